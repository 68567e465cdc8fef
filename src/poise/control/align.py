"""Devices of a plan renumbered so that least is fetched."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from poise.machine.cluster import Cluster
from poise.planning.placement import Placement


def aligned(before: Placement, after: Placement, cluster: Cluster, *, whole: bool) -> Placement:
    """``after`` with interchangeable devices renumbered so that least is fetched coming from ``before``.

    Devices of one node are interchangeable where speed and slots are equal, nodes where their devices are, in order.
    ``whole`` renumbers all layers alike, which linked layers (``stay``) need; else each layer has its own numbering.
    """
    slots_D = after.slots_D
    have, want = before.count_LED() > 0, after.count_LED()
    shared_LDD = np.einsum("lea,leb->lab", have.astype(np.float32), (want > 0).astype(np.float32))
    kind_D = list(zip(cluster.speed_D.tolist(), slots_D.tolist(), strict=True))
    inside = [np.flatnonzero(cluster.node_D == node) for node in range(cluster.num_nodes)]
    for layers in [slice(None)] if whole else [slice(at, at + 1) for at in range(after.num_layers)]:
        shared = shared_LDD[layers].sum(axis=0)
        to_node = np.full((cluster.num_nodes,) * 2, -np.inf)
        best: dict[tuple[int, int], NDArray[Any]] = {}
        for a, mine in enumerate(inside):
            for b, theirs in enumerate(inside):
                if [kind_D[d] for d in mine] == [kind_D[d] for d in theirs]:
                    value = shared[np.ix_(mine, theirs)].astype(np.float64)
                    same = np.array([[kind_D[x] == kind_D[y] for y in theirs] for x in mine])
                    _, column = linear_sum_assignment(np.where(same, -value, 1e9))
                    best[a, b] = theirs[column]
                    to_node[a, b] = value[np.arange(mine.size), column].sum()
        _, node = linear_sum_assignment(np.where(np.isfinite(to_node), -to_node, 1e12))
        source = np.concatenate([best[a, int(b)] for a, b in enumerate(node)])
        want[layers] = want[layers][:, :, source]
    return Placement.from_counts(want, slots_D=slots_D, layer_ids_L=after.layer_ids_L, method=after.method)
