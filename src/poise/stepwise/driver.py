"""One layer's fast loop from step to step: what is held, what is on its way. Pure; the same on every rank.

Serving executes what this class decides; the replay of a fast loop prices it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import StepPrice, fetch_seconds
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy
from poise.util.errors import PlacementError

RECENT = 8
"""Most recent steps that a policy may look at beside the prediction."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a step of one layer does.

    Parameters
    ----------
    plan : holders and token split.
    early_s, late_s : modelled seconds of the fetches before and after the gate.
    started_ED, landed_ED : bool [E, D], background fetches that start with this step, and that serve from the next
        step on; None: none.
    """

    plan: StepPlan
    early_s: float
    late_s: float
    started_ED: NDArray[np.bool_] | None = None
    landed_ED: NDArray[np.bool_] | None = None


class LayerLoop:
    """Holders that live from step to step, and background fetches.

    Parameters
    ----------
    policy, price, step_slots, layer : see :class:`poise.stepwise.protocol.LayerView`.
    static_ED : bool [E, D], the slow loop's placement.
    """

    def __init__(
        self, policy: StepPolicy, price: StepPrice, static_ED: NDArray[np.bool_], *, step_slots: int, layer: int
    ) -> None:
        self.policy, self.price, self.static_ED = policy, price, static_ED
        self.step_slots, self.layer = step_slots, layer
        self.held_ED, self.coming_ED = static_ED.copy(), np.zeros_like(static_ED)
        self._left_s = 0.0

    def begin(
        self, step: int, predicted_E: NDArray[np.float64], recent_HE: NDArray[np.float64]
    ) -> tuple[LayerView, NDArray[np.bool_]]:
        """What the policy sees, and the holders it wants before the gate, bool [E, D]."""
        view = LayerView(
            self.static_ED, self.held_ED.copy(), predicted_E, recent_HE, self.coming_ED.copy(), self.step_slots, step,
            self.layer, self.price,
        )  # fmt: skip
        return view, self.policy.before_gate(view)

    def finish(self, view: LayerView, early_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> Outcome:
        """The plan from exact loads int64 [D, E], and what happens in the background.

        Raises
        ------
        PlacementError : a plan or a background fetch breaks an invariant.
        """
        policy, price = self.policy, self.price
        plan = policy.after_gate(view, early_ED, load_SE)
        plan.check(view, load_SE, unbounded=getattr(policy, "unbounded", False))
        early_s = fetch_seconds(view.before_ED, early_ED & ~view.before_ED, price)
        late_s = fetch_seconds(early_ED, plan.holders_ED & ~early_ED, price)
        if not policy.keeps:
            return Outcome(plan, early_s, late_s)
        self.held_ED = plan.holders_ED.copy()
        return self._background(view, plan, early_s, late_s)

    def _background(self, view: LayerView, plan: StepPlan, early_s: float, late_s: float) -> Outcome:
        """Go on with what is on its way, or start what the policy asks for."""
        started = None
        if not self.coming_ED.any():
            fetch = self.policy.in_background(view, plan.holders_ED)
            if fetch is None:
                return Outcome(plan, early_s, late_s)
            started = fetch.coming_ED
            self._left_s = fetch_seconds(self.held_ED, started, self.price)
            self.coming_ED = started.copy()
            self.held_ED &= ~fetch.dropped_ED
            used_D = (self.held_ED | started).sum(axis=0)
            if (used_D > view.slots_D).any() or not self.held_ED.any(axis=1).all():
                raise PlacementError(
                    f"layer {self.layer}: a background fetch fills {used_D.max()} slots or drops the last copy"
                )
        self._left_s -= max(0.0, self.price.window_s - early_s)
        landed = None
        if self._left_s <= 0:
            landed = self.coming_ED
            self.held_ED = self.held_ED | landed
            self.coming_ED = np.zeros_like(landed)
        return Outcome(plan, early_s, late_s, started, landed)
