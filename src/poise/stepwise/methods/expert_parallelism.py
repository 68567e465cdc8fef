"""Expert parallelism: no step replicas; every token goes to the owner of its expert.

Step 1  Nothing moves before the gate.
Step 2  A token's expert is computed where it lies; tokens of an expert with static replicas are dealt evenly over
        them. No counts are exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.methods.split import even_quota
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy


@dataclass(frozen=True, slots=True)
class ExpertParallelism(StepPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "expert-parallelism"
    summary: ClassVar[str] = "plain expert parallelism: tokens go to the owner, nothing moves"
    exact: ClassVar[bool] = False

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Step 2."""
        return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), holders_ED))
