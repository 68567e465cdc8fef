"""``recorded``: plans of a training step from loads that are known before it runs, as a rollout's routing tells them.

Reinforcement learning trains on tokens that an engine has routed already; with the routing recorded
(:attr:`poise.stepwise.protocol.LayerView.foreseen`) nothing of a step's plan needs to wait for its gate.

Before the gate
    Step 1  The replicas of ``poise`` for the exact tokens of every source, in place of predicted loads spread evenly
            (:mod:`poise.stepwise.poise.gathers`, steps 1 to 3).
    Step 2  Replicas one more or one less at a time while the modelled time falls (:mod:`poise.stepwise.poise.early`);
            the same from the replicas that ``poise`` would have for loads of the steps before, early and late.
    Step 3  Of these, of the latter as they are, and of none, what takes least by the price of steps
            (:mod:`poise.stepwise.step_seconds`), which knows the rounds of gathers; with control time, unless routing
            is replayed. So what is known never makes a step slower than not knowing it, by that price.
After the gate
    Step 4  Loads are those of the record, and routing is replayed: the split of the plan. Nobody waited for counts.
    Step 5  Else, as ``poise`` does it: a split of the exact loads, and at most ``extra`` late replicas that pay. So a
            record that is wrong costs time and nothing else.

Without a record of the step it is ``poise`` in training, which plans from the steps before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.cost.route import locality_rows
from poise.cost.weights import compiled_price
from poise.routing.predict import WINDOW, mean_share
from poise.stepwise.driver import Outcome
from poise.stepwise.poise.early import improved
from poise.stepwise.poise.gathers import plan_layer, tried_counts
from poise.stepwise.poise.node_split import best_quotas, source_tokens
from poise.stepwise.poise.training import PoiseTraining, layer_of
from poise.stepwise.protocol import MAX_ROWS, LayerView, StepPlan, StepPolicy
from poise.stepwise.step_seconds import layer_seconds
from poise.util.compiled import plain


@dataclass(frozen=True, slots=True)
class KnownRouting(StepPolicy):
    """See the module docstring.

    Parameters
    ----------
    changes : most changes of step 2.
    margin, extra : of ``poise``, where the record does not hold (:class:`poise.stepwise.poise.policy.Poise`).
    """

    name: ClassVar[str] = "recorded"
    summary: ClassVar[str] = "replicas and split from the routing that a rollout recorded, before the step runs"
    exact: ClassVar[bool] = True
    changes: int = 24
    margin: float = 0.03
    extra: int = 4

    @property
    def unforeseen(self) -> PoiseTraining:
        """What runs where the record does not hold."""
        return PoiseTraining(self.margin, self.extra)

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Steps 1 to 3."""
        known = view.foreseen
        if known is None:
            return self.unforeseen.before_gate(view)
        if not known.load_SE.any() or not view.step_slots:
            return view.before_ED
        load_SE = np.ascontiguousarray(known.load_SE)
        layer = layer_of(view, load_SE)
        per_node = int(view.price.cluster.devices_per_node_N.max())
        plan, _ = plan_layer(layer, tried_counts(view.step_slots, per_node, len(view.before_ED)))
        found = [view.before_ED, improved(layer, plan.holders_ED, self.changes).holders_ED]
        for held_ED in self._of_history(view, load_SE):
            found += [improved(layer, plain(held_ED, np.bool_), changes).holders_ED for changes in (0, self.changes)]
            found.append(held_ED)  # with those that get no token, too: the split is searched, and may be worse without
        return min(found, key=lambda held_ED: self._seconds(view, held_ED, load_SE))

    def _of_history(self, view: LayerView, load_SE: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
        """What ``poise`` would hold before the gate and after it, bool [E, D], had nobody told it of the step."""
        if not len(view.recent_HE):
            return []
        share_E = mean_share(view.recent_HE, WINDOW, np.ones(load_SE.shape[1]))
        unaware = replace(view, foreseen=None, predicted_E=share_E * load_SE.sum())
        early_ED = self.unforeseen.before_gate(unaware)
        late_ED = self.unforeseen.after_gate(unaware, early_ED, load_SE).holders_ED
        return [early_ED] if (late_ED == early_ED).all() else [early_ED, late_ED]

    def _seconds(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> float:
        """Of the layer, the record being right."""
        forecast = view.foreseen is not None and not view.foreseen.replayed
        waits = forecast and bool((holders_ED != view.before_ED).any())
        control_s = self.unforeseen.control_seconds(view) if waits else 0.0
        done = Outcome(view, holders_ED, _split(view, holders_ED, load_SE), control_s)
        return layer_seconds(done, load_SE, view.price, again=view.price.rematerialise, keeps=False).total_s

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Steps 4 and 5."""
        known = view.foreseen
        rows = load_SE.size * len(load_SE)
        if known is not None and known.replayed and rows <= MAX_ROWS and np.array_equal(known.load_SE, load_SE):
            return _split(view, holders_ED, np.ascontiguousarray(load_SE))
        if known is not None:
            view = replace(view, predicted_E=known.load_SE.sum(axis=0).astype(np.float64))
        return self.unforeseen.after_gate(view, holders_ED, load_SE)

    def training_plan_seconds(self, num_experts: int, num_devices: int) -> float:
        """Of step 5, beside the control time that every exact method pays."""
        return self.unforeseen.training_plan_seconds(num_experts, num_devices)


def _split(view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
    """Step 4: the fastest split of loads that were known before the gate."""
    machine = compiled_price(view.price).machine
    _, quota_ED = best_quotas(source_tokens(plain(load_SE, np.int64), machine), plain(holders_ED, np.bool_), machine)
    rows_SED = locality_rows(load_SE, quota_ED, view.price.cluster.node_D)
    return StepPlan(holders_ED, quota_ED, rows_SED, passive=True)
