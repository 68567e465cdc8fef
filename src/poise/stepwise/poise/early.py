"""Compiled parts of ``recorded``: replicas for loads that are known before the gate, one more or one less at a time.

Starts from a plan of :mod:`poise.stepwise.poise.gathers`, which was searched for on a grid and has spare replicas
against what a prediction misses.

Step 1  Replicas without tokens go: what is known needs no spare.
Step 2  Of a replica more for the fullest device, one more where a node sends most tokens away, and one less (the one
        with fewest tokens, anywhere and on the device that gathers most), whatever lowers the modelled time most: the
        layer, and what its gathers before the gate expose.
Step 3  Until nothing gains, or a number of changes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import exposed_seconds, gather_seconds
from poise.stepwise.poise.gathers import GatherPlan, OwnedLayer, free_slots, replica_in_short_node, replica_of_fullest
from poise.stepwise.poise.node_split import best_quotas
from poise.util.compiled import compiled

LEAST_GAIN = 1e-4
"""Least gain of a change, as a share of the layer."""


@compiled
def priced(layer: OwnedLayer, holders_ED: NDArray[np.bool_]) -> GatherPlan:
    """The fastest split over holders, bool [E, D]; seconds with what their gather exposes."""
    seconds, quota_ED = best_quotas(layer.sources, holders_ED, layer.price.machine)
    gather = gather_seconds(layer.owned_ED, holders_ED & ~layer.owned_ED, layer.price)
    return GatherPlan(seconds + exposed_seconds(gather, 0.0, layer.price), holders_ED, quota_ED)


@compiled
def _least(plan: GatherPlan, owned_ED: NDArray[np.bool_], only: int) -> tuple[int, int]:
    """The replica with fewest tokens, on one device or (-1) on any; an expert of -1: none."""
    expert, device = -1, -1
    for d in range(owned_ED.shape[1]):
        if only >= 0 and d != only:
            continue
        for e in range(owned_ED.shape[0]):
            if plan.holders_ED[e, d] and not owned_ED[e, d]:
                if expert < 0 or plan.quota_ED[e, d] < plan.quota_ED[expert, device]:
                    expert, device = e, d
    return expert, device


@compiled(nogil=True)
def improved(layer: OwnedLayer, start_ED: NDArray[np.bool_], most: int) -> GatherPlan:
    """Steps 1 to 3 from holders bool [E, D], at most so many changes; loads of ``layer`` are exact."""
    owned_ED = layer.owned_ED
    best = priced(layer, start_ED)
    best = priced(layer, owned_ED | (start_ED & (best.quota_ED > 0)))
    for _ in range(most):
        free_D = free_slots(layer, best.holders_ED)
        chosen = best
        for kind in range(4):
            if kind == 0:
                e, d = replica_of_fullest(layer, best, free_D)
            elif kind == 1:
                e, d = replica_in_short_node(layer, best, free_D)
            elif kind == 2:
                e, d = _least(best, owned_ED, -1)
            else:
                e, d = _least(best, owned_ED, int(np.argmin(free_D)))
            if e < 0:
                continue
            other_ED = best.holders_ED.copy()
            other_ED[e, d] = kind < 2
            tried = priced(layer, other_ED)
            if tried.seconds < chosen.seconds:
                chosen = tried
        if chosen.seconds >= best.seconds * (1.0 - LEAST_GAIN):
            break
        best = chosen
    return GatherPlan(best.seconds, owned_ED | (best.holders_ED & (best.quota_ED > 0)), best.quota_ED)
