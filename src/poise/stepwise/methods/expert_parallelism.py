"""Expert parallelism: no step replicas; every token goes to the owner of its expert.

Step 1  Nothing moves before the gate.
Step 2  A token's expert is computed where it lies; tokens of an expert with static replicas are dealt evenly over
        them. No counts are exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.methods.split import even_quota
from poise.stepwise.protocol import Fetch, LayerView, StepPlan


@dataclass(frozen=True, slots=True)
class ExpertParallelism:
    """See the module docstring."""

    name: ClassVar[str] = "expert-parallelism"
    summary: ClassVar[str] = "plain expert parallelism: tokens go to the owner, nothing moves"
    keeps: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    grid: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Step 1."""
        return view.before_ED

    def in_background(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> Fetch | None:
        """Nothing."""
        return None

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Step 2."""
        return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), holders_ED))
