"""An all-to-all rank by rank: who is done when, if not all begin together. Finer than :mod:`poise.cost.links`.

An exchange of x[s, d] bytes that rank s begins at released[s] ends on rank r at

    start + max(released[r] + peer * posts[r],  every port that r's bytes pass is drained,  and crowding)

- A port drains in order: what is sent leaves from released[s] on; what arrives is taken sender by sender, as they
  begin. The bytes of one sender share its port evenly, so that a short message is out before a long one.
- A port that was idle has *credit*, seconds worth of bytes that pass at once: the bucket of an emulated port is full,
  and its last segment is on its way as soon as it may leave.
- Messages to further peers are posted while the first ones travel: the two overlap.
- *Crowding*. Where both ends of all flows are full, a port idles now and then because its partner is busy with
  somebody else, and that is not made up for: about a receive window is lost. A hot port never idles, its senders
  queue. So the loss is counted as bytes, ``crowding_bytes`` at most and a quarter of the exchange at most, times the
  evenness of the ports: mean over fullest. It counts from when ranks begin on average: who begins later than the
  others finds ports that they have left.

:func:`poise.lab.calibrate.exchange.fit_exchange` measures the constants.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from poise.machine.cluster import Cluster, same_node
from poise.util.errors import ClusterError

RAMP = 4.0
"""An exchange loses at most its bytes over this to crowding."""


@dataclass(frozen=True, slots=True)
class ExchangeModel:
    """Constants of an exchange.

    Parameters
    ----------
    start_s : seconds that every exchange takes at least.
    peer_s : seconds to post one peer's messages.
    intra_bytes_per_s, inter_bytes_per_s : of a device's ports.
    crowding_bytes : most that is lost where all ports are equally full.
    intra_credit_s, inter_credit_s : what a port gains if it was idle.

    Raises
    ------
    ClusterError : a rate is not above 0, or another constant is negative.
    """

    start_s: float
    peer_s: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    crowding_bytes: float = 0.0
    intra_credit_s: float = 0.0
    inter_credit_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and (value > 0 or (value == 0 and not name.endswith("_per_s")))):
                raise ClusterError(f"{name} of an exchange is {value!r}")

    @classmethod
    def of(cls, cluster: Cluster) -> ExchangeModel:
        """What a cluster's constants say: nothing is crowded."""
        start = cluster.intra_latency_s + (cluster.inter_latency_s if cluster.num_nodes > 1 else 0.0)
        return cls(start, cluster.peer_latency_s, cluster.intra_bytes_per_s, cluster.inter_bytes_per_s)


def evenness(bytes_DD: NDArray[np.float64]) -> float:
    """Mean over fullest port, in or out; 0 without bytes."""
    fullest = max(bytes_DD.sum(axis=0).max(), bytes_DD.sum(axis=1).max())
    return float(bytes_DD.sum() / len(bytes_DD) / fullest) if fullest > 0 else 0.0


def exchange_ends(
    bytes_DD: NDArray[np.float64],
    released_D: NDArray[np.float64],
    node_D: NDArray[np.int32],
    model: ExchangeModel,
    beside_DD: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """When every rank is done with an exchange, float64 [D].

    Parameters
    ----------
    bytes_DD : float64 [D, D], from rank to rank; what stays passes no port.
    released_D : float64 [D], when a rank begins.
    node_D : node of each rank.
    model : constants.
    beside_DD : other bytes that leave at the same times over the same ports (weights fetched after the gate).
    """
    elsewhere = ~np.eye(len(node_D), dtype=bool)
    tokens_DD = bytes_DD * elsewhere
    all_DD = tokens_DD if beside_DD is None else tokens_DD + beside_DD * elsewhere
    if not all_DD.any():
        return released_D.copy()
    posts_D = ((tokens_DD > 0).sum(axis=0) + (tokens_DD > 0).sum(axis=1)) / 2
    heard_D = np.where(all_DD > 0, released_D[:, None], -np.inf).max(axis=0)  # nothing arrives before it is sent
    end_D = np.maximum(released_D + model.peer_s * posts_D, heard_D)
    same_DD = same_node(node_D)
    for part_DD, rate, credit_s in (
        (all_DD * same_DD, model.intra_bytes_per_s, model.intra_credit_s),
        (all_DD * ~same_DD, model.inter_bytes_per_s, model.inter_credit_s),
    ):
        if part_DD.any():
            end_D = np.maximum(end_D, _drained(part_DD, released_D, rate, model.crowding_bytes) - credit_s)
    out: NDArray[np.float64] = model.start_s + end_D
    return out


def _drained(
    bytes_DD: NDArray[np.float64], released_D: NDArray[np.float64], rate: float, crowding: float
) -> NDArray[np.float64]:
    """When the ports of one class have passed all of each rank's bytes; -inf for a rank without."""
    out_D, in_D = bytes_DD.sum(axis=1), bytes_DD.sum(axis=0)
    fullest = max(out_D.max(), in_D.max())
    lost_s = evenness(bytes_DD) * min(crowding, fullest / RAMP) / rate
    end_D = np.where(out_D > 0, released_D + out_D / rate, -np.inf)
    order = np.argsort(released_D, kind="stable")
    for rank in np.flatnonzero(in_D > 0):
        now = left = -np.inf
        for source in order[bytes_DD[order, rank] > 0]:
            own = bytes_DD[source, rank]
            left = max(left, released_D[source] + np.minimum(bytes_DD[source], own).sum() / rate)
            now = max(now, released_D[source]) + own / rate
        end_D[rank] = max(end_D[rank], now, left)
    most_D = np.maximum(out_D, in_D)
    together_s = float(released_D[most_D > 0].mean())
    begin_D = np.minimum(together_s, end_D - most_D / rate)
    ends: NDArray[np.float64] = np.maximum(end_D, begin_D + most_D / rate + lost_s * most_D / fullest)
    return np.where(most_D > 0, ends, -np.inf)
