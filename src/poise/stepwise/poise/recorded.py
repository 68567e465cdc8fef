"""``recorded``: plans of a training step from loads that are known before it runs, as a rollout's routing tells them.

Reinforcement learning trains on tokens that an engine has routed already; with the routing recorded
(:attr:`poise.stepwise.protocol.LayerView.foreseen`) nothing of a step's plan needs to wait for its gate.

Before the gate
    Step 1  The replicas of ``poise`` for the exact tokens of every source, in place of predicted loads spread evenly
            (:mod:`poise.stepwise.poise.gathers`, steps 1 to 3).
    Step 2  Replicas one more or one less at a time while the modelled time falls (:mod:`poise.stepwise.poise.early`).
    Step 3  None, if that does not beat the owners alone by its control time, which is paid unless routing is replayed.
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
from poise.stepwise.poise.early import improved, priced
from poise.stepwise.poise.gathers import plan_layer, tried_counts
from poise.stepwise.poise.node_split import best_quotas, source_tokens
from poise.stepwise.poise.training import PoiseTraining, layer_of
from poise.stepwise.protocol import MAX_ROWS, LayerView, StepPlan, StepPolicy


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
        layer = layer_of(view, np.ascontiguousarray(known.load_SE))
        per_node = int(view.price.cluster.devices_per_node_N.max())
        plan, _ = plan_layer(layer, tried_counts(view.step_slots, per_node, len(view.before_ED)))
        best = improved(layer, plan.holders_ED, self.changes)
        control_s = 0.0 if known.replayed else self.unforeseen.control_seconds(view)
        alone_s = priced(layer, view.before_ED).seconds
        return best.holders_ED if best.seconds + control_s < alone_s else view.before_ED

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Steps 4 and 5."""
        known = view.foreseen
        rows = load_SE.size * len(load_SE)
        if known is not None and known.replayed and rows <= MAX_ROWS and np.array_equal(known.load_SE, load_SE):
            machine = compiled_price(view.price).machine
            _, quota_ED = best_quotas(source_tokens(np.ascontiguousarray(load_SE), machine), holders_ED, machine)
            rows_SED = locality_rows(load_SE, quota_ED, view.price.cluster.node_D)
            return StepPlan(holders_ED, quota_ED, rows_SED, passive=True)
        if known is not None:
            view = replace(view, predicted_E=known.load_SE.sum(axis=0).astype(np.float64))
        return self.unforeseen.after_gate(view, holders_ED, load_SE)

    def training_plan_seconds(self, num_experts: int, num_devices: int) -> float:
        """Of step 5, beside the control time that every exact method pays."""
        return self.unforeseen.training_plan_seconds(num_experts, num_devices)
