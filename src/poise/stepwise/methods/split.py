"""``split``: the static placement, and the tokens of its replicas split exactly once the loads are known.

Integer quotas that minimise the fullest device (:mod:`poise.cost.quota`), started from every token on its own device;
then own device, own node, remote for every source (:mod:`poise.cost.route`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.cost.quota import Holders, QuotaProblem, Scratch, balance, make_holders, make_scratch, near_start
from poise.cost.split import NONE
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy


def exact_split(
    load_SE: NDArray[np.int64],
    holders_ED: NDArray[np.bool_],
    speed_D: NDArray[np.float64],
    *,
    node_D: NDArray[np.int64] | None = None,
    slack: float = 0.0,
    ready: tuple[Holders, Scratch] | None = None,
) -> NDArray[np.int64]:
    """Quotas, int64 [E, D]: tokens on their own device, then node, where that costs the maximum at most ``slack``.

    Without ``node_D`` (int64 [D]) every device is a node of its own.
    """
    holders, scratch = ready or (make_holders(holders_ED), make_scratch(*holders_ED.shape))
    load_E = load_SE.sum(axis=0)
    local_H = np.zeros(holders.device_H.size, np.int64)
    near_start(load_SE, holders, np.arange(len(speed_D)) if node_D is None else node_D, local_H)
    quota_H = np.zeros(holders.device_H.size, np.int64)
    speed = np.array(speed_D, dtype=np.float64)  # of its own: to numba an array that may not be written is another type
    balance(QuotaProblem(load_E, speed, local_H, NONE, slack), holders, quota_H, scratch)
    out = np.zeros(holders_ED.shape, np.int64)
    out[holders.expert_H, holders.device_H] = quota_H
    return out


def even_quota(load_E: NDArray[np.int64], holders_ED: NDArray[Any]) -> NDArray[np.int64]:
    """Tokens dealt in turn over the holders, int64 [E, D]; what is left goes to the first ones."""
    holds = np.asarray(holders_ED) > 0
    base, rest = np.divmod(load_E, np.maximum(holds.sum(axis=1), 1))
    out: NDArray[np.int64] = np.where(holds, base[:, None] + (np.cumsum(holds, axis=1) <= rest[:, None]), 0)
    return out


def spread_evenly(load_E: NDArray[np.int64], num_devices: int) -> NDArray[np.int64]:
    """Tokens of each expert dealt over the sources, int64 [D, E]; what does not divide is dealt on in turn."""
    whole, rest = np.divmod(load_E, num_devices)
    first = (np.cumsum(rest) - rest)[None, :]
    out: NDArray[np.int64] = whole + ((np.arange(num_devices)[:, None] - first) % num_devices < rest)
    return out


@dataclass(frozen=True, slots=True)
class ExactSplit(StepPolicy):
    """Exact split over the static placement; no weight moves.

    Parameters
    ----------
    slack : the fullest device may exceed the least maximum by this share to keep tokens on their device.
    """

    name: ClassVar[str] = "split"
    summary: ClassVar[str] = "exact token split over the static placement"
    exact: ClassVar[bool] = True
    slack: float = 0.0

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Exact quotas."""
        nodes = view.price.cluster.node_D.astype(np.int64)
        return StepPlan(
            holders_ED, exact_split(load_SE, holders_ED, view.price.cluster.speed_D, node_D=nodes, slack=self.slack)
        )
