"""The driver of one layer's policy from step to step. Pure; the same on every rank.

All that runs a policy runs it through this class: the replays of serving and of training, the simulation of serving,
and serving and training on ranks. The replays price what it decides, the ranks execute it. A step of a layer is

1. :meth:`LayerDriver.view`: what the policy may look at, with a predicted load (:meth:`LayerDriver.predict`);
2. :meth:`LayerDriver.choose`: the holders before the gate;
3. :meth:`LayerDriver.finish`: the plan from exact loads, checked; what is kept, and what goes on in the background.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import StepPrice, fetch_seconds
from poise.routing.predict import WINDOW, mean_share
from poise.stepwise.beside import BesidePlanner
from poise.stepwise.protocol import Foreseen, LayerView, StepPlan, StepPolicy
from poise.util.errors import PlacementError


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a step of one layer does.

    Parameters
    ----------
    view : what the policy saw.
    early_ED : bool [E, D], the holders before the gate.
    plan : holders and token split.
    control_s : seconds of the exchange of counts, of planning and of synchronisation; 0 where nobody waits for counts.
    started_ED, landed_ED : bool [E, D], background fetches that start with this step, and that serve from the next
        step on; None: none.
    """

    view: LayerView
    early_ED: NDArray[np.bool_]
    plan: StepPlan
    control_s: float
    started_ED: NDArray[np.bool_] | None = None
    landed_ED: NDArray[np.bool_] | None = None

    @cached_property
    def early_s(self) -> float:
        """Modelled seconds of the fetches before the gate."""
        return _early_seconds(self.view, self.early_ED)

    @cached_property
    def late_s(self) -> float:
        """Modelled seconds of the fetches after the gate."""
        return fetch_seconds(self.early_ED, self.plan.holders_ED & ~self.early_ED, self.view.price)

    @property
    def fetched(self) -> int:
        """Replicas whose fetch begins in this step: before the gate, after it and in the background."""
        early = (self.early_ED & ~self.view.before_ED).sum() + (self.plan.holders_ED & ~self.early_ED).sum()
        return int(early) + (0 if self.started_ED is None else int(self.started_ED.sum()))


class LayerDriver:
    """One layer's policy, the holders that live from step to step, and background fetches.

    Parameters
    ----------
    policy : the method; nothing else calls it.
    static_ED : bool [E, D], the slow loop's placement, in training the owners. When it changes, a new driver begins.
    step_slots, layer : see :class:`poise.stepwise.protocol.LayerView`.
    window, prior_E : of :meth:`predict`: steps whose mean load is the prediction, and loads known before the first
        step, float64 [E] of any scale (None: all experts alike).
    """

    def __init__(
        self,
        policy: StepPolicy,
        static_ED: NDArray[np.bool_],
        *,
        step_slots: int,
        layer: int,
        window: int = WINDOW,
        prior_E: NDArray[np.float64] | None = None,
    ) -> None:
        self.policy, self.static_ED, self.step_slots, self.layer = policy, static_ED, step_slots, layer
        self.held_ED, self.coming_ED = static_ED.copy(), np.zeros_like(static_ED)
        self._window, self._prior_E = window, np.ones(len(static_ED)) if prior_E is None else prior_E
        self._left_s = 0.0
        self._planner = BesidePlanner(layer, len(static_ED))

    def predict(self, loads_HE: NDArray[np.float64], pairs: float) -> NDArray[np.float64]:
        """Predicted tokens of a step of so many pairs, float64 [E], from exact tokens of the steps before [H, E]."""
        return mean_share(loads_HE, self._window, self._prior_E) * pairs

    def view(
        self,
        step: int,
        predicted_E: NDArray[np.float64],
        loads_HE: NDArray[np.float64],
        price: StepPrice,
        foreseen: Foreseen | None = None,
    ) -> LayerView:
        """What the policy sees of a step.

        Parameters
        ----------
        step : number from 0.
        predicted_E : float64 [E], predicted tokens, of :meth:`predict` or of a predictor.
        loads_HE : float64 [H, E], exact tokens of the steps before, the newest last, as many as are known.
        price : machine, model, window and control time of this step.
        foreseen : what a record tells of this step.
        """
        view = LayerView(
            self.static_ED, self.held_ED.copy(), predicted_E, loads_HE[-self.policy.recent :], self.coming_ED.copy(),
            self.step_slots, step, self.layer, price, foreseen,
        )  # fmt: skip
        looks = None if price.training else self.policy.plans_beside(price, len(predicted_E), float(predicted_E.sum()))
        if looks is None:
            return view
        planner = self._planner
        planner.passes(step, looks, view.recent_HE, self.held_ED)
        return replace(view, seen_HE=planner.seen_HE, settled=planner.settled(self.held_ED))

    @property
    def chooses(self) -> bool:
        """Whether the policy has something to choose before the gate; else holders stay as they are."""
        return type(self.policy).before_gate is not StepPolicy.before_gate

    def choose(self, view: LayerView) -> NDArray[np.bool_]:
        """The holders that the policy wants before the gate, bool [E, D]. Any thread may call it."""
        return self.policy.before_gate(view)

    def needs_no_loads(self, view: LayerView, early_ED: NDArray[np.bool_]) -> bool:
        """Whether the plan will be passive whatever the exact loads are."""
        return self.policy.leaves_alone(view, early_ED)

    def unaided_row(
        self, view: LayerView, early_ED: NDArray[np.bool_], load_E: NDArray[np.int64], source: int
    ) -> NDArray[np.int64] | None:
        """Where a source sends its tokens int64 [E] in a passive plan, int64 [E, D]; None: the engine's even split."""
        load_SE = np.zeros((view.static_ED.shape[1], len(load_E)), np.int64)
        load_SE[source] = load_E
        rows_SED = self.policy.after_gate(view, early_ED, load_SE).rows_SED
        return None if rows_SED is None else rows_SED[source]

    def finish(
        self, view: LayerView, early_ED: NDArray[np.bool_], load_SE: NDArray[np.int64], *, keep: bool = True
    ) -> Outcome:
        """The plan from exact loads int64 [D, E], and what happens in the background.

        ``keep=False`` leaves no trace of the step in those to come: an evaluation between two steps of training.

        Raises
        ------
        PlacementError : a plan or a background fetch breaks an invariant.
        """
        policy, price = self.policy, view.price
        plan = policy.after_gate(view, early_ED, load_SE)
        plan.check(view, load_SE, unbounded=policy.unbounded)
        control_s = 0.0
        if policy.exact and not plan.passive:
            control_s = price.control_s
            if price.training:
                control_s += policy.training_plan_seconds(*view.static_ED.shape)
        if not keep or not (policy.keeps_in_training if price.training else policy.keeps):
            return Outcome(view, early_ED, plan, control_s)
        self.held_ED = plan.holders_ED.copy()
        if price.training:
            return Outcome(view, early_ED, plan, control_s)
        return Outcome(view, early_ED, plan, control_s, *self._background(view, early_ED, plan))

    def _background(
        self, view: LayerView, early_ED: NDArray[np.bool_], plan: StepPlan
    ) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
        """Go on with what is on its way, or start what the policy asks for; what starts, and what lands."""
        started = None
        if not self.coming_ED.any():
            fetch = self.policy.in_background(view, plan.holders_ED)
            if fetch is None:
                return None, None
            started = fetch.coming_ED
            self.coming_ED = started.copy()
            self.held_ED &= ~fetch.dropped_ED  # what is dropped sends nothing any more
            self._left_s = fetch_seconds(self.held_ED, started, view.price)
            used_D = (self.held_ED | started).sum(axis=0)
            if (used_D > view.slots_D).any() or not self.held_ED.any(axis=1).all():
                raise PlacementError(
                    f"layer {self.layer}: a background fetch fills {used_D.max()} slots or drops the last copy"
                )
        self._left_s -= max(0.0, view.price.window_s - _early_seconds(view, early_ED))
        landed = None
        if self._left_s <= 0:
            landed = self.coming_ED
            self.held_ED = self.held_ED | landed
            self.coming_ED = np.zeros_like(landed)
        return started, landed


def _early_seconds(view: LayerView, early_ED: NDArray[np.bool_]) -> float:
    return fetch_seconds(view.before_ED, early_ED & ~view.before_ED, view.price)
