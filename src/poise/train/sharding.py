"""Experts of one layer, owned whole by ranks: the module that stands in for ``experts``, and moving owners.

Ownership is at expert granularity and any plan over all layers is allowed (:mod:`poise.stepwise.sharding`). A rank's
experts are stacked in parameters [n, ...], by expert number, that know which experts they are
(:mod:`poise.train.rows`): ragged ownership is never shown as a ``Shard(0)`` DTensor, whose offsets would be wrong.
``state_dict`` speaks of all experts (:mod:`poise.train.shards`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from poise.runtime.collectives import Batch, next_tag
from poise.runtime.experts import Bank, ExpertKind, inputs_of
from poise.train.rows import ExpertRows, Ownership, plain, plainly, rows_of
from poise.util.errors import ModelError, OptionError


class LayerRunner(Protocol):
    """Who runs a layer: the schedule that all sharded layers of a model share."""

    device: torch.device
    compute_dtype: torch.dtype
    tokens_group: Any
    weights_group: Any

    def run(self, experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One layer, forward, of whatever leading shapes; [T, d]."""
        ...

    def weights_changed(self) -> None:
        """What was gathered before is old."""
        ...


def stacked(experts: nn.Module, kind: ExpertKind) -> dict[str, Tensor]:
    """All experts' weights, name -> [E, ...], from a fused module or a list of modules."""
    if isinstance(experts, nn.ModuleList):
        return {name: torch.stack([dict(one.named_parameters())[name].detach() for one in experts])
                for name in kind.shapes}  # fmt: skip
    return {name: weight.detach() for name, weight in experts.named_parameters(recurse=False)}


def _taken(name: str) -> ModelError:
    return ModelError(
        f"{name} of sharded experts is not what they were sharded with: replaced, taken away, or computed from others "
        "(parametrisation, pruning, an adapter)",
        hint="adapt other modules; experts' weights change in place, or before fully_shard_experts",
    )


class ShardedExperts(nn.Module):
    """The experts that one rank owns, called as Hugging Face calls ``experts``.

    Parameters
    ----------
    kind : how an expert computes.
    weights : all experts' weights, name -> [E, ...] (or on the meta device); this rank keeps its rows.
    trainable : names of the weights that are trained.
    ownership : the owner of every expert.
    """

    def __init__(
        self, kind: ExpertKind, weights: dict[str, Tensor], trainable: list[str], ownership: Ownership
    ) -> None:
        super().__init__()
        self.kind, self.ownership = kind, ownership
        self.num_experts = len(ownership.owner_E)
        self._attribute = {name: name.replace(".", "__") for name in kind.shapes}
        for name in kind.shapes:
            row = rows_of(weights[name][ownership.index(weights[name].device)].clone(), ownership)
            self.register_parameter(self._attribute[name], nn.Parameter(row, requires_grad=name in trainable))
        self.schedule: LayerRunner | None = None
        self.number = -1
        self._fixed: frozenset[str] = frozenset()
        self._inputs = ["hidden_states", "top_k_index", "top_k_weights"]

    def stands_for(self, experts: nn.Module) -> None:
        """Be called as ``experts``, and refuse to be given what it had: its code runs with the constants of before."""
        self._inputs = inputs_of(experts)
        had = {key for key in (*vars(experts), *experts._modules) if not key.startswith("_") and key != "training"}
        self._fixed = frozenset(had - set(vars(self)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_fixed", ()):
            raise ModelError(f"{name} of sharded experts cannot be changed", hint="set it before fully_shard_experts")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("_attribute", {}).values():
            raise _taken(name)
        super().__delattr__(name)

    def _weight(self, name: str) -> Any:
        weight = self._parameters.get(self._attribute[name])
        if not isinstance(weight, ExpertRows):
            raise _taken(name)
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedExperts:
        """Of a run of its own (:meth:`poise.train.schedule.Schedule.__deepcopy__`), with all of its layers."""
        if id(self) not in memo:
            out = memo[id(self)] = object.__new__(ShardedExperts)
            rest = {key: value for key, value in self.__dict__.items() if key != "schedule"}
            out.__dict__.update(copy.deepcopy(rest, memo), schedule=None)
            out.schedule = copy.deepcopy(self.schedule, memo)
        copied: ShardedExperts = memo[id(self)]
        return copied

    @property
    def owner_E(self) -> NDArray[np.int64]:
        """Rank of each expert, int64 [E]."""
        return self.ownership.owner_E

    @property
    def mine(self) -> list[int]:
        """The experts that this rank owns."""
        return self.ownership.mine

    @property
    def listed(self) -> bool:
        """Whether the unsharded experts are a list of modules."""
        return self.ownership.listed

    def owned(self) -> Bank:
        """Parameters of this rank, name -> [n, ...]."""
        return {name: self._weight(name) for name in self._attribute}

    def rows(self) -> Bank:
        """The same as ordinary tensors outside of any graph, to compute with."""
        return {name: plain(weight) for name, weight in self.owned().items()}

    @property
    def trainable(self) -> list[str]:
        """Names of the weights that are trained."""
        return [name for name, weight in self.owned().items() if weight.requires_grad]

    def gradient(self, name: str) -> Tensor:
        """Gradient of an owned weight, zeros until something is added: every expert gets one in every step."""
        weight = self._weight(name)
        with plainly():
            if weight.grad is None:
                weight.grad = rows_of(torch.zeros_like(weight), self.ownership)
            grad: Tensor = weight.grad.detach()
        return grad

    def takes(self, name: str, grad: Tensor) -> bool:
        """Whether a new gradient can become the weight's own without a copy: the first of a step, of the same type."""
        weight = self._weight(name)
        with plainly():
            return weight.grad is None and grad.dtype == weight.dtype and grad.device == weight.device

    def add_gradient(self, name: str, grad: Tensor | None, scale: float) -> None:
        """Add ``scale * grad``."""
        weight = self._weight(name)
        if grad is not None and self.takes(name, grad):
            with plainly():
                weight.grad = rows_of(grad.contiguous().mul_(scale), self.ownership)
            return
        into = self.gradient(name)
        if grad is not None:
            into.add_(grad.to(into.device), alpha=scale)

    @property
    def needs_copies(self) -> bool:
        """Owned weights are computed with in another type or on another device than they are stored in."""
        assert self.schedule is not None
        run = self.schedule
        return any(weight.dtype != run.compute_dtype or weight.device != run.device for weight in self.owned().values())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """Tokens [T, d] (or [..., d]), expert ids and weights [T, K]; the weighted sum of the experts, [T, d].

        By name they are called as in the module before sharding.
        """
        if len(given) + len(named) != 3 or set(named) != set(self._inputs[len(given) :]):
            raise ModelError(
                f"experts called with {len(given)} inputs and {sorted(named)}, not with {', '.join(self._inputs)}"
            )
        hidden_states, top_k_index, top_k_weights = *given, *(named[name] for name in self._inputs[len(given) :])
        if self.schedule is None:
            raise ModelError("these experts belong to no run", hint="fully_shard_experts sets them up")
        if self.training and self.kind.random:
            raise ModelError(
                "these experts draw random numbers in training (dropout, noise): they may be evaluated only",
                hint="model.eval(), or set their probability to 0 before fully_shard_experts",
            )
        self.kind.follow(self.training)
        return self.schedule.run(self, hidden_states, top_k_index, top_k_weights).view(hidden_states.shape)

    def extra_repr(self) -> str:
        """Which experts lie here."""
        return f"{self.kind.name}, experts={self.num_experts}, owned here={self.mine}"


def move_owners(
    layers: list[ShardedExperts],
    owner_LE: NDArray[np.int64],
    optimizers: list[torch.optim.Optimizer],
    followers: Sequence[ExpertRows],
    group: Any,
    device: torch.device,
) -> int:
    """Give every expert its new owner, optimizer states, gradients and what follows with it; bytes this rank received.

    Optimizer states that have one row an expert owned here go along; others (a step count) stay.

    Raises
    ------
    OptionError : on every rank, if on any a state has neither one row an expert nor a single value; nothing moves then.
    ModelError : on every rank: a follower's rows are from before an earlier move.
    """
    rank, received = dist.get_rank(group), 0
    _check_states(layers, optimizers, group, device)
    for experts in layers:
        for one in followers:
            experts.ownership.check(one.ownership)
    for experts, owner_E in zip(layers, owner_LE, strict=True):
        if (experts.owner_E == owner_E).all():
            continue
        moving = np.flatnonzero(experts.owner_E != owner_E)
        ownership = experts.ownership.moved(owner_E)
        old, new = experts.mine, ownership.mine
        tables = [
            one for weight in experts.owned().values() for one in _tables(weight, ownership, len(old), optimizers)
        ]
        tables += [_in_place(one, ownership) for one in followers if one.ownership.origin is ownership.origin]
        operations, after, landing, tag = [], [], [], next_tag(group)
        for tensor, put in tables:
            into = tensor.new_empty((len(new), *tensor.shape[1:]))
            for e in set(new) & set(old):
                into[new.index(e)] = tensor[old.index(e)]
            for e in moving.tolist():
                if experts.owner_E[e] == rank:
                    peer = dist.get_global_rank(group, int(owner_E[e]))
                    operations.append(dist.P2POp(dist.isend, tensor[old.index(e)].to(device), peer, group, tag))
                elif owner_E[e] == rank:
                    peer = dist.get_global_rank(group, int(experts.owner_E[e]))
                    row = into[new.index(e)]
                    here = row if row.device == device else row.to(device)  # offloaded rows travel by the device
                    landing.append((row, here))
                    operations.append(dist.P2POp(dist.irecv, here, peer, group, tag))
                    received += row.nbytes
            after.append((put, into))
        Batch(operations, group).wait()
        for row, here in landing:
            if here is not row:
                row.copy_(here)
        for put, into in after:
            put(into)
        experts.ownership = ownership
    return received


def _check_states(
    layers: list[ShardedExperts], optimizers: list[torch.optim.Optimizer], group: Any, device: torch.device
) -> None:
    problem: OptionError | None = None
    try:
        for experts in layers:
            for weight in experts.owned().values():
                _states(weight, len(experts.mine), optimizers)
    except OptionError as error:
        problem = error
    flag = torch.tensor([problem is not None], dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    if problem is not None:
        raise problem
    if flag.item():
        raise OptionError(
            "optimizer states of another rank do not belong to single experts",
            hint="use an optimizer whose states have the shape of the parameter",
        )


def _tables(
    weight: Any, ownership: Ownership, rows: int, optimizers: list[torch.optim.Optimizer]
) -> list[tuple[Tensor, Any]]:
    """What has one row an expert: the weight, its gradient, its optimizer states; and how to put it back."""

    def put_grad(into: Tensor) -> None:
        with plainly():
            weight.grad = rows_of(into, ownership)

    with plainly():
        gradient = weight.grad
        weight.grad = None  # a gradient must have its weight's shape at all times
    out = [_in_place(weight, ownership)]
    for state, key in _states(weight, rows, optimizers):
        out.append(
            (plain(state[key]), lambda into, state=state, key=key: state.__setitem__(key, rows_of(into, ownership)))
        )
    if gradient is not None:
        out.append((plain(gradient), put_grad))
    return out


def _in_place(rows: ExpertRows, ownership: Ownership) -> tuple[Tensor, Any]:
    """Rows that stay the same object, whoever holds it."""

    def put(into: Tensor) -> None:
        with plainly():
            rows.data = into
        rows.ownership = ownership

    return plain(rows), put


def _states(weight: Any, rows: int, optimizers: list[torch.optim.Optimizer]) -> list[tuple[dict[str, Any], str]]:
    """Optimizer states that have one row an expert: where they are kept, by name."""
    out = []
    for optimizer in optimizers:
        state = optimizer.state.get(weight, {})
        for key in sorted(state):
            value = plain(state[key]) if isinstance(state[key], Tensor) else None
            if value is not None and value.dim() > 0:
                if value.dim() != len(weight.shape) or value.shape[0] != rows:
                    raise OptionError(
                        f"optimizer state {key!r} of shape {tuple(value.shape)} does not belong to {rows} experts",
                        hint="use an optimizer whose states have the shape of the parameter",
                    )
                out.append((state, key))
    return out
