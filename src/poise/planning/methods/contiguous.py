"""Contiguous expert parallelism: the layout every engine starts from.

Step 1  experts in ascending order fill the devices in order, each device as many as its share of the slots.
Step 2  redundant slots hold experts 0, 1, 2, ... again (SGLang's trivial map: physical p holds logical p mod E).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem, Progress


def spread(sequence: NDArray[Any], slots_D: NDArray[Any], num_experts: int) -> NDArray[np.int32]:
    """Deal a sequence of experts to devices in order, int32 [E, D] of 0 and 1.

    An expert that its device already holds goes to the next device with a free slot that has none of it; a redundant
    one that fits nowhere is left out.
    """
    count = np.zeros((num_experts, len(slots_D)), np.int32)
    free = np.asarray(slots_D, dtype=np.int64).copy()
    device = 0
    for expert in sequence:
        while device < len(free) - 1 and free[device] == 0:
            device += 1
        order = np.roll(np.arange(len(free)), -device)
        fits = order[(free[order] > 0) & (count[expert, order] == 0)]
        if fits.size:
            count[expert, fits[0]] = 1
            free[fits[0]] -= 1
    return count


def plan(
    problem: PlacementProblem, *, time_limit_s: float, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """Contiguous blocks of experts; without redundant slots the blocks are as even as the slots allow."""
    experts, slots = problem.batch.num_experts, np.asarray(problem.slots_D)
    if problem.pooled or slots.sum() > 2 * experts:
        slots = np.minimum(slots, experts)
    sequence = np.arange(max(experts, int(slots.sum()))) % experts
    count = spread(sequence[: max(experts, int(slots.sum()))], slots, experts)
    counts = np.repeat(count[None], problem.batch.num_layers, axis=0)
    return MethodResult(
        Placement.from_counts(
            counts, slots_D=None if problem.pooled else problem.slots_D, layer_ids_L=problem.batch.layer_ids_L,
            method="contiguous",
        )
    )  # fmt: skip
