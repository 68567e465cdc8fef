"""Owners of experts change: weights, gradients, optimizer states and whatever follows them go to the new owners."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from poise.runtime.collectives import Batch, Operation, next_tag
from poise.train.agree import agree
from poise.train.owned import OwnedExperts
from poise.train.ownership import Ownership
from poise.train.rows import ExpertRows, plain, plainly, rows_of
from poise.train.settings import Deployment
from poise.util.errors import OptionError


class OwnerMoves:
    """What moves with the owners of a run.

    Parameters
    ----------
    layers : owned experts of every layer.
    deployment : their ranks.
    """

    def __init__(self, layers: Sequence[OwnedExperts], deployment: Deployment) -> None:
        self.layers, self.deployment = layers, deployment
        self.optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._followers: list[Any] = []

    def know(self, optimizer: torch.optim.Optimizer) -> None:
        """Its states move with owners, as long as it lives."""
        self.optimizers = [ref for ref in self.optimizers if ref() is not None]
        if not any(ref() is optimizer for ref in self.optimizers):
            self.optimizers.append(weakref.ref(optimizer))

    def follow(self, held: Mapping[Any, Tensor] | list[Tensor]) -> None:
        """The rows in a mapping or list move with owners; it is looked through at every move."""
        if not any(one is held for one in self._followers):
            self._followers.append(held)

    def move(self, owner_LE: NDArray[np.int64]) -> int:
        """Give experts these owners; bytes this rank received. Errors as in :func:`move_owners`."""
        optimizers = [optimizer for ref in self.optimizers if (optimizer := ref()) is not None]
        held = [one for each in self._followers for one in (each.values() if isinstance(each, Mapping) else each)]
        rows = list({id(one): one for one in held if isinstance(one, ExpertRows)}.values())
        group, device = self.deployment.weights_group, self.deployment.device
        return move_owners(self.layers, owner_LE, optimizers, rows, group, device)


def move_owners(
    layers: Sequence[OwnedExperts],
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
    ModelError : on every rank, if on any a follower's rows are from before an earlier move, or a weight was replaced.
    """
    rank, received = dist.get_rank(group), 0
    agree(lambda: (_check(layers, optimizers, followers), {}), group)
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
                    operations.append(Operation(True, tensor[old.index(e)].to(device), int(owner_E[e]), tag))
                elif owner_E[e] == rank:
                    row = into[new.index(e)]
                    here = row if row.device == device else row.to(device)  # offloaded rows travel by the device
                    landing.append((row, here))
                    operations.append(Operation(False, here, int(experts.owner_E[e]), tag))
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


def _check(
    layers: Sequence[OwnedExperts], optimizers: list[torch.optim.Optimizer], followers: Sequence[ExpertRows]
) -> bool:
    for experts in layers:
        experts.check_rows()
        for weight in experts.owned().values():
            _states(weight, len(experts.mine), optimizers)
        for one in followers:
            experts.ownership.check(one.ownership)
    return True


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
    """Rows, and how to put new ones into the same object, whoever holds it."""

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
