"""State dicts of optimizers that hold sharded experts speak of all experts."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from poise.train.rows import ExpertRows, plain
from poise.train.shards import own_rows, shards_of
from poise.util.errors import OptionError

_SPEAKING: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers whose state dicts speak of all experts."""


def speak_of_experts(optimizer: torch.optim.Optimizer) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of an optimizer speak of all experts; convert states that it has.

    Raises
    ------
    OptionError : it takes all parameters as one vector. ModelError : states of another number of experts were loaded.
    """
    if optimizer in _SPEAKING:
        return
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptionError(
            "LBFGS takes all parameters of a process as one vector, and ranks have different ones",
            hint="use an optimizer that treats parameters one by one",
        )
    for weight in weights_of(optimizer):
        if isinstance(weight, ExpertRows) and optimizer.state.get(weight):
            optimizer.state[weight] = _taken(weight, optimizer.state[weight])
    optimizer.register_state_dict_post_hook(_show)
    optimizer.register_load_state_dict_pre_hook(_take)
    _SPEAKING.add(optimizer)


def weights_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    """All parameters that an optimizer holds."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _show(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return _each(optimizer, state_dict, _shown)


def _take(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return _each(optimizer, state_dict, _taken)


def _each(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], make: Callable[[Any, dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """A state dict with the states of expert weights made anew; the inner dicts are the optimizer's own."""
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    states = dict(state_dict["state"])
    for number, weight in zip(numbers, weights_of(optimizer), strict=False):  # the optimizer refuses others
        if isinstance(weight, ExpertRows) and states.get(number):
            states[number] = make(weight, states[number])
    return {**state_dict, "state": states}


def _shown(weight: ExpertRows, states: dict[str, Any]) -> dict[str, Any]:
    axes, rows = len(weight.shape), weight.shape[0]
    out = dict(states)
    for key, value in states.items():
        if not isinstance(value, Tensor) or not plain(value).dim():
            continue
        if plain(value).dim() != axes or value.shape[0] != rows:
            raise OptionError(
                f"optimizer state {key!r} of shape {tuple(value.shape)} does not belong to {rows} experts",
                hint="use an optimizer whose states have the shape of the parameter",
            )
        out[key] = shards_of(value, value.ownership if isinstance(value, ExpertRows) else weight.ownership)
    return out


def _taken(weight: ExpertRows, states: dict[str, Any]) -> dict[str, Any]:
    out = dict(states)
    for key in sorted(states):
        value = states[key]
        if isinstance(value, Tensor) and plain(value).dim():
            made_here = type(value) is Tensor and value.shape[0] == weight.shape[0]
            out[key] = value if made_here else own_rows(value, weight.ownership, f"optimizer state {key!r}")
    return out


@torch.no_grad()  # type: ignore[untyped-decorator]
def full_optimizer_state_dict(optimizer: Any) -> dict[str, Any] | None:
    """The state dict of the unsharded optimizer on the CPU of rank 0 (None elsewhere), one state at a time. Collective.

    ``optimizer.load_state_dict`` takes it on every rank, at any number of ranks. Wrappers of an optimizer are fine.
    """

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: whole(one) for key, one in value.items()}
        if isinstance(value, DTensor):
            value = value.full_tensor()
        return value.detach().cpu().clone() if first and isinstance(value, Tensor) else value

    first = dist.get_rank() == 0
    shown = optimizer.state_dict()
    out = {**shown, "state": whole(shown["state"])}
    return out if first else None
