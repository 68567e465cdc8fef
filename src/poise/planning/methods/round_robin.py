"""Round robin (vLLM's ``--expert-placement-strategy round_robin``): expert e on device e mod D.

Step 1  experts in ascending order are dealt to the devices in turn, passing over full ones.
Step 2  redundant slots are filled by dealing on with experts 0, 1, 2, ...
"""

from __future__ import annotations

import numpy as np

from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem, Progress


def plan(
    problem: PlacementProblem, *, time_limit_s: float, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """Experts dealt to devices in turn, the same in every layer."""
    experts, devices = problem.batch.num_experts, problem.num_devices
    free = np.minimum(problem.slots_D, experts).astype(np.int64)
    count = np.zeros((experts, devices), np.int32)
    turn = 0
    for index in range(int(free.sum())):
        expert = index % experts
        order = (turn + np.arange(devices)) % devices
        fits = order[(free[order] > 0) & (count[expert, order] == 0)]
        if fits.size:
            count[expert, fits[0]] = 1
            free[fits[0]] -= 1
            turn = int(fits[0]) + 1
    counts = np.repeat(count[None], problem.batch.num_layers, axis=0)
    return MethodResult(
        Placement.from_counts(
            counts, slots_D=None if problem.pooled else problem.slots_D, layer_ids_L=problem.batch.layer_ids_L,
            method="round-robin",
        )
    )  # fmt: skip
