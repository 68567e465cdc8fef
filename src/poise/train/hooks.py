"""Hooks on gradients of sharded experts: they run once a step, when the gradient is complete.

Autograd would call them in every layer's backward, before replicas' gradients have come. So they are taken off a
layer's weights when its backward begins and put back, and called, when the backward pass is over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn

from poise.util.errors import ModelError

GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Of a weight, by ``register_hook`` and ``register_post_accumulate_grad_hook``."""


class GradientHooks:
    """Those of the layers whose backward runs."""

    def __init__(self) -> None:
        self._taken: list[tuple[nn.Parameter, str, Any]] = []

    @staticmethod
    def unfit(weights: Iterable[nn.Parameter], sync: bool) -> ModelError | None:
        """What is wrong with hooks of a layer whose backward is to begin: one on a gradient that more than one backward
        pass makes. ``sync``: gradients are complete after this one. A rank may have such a hook alone.
        """
        for weight in weights:
            if getattr(weight, "_backward_hooks", None) and (weight.grad is not None or not sync):
                return ModelError(
                    "a hook on the gradient of sharded experts would see more than one backward pass",
                    hint="set gradients to None before each, or change them by hand before the optimizer step",
                )
        return None

    def take_off(self, weights: Iterable[nn.Parameter]) -> None:
        """A layer's backward begins."""
        for weight in weights:
            for name in GRADIENT_HOOKS:
                hooks = getattr(weight, name, None)
                if hooks:
                    self._taken.append((weight, name, hooks))
                    setattr(weight, name, OrderedDict())

    def put_back(self) -> None:
        """The backward pass is over, or has failed."""
        for weight, name, hooks in self._taken:
            setattr(weight, name, hooks)
        self._taken.clear()

    @staticmethod
    def call(weights: Iterable[nn.Parameter]) -> None:
        """Gradients are complete."""
        for weight in weights:
            for hook in (getattr(weight, "_backward_hooks", None) or {}).values():
                changed = hook(weight.grad) if weight.grad is not None else None
                if changed is not None:
                    weight.grad = changed
            for hook in (getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values():
                hook(weight)
