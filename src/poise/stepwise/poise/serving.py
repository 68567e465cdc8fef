"""``poise`` in serving, by seconds: replicas that stay until they are replaced, and move only where that pays.

Before the gate, from predicted loads
    Step 1  Surplus fill of work, in seconds under the roofline (:mod:`poise.stepwise.poise.surplus`); slots still free
            are offered to the hottest experts, whose tokens then stay at home. What is predicted again is not fetched
            again.
    Step 2  Of all the plans passed on the way, from "move nothing" on, the one with the least predicted layer time +
            exposed fetch / ``horizon`` steps. No fetch stalls a layer by more than ``stall`` times its own time, and
            what can come in the background within ``patience`` windows does, unless it gains ``urgency``. If leaving
            the engine's even split over the static placement alone is predicted to be as fast, nothing is exchanged
            and nothing moves.
    Step 3  Replicas that would pay were they here, but whose fetch would be seen, come in the background: at most one a
            device at a time.
After the gate, from exact loads
    Step 4  The fastest for these sources of the exact split, one by work (experts bound by reading their weights stay
            whole), and one by work that leaves more tokens at home (:mod:`poise.stepwise.poise.work_split`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import fetch_seconds
from poise.stepwise.methods.split import even_quota
from poise.stepwise.poise.surplus import filled_by_work
from poise.stepwise.poise.work_split import exact_quota_by_work, passive_seconds, plan_seconds
from poise.stepwise.poise.workspace import Desk, desk_of
from poise.stepwise.protocol import Fetch, LayerView, StepPlan, StepPolicy


@dataclass(frozen=True, slots=True)
class PoiseServing(StepPolicy):
    """See the module docstring; the settings are those of :class:`poise.stepwise.poise.policy.Poise`."""

    name: ClassVar[str] = "poise"
    summary: ClassVar[str] = "predicted replicas where they pay, kept; the fastest of three splits after the gate"
    keeps: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    horizon: float
    stall: float
    urgency: float
    patience: float
    margin: float
    slack: float

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Steps 1 and 2."""
        if view.coming_ED.any():
            return view.before_ED
        desk = desk_of(view)
        best, best_seconds = view.before_ED, np.inf
        wake = self._wake_below(view, desk)
        last, stay_s = view.before_ED, np.inf
        for plan in filled_by_work(view, view.before_ED, desk):
            seconds = self._planned(view, plan, desk)
            stay_s = min(stay_s, seconds) if not (plan & ~view.before_ED).any() else stay_s
            exposed = fetch_seconds(view.before_ED, plan & ~view.before_ED, view.price) - view.price.window_s
            if exposed > 0.0:
                if exposed > self.stall * wake:
                    break
                alone = fetch_seconds(view.before_ED, plan & ~last, view.price)
                if alone <= self.patience * view.price.window_s and seconds > (1.0 - self.urgency) * stay_s:
                    last = plan
                    continue  # step 3 will bring it in the background
                seconds += exposed / self.horizon
            last = plan
            if seconds < best_seconds * (1 - 1e-6):
                best, best_seconds = plan, seconds
        return view.before_ED if best_seconds > wake else best

    def in_background(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> Fetch | None:
        """Step 3."""
        desk = desk_of(view)
        plans = filled_by_work(view, holders_ED, desk)
        seconds = [self._planned(view, plan, desk) for plan in plans]
        wake = self._wake_below(view, desk)
        best = int(np.argmin(seconds))
        if best == 0 or seconds[best] > min(wake, seconds[0] * (1.0 - self.margin)):
            return None
        coming, reached = np.zeros_like(holders_ED), holders_ED
        for before, after in pairwise(plans[: best + 1]):
            new = after & ~before
            if coming[:, new.any(axis=0)].any():
                break
            coming, reached = coming | new, after
        wanted = coming & ~holders_ED
        if fetch_seconds(holders_ED, wanted, view.price) > self.patience * view.price.window_s:
            return None
        to = wanted.any(axis=0)
        dropped = holders_ED & ~reached & to & ~view.static_ED
        room = view.slots_D - holders_ED.sum(axis=0)
        dropped &= room < wanted.sum(axis=0)
        return Fetch(wanted, dropped) if wanted.any() and (dropped.sum(axis=0) <= 1).all() else None

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Step 4."""
        if self.leaves_alone(view, holders_ED):
            return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), view.static_ED), passive=True)
        return StepPlan(holders_ED, exact_quota_by_work(load_SE, self.slack, desk_of(view).put(holders_ED)))

    def leaves_alone(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> bool:
        """Whether :meth:`after_gate` will be passive whatever the exact loads are: then nobody need wait for them."""
        desk = desk_of(view)
        return self._planned(view, holders_ED, desk) > self._wake_below(view, desk)

    def _planned(self, view: LayerView, plan_ED: NDArray[np.bool_], desk: Desk) -> float:
        """Predicted seconds of a plan's split, control included."""
        load_E = view.predicted_E.copy()  # to numba an array that may not be written is another type
        return plan_seconds(load_E, view.price.control_s, desk.put(plan_ED))

    def _wake_below(self, view: LayerView, desk: Desk) -> float:
        """Predicted seconds below which the loop is worth its control time."""
        passive = passive_seconds(view.predicted_E, desk.put(view.static_ED))
        return passive * (1.0 - self.margin) - self.margin * view.price.cluster.dispatch_wire.start_s
