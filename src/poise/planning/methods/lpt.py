"""Longest processing time first (Graham 1969), per layer, on the expected load.

Step 1  (our extension) redundant slots: one replica at a time to the expert with the largest load / replicas.
Step 2  replicas in descending load; each goes to the device with the least load / speed that has a free slot and
        none of this expert.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from poise.cost.entries import HeldEntries, LayerEntries
from poise.planning.budget import Limit
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.util.compiled import compiled


def replicate(load_E: NDArray[np.float64], extra: int, most: int) -> NDArray[np.int64]:
    """Replicas of each expert, int [E]: ``extra`` more, each to the largest load / replicas, at most ``most`` each."""
    replicas = np.ones(len(load_E), np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    while extra and heap:
        _, expert = heapq.heappop(heap)
        if replicas[expert] == most:
            continue
        replicas[expert] += 1
        extra -= 1
        heapq.heappush(heap, (-float(load_E[expert]) / replicas[expert], expert))
    return replicas


@compiled(nogil=True)
def _pack(each_E, replicas_E, order, free_D, speed_D):  # type: ignore[no-untyped-def]
    """Step 2; ``free_D`` int64 [D] is used up."""
    devices = free_D.size
    count = np.zeros((each_E.size, devices), np.int32)
    load_D = np.zeros(devices)
    for expert in order:
        for _ in range(replicas_E[expert]):
            best, least = -1, np.inf
            for d in range(devices):
                if free_D[d] > 0 and count[expert, d] == 0:
                    level = (load_D[d] + each_E[expert]) / speed_D[d]
                    if best < 0 or level < least:
                        best, least = d, level
            if best >= 0:
                count[expert, best] = 1
                free_D[best] -= 1
                load_D[best] += each_E[expert]
    return count


def pack(
    load_E: NDArray[np.float64], replicas_E: NDArray[np.int64], slots_D: NDArray[np.int64], speed_D: NDArray[np.float64]
) -> NDArray[np.int32]:
    """Capacity-constrained LPT, int32 [E, D] of 0 and 1; a replica that fits nowhere is left out."""
    each = np.asarray(load_E / replicas_E, dtype=np.float64)
    order, free = np.argsort(-each, kind="stable"), np.array(slots_D, dtype=np.int64)
    speed = np.array(speed_D, np.float64)  # not one that is read-only: that would be compiled apart
    out: NDArray[np.int32] = _pack(each, np.asarray(replicas_E, np.int64), order, free, speed)
    return out


def pack_all(
    load_E: NDArray[np.float64], slots_D: NDArray[np.int64], speed_D: NDArray[np.float64]
) -> NDArray[np.int32]:
    """Replicas for all slots, packed, int32 [E, D]; with fewer replicas where they would crowd an expert out."""
    spare = int(slots_D.sum()) - len(load_E)
    while True:
        count = pack(load_E, replicate(load_E, spare, len(slots_D)), slots_D, speed_D)
        if (count.sum(axis=1) > 0).all():
            return count
        spare //= 2


def pack_layers(
    load_LE: NDArray[np.float64], slots_D: NDArray[np.int64], speed_D: NDArray[np.float64]
) -> HeldEntries:  # fmt: skip
    """:func:`pack_all` of every layer."""
    return HeldEntries.of_layers(LayerEntries.of_counts(pack_all(load_E, slots_D, speed_D)) for load_E in load_LE)


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """LPT per layer with greedily replicated experts."""
    slots_D = np.minimum(problem.slots_D, problem.batch.num_experts)
    held = pack_layers(problem.batch.load_LE(), slots_D, problem.cluster.speed_D)
    return MethodResult(problem.placed(held, "lpt"))
