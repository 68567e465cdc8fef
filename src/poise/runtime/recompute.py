"""Activation checkpointing: which forward pass is computed again, and what its router says the second time."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor


def in_backward() -> bool:
    """Whether autograd is running: then a forward is a recomputation."""
    return int(torch._C._current_graph_task_id()) != -1


def checkpoint_frame() -> Any:
    """What ``torch.utils.checkpoint`` (not reentrant) calls this region, or None outside of one.

    It is the same object in the forward pass and in the recomputation, so that a rank knows by itself which of several
    open passes is computed again, even without tokens. It is read from the saved-tensor hook that checkpointing sets;
    under another hook (offloading of activations) or in another release of PyTorch it may not be found.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    for cell in getattr(inspect.unwrap(hooks[0]), "__closure__", None) or ():
        content = cell.cell_contents
        frame = content() if isinstance(content, weakref.ref) else content
        if type(frame).__name__ == "_CheckpointFrame":
            return frame
    return None


def places(ids_TK: Tensor, again_TK: Tensor) -> Tensor:
    """Where each of a token's experts stands in the router's second answer, int64 [T, K].

    An expert that it does not name the second time takes the place of one that is new, in order.
    """
    equal_TKK = ids_TK.unsqueeze(2) == again_TK.unsqueeze(1)
    known_TK, new_TK = equal_TKK.any(2), ~equal_TKK.any(1)
    free_TK = new_TK.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    turn_TK = ((~known_TK).cumsum(1) - 1).clamp(min=0)
    return torch.where(known_TK, equal_TKK.to(torch.int8).argmax(2), free_TK.gather(1, turn_TK))
