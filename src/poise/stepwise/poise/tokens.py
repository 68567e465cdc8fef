"""``poise`` with ``objective=tokens``, in serving and in training: as even a split of tokens as the slots allow.

Nothing is priced: every replica that helps is fetched, whatever it costs.

Before the gate, from predicted loads
    Step 1  Surplus fill of tokens (:mod:`poise.stepwise.poise.surplus`).
    Step 2  Slots still free get the experts with most tokens a holder, as slack for what the prediction misses.
After the gate, from exact loads
    Step 3  The exact split; tokens stay on their device, then in their node, where that costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.methods.split import ExactSplit
from poise.stepwise.poise.surplus import fill_free_slots, surplus_fill
from poise.stepwise.poise.workspace import desk_of
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy


@dataclass(frozen=True, slots=True)
class PoiseTokens(StepPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "poise"
    summary: ClassVar[str] = "predicted replicas, exact split after the gate, whatever it costs"
    keeps: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Steps 1 and 2."""
        load_E = view.predicted_E

        def tokens_a_holder(held_ED: NDArray[np.bool_], device: int) -> NDArray[np.float64]:
            return load_E / held_ED.sum(axis=1)

        filled_ED = surplus_fill(view, view.before_ED, load_E, desk_of(view))[-1]
        return fill_free_slots(filled_ED, view.slots_D, tokens_a_holder)[-1]

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Step 3."""
        return ExactSplit().after_gate(view, holders_ED, load_SE)
