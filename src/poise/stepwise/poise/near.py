"""``poise-near``: replicas along ways that are priced, tokens sent by planned shares without an exchange of counts.

For several nodes, where a replica takes tens of windows to come and the counts of a step long to go round. In serving:

Loads
    Those of 24 steps (:func:`poise.stepwise.poise.outlook.expected_loads`), looked at anew every ``refresh`` steps, or
    as often as planning beside the steps allows; what that finds is in force when it has been found
    (:mod:`poise.stepwise.poise.host`). A look plans one batch: the next one waits for a look that has seen it come.
Before the gate, and in the background
    Step 1  The first batch of the best way to better holders (:mod:`poise.stepwise.poise.ways`), at once where what it
            exposes pays sooner than the batch would come in the background; else in the background, however many
            windows it takes.
After the gate
    Step 2  Of three ways to send tokens, the one that would have been fastest in the newest steps
            (:func:`poise.stepwise.poise.outlook.best_sending`): the engine's even split over the static placement;
            every source by shares planned for the expected loads, to near holders first
            (:mod:`poise.stepwise.poise.shares`); the exact split, with its control time.

In training it is ``poise``'s policy of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import StepPrice, compiled_price
from poise.stepwise.methods.split import even_quota
from poise.stepwise.poise.host import host_looks
from poise.stepwise.poise.outlook import Sending, best_sending, site_of
from poise.stepwise.poise.shares import deal_rows
from poise.stepwise.poise.training import PoiseTraining
from poise.stepwise.poise.ways import FirstBatch, first_batch
from poise.stepwise.poise.work_split import exact_quota_by_work
from poise.stepwise.protocol import Fetch, LayerView, Looks, StepPlan, StepPolicy

SLACK = 0.05
"""The exact split may exceed the best maximum by this share to keep tokens at home."""


@dataclass(frozen=True, slots=True)
class PoiseNear(StepPolicy):
    """See the module docstring.

    Parameters
    ----------
    horizon : steps over which a way to other holders has to pay; exposed fetches do so before a multiple of it ends.
    margin : least predicted gain of a way, as a share of the time without it.
    refresh : least steps between two looks at the loads.
    """

    name: ClassVar[str] = "poise-near"
    summary: ClassVar[str] = "replicas along priced ways, tokens by planned shares where counts need no exchange"
    keeps: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    recent: ClassVar[int] = 24
    horizon: float = 200.0
    margin: float = 0.02
    refresh: int = 8

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Step 1, where it comes at once."""
        if view.price.training:
            return self.training.before_gate(view)
        batch = None if view.coming_ED.any() else self._first_batch(view, view.before_ED)
        if batch is None or not batch.at_once(self._steps_left(view)):
            return view.before_ED
        return (view.before_ED & ~batch.dropped_ED) | batch.coming_ED

    def in_background(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> Fetch | None:
        """Step 1, in the background."""
        batch = self._first_batch(view, holders_ED)
        if batch is None or batch.at_once(self._steps_left(view)):
            return None
        return Fetch(batch.coming_ED, batch.dropped_ED)

    def leaves_alone(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> bool:
        """Whether step 2 needs no counts."""
        return not view.price.training and self._sending(view, holders_ED).how != "exact"

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Step 2."""
        if view.price.training:
            return self.training.after_gate(view, holders_ED, load_SE)
        sending = self._sending(view, holders_ED)
        if sending.how == "even":
            return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), view.static_ED), passive=True)
        if sending.how == "exact":
            return StepPlan(holders_ED, exact_quota_by_work(load_SE, SLACK, site_of(view).desk.put(holders_ED)))
        machine = compiled_price(view.price).machine
        # a copy: to numba an array that may not be written is another type
        rows_SED = deal_rows(np.ascontiguousarray(load_SE), sending.tokens_ED, holders_ED.copy(), machine)
        return StepPlan(holders_ED, rows_SED.sum(axis=0), rows_SED, passive=True)

    def training_plan_seconds(self, num_experts: int, num_devices: int) -> float:
        """As ``poise``."""
        return self.training.training_plan_seconds(num_experts, num_devices)

    @property
    def training(self) -> PoiseTraining:
        """What runs in training."""
        return PoiseTraining(margin=0.03, extra=4)

    def plans_beside(self, price: StepPrice, num_experts: int, tokens: float) -> Looks:
        """As ranks plan their layers beside the steps (:mod:`poise.stepwise.poise.host`)."""
        return host_looks(price, num_experts, _size(tokens), self.refresh)

    def _first_batch(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> FirstBatch | None:
        loads = self._loads(view)
        if not len(loads) or not view.settled or (holders_ED != view.before_ED).any():
            return None
        return first_batch(site_of(view), holders_ED.tobytes(), loads.tobytes(), self.horizon, self.margin)

    def _sending(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> Sending:
        loads = self._loads(view)
        if not len(loads):
            return Sending("even", 0.0, np.zeros(holders_ED.shape))
        return best_sending(site_of(view), holders_ED.tobytes(), loads.tobytes(), SLACK)

    def _steps_left(self, view: LayerView) -> float:
        return self.horizon - view.step % self.horizon

    def _loads(self, view: LayerView) -> NDArray[np.float64]:
        """Loads known at the look in force, float64 [H, E], in the size of this step.

        Sizes in steps of a quarter octave, so that what was found for one step serves the next ones too.
        """
        known_HE = view.recent_HE if view.seen_HE is None else view.seen_HE
        known_HE = known_HE[known_HE.sum(axis=1) > 0]
        if not len(known_HE):
            return known_HE
        return np.asarray(known_HE * (_size(float(view.predicted_E.sum())) / known_HE.sum(axis=1).mean()))


def _size(pairs: float) -> float:
    """Pairs of a step, to a quarter octave."""
    return float(2.0 ** (np.rint(4.0 * np.log2(max(pairs, 1.0))) / 4.0))
