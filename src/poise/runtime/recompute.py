"""Activation checkpointing: which forward pass is computed again, and what its router says the second time."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def in_backward() -> bool:
    """Whether autograd is running: then a forward is a recomputation."""
    return int(torch._C._current_graph_task_id()) != -1


@dataclass(frozen=True, slots=True)
class Region:
    """Where a forward pass runs.

    Parameters
    ----------
    frames : what ``torch.utils.checkpoint`` (not reentrant) calls the regions around it, innermost first: the same
        objects in the forward pass and in the recomputation, so that a rank knows by itself, even without tokens, which
        of several open passes is computed again. Of nested regions, only the outermost has the same object both times.
    later : what is saved here is dropped, and computed again before its backward.
    """

    frames: tuple[Any, ...]
    later: bool


def checkpoint_region() -> Region:
    """Read from the saved-tensor hooks that checkpointing sets; another release of PyTorch may hide it there."""
    frames, later = [], False
    for depth, hooks in enumerate(_saved_tensor_hooks()):
        for cell in getattr(inspect.unwrap(hooks[0]), "__closure__", None) or ():
            content = cell.cell_contents
            frame = content() if isinstance(content, weakref.ref) else content
            if type(frame).__name__ == "_CheckpointFrame":
                frames.append(frame)
                later = later or (depth == 0 and frame is content)  # in the recomputation it is a weak reference
    return Region(tuple(frames), later)


def _saved_tensor_hooks() -> list[Any]:
    """All that are set, innermost first. Only that one can be read, so they are taken off one by one and put back."""
    api: Any = torch._C._autograd
    taken: list[Any] = []
    while (top := api._top_saved_tensors_default_hooks(True)) is not None:
        taken.append(top)
        if not api._saved_tensors_hooks_is_enabled():
            return taken
        api._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(taken):
        api._push_saved_tensors_default_hooks(pack, unpack)
    return taken


def places(ids_TK: Tensor, again_TK: Tensor) -> Tensor:
    """Where each of a token's experts stands in the router's second answer, int64 [T, K].

    An expert that it does not name the second time takes the place of one that is new, in order.
    """
    equal_TKK = ids_TK.unsqueeze(2) == again_TK.unsqueeze(1)
    known_TK, new_TK = equal_TKK.any(2), ~equal_TKK.any(1)
    free_TK = new_TK.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    turn_TK = ((~known_TK).cumsum(1) - 1).clamp(min=0)
    return torch.where(known_TK, equal_TKK.to(torch.int8).argmax(2), free_TK.gather(1, turn_TK))
