"""``poise`` in training, by seconds: replicas that live for one step, where they save more than their weights cost.

The optimizer changes every weight, so no replica is kept and none comes in the background (``view.before_ED`` holds
owners only). Priced are three compute passes, four all-to-alls, and weights there and back.

Before the gate
    Step 1  The replicas with the least modelled time on predicted loads (:mod:`poise.stepwise.poise.gathers`, steps 1
            to 4). None, which is plain expert parallelism, unless that beats the owners alone by more than ``margin``
            of their time, with what it saves on the loads of each of the last steps, less one standard error of their
            mean: loads of a few steps look more uneven than the next ones will be.
After the gate
    Step 2  No counts are exchanged where tokens sent to their nearest holders are predicted to be as fast, within
            ``margin``, as the exact split with its control time.
    Step 3  Else the fastest two-level split on exact loads, and at most ``extra`` late replicas that pay (steps 5 and 6
            there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import compiled_price
from poise.routing.predict import WINDOW
from poise.stepwise.methods.hecate import nearest_rows
from poise.stepwise.methods.split import even_quota, spread_evenly
from poise.stepwise.poise.gathers import OwnedLayer, calibrate, plan_layer, tried_counts
from poise.stepwise.poise.node_split import best_quotas, quota_seconds, source_tokens
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy
from poise.util.compiled import plain

CALIBRATE_SECONDS_BASE, CALIBRATE_SECONDS_PER_PAIR = 25e-6, 100e-9
"""Step 3 on one core: seconds, and seconds per (expert, device), after benchmarks/train.py (part ``planner``)."""


class Weighed(NamedTuple):
    """Replicas for one step, and what speaks for and against them.

    Parameters
    ----------
    holders_ED : bool [E, D], with the owners.
    costs_s : seconds that they and their split add.
    margin_s : the least that must be gained beside.
    saves_s : seconds that they save on the predicted loads.
    sure_s : the part of it that the last steps are sure of; ``saves_s`` where that is too little already.
    """

    holders_ED: NDArray[np.bool_]
    costs_s: float
    margin_s: float
    saves_s: float
    sure_s: float

    @property
    def pays(self) -> bool:
        """Whether they are made."""
        return self.costs_s + self.margin_s < self.sure_s


@dataclass(frozen=True, slots=True)
class PoiseTraining(StepPolicy):
    """See the module docstring; the settings are those of :class:`poise.stepwise.poise.policy.Poise`."""

    name: ClassVar[str] = "poise"
    summary: ClassVar[str] = "replicas for one step where they pay, two-level split after the gate"
    exact: ClassVar[bool] = True
    margin: float
    extra: int

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Step 1."""
        best = self.weighed(view)
        return best.holders_ED if best.pays else view.before_ED

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Steps 2 and 3."""
        if (holders_ED == view.static_ED).all():
            return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), view.static_ED), passive=True)
        near_s, exact_s = self.dispatch_seconds(view, holders_ED)
        if near_s * (1.0 + self.margin) < exact_s + self.control_seconds(view):
            rows = nearest_rows(load_SE, holders_ED, view.price.cluster.node_D)
            return StepPlan(holders_ED, rows.sum(axis=0), rows, passive=True)
        plan = calibrate(layer_of(view, plain(load_SE, np.int64)), plain(holders_ED, np.bool_), self.extra)
        return StepPlan(plan.holders_ED, plan.quota_ED)

    def training_plan_seconds(self, num_experts: int, num_devices: int) -> float:
        """What step 3 takes beside the control time that every exact method pays."""
        return CALIBRATE_SECONDS_BASE + CALIBRATE_SECONDS_PER_PAIR * num_experts * num_devices

    def weighed(self, view: LayerView) -> Weighed:
        """Step 1: the best replicas, and what they cost and save beside the owners alone."""
        cluster = view.price.cluster
        counts = tried_counts(view.step_slots, int(cluster.devices_per_node_N.max()), len(view.before_ED))
        plan, alone_s = plan_layer(layer_of(view, _expected(view)), counts)
        if (plan.holders_ED == view.before_ED).all():
            return Weighed(view.before_ED, 0.0, 0.0, 0.0, 0.0)
        near_s, exact_s = self.dispatch_seconds(view, plan.holders_ED)
        costs_s = plan.seconds - exact_s + min(near_s, exact_s + self.control_seconds(view)) - exact_s
        best = Weighed(plan.holders_ED, costs_s, self.margin * alone_s, alone_s - exact_s, alone_s - exact_s)
        return best._replace(sure_s=min(best.saves_s, _sure_seconds(view, plan.holders_ED))) if best.pays else best

    def control_seconds(self, view: LayerView) -> float:
        """Of the exact split, planning included."""
        return view.price.control_s + self.training_plan_seconds(*view.static_ED.shape)

    def dispatch_seconds(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> tuple[float, float]:
        """Predicted seconds of a layer if tokens go to the nearest holders, and if they are split exactly."""
        machine = compiled_price(view.price).machine
        sources = source_tokens(_expected(view), machine)
        exact_s, _ = best_quotas(sources, plain(holders_ED, np.bool_), machine)
        near = nearest_rows(sources.load_SE, holders_ED, machine.node_D).sum(axis=0)
        return quota_seconds(near, sources, machine), exact_s


def _expected(view: LayerView) -> NDArray[np.int64]:
    """Predicted tokens of each source, evenly spread, int64 [D, E]."""
    return _spread(view, view.predicted_E)


def _spread(view: LayerView, load_E: NDArray[np.float64]) -> NDArray[np.int64]:
    return spread_evenly(np.rint(load_E).astype(np.int64), view.price.cluster.num_devices)


def _sure_seconds(view: LayerView, holders_ED: NDArray[np.bool_]) -> float:
    """What holders save beside the owners on each of the last steps' loads: their mean less its standard error; inf
    where fewer than two steps are known.
    """
    machine, pairs = compiled_price(view.price).machine, view.predicted_E.sum()
    recent_HE = [load_E * (pairs / load_E.sum()) for load_E in view.recent_HE[-WINDOW:] if load_E.any()]
    if len(recent_HE) < 2:
        return np.inf
    saved_H = np.zeros(len(recent_HE))
    owned_ED, held_ED = plain(view.before_ED, np.bool_), plain(holders_ED, np.bool_)
    for h, load_E in enumerate(recent_HE):
        sources = source_tokens(_spread(view, load_E), machine)
        saved_H[h] = best_quotas(sources, owned_ED, machine)[0] - best_quotas(sources, held_ED, machine)[0]
    return float(saved_H.mean() - saved_H.std(ddof=1) / np.sqrt(len(saved_H)))


def layer_of(view: LayerView, load_SE: NDArray[np.int64]) -> OwnedLayer:
    """A layer to plan for tokens of each source, int64 [D, E]."""
    price = compiled_price(view.price)
    free_D = view.slots_D - view.before_ED.sum(axis=0)
    return OwnedLayer(source_tokens(load_SE, price.machine), plain(view.before_ED, np.bool_), free_D, price)
