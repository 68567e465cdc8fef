"""Round robin (vLLM's ``--expert-placement-strategy round_robin``): expert e on device e mod D.

Step 1  experts in ascending order are dealt to the devices in turn, passing over full ones.
Step 2  (our extension: the engine has none here) redundant slots are filled by dealing on with experts 0, 1, 2, ...
"""

from __future__ import annotations

from poise.planning.budget import Limit
from poise.planning.methods.contiguous import deal, place_alike
from poise.planning.problem import MethodResult, PlacementProblem, Progress


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """Experts dealt to devices in turn, the same in every layer; load, time limit and seed play no part."""
    return place_alike(problem, deal(problem.batch.num_experts, problem.slots_D, in_turn=True), "round-robin")
