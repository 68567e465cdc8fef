"""When things happen: the one object that all sharded layers of a model share.

Forward   gather of layer l starts when layer l - 1 is done, so it runs under the attention of the same block; the
          first one starts with the model. Counts are exchanged after the gate, the policy plans, what it adds is
          fetched in sight, tokens are dispatched.
Backward  reduction of layer l and (re-materialisation) the gather of layer l - 1 start when layer l's experts are
          done and run under its attention's backward; layer l - 1 first waits for both. So the replicas of one
          layer, with their gradients, are all that lives at once.
End       a callback of the engine waits for the last reduction.

Hecate (arXiv 2502.02581) section 3.2. Holders and splits come from :mod:`poise.stepwise.driver`.
"""

from __future__ import annotations

import copy
import re
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from poise.cost.route import locality_rows
from poise.cost.transfers import Form, plan_transfers
from poise.cost.weights import StepPrice, training_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.runtime.collectives import exchanges
from poise.runtime.dispatch import counted, make_exchange, named, out_of_range, routed
from poise.runtime.layer import LayerStep, RunExperts
from poise.runtime.recompute import Region, checkpoint_region, in_backward, places
from poise.runtime.together import Place, meeting_of
from poise.stepwise.driver import LayerDriver
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy
from poise.stepwise.rematerialise import layers_to_keep
from poise.stepwise.sharding import ShardingPolicy, owned_ED
from poise.train.ahead import Plan, PlanAhead
from poise.train.history import LoadHistory
from poise.train.materialize import Ledger, Materialised
from poise.train.metrics import LayerMetrics
from poise.train.passes import Pass, Passes
from poise.train.reduce import ReplicaGradients
from poise.train.rows import ExpertRows, stepping
from poise.train.sharding import ShardedExperts, move_owners
from poise.train.states import watch_optimizers
from poise.train.window import WindowClock
from poise.util.errors import ModelError, OptionError, PoiseError

GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Of a weight, by ``register_hook`` and ``register_post_accumulate_grad_hook``."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run is scheduled; see :func:`poise.train.api.fully_shard_experts`."""

    policy: StepPolicy
    step_slots: int
    window: int
    prefetch: int
    rematerialise: bool | float
    sharding: ShardingPolicy | None
    form: Form
    window_s: float | None
    force_balance: bool


class Options(str):
    """What a run was told, in words that are as long as they must; for short, their sum."""

    def __repr__(self) -> str:
        return self.short

    def __init__(self, text: str) -> None:
        self.short = str(zlib.crc32(text.encode()))


class Schedule:
    """See the module docstring.

    Parameters
    ----------
    layers : sharded experts in the order they run.
    settings, cluster, model : what to do, and the sizes that the policy reckons with.
    tokens_group, weights_group : two communicators of the same ranks: dispatch does not queue behind weights.
    compute_dtype, reduce_dtype : of materialised weights and of gradients on the wire.
    device : where experts are computed.
    top_k : experts a token, until the first forward pass tells.
    """

    def __init__(
        self,
        layers: list[ShardedExperts],
        settings: Settings,
        cluster: Cluster,
        model: ModelSpec,
        tokens_group: Any,
        weights_group: Any,
        compute_dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        device: torch.device,
        top_k: int,
    ) -> None:
        self.layers, self.settings, self.cluster, self.model = layers, settings, cluster, model
        self.tokens_group, self.weights_group = tokens_group, weights_group
        self.compute_dtype, self.reduce_dtype, self.device = compute_dtype, reduce_dtype, device
        self.rank = dist.get_rank(tokens_group)
        self.form: Form = settings.form
        self.ledger = Ledger()
        self.sync = True
        self.divide_factor = float(cluster.num_devices)
        self.metrics: list[LayerMetrics] = []
        self.moved_bytes = {"gather": 0, "reduce": 0, "reshard": 0}
        self.optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self.steps = 0
        self.top_k = top_k
        self.measured_window_s: float | None = settings.window_s
        self.history = LoadHistory(len(layers), layers[0].num_experts)
        self.replica_gradients = ReplicaGradients(self)
        self._ahead, self._version = PlanAhead(), 0
        self._early: dict[int, Materialised] = {}
        self.drivers = self._new_drivers()
        self.passes, self._pass = Passes(), 0
        self.meeting = meeting_of(tokens_group)
        self.run_number = self.meeting.join(layers[0].num_experts + 4, device)
        self._said: tuple[Any, Options] = (None, Options(""))
        self._callback, self._accumulated, self._wrapped_well = False, False, False
        self._hooks: list[tuple[Any, str, Any]] = []
        self._last: int | None = None
        self._unstepped = False
        self._followers: list[Any] = []
        self._started: list[Materialised] = []
        self._due: NDArray[np.int64] | None = None
        self._keep_L, self._kept_bytes = np.zeros(len(layers), bool), 0.0
        self._last_bytes_L, self._last_s_L = np.zeros(len(layers)), np.zeros(len(layers))
        self._clock = WindowClock()
        for number, experts in enumerate(layers):
            experts.schedule, experts.number = self, number

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        """A run of its own for a copy of the model, over the same groups: an average that is evaluated or trained."""
        if self.passes.open():
            raise ModelError("a model cannot be copied between its forward and its backward pass")
        out = memo[id(self)] = object.__new__(Schedule)
        layers = [copy.deepcopy(experts, memo) for experts in self.layers]
        out.__init__(  # type: ignore[misc]
            layers, self.settings, self.cluster, self.model, self.tokens_group, self.weights_group,
            self.compute_dtype, self.reduce_dtype, self.device, self.top_k,
        )  # fmt: skip
        out.divide_factor, out.measured_window_s = self.divide_factor, self.measured_window_s
        watch_optimizers(out, [])
        return out

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights on the wire."""
        return float(self.layers[0].kind.numel * self.compute_dtype.itemsize)

    @property
    def gradient_bytes(self) -> float:
        """Bytes of one expert's gradients on the wire."""
        return float(self.layers[0].kind.numel * self.reduce_dtype.itemsize)

    # ---- forward -------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self) -> None:
        """A forward pass of the model starts; where the model's hook does not run, its first layer says so."""
        if in_backward():
            return
        self._drop_early()
        stepping.clear()  # of a step that failed
        if self._callback:
            self._forget_backward()
        self._check_wrappers()
        self.metrics, self._last = [], -1
        self._clock.forget()
        self.passes.begin()
        if self._unstepped and self._gradients_dropped():
            self._close_iteration()
        if self._due is not None:
            self._meet("moving owners", more=(("owners", zlib.crc32(self._due.tobytes())),))
            self._move(self._due)
        self._choose_kept()
        for layer in range(min(self.settings.prefetch, len(self.layers))):
            self._fetch_early(layer)

    def _check_wrappers(self) -> None:
        """Data parallelism around a parent of the model takes experts for replicas, and the same on every rank."""
        active = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if self._wrapped_well or active is None:
            return
        managed = {id(weight) for weight in active._module_parameters}
        if any(id(weight) in managed for experts in self.layers for weight in experts.parameters()):
            raise ModelError(
                "DistributedDataParallel manages sharded experts, and has overwritten them",
                hint="wrap the very model that was given to fully_shard_experts, or use fully_shard",
            )
        self._wrapped_well = True

    def _meet(
        self, doing: str, layer: int = -1, number: int = -1, *, numbers_X: Tensor | None = None,
        problem: PoiseError | None = None, more: tuple[tuple[str, Any], ...] = (),
    ) -> NDArray[np.int64]:  # fmt: skip
        """All ranks are about to do the same, or all raise; numbers of every rank."""
        place = Place(doing, self.run_number, layer, number, (
            *more, ("optimizer steps", self.steps), ("exchanges of tokens", exchanges(self.tokens_group)),
            ("transfers of weights", exchanges(self.weights_group)),
        ))  # fmt: skip
        return self.meeting.meet(place, numbers_X, problem)

    def _options(self) -> Options:
        """What all ranks must have been told alike."""
        if self._said[0] is not self.settings:
            text = f"{self.settings!r}, {self.cluster!r}, {self.compute_dtype}, {self.reduce_dtype}"
            self._said = self.settings, Options(re.sub(r" at 0x[0-9a-f]+", "", text))
        return self._said[1]

    def run(self, experts: ShardedExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One layer, forward, of whatever leading shapes; [T, d]."""
        region = checkpoint_region()
        # selective checkpointing looks at every operation and expects the same ones when it computes again
        with _disable_current_modes() if region.frames else nullcontext():
            return self._run(experts, x, ids, weights, region)

    def _run(self, experts: ShardedExperts, x: Tensor, ids: Tensor, weights: Tensor, region: Region) -> Tensor:
        problem: ModelError | None = None
        try:
            width = experts.kind.hidden if experts.kind.name != "modules" else None
            x_Td, ids_TK, weights_TK = routed(x, ids, weights, width)
        except ModelError as error:  # all ranks learn of it where they meet
            problem, x_Td, weights_TK = error, x.new_zeros(0, 1), weights.new_zeros(0, 1)
            ids_TK = torch.zeros((0, 1), dtype=torch.int64, device=ids.device)
        if in_backward():
            one = self._again(experts, ids_TK, region, problem)
        else:
            if self._last is None or experts.number <= self._last:
                self.begin()
            if self._last == -1:
                self._pass += 1
            self._clock.enter(x_Td)
            one = self._plan(experts, x_Td, ids_TK, region, problem)
        trainable = [weight for weight in experts.parameters() if weight.requires_grad]
        graph = torch.is_grad_enabled() and (x_Td.requires_grad or bool(trainable))
        step = LayerStep(
            experts.kind, one.way, ids_TK.shape[1], self.tokens_group, _Link(self, one),
            one.weights.counts(one.way.count_E), one.inner,
        )  # fmt: skip
        recomputed = in_backward()
        tokens = x_Td.to(self.compute_dtype) if x_Td.dtype != self.compute_dtype else x_Td
        y_Nd = RunExperts.apply(step, graph and not region.later, recomputed, tokens, *trainable)
        if not graph:
            one.weights.free()
            one.done = True
        elif not recomputed:
            one.node = weakref.ref(y_Nd.grad_fn)
        self._clock.leave(y_Nd)
        y_TKd = y_Nd.view(*ids_TK.shape, y_Nd.shape[1])
        if region.frames:  # recorded now, so that the recomputation can put swapped experts back
            weights_TK = weights_TK.gather(1, places(one.ids_TK, ids_TK))
        if len(one.way.send_N) < one.ids_TK.numel():  # whatever stands where no expert was named counts for nothing
            weights_TK = weights_TK.masked_fill(~named(one.ids_TK, experts.num_experts), 0)
        return (y_TKd * weights_TK.unsqueeze(-1).to(y_TKd.dtype)).sum(dim=1).to(x_Td.dtype)

    def _forced(self, ids_TK: Tensor) -> Tensor:
        """The router's choice, or, to compare with, the same number of tokens for every expert."""
        if not self.settings.force_balance:
            return ids_TK
        experts = self.layers[0].num_experts
        turn = torch.arange(ids_TK.numel(), device=ids_TK.device) + self.rank * ids_TK.numel()
        return torch.where(named(ids_TK, experts), (turn % experts).view(ids_TK.shape), ids_TK)

    def _again(self, experts: ShardedExperts, ids_TK: Tensor, region: Region, problem: PoiseError | None) -> Pass:
        """The pass that is computed again, the same on all ranks."""
        one: Pass | None = None
        try:
            one = self.passes.again(experts.number, ids_TK, region)
        except ModelError as error:
            problem = problem or error
        number = -1 if one is None else one.number
        self._meet("recomputation", experts.number, number, problem=problem)
        assert one is not None
        return one

    def _loads(
        self, experts: ShardedExperts, x_Td: Tensor, ids_TK: Tensor, region: Region, problem: PoiseError | None
    ) -> NDArray[np.int64]:
        """Pairs of every rank and expert, int64 [D, E], once all ranks are in this layer of this pass."""
        count, early = experts.num_experts, self._early.get(experts.number)
        known = b"" if early is None else early.early_ED.tobytes()
        more = (
            ("whether gradients are recorded", torch.is_grad_enabled()), ("training", experts.training),
            ("activation checkpointing", bool(region.frames)), ("experts a token", ids_TK.shape[1]),
            ("width of tokens", x_Td.shape[1]), ("trained weights", experts.trainable), ("options", self._options()),
            ("iterations", self.history.seen(experts.number)),
            ("sum over owners and replicas", zlib.crc32(known, zlib.crc32(experts.owner_E.tobytes()))),
        )  # fmt: skip
        told = self._meet("forward", experts.number, self._pass, numbers_X=counted(ids_TK, count), problem=problem,
                          more=more)  # fmt: skip
        if told[:, 0].any() or told[:, -1].any():
            self.meeting.settle(
                Place("forward", self.run_number, experts.number, self._pass), out_of_range(ids_TK, count)
            )
        return np.ascontiguousarray(told[:, 2 : count + 2])  # as compiled functions take it

    def _plan(
        self, experts: ShardedExperts, x_Td: Tensor, given_TK: Tensor, region: Region, problem: PoiseError | None
    ) -> Pass:
        layer, ids_TK = experts.number, self._forced(given_TK)
        load_SE = self._loads(experts, x_Td, ids_TK, region, problem)
        self._last, self.top_k = layer, ids_TK.shape[1]
        weights = self._early.pop(layer, None) or self._materialise(layer)
        view = self.view(layer, load_SE.sum())
        recorded = torch.is_grad_enabled()
        plan = self.drivers[layer].finish(view, weights.early_ED, load_SE, keep=recorded).plan
        rows = plan.rows_SED
        if rows is None:
            rows = locality_rows(load_SE, plan.quota_ED, self.cluster.node_D)
        weights.complete(plan.holders_ED, plan.quota_ED > 0)
        way = make_exchange(ids_TK, rows, self.rank, weights.slots)
        one = Pass(layer, given_TK, way, weights, self._pass, [weakref.ref(frame) for frame in region.frames])
        self._note(experts, load_SE, plan, weights, view)
        if recorded:
            self.passes.add(one)
        return one

    def _note(
        self,
        experts: ShardedExperts,
        load_SE: NDArray[np.int64],
        plan: StepPlan,
        weights: Materialised,
        view: LayerView,
    ) -> None:  # fmt: skip
        load_E = load_SE.sum(axis=0)
        gathered = int(weights.gathered_count * self.expert_bytes)
        self.moved_bytes["gather"] += gathered
        owner_tokens = np.bincount(experts.owner_E, weights=load_E, minlength=self.cluster.num_devices)
        self.metrics.append(
            LayerMetrics(experts.number, plan.quota_ED.sum(axis=0), owner_tokens.astype(np.int64),
                         weights.gathered_count, gathered, self.settings.policy, view)
        )  # fmt: skip
        if not torch.is_grad_enabled():
            return
        self.history.record(experts.number, load_E)
        if self.history.passes(experts.number) == 1:  # of several micro-batches, the close of the iteration plans anew
            self._ahead.start(experts.number, self._version, self._early_plan(experts.number))
        if not isinstance(self.settings.rematerialise, bool):
            self._last_bytes_L[experts.number] = self._fullest_bytes(weights)
            seconds = sum(part.plan.seconds(self.cluster, self.expert_bytes) for part in weights.parts)
            hidden = 2.0 * self.price(load_E.sum()).window_s
            self._last_s_L[experts.number] = max(0.0, 2.0 * seconds - hidden) - max(0.0, seconds - hidden)

    def _fullest_bytes(self, weights: Materialised) -> float:
        """Replicas of a layer on the rank that has most, in bytes; the same on all ranks."""
        extra_D = np.zeros(self.cluster.num_devices, np.int64)
        for part in weights.parts:
            extra_D += part.plan.links_DD(len(extra_D)).sum(axis=0)
        return float(extra_D.max() * self.expert_bytes)

    def view(self, layer: int, pairs: float | None = None) -> LayerView:
        """What the policy may look at in a pass of so many (token, expert) pairs; default: as many as in the last."""
        driver, loads_HE = self.drivers[layer], self.history.of(layer)
        total = pairs if pairs is not None else float(self.history.pairs_L[layer])
        return driver.view(self.history.seen(layer), driver.predict(loads_HE, total), loads_HE, self.price(total))

    def _new_drivers(self) -> list[LayerDriver]:
        """One a layer, from the present owners, policy and slots on."""
        settings, devices = self.settings, self.cluster.num_devices
        return [LayerDriver(settings.policy, owned_ED(experts.owner_E, devices), step_slots=settings.step_slots,
                            layer=layer, window=settings.window)
                for layer, experts in enumerate(self.layers)]  # fmt: skip

    def price(self, pairs: float) -> StepPrice:
        """Machine, model and window; the tokens count in powers of two, so that it seldom changes."""
        tokens = 2.0 ** round(np.log2(max(1.0, pairs / self.top_k)))
        ratio, again = self.gradient_bytes / self.expert_bytes, self.settings.rematerialise is not False
        return _price(tokens, self.layers[0].num_experts, self.cluster, self.model, again, self.measured_window_s,
                      ratio, self.form != "direct")  # fmt: skip

    def _materialise(self, layer: int) -> Materialised:
        plan = self._ahead.get(layer, self._version) or self._early_plan(layer)()
        return Materialised(self.layers[layer], self, *plan)

    def _early_plan(self, layer: int) -> Callable[[], Plan]:
        """Replicas of the next forward pass and how they travel: after this one all is known that will be."""
        view, driver, owner_E = self.view(layer), self.drivers[layer], self.layers[layer].owner_E
        route = partial(plan_transfers, owner_E, cluster=self.cluster, expert_bytes=self.expert_bytes, form=self.form)

        def plan() -> Plan:
            early_ED = driver.choose(view)
            return early_ED, route(early_ED)

        return plan

    def _fetch_early(self, layer: int) -> None:
        if layer < len(self.layers) and layer not in self._early:
            self._early[layer] = self._materialise(layer)

    def forward_done(self, weights: Materialised) -> None:
        """Experts of a layer have run: free, and fetch for the next."""
        if in_backward():
            return
        if not self._keeps(weights):
            weights.free()
        if self.settings.prefetch:
            self._fetch_early(weights.experts.number + self.settings.prefetch)

    def _keeps(self, weights: Materialised) -> bool:
        """Whether a layer's replicas stay until its backward: all, the last only, or those that pay most and fit."""
        budget, layer = self.settings.rematerialise, weights.experts.number
        if budget is False or layer == len(self.layers) - 1:
            return True
        nbytes = self._fullest_bytes(weights) if self._keep_L[layer] else 0.0
        if not self._keep_L[layer] or self._kept_bytes + nbytes > budget:
            return False
        self._kept_bytes += nbytes
        weights.kept_bytes = nbytes
        return True

    def _choose_kept(self) -> None:
        """By what the layers' replicas took and saved in the last training pass; this pass's must fit as well."""
        budget = self.settings.rematerialise
        self._keep_L = np.zeros(len(self.layers), bool)
        if not isinstance(budget, bool) and self._last_bytes_L.any():
            self._keep_L = layers_to_keep(self._last_bytes_L, self._last_s_L, float(budget))

    # ---- backward ------------------------------------------------------------------------------------------------

    def together(self, one: Pass, accumulates: Callable[[], bool]) -> bool:
        """All ranks go backward through this layer of this pass, and through as many after it, or all raise."""
        problem, accumulate = None, False
        try:
            one.weights.check_owners()
            accumulate = accumulates()
        except ModelError as error:
            problem = error
        coming = sum(other.comes for other in self.passes.open() if other is not one)
        self._meet("backward", one.layer, one.number, problem=problem, more=(
            ("layers still to come", coming), ("whether weights get gradients", accumulate),
            ("whether gradients are synchronised", self.sync), ("divide factor", self.divide_factor),
        ))  # fmt: skip
        return accumulate

    def backward_starts(self, weights: Materialised) -> None:
        """A layer's backward begins: earlier reductions end first, so that one layer's gradients live at once."""
        if not self._callback:
            self._callback = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        for weight in weights.experts.parameters():  # autograd would call them before the gradient is complete
            for name in GRADIENT_HOOKS:
                hooks = getattr(weight, name, None)
                if hooks:
                    self._hooks.append((weight, name, hooks))
                    setattr(weight, name, OrderedDict())
                    if name == "_backward_hooks" and (weight.grad is not None or not self.sync):
                        raise ModelError(
                            "a hook on the gradient of sharded experts would see more than one backward pass",
                            hint="set gradients to None before each, or change them by hand before the optimizer step",
                        )
        self.replica_gradients.wait()

    def backward_done(
        self, weights: Materialised, own: dict[str, Tensor | None], replicas: dict[int, list[Tensor]], nbytes: int
    ) -> None:
        """A layer's experts have their gradients: add the owned ones, send the others home."""
        experts, scale, self._accumulated = weights.experts, 1.0 / self.divide_factor, True
        self._kept_bytes, weights.kept_bytes = self._kept_bytes - weights.kept_bytes, 0.0
        beside = sum(grad.nbytes for name, grad in own.items() if grad is not None and not experts.takes(name, grad))
        self.ledger.add("gradients of owned experts", beside)
        for name, grad in own.items():
            experts.add_gradient(name, grad, scale)
        self.ledger.add("gradients of owned experts", -beside)
        self.replica_gradients.add(weights, replicas, nbytes, scale)
        if self.sync:
            self._reduce(experts.number)

    def _reduce(self, layer: int) -> None:
        self.moved_bytes["reduce"] += int(self.replica_gradients.reduce(layer) * self.gradient_bytes)

    def previous_starts(self, one: Pass) -> None:
        """Gather for the backward of the layers before, under this layer's attention."""
        for _ in range(self.settings.prefetch):
            if one.before is None:
                return
            one = one.before
            if not one.done:
                one.weights.start()
                self._started.append(one.weights)

    def _end_started(self) -> None:
        """Gathers for layers that the backward pass did not reach."""
        for weights in self._started:
            if not weights.used_in_backward:
                weights.free()
        self._started.clear()

    def _forget_backward(self) -> None:
        """A backward pass failed on the way: what it left must not enter the next step."""
        self._callback, self._accumulated, self._kept_bytes = False, False, 0.0
        self._give_hooks_back()
        self._end_started()
        self.replica_gradients.forget()

    def _finish(self) -> None:
        """The backward pass is over."""
        self._callback, self._last = False, None
        self._give_hooks_back()
        self._end_started()
        accumulated, self._accumulated = self._accumulated, False
        if not accumulated:  # torch.autograd.grad by something else than weights
            return
        if self.sync:
            for layer in range(len(self.layers)):  # what earlier micro-batches left in layers this one did not reach
                self._reduce(layer)
        self.replica_gradients.wait()
        if not self.sync:
            return
        self._unstepped = True
        for experts in self.layers:
            for weight in experts.parameters():
                for hook in (getattr(weight, "_backward_hooks", None) or {}).values():
                    changed = hook(weight.grad) if weight.grad is not None else None
                    if changed is not None:
                        weight.grad = changed
                for hook in (getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values():
                    hook(weight)

    def _give_hooks_back(self) -> None:
        for weight, name, hooks in self._hooks:
            setattr(weight, name, hooks)
        self._hooks.clear()

    # ---- between steps -------------------------------------------------------------------------------------------

    def weights_changed(self) -> None:
        """What was gathered before is old."""
        self._drop_early()
        self._last = None

    def know(self, optimizer: torch.optim.Optimizer) -> None:
        """Its states move with owners, as long as it lives."""
        self.optimizers = [ref for ref in self.optimizers if ref() is not None]
        if not any(ref() is optimizer for ref in self.optimizers):
            self.optimizers.append(weakref.ref(optimizer))

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer that holds owned experts made a step: the first one after a backward pass ends the iteration."""
        self.weights_changed()
        self.know(optimizer)
        if not self._unstepped:
            return
        self._close_iteration()
        self.steps += 1
        sharding = self.settings.sharding
        if self.settings.window_s is None and self.steps in (3, 10):
            mine = torch.tensor([round(1e9 * (self._clock.median() or 0.0))], device=self.device)
            least = self._meet("optimizer step", numbers_X=mine).min()
            if least > 0:
                self.measured_window_s = float(least) / 1e9
                self._version += 1
        if sharding is None or not sharding.interval or self.steps % sharding.interval:
            return
        load_LE = self.history.mean_LE()
        if not load_LE.any():
            return
        current = np.array([experts.owner_E for experts in self.layers])
        planned = sharding.plan(load_LE, current, self.price(load_LE.sum(axis=1).mean()))
        if (planned != current).any():
            self._due = planned

    def _gradients_dropped(self) -> bool:
        """Whether gradients were set to None since the last backward pass: without a step, that ends an iteration too.

        The first step of an optimizer comes after the first iteration's last pass: before it, nothing else tells.
        """
        return all(weight.grad is None for experts in self.layers for weight in experts.owned().values())

    def _close_iteration(self) -> None:
        self._unstepped, self._kept_bytes = False, 0.0
        for layer in self.history.close():
            self._ahead.start(layer, self._version, self._early_plan(layer))

    def reshard(self, owner_LE: NDArray[np.int64]) -> int:
        """Give experts new owners, optimizer states with them; bytes this rank received. Between steps only."""
        flag = torch.tensor([int(bool(self.passes.open()))], device=self.device)
        owners = (("owners", zlib.crc32(owner_LE.tobytes())),)
        if self._meet("moving owners", numbers_X=flag, more=owners).any():
            raise OptionError("owners cannot move while a backward pass is to come")
        return self._move(owner_LE)

    def _move(self, owner_LE: NDArray[np.int64]) -> int:
        """A pass that is still open then raises in its backward."""
        if self.replica_gradients.waiting:
            raise OptionError("owners cannot move while replica gradients wait for a synchronised backward pass")
        self._due = None
        self._drop_early()
        optimizers = [optimizer for ref in self.optimizers if (optimizer := ref()) is not None]
        held = [one for one in self._followers if not isinstance(one, Schedule)]
        rows = [one for each in held for one in (each.values() if isinstance(each, Mapping) else each)]
        rows = list({id(one): one for one in rows if isinstance(one, ExpertRows)}.values())
        received = move_owners(self.layers, owner_LE, optimizers, rows, self.weights_group, self.device)
        for one in self._followers:
            if isinstance(one, Schedule):
                received += one._move(owner_LE)
        self.moved_bytes["reshard"] += received
        self.forget_held()
        return received

    def follow(self, what: Any) -> None:
        """A mapping or list of rows, or the run of a copy: it moves when owners do."""
        if not any(one is what for one in self._followers):
            self._followers.append(what)

    def forget_held(self) -> None:
        """Replicas that a policy keeps from step to step, and plans made ahead, start anew."""
        self.drivers = self._new_drivers()
        self._version += 1
        self._drop_early()

    def _drop_early(self) -> None:
        """What was gathered for a forward pass that did not come."""
        for weights in self._early.values():
            weights.free()
        self._early.clear()


class Begin:
    """The model's forward hook; a copy of the model has one of its own run."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, *_: Any) -> None:
        """A forward pass starts."""
        self.schedule.begin()


class _Link:
    """What a layer's step sees of its pass; it ends the pass when its backward is done."""

    def __init__(self, schedule: Schedule, one: Pass) -> None:
        self.schedule, self.one = schedule, one
        self.together = partial(schedule.together, one)
        self.banks, self.leaves = one.weights.banks, one.weights.leaves
        self.after_forward, self.before_backward = one.weights.after_forward, one.weights.before_backward

    def after_backward(self, grads: Any) -> None:
        self.one.weights.after_backward(grads)
        self.one.done = True
        self.schedule.previous_starts(self.one)
        self.one.before = None


@lru_cache(maxsize=64)
def _price(
    tokens: float,
    num_experts: int,
    cluster: Cluster,
    model: ModelSpec,
    rematerialise: bool,
    window_s: float | None,
    gradient_ratio: float,
    fan_out: bool,
) -> StepPrice:
    return training_price(tokens, num_experts, cluster, model, rematerialise=rematerialise, window_s=window_s,
                          gradient_ratio=gradient_ratio, fan_out=fan_out)  # fmt: skip
