"""When things happen: the one object that all sharded layers of a model share.

Forward   gather of layer l starts when layer l - 1 is done, so it runs under the attention of the same block; the
          first one starts with the model. Counts are exchanged after the gate, the policy plans, what it adds is
          fetched in sight, tokens are dispatched.
Backward  reduction of layer l and (re-materialisation) the gather of layer l - 1 start when layer l's experts are
          done and run under its attention's backward; layer l - 1 first waits for both. So the replicas of one
          layer, with their gradients, are all that lives at once.
End       a callback of the engine waits for the last reduction.

Hecate (arXiv 2502.02581) section 3.2. No policy here: holders and splits come from ``policies/``.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from poise.cluster import Cluster
from poise.cost.route import locality_rows
from poise.cost.weights import StepPrice, training_price
from poise.errors import ModelError, OptionError
from poise.modelspec import ModelSpec
from poise.policies.plan import LayerView, StepPlan, StepPolicy
from poise.policies.rematerialise import layers_to_keep
from poise.policies.sharding import ShardingPolicy
from poise.runtime.dispatch import Exchange, all_counts, make_exchange
from poise.runtime.layer import Inner, LayerStep, RunExperts
from poise.runtime.recompute import checkpoint_frame, in_backward, places
from poise.runtime.transfers import Form
from poise.train.materialize import Ledger, Materialised, Reduction
from poise.train.sharding import ShardedExperts, move_owners

RECENT = 20
"""Steps of exact loads that are kept for predictions."""


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
    top_k: int


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """What one layer did in one forward pass, the same on all ranks.

    Parameters
    ----------
    layer : number among the MoE layers.
    tokens_D : pairs computed on each rank.
    owner_tokens_D : pairs each rank would have computed without replicas (plain expert parallelism on these owners).
    replicas : experts gathered, over all ranks.
    gathered_bytes : they in bytes; re-gathering for the backward costs the same again.
    """

    layer: int
    tokens_D: NDArray[np.int64]
    owner_tokens_D: NDArray[np.int64]
    replicas: int
    gathered_bytes: int

    @property
    def overload(self) -> float:
        """Max / mean pairs over the ranks."""
        return float(self.tokens_D.max() / max(1e-9, self.tokens_D.mean()))

    @property
    def owner_overload(self) -> float:
        """The same without replicas."""
        return float(self.owner_tokens_D.max() / max(1e-9, self.owner_tokens_D.mean()))


@dataclass(eq=False, slots=True, weakref_slot=True)
class Pass:
    """One layer in one forward pass: what its backward, or its recomputation under checkpointing, needs again."""

    layer: int
    ids_TK: Tensor
    way: Exchange
    weights: Materialised
    before: weakref.ref[Pass] | None
    frame: weakref.ref[Any] | None
    inner: Inner = field(default_factory=Inner)
    done: bool = False


class Schedule:
    """See the module docstring.

    Parameters
    ----------
    layers : sharded experts in the order they run.
    settings, cluster, model : what to do, and the sizes that the policy reckons with.
    tokens_group, weights_group : two communicators of the same ranks: dispatch does not queue behind weights.
    compute_dtype, reduce_dtype : of materialised weights and of gradients on the wire.
    device : where experts are computed.
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
        self.optimizers: list[torch.optim.Optimizer] = []
        self.steps = 0
        self.measured_window_s: float | None = settings.window_s
        self._recent = [deque[NDArray[np.float64]](maxlen=RECENT) for _ in layers]
        self._early: dict[int, Materialised] = {}
        self._held: list[NDArray[np.bool_] | None] = [None] * len(layers)
        self._passes: list[weakref.ref[Pass]] = []
        self._reductions: list[Reduction] = []
        self._grad_bytes = [0] * len(layers)
        self._kept_grads: list[dict[int, list[Tensor]]] = [{} for _ in layers]
        self._kept_ED: list[NDArray[np.bool_] | None] = [None] * len(layers)
        self._callback = False
        self._due: NDArray[np.int64] | None = None
        self._keep_L = np.zeros(len(layers), bool)
        self._last_bytes_L, self._last_s_L = np.zeros(len(layers)), np.zeros(len(layers))
        self._seen_L = np.zeros(len(layers), np.int64)
        self._left_at: Any = None
        self._windows: deque[tuple[Any, Any]] = deque(maxlen=RECENT)
        for number, experts in enumerate(layers):
            experts.schedule, experts.number = self, number

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert on the wire."""
        return float(self.layers[0].kind.numel * torch.empty((), dtype=self.compute_dtype).element_size())

    # ---- forward -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A forward pass of the model starts."""
        if in_backward():
            return
        self._drop_early()
        if self._callback:
            self._forget_backward()
        self.metrics = []
        self._left_at = None
        if self._due is not None:
            self.reshard(self._due)
        self._choose_kept()
        for layer in range(min(max(1, self.settings.prefetch), len(self.layers))):
            self._fetch_early(layer)

    def run(self, experts: ShardedExperts, x_Td: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """One layer, forward."""
        frame = checkpoint_frame()
        if in_backward():
            one = self._replay(experts, ids_TK, frame)
        else:
            if self._left_at is not None:
                self._windows.append((self._left_at, _now(x_Td)))
            one = self._plan(experts, ids_TK, frame)
        trainable = [weight for weight in experts.owned().values() if weight.requires_grad]
        graph = torch.is_grad_enabled() and (x_Td.requires_grad or bool(trainable))
        step = LayerStep(
            experts.kind, one.way, ids_TK.shape[1], self.tokens_group, _Link(self, one),
            one.weights.counts(one.way.count_E), one.inner,
        )  # fmt: skip
        recomputed = in_backward()
        x = x_Td.to(self.compute_dtype) if x_Td.dtype != self.compute_dtype else x_Td
        y_Nd = RunExperts.apply(step, graph and (frame is None or recomputed), recomputed, x, *trainable)
        if not graph:
            one.weights.free()
            one.done = True
        self._left_at = _now(y_Nd)
        y_TKd = y_Nd.view(*ids_TK.shape, y_Nd.shape[1])
        if frame is not None:  # recorded now, so that the recomputation can put swapped experts back
            weights_TK = weights_TK.gather(1, places(one.ids_TK, ids_TK))
        return (y_TKd * weights_TK.unsqueeze(-1).to(y_TKd.dtype)).sum(dim=1).to(x_Td.dtype)

    def _forced(self, ids_TK: Tensor) -> Tensor:
        """The router's choice, or, to compare with, the same number of tokens for every expert."""
        if not self.settings.force_balance:
            return ids_TK
        experts = self.layers[0].num_experts
        turn = torch.arange(ids_TK.numel(), device=ids_TK.device) + self.rank * ids_TK.numel()
        return (turn % experts).view(ids_TK.shape)

    def _plan(self, experts: ShardedExperts, given_TK: Tensor, frame: Any) -> Pass:
        layer, ids_TK = experts.number, self._forced(given_TK)
        load_SE = all_counts(ids_TK, experts.num_experts, self.tokens_group)
        weights = self._early.pop(layer, None) or self._materialise(layer)
        view = self.view(layer, load_SE.sum())
        policy = self.settings.policy
        plan = policy.after_gate(view, weights.early_ED, load_SE)
        plan.check(view, load_SE, unbounded=getattr(policy, "unbounded", False))
        rows = plan.rows_SED
        if rows is None:
            rows = locality_rows(load_SE, plan.quota_ED, self.cluster.node_D)
        weights.complete(plan.holders_ED, plan.quota_ED > 0)
        if getattr(policy, "keeps_in_training", policy.keeps):
            self._held[layer] = plan.holders_ED
        way = make_exchange(ids_TK, rows, self.rank, weights.slots)
        one = Pass(layer, given_TK, way, weights, None, None if frame is None else weakref.ref(frame))
        self._note(experts, load_SE, plan, weights)
        if torch.is_grad_enabled():
            self._passes = [ref for ref in self._passes if (old := ref()) is not None and not old.done]
            if layer and self._passes:
                before = self._passes[-1]()
                one.before = self._passes[-1] if before is not None and before.layer == layer - 1 else None
            self._passes.append(weakref.ref(one))
        return one

    def _note(self, experts: ShardedExperts, load_SE: NDArray[np.int64], plan: StepPlan, weights: Materialised) -> None:
        load_E = load_SE.sum(axis=0)
        self._recent[experts.number].append(load_E.astype(np.float64))
        self._seen_L[experts.number] += 1
        gathered = int(weights.gathered_count * self.expert_bytes)
        if not isinstance(self.settings.rematerialise, bool):
            extra_D = np.zeros(self.cluster.num_devices, np.int64)
            for part in weights.parts:
                extra_D += part.plan.links_DD(len(extra_D)).sum(axis=0)
            self._last_bytes_L[experts.number] = extra_D.max() * self.expert_bytes
            seconds = sum(part.plan.seconds(self.cluster, self.expert_bytes) for part in weights.parts)
            hidden = 2.0 * self.price(load_E.sum()).window_s
            self._last_s_L[experts.number] = max(0.0, 2.0 * seconds - hidden) - max(0.0, seconds - hidden)
        self.moved_bytes["gather"] += gathered
        owner_tokens = np.bincount(experts.owner_E, weights=load_E, minlength=self.cluster.num_devices)
        self.metrics.append(
            LayerMetrics(experts.number, plan.quota_ED.sum(axis=0), owner_tokens.astype(np.int64),
                         weights.gathered_count, gathered)
        )  # fmt: skip

    def _replay(self, experts: ShardedExperts, ids_TK: Tensor, frame: Any) -> Pass:
        """The pass that activation checkpointing computes again: a router may flip ties, plan and splits must not.

        Of several open passes it is the one of this checkpoint; of several of it, the one with the most equal ids.
        """
        known = [
            one for ref in self._passes
            if (one := ref()) is not None and one.layer == experts.number and one.ids_TK.shape == ids_TK.shape
        ]  # fmt: skip
        # one that is done comes back when its graph was kept
        found = [one for one in known if frame is not None and one.frame is not None and one.frame() is frame]
        found = found or [one for one in known if not one.done]
        if not found:
            raise ModelError(
                f"layer {experts.number} is computed in the backward pass, but no forward pass of it is open",
                hint="checkpoint with use_reentrant=False",
            )
        same = [int((one.ids_TK == ids_TK).sum()) if len(found) > 1 else 0 for one in found]
        return found[max(range(len(found)), key=lambda i: (same[i], i))]

    def view(self, layer: int, pairs: float | None = None) -> LayerView:
        """What the policy may look at."""
        experts = self.layers[layer]
        shape = (experts.num_experts, self.cluster.num_devices)
        static = np.zeros(shape, bool)
        static[np.arange(shape[0]), experts.owner_E] = True
        recent = self._recent[layer]
        history = np.array(recent) if recent else np.zeros((0, shape[0]))
        total = pairs if pairs is not None else (history[-1].sum() if len(history) else 1.0)
        load_E = history[-self.settings.window :].mean(axis=0) if len(history) else np.ones(shape[0])
        if not load_E.any():
            load_E = np.ones(shape[0])
        held = self._held[layer]
        return LayerView(
            static, static if held is None else held, load_E * (total / load_E.sum()), history[-8:],
            np.zeros(shape, bool), self.settings.step_slots, int(self._seen_L[layer]), layer, self.price(total),
        )  # fmt: skip

    def price(self, pairs: float) -> StepPrice:
        """Machine, model and window; the tokens count in powers of two, so that it seldom changes."""
        tokens = 2.0 ** round(np.log2(max(1.0, pairs / self.settings.top_k)))
        return _price(tokens, self.layers[0].num_experts, self.cluster, self.model,
                      bool(self.settings.rematerialise), self.measured_window_s)  # fmt: skip

    def _materialise(self, layer: int) -> Materialised:
        early_ED = self.settings.policy.before_gate(self.view(layer))
        return Materialised(self.layers[layer], self, early_ED)

    def _fetch_early(self, layer: int) -> None:
        if layer < len(self.layers) and layer not in self._early:
            self._early[layer] = self._materialise(layer)

    def forward_done(self, weights: Materialised) -> None:
        """Experts of a layer have run: free, and fetch for the next."""
        if in_backward():
            return
        layer = weights.experts.number
        if self.settings.rematerialise is not False and not self._keep_L[layer]:
            weights.free()
        if self.settings.prefetch:
            self._fetch_early(layer + self.settings.prefetch)

    def _choose_kept(self) -> None:
        """Layers whose replicas stay until their backward: all, the last one only, or those that pay most."""
        budget = self.settings.rematerialise
        self._keep_L = np.zeros(len(self.layers), bool)
        self._keep_L[-1] = True
        if isinstance(budget, bool) or not self._last_bytes_L.any():
            return
        self._keep_L = layers_to_keep(self._last_bytes_L, self._last_s_L, float(budget))

    # ---- backward ------------------------------------------------------------------------------------------------

    def backward_starts(self, weights: Materialised) -> None:
        """A layer's backward begins: earlier reductions end first, so that one layer's gradients live at once."""
        if not self._callback:
            self._callback = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._wait_reductions()

    def backward_done(
        self, weights: Materialised, own: dict[str, Tensor | None], replicas: dict[int, list[Tensor]], nbytes: int
    ) -> None:
        """A layer's experts have their gradients: add the owned ones, send the others home."""
        experts, scale = weights.experts, 1.0 / self.divide_factor
        for name, grad in own.items():
            into = experts.gradient(name)
            if grad is not None:
                into.add_(grad.to(into.device), alpha=scale)
        sent = {e: [_scaled(row, scale, self.reduce_dtype) for row in rows] for e, rows in replicas.items()}
        if self.reduce_dtype != self.compute_dtype:  # copies in the wider type took their place
            copied = sum(row.nbytes for rows in sent.values() for row in rows)
            self.ledger.add("replica gradients", copied - nbytes)
            nbytes = copied
        self._grad_bytes[experts.number] += nbytes
        active_ED = weights.used_ED.copy()
        kept = self._kept_grads[experts.number]
        for e, rows in sent.items():
            if e in kept:
                for into, row in zip(kept[e], rows, strict=True):
                    into.add_(row)
            else:
                kept[e] = rows
        before = self._kept_ED[experts.number]
        active_ED = active_ED if before is None else active_ED | before
        if not self.sync:
            self._kept_ED[experts.number] = active_ED
            return
        self._kept_grads[experts.number], self._kept_ED[experts.number] = {}, None
        reduction = Reduction(experts, self, active_ED, kept, self._grad_bytes[experts.number])
        self._grad_bytes[experts.number] = 0
        self.moved_bytes["reduce"] += int(reduction.count * self.expert_bytes)
        self._reductions.append(reduction)

    def previous_starts(self, one: Pass) -> None:
        """Gather for the backward of the layers before, under this layer's attention."""
        for _ in range(self.settings.prefetch):
            before = one.before() if one.before is not None else None
            if before is None:
                return
            if not before.done:
                before.weights.start()
            one = before

    def _wait_reductions(self) -> None:
        for reduction in self._reductions:
            reduction.wait()
        self._reductions.clear()

    def _forget_backward(self) -> None:
        """A backward pass failed on the way: what it left must not enter the next step."""
        self._callback = False
        for reduction in self._reductions:
            reduction.discard()
        self._reductions.clear()
        self.ledger.add("replica gradients", -sum(self._grad_bytes))
        self._grad_bytes = [0] * len(self.layers)
        self._kept_grads, self._kept_ED = [{} for _ in self.layers], [None] * len(self.layers)

    def _finish(self) -> None:
        """The backward pass is over."""
        self._callback = False
        self._wait_reductions()
        if self.sync:
            for experts in self.layers:
                for weight in experts.owned().values():
                    for hook in (getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values():
                        hook(weight)

    # ---- between steps -------------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """An optimizer step was made: see whether owners are to move at the next forward pass."""
        self.steps += 1
        sharding = self.settings.sharding
        if self.settings.window_s is None and self.steps in (3, 10):
            self._measure_window()
        if sharding is None or not sharding.interval or self.steps % sharding.interval or not self._recent[0]:
            return
        load_LE = np.array([np.mean(recent, axis=0) for recent in self._recent])
        current = np.array([experts.owner_E for experts in self.layers])
        planned = sharding.plan(load_LE, current, self.price(load_LE.sum(axis=1).mean()))
        if (planned != current).any():
            self._due = planned

    def reshard(self, owner_LE: NDArray[np.int64]) -> int:
        """Give experts new owners, optimizer states with them; bytes this rank received. Between steps only."""
        if self._passes and any((one := ref()) is not None and not one.done for ref in self._passes):
            raise OptionError("owners cannot move while a backward pass is to come")
        if any(kept is not None for kept in self._kept_ED):
            raise OptionError("owners cannot move while replica gradients wait for a synchronised backward pass")
        self._due = None
        self._drop_early()
        received = move_owners(self.layers, owner_LE, self.optimizers, self.weights_group)
        self.moved_bytes["reshard"] += received
        self.forget_held()
        return received

    def forget_held(self) -> None:
        """Replicas that a policy keeps from step to step start anew."""
        self._held = [None] * len(self.layers)
        self._drop_early()

    def _drop_early(self) -> None:
        """What was gathered for a forward pass that did not come."""
        for weights in self._early.values():
            weights.free()
        self._early.clear()

    def _measure_window(self) -> None:
        """Least median time between layers over the ranks: what a gather can hide behind."""
        if not self._windows:
            return
        mine = torch.tensor(
            [float(np.median([_seconds(*window) for window in self._windows]))], dtype=torch.float64, device=self.device
        )
        dist.all_reduce(mine, op=dist.ReduceOp.MIN, group=self.tokens_group)
        self.measured_window_s = float(mine.item())


class _Link:
    """What a layer's step sees of its pass; it ends the pass when its backward is done."""

    def __init__(self, schedule: Schedule, one: Pass) -> None:
        self.schedule, self.one = schedule, one
        self.banks, self.leaves = one.weights.banks, one.weights.leaves
        self.after_forward, self.before_backward = one.weights.after_forward, one.weights.before_backward

    def after_backward(self, grads: Any) -> None:
        self.one.weights.after_backward(grads)
        self.one.done = True
        self.schedule.previous_starts(self.one)


def _now(like: Tensor) -> Any:
    """Now, in the work of a tensor's device."""
    if like.is_cuda:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _scaled(row: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return row.to(dtype) if scale == 1.0 else row.to(dtype).mul_(scale)


@lru_cache(maxsize=64)
def _price(
    tokens: float, num_experts: int, cluster: Cluster, model: ModelSpec, rematerialise: bool, window_s: float | None
) -> StepPrice:
    return training_price(tokens, num_experts, cluster, model, rematerialise=rematerialise, window_s=window_s)
