"""SmartMoE's online placement (ATC 2023): experts change places, none is replicated.

Before the gate, every ``interval`` steps, from the mean of recent loads
    Step 1  Greedy: swap an expert of the fullest device with one of the idlest, the pair that lowers the larger of the
            two loads most; repeat while it lowers the maximum, at most ``most`` times.
    Step 2  Switch only if the maximum falls by more than ``threshold``.
After the gate: every token goes to its expert; static replicas split evenly.

Published greedy, dynamic and hybrid searches over pools of plans; this is the greedy one. A switch's fetch is exposed.
Serving moves weights only; training moves optimizer states with them (the replay charges it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.methods.split import even_quota
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy


@dataclass(frozen=True, slots=True)
class SmartMoE(StepPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "smart-moe"
    summary: ClassVar[str] = "SmartMoE: swaps of owners every few steps"
    keeps: ClassVar[bool] = True
    keeps_in_training: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    interval: int = 10
    threshold: float = 0.05
    most: int = 64

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Steps 1 and 2."""
        if view.step == 0 or view.step % self.interval:
            return view.before_ED
        load_E = view.recent_HE.mean(axis=0) if len(view.recent_HE) else view.predicted_E
        held, speed = view.before_ED.copy(), view.price.cluster.speed_D
        each_E = load_E / held.sum(axis=1)
        first = float(((each_E[:, None] * held).sum(axis=0) / speed).max())
        for _ in range(self.most):
            load_D = (each_E[:, None] * held).sum(axis=0) / speed
            top, low = int(load_D.argmax()), int(load_D.argmin())
            give = np.flatnonzero(held[:, top] & ~held[:, low])
            take = np.flatnonzero(held[:, low] & ~held[:, top])
            if not (give.size and take.size):
                break
            moved = each_E[give][:, None] - each_E[take][None, :]
            after = np.maximum(load_D[top] - moved / speed[top], load_D[low] + moved / speed[low])
            i, j = np.unravel_index(int(after.argmin()), after.shape)
            if after[i, j] >= load_D[top] * (1 - 1e-9):
                break
            held[give[i], [top, low]] = False, True
            held[take[j], [low, top]] = False, True
        last = float(((each_E[:, None] * held).sum(axis=0) / speed).max())
        return held if last < first * (1.0 - self.threshold) else view.before_ED

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Every token to its expert."""
        return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), holders_ED))
