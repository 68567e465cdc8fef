"""Full replication (FSDP): every expert on every device before the gate; no token travels.

Step 1  Before the gate all experts that a device lacks are gathered.
Step 2  Every token is computed at home; nothing is exchanged.

It needs E slots a device and takes no notice of the step slots: a reference, not a rival at the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy


@dataclass(frozen=True, slots=True)
class FullReplication(StepPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "full-replication"
    summary: ClassVar[str] = "FSDP: all experts everywhere, more memory than the others"
    exact: ClassVar[bool] = False
    unbounded: ClassVar[bool] = True

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Step 1."""
        return np.ones_like(view.static_ED)

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Step 2."""
        devices = len(load_SE)
        rows = np.zeros((devices, *holders_ED.shape), np.int64)
        rows[np.arange(devices), :, np.arange(devices)] = load_SE
        return StepPlan(holders_ED, load_SE.T.copy(), rows)
