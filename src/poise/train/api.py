"""``fully_shard_experts``: experts of every MoE layer fully sharded and sparsely materialised, in place.

In the manner of PyTorch's ``fully_shard``, which takes the dense rest::

    run = fully_shard_experts(model, mesh=mesh, policy="poise", step_slots=2)
    fully_shard(model, mesh=mesh)                      # experts are left alone
    optimizer = torch.optim.AdamW(model.parameters())  # owners may move: optimizer states go with them
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from poise.cost.memory import TrainingBytes, slots_that_fit
from poise.cost.transfers import Form
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.runtime.alike import HOOKS
from poise.runtime.collectives import twin
from poise.stepwise.protocol import StepPolicy
from poise.stepwise.registry import as_policy
from poise.stepwise.sharding import ShardingPolicy
from poise.train.checkpoint import speak_of_experts
from poise.train.checks import flattened, ready
from poise.train.dispatched import pass_tokens_on
from poise.train.foresight import replay_routers
from poise.train.gradients import clip_grad_norm_
from poise.train.hooks import GRADIENT_HOOKS
from poise.train.machine import warn_of_rates
from poise.train.metrics import LayerMetrics
from poise.train.owned import stacked
from poise.train.ownership import Ownership
from poise.train.packing import Packing
from poise.train.regroup import MicroBatches
from poise.train.rollout import Rollout
from poise.train.rows import ExpertRows
from poise.train.schedule import Schedule
from poise.train.settings import Deployment, Settings, TrainingFlow
from poise.train.sharding import Begin, ShardedExperts
from poise.train.steps import attach, watch_optimizers
from poise.util.errors import OptionError

IDLE = (
    "experts of a list: one that gets no token has a gradient of zeros here and none in the unsharded model, so weight "
    "decay and momentum move it"
)


class FssdpExperts:
    """Handle of a model whose experts are sharded.

    Parameters
    ----------
    model : it.
    schedule : the run that its layers share.
    guessed : the devices, where policies reckon with another machine's rates (:func:`poise.train.machine.unknown`).
    """

    def __init__(self, model: nn.Module, schedule: Schedule, guessed: str = "") -> None:
        self.model, self.schedule, self.guessed = model, schedule, guessed
        self._replays = False  # the hooks that replay routing are on

    @property
    def metrics(self) -> list[LayerMetrics]:
        """Of the last forward pass, one a layer."""
        return self.schedule.metrics

    @property
    def owners(self) -> NDArray[np.int64]:
        """Owner of every expert, int64 [L, E]."""
        return np.array([experts.owner_E for experts in self.schedule.layers])

    def parameters(self) -> set[nn.Parameter]:
        """Owned expert weights: ``ignored_params`` for wrappers that ask."""
        return {weight for experts in self.schedule.layers for weight in experts.parameters()}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Name an optimizer whose states move with owners before its first step; later its steps make it known.

        Raises
        ------
        OptionError : it holds no sharded expert (it was built before they were sharded, or of another model), or it
            takes all parameters as one vector.
        """
        owned = {id(weight) for weight in self.parameters()}
        if not any(id(weight) in owned for group in optimizer.param_groups for weight in group["params"]):
            raise OptionError(
                f"{type(optimizer).__name__} holds none of the {len(owned)} sharded weights",
                hint="build the optimizer after fully_shard_experts",
            )
        attach(optimizer)

    def follow(self, tensors: nn.Module | Mapping[str, Tensor] | Iterable[Tensor]) -> None:
        """Name tensors that move with owners as optimizer states do: averages (EMA, SWA, Polyak), snapshots.

        Parameters
        ----------
        tensors : made of owned weights or their states by elementwise operations (``weight.detach().clone()``), in a
            mapping or list that is looked through at every move; or a copy of the model (``copy.deepcopy``,
            ``torch.optim.swa_utils.AveragedModel``), whose owners then move as the model's. The same on all ranks.

        Raises
        ------
        OptionError : nothing in it belongs to these experts.
        """
        if isinstance(tensors, nn.Module):
            found: list[Any] = [m.schedule for m in tensors.modules() if isinstance(m, ShardedExperts)]
            if not found or len(found[0].layers) != len(self.schedule.layers):
                raise OptionError(
                    f"{type(tensors).__name__} has {len(found)} sharded layers, the model {len(self.schedule.layers)}"
                )
            self.schedule.follow(found[0])
            return
        held = tensors if isinstance(tensors, (Mapping, list)) else list(tensors)
        origins = {id(experts.ownership.origin) for experts in self.schedule.layers}
        values = held.values() if isinstance(held, Mapping) else held
        if not any(isinstance(one, ExpertRows) and id(one.ownership.origin) in origins for one in values):
            raise OptionError(
                f"none of {len(held)} tensors is made of this model's sharded weights",
                hint="{name: weight.detach().clone() for name, weight in model.named_parameters()}",
            )
        self.schedule.follow(held)

    def weights_changed(self) -> None:
        """Tell, on every rank, that owned weights were changed by hand, as by an average of weights that is swapped in.

        Optimizer steps and ``load_state_dict`` are seen without it.
        """
        self.schedule.weights_changed()

    def reshard(self, owner_LE: NDArray[np.int64]) -> int:
        """Move owners now, between steps; bytes that this rank received. Collective.

        Raises
        ------
        OptionError, on every rank : a shape that is not [L, E], an owner that does not exist, or a backward pass still
            to come.
        """
        return self.schedule.reshard(owner_LE)

    def foresee(
        self, rollout: Rollout, micro_batches: Sequence[NDArray[np.int64]], *, replay: bool = True
    ) -> Iterator[int]:
        """Numbers of micro-batches whose routing a rollout has recorded, each while its own passes run. Collective.

        With ``policy="recorded"`` replicas and token splits of every micro-batch and layer are planned at once, on a
        thread; any other policy takes the record for its prediction. Owners, where the sharding policy moves them, are
        planned from the record too, at the first call and then every ``interval`` optimizer steps. Results are exact,
        whatever the record says.

        Parameters
        ----------
        rollout : what this rank has of it.
        micro_batches : of each, which recorded token every token of this rank is, int [T] or [B, S], -1: unknown
            (:meth:`poise.train.rollout.Rollout.rows`); as many on every rank.
        replay : the record replaces the router's choice of experts (``torch.topk`` over all of them, in the forward of
            the module that holds the experts); gate weights are the router's own for these. Unknown tokens go where the
            router sends them. False: the record is a forecast.

        Raises
        ------
        PoiseError : on every rank, what is wrong on one (:func:`poise.train.known.known_ahead`); in forward passes
            ModelError, on every rank, for tokens or experts a token that are not those of the record, and under
            ``replay`` for a router that was not made to follow it.
        """
        if replay and not self._replays:
            replay_routers(self.model)
            self._replays = True
        return self.schedule.foresee(rollout, micro_batches, replay=replay)

    def deal(self, rollout: Rollout, groups: MicroBatches) -> list[list[list[int]]]:
        """Requests of an optimizer step dealt anew to its micro-batches and ranks, by modelled time. Collective.

        Gradient accumulation is a sum, so that where a request runs changes nothing where the loss is normalised by the
        tokens (or requests) of the whole step. Chosen from: as given; evened out over micro-batches; dealt to the nodes
        whose experts they use; and, where a sharding policy by price is due, the same with owners that move at once
        (:mod:`poise.stepwise.dealing`). Every rank and micro-batch keeps its number of requests.

        Parameters
        ----------
        rollout : the whole step's, the same on every rank.
        groups : requests of every micro-batch and rank, ``groups[micro_batch][rank]``.

        Raises
        ------
        PoiseError : on every rank, what is wrong on one: a rollout of another model, groups of other ranks, requests
            named twice or not recorded, or whatever else fails while they are read and dealt.
        CommunicationError : ranks name other groups (shuffled with seeds of their own?) or hold other records of them.
        """
        return self.schedule.deal(rollout, groups)

    def set_policy(self, policy: str | StepPolicy, step_slots: int | None = None) -> None:
        """Change the policy between steps; results stay the same.

        Raises
        ------
        OptionError : no policy, or step slots below 0.
        """
        old = self.schedule.settings
        new = as_policy(policy)
        slots = old.step_slots if step_slots is None else step_slots
        if slots < 0:
            raise OptionError(f"step_slots must be at least 0, got {slots}")
        warn_of_rates(self.guessed, new)
        self.schedule.restart(replace(old, policy=new, step_slots=slots))

    def set_requires_gradient_sync(self, sync: bool) -> None:
        """False: replica gradients stay where they are until a backward pass with True (gradient accumulation).

        So each is sent once for all micro-batches that had it, and not once for each; ``accumulate_bytes`` limits what
        they take meanwhile. Gradients are whole after a backward pass with True; an optimizer step before is an error.
        """
        self.schedule.backward.sync = sync

    def set_gradient_divide_factor(self, factor: float) -> None:
        """What expert gradients are divided by: the number of ranks unless set (FSDP2's mean). 1: a sum."""
        if not factor > 0:
            raise OptionError(f"the divide factor must be above 0, got {factor}")
        self.schedule.backward.divide_factor = factor

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """See :func:`poise.train.gradients.clip_grad_norm_`."""
        return clip_grad_norm_(self.model, max_norm, norm_type)

    def memory(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Bytes of experts on this rank: owned weights, their gradients and states, and the peak of all else."""
        weights = self.parameters()
        states = optimizer.state if optimizer is not None else {}
        ledger = self.schedule.ledger
        return {
            "parameters": sum(weight.nbytes for weight in weights),
            "gradients": sum(weight.grad.nbytes for weight in weights if weight.grad is not None),
            "states": sum(
                value.nbytes for weight in weights for value in states.get(weight, {}).values()
                if isinstance(value, Tensor)
            ),
            "materialised peak": ledger.peak,
            **{f"peak: {kind}": nbytes for kind, nbytes in ledger.peak_parts.items()},
        }  # fmt: skip


def fully_shard_experts(
    model: nn.Module,
    *,
    mesh: DeviceMesh,
    policy: str | StepPolicy = "poise",
    step_slots: int | None = None,
    replica_bytes: float | None = None,
    sharding: str | ShardingPolicy | None = "even",
    rematerialise: bool | float = False,
    prefetch: int = 1,
    window: int = 5,
    cluster: Cluster | None = None,
    window_s: float | None = None,
    form: Form = "auto",
    mp_policy: Any = None,
    gather_dtype: torch.dtype | None = None,
    offload: bool = False,
    accumulate_bytes: float | None = None,
    traffic: TrainingFlow = "home",
    force_balance: bool = False,
    owners: NDArray[np.int64] | None = None,
) -> FssdpExperts:
    """Shard the experts of every MoE layer over a mesh, in place.

    Parameters
    ----------
    model : a Hugging Face MoE model (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V3, gpt-oss kind), torchtitan's (before its
        ``parallelize``), or any module with a child ``experts`` called as ``experts(tokens, ids, weights)``
        (:mod:`poise.runtime.moe`); may be on the meta device.
    mesh : 1-D, or 2-D (node, device in the node). Every rank has its own tokens.
    policy : name (with settings, ``hecate:overlap=8``) or object of :mod:`poise.stepwise`.
    step_slots : M, replicas a rank may hold of a layer beside the experts it owns; 2 without ``replica_bytes``.
    replica_bytes : memory a rank may spend on replicas of all layers and their gradients, in place of ``step_slots``.
    sharding : ``even``, or owners that are planned every 100 steps and move where modelled steps are faster with them,
        their move included: ``heterogeneous`` (Hecate's Algorithm 2), ``balanced`` (poise's), or an object
        (``Heterogeneous()`` moves whatever the published algorithm says): who owns what.
    rematerialise : True frees replicas after the forward pass and gathers them again (Hecate-RM); a number keeps
        those that pay most within so many bytes.
    prefetch : layers ahead whose replicas are gathered; 0: their gather is exposed.
    window : steps whose mean load is the prediction.
    cluster : the machine that policies reckon with; without it, nodes from the mesh or ``LOCAL_WORLD_SIZE`` and the
        datasheet rates of the GPUs, or, with a warning where a policy asks for them, those of an A100
        (:mod:`poise.train.machine`).
    window_s : seconds of attention that a gather can hide behind; without it, modelled first and measured on the run.
    form : how sparse collectives travel (:mod:`poise.cost.transfers`).
    mp_policy : FSDP2's ``MixedPrecisionPolicy``: ``param_dtype`` of materialised weights, ``reduce_dtype`` on the wire.
    gather_dtype : of weights on the wire, ``torch.bfloat16`` or ``torch.float8_e4m3fn``, where it has fewer bits than
        what is computed with: owners keep their weights, and owners and replicas alike compute with the rounded ones
        (:mod:`poise.train.packing`). None: as they are computed with.
    offload : owned weights, gradients and states stay on the CPU.
    accumulate_bytes : of gradient accumulation (:meth:`FssdpExperts.set_requires_gradient_sync`), memory a rank may
        spend on replica gradients that wait for the last micro-batch; what does not fit is reduced in the same backward
        pass, where one layer's gradients come on top. None: all wait.
    traffic : ``home``, a row for every (token, expert) pair, or ``home_device_dedup``: a token goes to a device once,
        for all of its experts there, and comes back as their weighted sum (:mod:`poise.runtime.once`). ``auto``: layer
        by layer, what is modelled faster for the loads of the first training pass of so many tokens (in powers of two)
        after a start or a move of owners.
    force_balance : replace the router's choice by an even one, to see what imbalance costs.
    owners : int64 [L, E], who owns what at first, in place of the sharding policy's even plan.

    Raises
    ------
    ModelError : no MoE layer of a known shape, layers that differ, experts whose own code computes something else, or
        another model or other options on another rank. OptionError : an option out of range, or a mesh that does not
        hold this rank. All but the last on every rank of the mesh, and the model is as it was.
    """
    given = {
        "policy": policy, "step_slots": step_slots, "replica_bytes": replica_bytes, "sharding": sharding,
        "rematerialise": rematerialise, "prefetch": prefetch, "window": window, "cluster": cluster,
        "window_s": window_s, "form": form, "mp_policy": mp_policy, "gather_dtype": gather_dtype, "offload": offload,
        "accumulate_bytes": accumulate_bytes, "traffic": traffic, "force_balance": force_balance, "owners": owners,
    }  # fmt: skip
    flat = flattened(mesh)
    tokens_group = flat.get_group()
    checked = ready(model, mesh, tokens_group, given)
    weights_group = _second_group(tokens_group)
    experts = checked.owner_LE.shape[1]
    found, kinds, owner_LE = checked.found, checked.kinds, checked.owner_LE
    warn_of_rates(checked.guessed, checked.policy, checked.sharding)
    if any(isinstance(module, nn.ModuleList) and checked.trained[name] for name, module in found.items()):
        warnings.warn(IDLE, stacklevel=2)
    layers: list[ShardedExperts] = []
    replaced: list[weakref.ref[nn.Parameter]] = []
    for number, (name, module) in enumerate(found.items()):
        weights = stacked(module, kinds[name])
        ownership = Ownership(flat, owner_LE[number], listed=isinstance(module, nn.ModuleList))
        new = ShardedExperts(kinds[name], weights, checked.trained[name], ownership)
        speak_of_experts(new)
        if offload and not any(weight.is_meta for weight in weights.values()):
            new.to("cpu")
        _take_gradient_hooks(new, module)
        replaced += [weakref.ref(weight) for weight in module.parameters()]
        for place in (name, *checked.again[name]):
            parent, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
            if kinds[name].name == "sorted":
                pass_tokens_on(model, place)
        for kind_of_hook in HOOKS:
            getattr(new, kind_of_hook).update(getattr(module, kind_of_hook))
        new._is_full_backward_hook = module._is_full_backward_hook
        new.train(module.training)
        new.stands_for(module)
        _hide(new)
        layers.append(new)
    stored = next(iter(layers[0].owned().values()))
    device = (
        torch.device(mesh.device_type, torch.cuda.current_device())
        if mesh.device_type == "cuda"
        else (torch.device(mesh.device_type))
    )
    compute = getattr(mp_policy, "param_dtype", None) or stored.dtype
    kind, top_k = next(iter(kinds.values())), checked.top_k
    reduced = getattr(mp_policy, "reduce_dtype", None) or compute
    sizes = _model(kind, experts, top_k, len(layers), compute)
    packing = None if gather_dtype in (None, compute) else Packing(gather_dtype)
    packed = 0.0 if packing is None else float(sum(packing.nbytes((1, *shape)) for shape in kind.shapes.values()))
    slots = 2 if step_slots is None else step_slots
    if replica_bytes is not None:
        each = TrainingBytes(compute.itemsize + packed / kind.numel, float(reduced.itemsize), 0.0)
        keeps = 0.0 if isinstance(rematerialise, bool) else float(rematerialise)  # these come on top of the buffers
        slots = slots_that_fit(max(0.0, replica_bytes - keeps), sizes, rematerialise=rematerialise is not False,
                               in_flight=max(2, prefetch + 1), sizes=each)  # fmt: skip
    settings = Settings(
        policy=checked.policy, step_slots=slots, window=window, prefetch=prefetch, rematerialise=rematerialise,
        sharding=checked.sharding, window_s=window_s, force_balance=force_balance,
        accumulate_bytes=accumulate_bytes, traffic=traffic,
    )  # fmt: skip
    deployment = Deployment(
        cluster=checked.machine, tokens_group=tokens_group, weights_group=weights_group, device=device,
        compute_dtype=compute, reduce_dtype=reduced, form=form, expert_numel=kind.numel,
        rank=dist.get_rank(tokens_group), packing=packing, packed_bytes=packed,
    )  # fmt: skip
    schedule = Schedule(list(layers), settings, deployment, sizes, top_k)
    for one in layers:
        one.schedule = schedule
    handle = FssdpExperts(model, schedule, checked.guessed)
    model.register_forward_pre_hook(Begin(schedule))
    names = [name for name, weight in model.named_parameters() if weight in handle.parameters()]
    model._ddp_params_and_buffers_to_ignore = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names]
    watch_optimizers(schedule, replaced)
    return handle


def _take_gradient_hooks(new: ShardedExperts, module: nn.Module) -> None:
    """Give the new weights the gradient hooks of the stacked weights they stand for."""
    for name, weight in module.named_parameters(recurse=False):
        for kind in GRADIENT_HOOKS:
            if getattr(weight, kind, None):
                setattr(new.owned()[name], kind, getattr(weight, kind))


_WEIGHTS_GROUPS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _second_group(first: Any) -> Any:
    """A communicator of the same ranks for weights, one a process group: each costs threads or device memory."""
    group = _WEIGHTS_GROUPS.get(first)
    if group is None:
        group = _WEIGHTS_GROUPS[first] = twin(first)
    return group


def _model(kind: Any, experts: int, top_k: int, layers: int, dtype: torch.dtype) -> ModelSpec:
    """Sizes for the policies' price, those of one expert from its weights."""
    size = float(torch.empty((), dtype=dtype).element_size())
    hidden, inner = kind.hidden, max(1, round(kind.numel / (kind.matrices * kind.hidden)))
    return ModelSpec("training", layers, tuple(range(layers)), experts, min(top_k, experts), hidden, inner,
                     kind.matrices, size, size, size, 2.0 * hidden)  # fmt: skip


def _hide(experts: ShardedExperts) -> None:
    """Mark experts as taken by another composable parallelism: FSDP2 passes over such modules."""
    from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem

    experts.__dict__.setdefault(REGISTRY_KEY, {})["replicate"] = RegistryItem()
