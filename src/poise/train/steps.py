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


def _steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepping[:] = []
    if any(isinstance(weight, ExpertRows) for weight in weights_of(optimizer)):
        speak_of_experts(optimizer)
        stepping[:] = [type(optimizer).__name__]
    held = {id(weight) for weight in weights_of(optimizer)}
    for run, replaced in list(_RUNS.items()):
        owned = {id(weight) for experts in run.layers for weight in experts.parameters()}
        old = {id(weight) for ref in replaced if (weight := ref()) is not None}
        if not owned & held and old & held:
            raise OptionError(
                f"{type(optimizer).__name__} holds {len(old & held)} weights that fully_shard_experts has replaced",
                hint="build the optimizer after fully_shard_experts",
            )


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepping[:] = []
    held = {id(weight) for weight in weights_of(optimizer)}
    for run in list(_RUNS):
        if any(id(weight) in held for experts in run.layers for weight in experts.parameters()):
            run.stepped(optimizer)
