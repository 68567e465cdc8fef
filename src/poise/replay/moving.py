"""What it takes to go from one placement to another: who fetches which expert from whom, and how long links need.

All fetches at once, in the background, each once over its link. :mod:`poise.control.moves` makes of it the rounds that
keep serving correct with few buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.transfers import Transfer, TransferPlan
from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.util.errors import PlacementError


@dataclass(frozen=True, slots=True, eq=False)
class Moving:
    """Experts that arrive and leave; slots may be renumbered inside a device for nothing.

    Parameters
    ----------
    arrive_LD, leave_LD : int64 [L, D], experts that each device must fetch, and those it gives up; D devices in all,
        those that join or leave included.
    transfers : of each layer, who sends what to whom.
    layer_ids_L : int32 [L], decoder layers.
    reads_LED : bool [L, E, D], arrivals that nobody can send: they are read from the checkpoint.
    """

    arrive_LD: NDArray[np.int64]
    leave_LD: NDArray[np.int64]
    transfers: tuple[tuple[Transfer, ...], ...]
    layer_ids_L: NDArray[np.int32]
    reads_LED: NDArray[np.bool_]

    @property
    def fetched(self) -> int:
        """Experts to fetch in all, those that are read included."""
        return int(self.arrive_LD.sum())

    @property
    def read(self) -> int:
        """Experts to read from the checkpoint."""
        return int(self.reads_LED.sum())

    @property
    def dropped(self) -> int:
        """Experts given up in all."""
        return int(self.leave_LD.sum())

    @property
    def plan(self) -> TransferPlan:
        """All fetches in one round."""
        every = tuple(move for layer in self.transfers for move in layer)
        return TransferPlan((every,) if every else (), "direct")

    def links_DD(self) -> NDArray[np.int64]:
        """Experts from each device to each other, int64 [D, D]."""
        return self.plan.links_DD(self.arrive_LD.shape[1])

    def by_link(self, cluster: Cluster) -> tuple[int, int]:
        """Experts that move inside their node, and over the network."""
        links_DD = self.links_DD()
        near = int(links_DD[cluster.same_node_DD].sum())
        return near, self.fetched - self.read - near

    def seconds(self, cluster: Cluster, expert_bytes: float) -> float:
        """Seconds of the fullest port if links do nothing else, with one start-up; 0 if nothing moves."""
        return float(self.plan.seconds(cluster, expert_bytes))

    def most(self, count: int) -> list[int]:
        """Layers, by index, in which most experts arrive, most first; those without are left out."""
        arrive_L = self.arrive_LD.sum(axis=1)
        return [int(layer) for layer in np.argsort(-arrive_L, kind="stable")[:count] if arrive_L[layer] > 0]


def moving(
    before: Placement, after: Placement, node_D: NDArray[Any] | None = None, *, lost: Sequence[int] = ()
) -> Moving:  # fmt: skip
    """Fetches from one placement to another, a sender for each.

    A sender holds the expert before. One of the receiver's own node is preferred, then one that stays, then the one
    that has sent least; experts with the fewest holders choose first. Devices keep their numbers. One with slots before
    and none after leaves: until then it can send.

    Parameters
    ----------
    node_D : int [D], node of each of the devices of the larger placement; None: all are alike.
    lost : devices that are gone with what they held; what nobody else holds is read from the checkpoint.

    Raises
    ------
    PlacementError : the placements are not of one model: layers or experts differ.
    """
    before.diff(after)
    devices = max(before.num_devices, after.num_devices)
    before, after = before.on_devices(devices), after.on_devices(devices)
    ids, others = before.layer_ids_L, after.layer_ids_L
    if (ids != others).any():
        at = int(np.argmax(ids != others))
        raise PlacementError(
            f"placements of different decoder layers cannot be compared: MoE layer {at} is decoder layer {ids[at]} "
            f"in one and {others[at]} in the other",
            hint="are both of one model?",
        )
    node = np.zeros(devices, np.int64) if node_D is None else np.asarray(node_D)
    if node.shape != (devices,):
        raise PlacementError(f"the cluster has {node.size} devices, the placements have {devices}")
    have_LED, want_LED = before.count_LED() > 0, after.count_LED() > 0
    sends_LED = have_LED.copy()
    sends_LED[:, :, list(lost)] = False
    arrive_LED, leaves_D = want_LED & ~sends_LED, before.leaving_D(after)
    reads_LED = arrive_LED & ~sends_LED.any(axis=2, keepdims=True)
    sent_D = np.zeros(devices, np.int64)
    transfers = []
    for have_ED, arrive_ED in zip(sends_LED, arrive_LED & ~reads_LED, strict=True):
        todo = [(int(e), int(d)) for e, d in np.argwhere(arrive_ED)]
        copies_E = have_ED.sum(axis=1)
        chosen = []
        for e, d in sorted(todo, key=lambda pair: copies_E[pair[0]]):
            holders = np.flatnonzero(have_ED[e]).tolist()
            source = min(holders, key=lambda s: (node[s] != node[d], leaves_D[s], sent_D[s], s))
            sent_D[source] += 1
            chosen.append(Transfer(e, source, d))
        transfers.append(tuple(chosen))
    return Moving(arrive_LED.sum(axis=1), (have_LED & ~want_LED).sum(axis=1), tuple(transfers), ids,
                  reads_LED)  # fmt: skip
