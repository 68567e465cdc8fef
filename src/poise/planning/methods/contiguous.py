"""Contiguous expert parallelism: the layout every engine starts from.

Step 1  experts in ascending order fill the devices in order, each device all its slots.
Step 2  redundant slots hold experts 0, 1, 2, ... again (SGLang's trivial map: physical p holds logical p mod E).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.entries import HeldEntries, LayerEntries
from poise.planning.budget import Limit
from poise.planning.problem import MethodResult, PlacementProblem, Progress


def deal(num_experts: int, slots_D: NDArray[Any], *, in_turn: bool) -> NDArray[np.int32]:
    """Deal experts 0, 1, ..., E - 1, 0, 1, ... until the slots are full, int32 [E, D] of 0 and 1.

    ``in_turn`` gives every card to the next device, else a device is filled before the next one gets any. An expert
    that its device already holds goes to the next device with a free slot and none of it; a redundant one that fits
    nowhere is passed over. ``slots_D`` must sum to E or more.
    """
    devices = len(slots_D)
    free = np.minimum(slots_D, num_experts).astype(np.int64)
    count = np.zeros((num_experts, devices), np.int32)
    next_device = expert = passed = 0
    while free.any() and passed < num_experts:
        order = (next_device + np.arange(devices)) % devices
        fits = order[(free[order] > 0) & (count[expert, order] == 0)]
        passed = 0 if fits.size else passed + 1
        if fits.size:
            count[expert, fits[0]] = 1
            free[fits[0]] -= 1
            if in_turn:
                next_device = int(fits[0]) + 1
        while not in_turn and next_device < devices - 1 and free[next_device] == 0:
            next_device += 1
        expert = (expert + 1) % num_experts
    return count


def place_alike(problem: PlacementProblem, count_ED: NDArray[np.int32], name: str) -> MethodResult:
    """The same layout in every layer."""
    held = HeldEntries.of_layers([LayerEntries.of_counts(count_ED)] * problem.batch.num_layers)
    return MethodResult(problem.placed(held, name))


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """Contiguous blocks of experts, the same in every layer; load, time limit and seed play no part."""
    return place_alike(problem, deal(problem.batch.num_experts, problem.slots_D, in_turn=False), "contiguous")
