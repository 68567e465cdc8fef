"""Bytes of replicas on a rank in training: weights, and gradients while they wait to be reduced.

    kept from forward to backward     weights of all layers, gradients of :data:`GRADIENT_LAYERS`
    re-materialised                   weights of ``in_flight`` layers at a time (the buffers are shared by all layers)

in_flight 2: the next layer's replicas are gathered while this one runs; poise's runtime frees first and needs 1. What
other ways of placing experts need beside that: benchmarks/train_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from poise.machine.model import ModelSpec
from poise.util.errors import OptionError

GRADIENT_LAYERS = 2
"""Layers whose replica gradients wait at once: beside a layer's own, as many arrive at owners."""


@dataclass(frozen=True, slots=True)
class TrainingBytes:
    """Bytes a parameter: of its weight, of its gradient, of the optimizer's states."""

    weight: float = 2.0
    gradient: float = 2.0
    states: float = 12.0

    def __post_init__(self) -> None:
        if not min(self.weight, self.gradient, self.states) >= 0 or self.weight == 0:
            raise OptionError(
                f"bytes a parameter must be at least 0, got {self.weight}, {self.gradient}, {self.states}"
            )


def slots_that_fit(
    budget_bytes: float,
    model: ModelSpec,
    *,
    rematerialise: bool,
    in_flight: int = 2,
    sizes: TrainingBytes | None = None,
) -> int:
    """Hecate's m: the most replicas a rank may hold of every layer within ``budget_bytes`` for all layers together.

    Parameters
    ----------
    rematerialise : replicas are freed after the forward pass; else those of all layers live until the backward.
    in_flight : layers whose replicas lie in the shared buffers at once, where they are re-materialised.
    sizes : bytes a parameter.

    Raises
    ------
    OptionError : a budget below 0, or no layer in flight.
    """
    if not budget_bytes >= 0:
        raise OptionError(f"the budget for replicas must be at least 0 bytes, got {budget_bytes}")
    if in_flight < 1:
        raise OptionError(f"at least one layer's replicas are in flight, got {in_flight}")
    each, layers = sizes or TrainingBytes(), model.num_moe_layers
    live, waiting = min(in_flight, layers) if rematerialise else layers, min(GRADIENT_LAYERS, layers)
    one = model.expert_parameters * (live * each.weight + waiting * each.gradient)
    return min(int(budget_bytes / one), model.num_experts)
