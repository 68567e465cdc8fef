"""Steps of optimizers: a run is told of those that hold its experts, by PyTorch's hooks for all optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from poise.train.rows import ExpertRows, stepping
from poise.train.schedule import Schedule
from poise.train.states import speak_of_experts, weights_of
from poise.util.errors import OptionError

_RUNS: weakref.WeakKeyDictionary[Schedule, Sequence[weakref.ref[nn.Parameter]]] = weakref.WeakKeyDictionary()
"""Every run, and the parameters that its experts have replaced."""
_WATCHED: list[Any] = []


def watch_optimizers(run: Schedule, replaced: Sequence[weakref.ref[nn.Parameter]] = ()) -> None:
    """Let the run know of every step of an optimizer that holds its experts.

    Two hooks for all runs, for good: to take one off while PyTorch goes through its hooks is an error.

    Parameters
    ----------
    run : it; told twice, it is watched once.
    replaced : parameters that its experts have replaced: an optimizer that holds those alone was built too early.
    """
    _RUNS[run] = replaced
    if not _WATCHED:
        _WATCHED.append(register_optimizer_step_pre_hook(_steps))
        _WATCHED.append(register_optimizer_step_post_hook(_stepped))


def attach(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer speak of all experts, and its states move with the owners of every run whose experts it holds.

    Raises
    ------
    OptionError, ModelError : as :func:`poise.train.states.speak_of_experts`.
    """
    speak_of_experts(optimizer)
    for run in _held_by(optimizer):
        run.moves.know(optimizer)


def _held_by(optimizer: torch.optim.Optimizer) -> list[Schedule]:
    """The runs whose experts it holds."""
    held = {id(weight) for weight in weights_of(optimizer)}
    return [run for run in list(_RUNS) if not held.isdisjoint(_owned_by(run))]


def _owned_by(run: Schedule) -> set[int]:
    """Which parameters are a run's experts. ``Module.parameters`` looks for modules in modules, and takes ten times as
    long, in every step of every optimizer.
    """
    return {id(weight) for experts in run.layers
            for weight in (experts.parameters() if experts._modules else experts._parameters.values())}  # fmt: skip


def _steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepping[:] = []
    weights = weights_of(optimizer)
    if any(isinstance(weight, ExpertRows) for weight in weights):
        speak_of_experts(optimizer)
        stepping[:] = [type(optimizer).__name__]
    held = {id(weight) for weight in weights}
    for run, replaced in list(_RUNS.items()):
        owns = not held.isdisjoint(_owned_by(run))
        old = {id(weight) for ref in replaced if (weight := ref()) is not None}
        if not owns and old & held:
            raise OptionError(
                f"{type(optimizer).__name__} holds {len(old & held)} weights that fully_shard_experts has replaced",
                hint="build the optimizer after fully_shard_experts",
            )
        waiting = run.backward.incomplete() if owns else 0
        if waiting:
            raise OptionError(
                f"{type(optimizer).__name__} makes a step while gradients of {waiting} of {len(run.layers)} layers "
                "wait for a synchronised backward pass",
                hint="run.set_requires_gradient_sync(True) before the backward pass of the last micro-batch; after "
                "zero_grad() they wait until ranks meet in the next pass",
            )


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepping[:] = []
    for run in _held_by(optimizer):
        run.stepped(optimizer)
