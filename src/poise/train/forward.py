"""The forward pass of sharded experts, layer by layer.

Replicas that are known before the gate are gathered while the layer before is done; counts of all ranks are exchanged,
the policy plans, tokens go to their experts and come back. Replicas that only the plan after the gate asks for are
gathered beside the dispatch: that gather is exposed. For autograd a layer is one function, whose backward is
:meth:`poise.train.backward.BackwardSchedule.layer`.
"""

from __future__ import annotations

import weakref
import zlib
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.runtime.dispatch import evenly, make_exchange, named, routed
from poise.runtime.layer import LayerFunction, LayerStep
from poise.runtime.once import OnceExchange, once
from poise.runtime.recompute import Region, in_backward, places
from poise.runtime.spans import span
from poise.stepwise.protocol import LayerView
from poise.train.backward import DROPPED, BackwardSchedule
from poise.train.materialize import Materialised
from poise.train.metrics import LayerMetrics
from poise.train.owned import OwnedExperts
from poise.train.passes import Pass
from poise.train.run import RunState
from poise.train.window import WindowClock
from poise.util.errors import ModelError


class ForwardSchedule:
    """When counts are exchanged, replicas gathered and freed, and experts computed.

    ``metrics`` are those of the last forward pass, one a layer; ``clock`` measures the time between layers.
    """

    def __init__(self, run: RunState, backward: BackwardSchedule) -> None:
        self._run, self._backward = run, backward
        self.metrics: list[LayerMetrics] = []
        self.clock = WindowClock()
        self._early: dict[int, Materialised] = {}  # gathered, or on their way, for layers that have not run yet

    def begin(self, problem: ModelError | None) -> None:
        """A forward pass of the model starts: gather for its first layers, as all ranks do, and then say what is wrong.

        Raises
        ------
        ModelError : on every rank, where they meet: the problem of one, or its weights are unfit.
        """
        self.metrics = []
        self.clock.forget()
        self._run.budget.choose()
        for layer in range(min(self._run.settings.prefetch, len(self._run.layers))):
            self._fetch_early(layer)
        unfit = (weights.problem for weights in self._early.values() if weights.problem is not None)
        problem = problem or next(unfit, None)
        if problem is not None:  # before the model's other modules say something else; the others hear it in a layer
            self._run.passes.count()  # as the others do
            self._run.meeting.meet("beginning a pass", problem=problem)

    def layer(self, experts: OwnedExperts, x: Tensor, ids: Tensor, weights: Tensor, region: Region) -> Tensor:
        """One layer, of whatever leading shapes; [T, d]. ``region``: where the model calls it."""
        problem: ModelError | None = None
        try:
            width = experts.kind.hidden if experts.kind.name != "modules" else None
            x_Td, ids_TK, weights_TK = routed(x, ids, weights, width)
        except ModelError as error:  # raised on all ranks, where they exchange counts
            problem, x_Td, weights_TK = error, x.new_zeros(0, 1), weights.new_zeros(0, 1)
            ids_TK = torch.zeros((0, 1), dtype=torch.int64, device=ids.device)
        recomputed = in_backward()
        if recomputed:
            one = self._again(experts, ids_TK, region, problem)
        else:
            now = self._run.planner.micro_batch
            problem = problem or (None if now is None else now.problem(experts.number, ids_TK))
            self._run.passes.count()
            self.clock.enter(x_Td)
            one = self._planned(experts, x_Td, ids_TK, region, problem)
        trainable = [weight for weight in experts.parameters() if weight.requires_grad]
        if region.frames:  # recorded now, so that the recomputation can put swapped experts back
            weights_TK = weights_TK.gather(1, places(one.ids_TK, ids_TK))
        compute_dtype, way = self._run.deployment.compute_dtype, one.step.way
        tokens = x_Td.to(compute_dtype) if x_Td.dtype != compute_dtype else x_Td
        if isinstance(way, OnceExchange):
            tokens = way.beside(tokens, weights_TK)
        graph = torch.is_grad_enabled() and (tokens.requires_grad or bool(trainable))
        inside = graph and not region.later
        y_Nd = LayerFunction.apply(
            partial(self.compute, one, graph=inside, recomputed=recomputed), partial(self._backward.layer, one), tokens,
            *trainable,
        )  # fmt: skip
        if not graph:
            one.weights.free()
            one.done = True
        elif not recomputed:
            one.node = weakref.ref(y_Nd.grad_fn)
        self.clock.leave(y_Nd)
        if isinstance(way, OnceExchange):  # they are sums
            return y_Nd.to(x_Td.dtype)
        y_TKd = y_Nd.view(*ids_TK.shape, y_Nd.shape[1])
        if not one.step.way.whole:  # some name no expert: their weights count for nothing
            weights_TK = weights_TK.masked_fill(~named(one.ids_TK, experts.num_experts), 0)
        return (y_TKd * weights_TK.unsqueeze(-1).to(y_TKd.dtype)).sum(dim=1).to(x_Td.dtype)

    def _again(self, experts: OwnedExperts, ids_TK: Tensor, region: Region, problem: ModelError | None) -> Pass:
        """The pass that activation checkpointing computes again, the same on all ranks."""
        one: Pass | None = None
        try:
            one = self._run.passes.again(experts.number, ids_TK, region)
            problem = problem or one.out_of_turn(self._run.planner.micro_batch)
        except ModelError as error:
            problem = problem or error
        number = -1 if one is None else one.number
        self._run.meeting.meet("recomputation", experts.number, number, problem=problem)
        assert one is not None
        return one

    def _planned(
        self, experts: OwnedExperts, x_Td: Tensor, given_TK: Tensor, region: Region, problem: ModelError | None
    ) -> Pass:
        """A new pass of a layer: counts of all ranks, the plan, and its weights here or on their way."""
        run, layer, recorded = self._run, experts.number, torch.is_grad_enabled()
        there, number = run.deployment, run.passes.number
        ids_TK = evenly(given_TK, experts.num_experts, there.rank) if run.settings.force_balance else given_TK
        early = self._early.get(layer)
        dropped, wrong = self._backward.dropped()
        wrong = experts.unfit() or (None if early is None else early.problem) or wrong
        trained = experts.trainable if wrong is None else []
        known = b"" if early is None else early.early_ED.tobytes()
        with span("counts"):
            load_SE = run.meeting.loads(layer, number, ids_TK, problem=problem or wrong, more=(
                ("whether gradients are recorded", recorded), ("training", experts.training),
                ("activation checkpointing", bool(region.frames)), ("experts a token", ids_TK.shape[1]),
                ("width of tokens", x_Td.shape[1]), ("trained weights", trained),
                ("options", run.meeting.options(run.settings)), ("iterations", run.planner.history.seen(layer)),
                ("micro-batch of a rollout", None if run.planner.micro_batch is None else run.planner.micro_batch.key),
                ("sum over owners and replicas", zlib.crc32(known, zlib.crc32(experts.owner_E.tobytes()))),
                (DROPPED, dropped),
            ))  # fmt: skip
        if dropped:
            self._backward.let_go()
        with span("plan"):
            run.passes.layer, run.planner.top_k = layer, ids_TK.shape[1]
            weights = self._early.pop(layer, None) or self._materialise(layer)
            plan, rows_SED, view = run.planner.finish(layer, weights.early_ED, load_SE, keep=recorded)
            weights.complete(plan.holders_ED, plan.quota_ED > 0)
            pairs = make_exchange(ids_TK, rows_SED, there.rank, there.tokens_group, weights.slots)
            run_experts = partial(experts.kind.run_counted, weights.counts(pairs.count_E))
            step = LayerStep(pairs, run_experts)
            if run.planner.travels_once(layer, rows_SED, keep=recorded):
                way = once(pairs, x_Td.shape[1])
                step = LayerStep(way, way.around(run_experts))
            frames = [weakref.ref(frame) for frame in region.frames]
            one = Pass(
                layer, given_TK, step, weights, number, pairs.number, frames, micro_batch=run.planner.micro_batch
            )
            self._note(weights, load_SE.sum(axis=0), plan.quota_ED.sum(axis=0), view)
            if recorded:
                self._learn(weights, load_SE.sum(axis=0))
                run.passes.add(one)
        return one

    def _note(
        self, weights: Materialised, load_E: NDArray[np.int64], tokens_D: NDArray[np.int64], view: LayerView
    ) -> None:
        experts, devices = weights.experts, self._run.deployment.cluster.num_devices
        gathered = int(weights.gathered_count * self._run.deployment.expert_bytes)
        self._run.moved_bytes["gather"] += gathered
        owner_tokens = np.bincount(experts.owner_E, weights=load_E, minlength=devices)
        self.metrics.append(
            LayerMetrics(experts.number, tokens_D, owner_tokens.astype(np.int64), weights.gathered_count, gathered,
                         self._run.settings.policy, view)
        )  # fmt: skip

    def _learn(self, weights: Materialised, load_E: NDArray[np.int64]) -> None:
        """What a training pass of a layer shows: its loads, and what its replicas cost."""
        layer = weights.experts.number
        self._run.planner.learn(layer, load_E)
        if self._run.budget.limited:
            once_s, hidden_s = weights.gather_s, 2.0 * self._run.planner.price(load_E.sum()).window_s
            saved_s = max(0.0, 2.0 * once_s - hidden_s) - max(0.0, once_s - hidden_s)
            self._run.budget.learn(layer, weights.fullest_bytes, saved_s)

    def _materialise(self, layer: int) -> Materialised:
        early_ED, transfers = self._run.planner.early_plan(layer)
        return Materialised(self._run.layers[layer], self._run.deployment, self._run.ledger, early_ED, transfers)

    def _fetch_early(self, layer: int) -> None:
        if layer < len(self._run.layers) and layer not in self._early:
            self._early[layer] = self._materialise(layer)

    def drop_early(self) -> None:
        """Free what was gathered for a forward pass that did not come, or from weights that have changed."""
        for weights in self._early.values():
            weights.free()
        self._early.clear()

    def compute(self, one: Pass, x_Td: Tensor, *, graph: bool, recomputed: bool) -> Tensor:
        """Outputs of this rank's pairs, [T * K, d], of its tokens where they travel once; ``graph``: build it inside.

        The layer's replicas are freed, unless they stay until the backward, and the gather for a later layer begins,
        once the combine is on its way.
        """
        x_in = one.step.dispatch(x_Td)
        with span("weights"):
            banks = one.weights.banks()
        y_in, failed = one.step.compute(x_in, banks, graph=graph, recomputed=recomputed)
        y_Nd = one.step.combine(y_in)
        if not recomputed:  # where experts failed, too: the other ranks do, and the gather is also of what lies here
            kept = self._run.budget.take(one.weights)
            if kept is None:
                one.weights.free()
            else:
                one.kept_bytes = kept
            if self._run.settings.prefetch:
                self._fetch_early(one.layer + self._run.settings.prefetch)
        if failed is not None:
            if not recomputed:  # no backward of it will come here
                one.weights.free()
                one.done = True
            raise failed
        return y_Nd
