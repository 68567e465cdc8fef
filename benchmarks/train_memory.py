"""Bytes on a rank in training: what each way of placing experts needs, and the batch that fits beside it.

Per parameter, mixed precision with Adam: 2 bytes of weights, 2 of gradient, 12 of states (32-bit weights and two
moments). A rank owns L * E / D experts (rounded up) with all three. Replicas of a step hold weights, and gradients
while they wait to be reduced:

    kept from forward to backward     weights of all layers, gradients of ``gradient_layers``
    re-materialised                   weights of ``in_flight`` layers at a time (the buffers are shared by all layers)
    kept for good (rearrangement)     weights, gradients and states of all layers

Hecate (arXiv 2502.02581, section 5) counts parameters, gradients and states so; its published totals follow with
``in_flight`` and ``gradient_layers`` of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.memory import GRADIENT_LAYERS, TrainingBytes
from poise.machine.model import ModelSpec
from poise.util.errors import OptionError


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on the fullest rank.

    Parameters
    ----------
    weights, gradients, states : of owned experts.
    dense : weights, gradients and states of everything else.
    replica_weights, replica_gradients, replica_states : of experts it does not own.
    """

    weights: float
    gradients: float
    states: float
    dense: float = 0.0
    replica_weights: float = 0.0
    replica_gradients: float = 0.0
    replica_states: float = 0.0

    @property
    def owned(self) -> float:
        """Experts it owns."""
        return self.weights + self.gradients + self.states

    @property
    def replicas(self) -> float:
        """Experts it does not own."""
        return self.replica_weights + self.replica_gradients + self.replica_states

    @property
    def total(self) -> float:
        """Everything but activations."""
        return self.owned + self.dense + self.replicas

    @property
    def overhead(self) -> float:
        """Replicas over owned experts: what plain expert parallelism would not need (dense parts left out)."""
        return self.replicas / self.owned


def training_memory(
    model: ModelSpec,
    num_devices: int,
    replicas_L: NDArray[Any],
    *,
    kept_L: NDArray[Any] | None = None,
    with_states: bool = False,
    in_flight: int = 2,
    gradient_layers: int = GRADIENT_LAYERS,
    sizes: TrainingBytes | None = None,
    dense_parameters: float = 0.0,
) -> RankMemory:
    """Bytes on the rank with most replicas.

    Parameters
    ----------
    model, num_devices : L, E and the size of an expert; D.
    replicas_L : int [L], replicas of each layer on that rank (0: plain expert parallelism).
    kept_L : bool [L], layers whose replicas live from forward to backward; the others are re-materialised. None: all.
        The last layer of a re-materialising schedule, kept too, lies in the shared buffers: leave it False here.
    with_states : replicas are kept for good, with gradients and states of their own (FlexMoE).
    in_flight : layers whose replicas lie in the shared buffers at once.
    gradient_layers : layers whose replica gradients wait at once.
    sizes : bytes a parameter.
    dense_parameters : parameters outside the routed experts, whole on every rank (data parallel).

    Raises
    ------
    OptionError : counts that are negative or not [L], or no layer in flight.
    """
    each = sizes or TrainingBytes()
    replicas = np.asarray(replicas_L, dtype=np.float64)
    layers = model.num_moe_layers
    kept = np.ones(layers, bool) if kept_L is None else np.asarray(kept_L, dtype=bool)
    if replicas.shape != (layers,) or kept.shape != (layers,) or replicas.min() < 0:
        raise OptionError(f"{model.name} has {layers} MoE layers, got {replicas.shape} replicas and {kept.shape} flags")
    if in_flight < 1 or gradient_layers < 1 or num_devices < 1:
        raise OptionError(
            f"devices and layers in flight must be at least 1, got {num_devices}, {in_flight}, {gradient_layers}"
        )
    owned = -(-layers * model.num_experts // num_devices) * model.expert_parameters
    per_replica = float(model.expert_parameters)
    if with_states:
        count = float(replicas.sum()) * per_replica
        extra = (count * each.weight, count * each.gradient, count * each.states)
    else:
        live = replicas[kept].sum() + np.sort(replicas[~kept])[::-1][:in_flight].sum()
        waiting = np.sort(replicas)[::-1][:gradient_layers].sum()
        extra = (float(live) * per_replica * each.weight, float(waiting) * per_replica * each.gradient, 0.0)
    every = each.weight + each.gradient + each.states
    return RankMemory(owned * each.weight, owned * each.gradient, owned * each.states, dense_parameters * every, *extra)


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that a token leaves on a rank between forward and backward, without re-computation.

    Attention, norms and residuals: ``per_hidden`` bytes an element of the hidden size and layer (arXiv 2205.05198,
    equation 1: 34 for a layer, 19 of them the dense network; scores are not stored). Experts, a (token, expert) pair:
    input and output (hidden size) and two inner activations, 2 bytes each, times the imbalance of the fullest rank.
    Output head: ``vocabulary`` logits in 16 and 32 bits.

    Parameters
    ----------
    per_hidden : see above.
    vocabulary : entries of the output head; 0: none.
    reserved_bytes : context, communication buffers and workspace.
    """

    per_hidden: float = 15.0
    vocabulary: int = 0
    reserved_bytes: float = 2e9

    def per_token(self, model: ModelSpec, imbalance: float) -> float:
        """Bytes a token of the rank's own batch, when its device computes ``imbalance`` times the mean."""
        pair = 2.0 * (2.0 * model.expert_width + 2.0 * model.expert_intermediate_size)
        dense = self.per_hidden * model.hidden_size * model.num_hidden_layers
        return dense + pair * model.top_k * imbalance * model.num_moe_layers + 6.0 * self.vocabulary


def largest_batch(
    memory_bytes: float,
    held: RankMemory,
    model: ModelSpec,
    sequence_length: int,
    *,
    imbalance: float,
    activations: Activations | None = None,
) -> int:
    """Sequences a rank that fit beside what it holds; 0 if none does.

    Parameters
    ----------
    memory_bytes : of a device.
    held : parameters, gradients, states and replicas.
    model, sequence_length : what a sequence is.
    imbalance : largest max / mean tokens that a layer reaches: the fullest device must not run out.
    activations : the model of activations.

    Raises
    ------
    OptionError : a size that is not above 0, or an imbalance below 1.
    """
    if not (memory_bytes > 0 and sequence_length >= 1 and imbalance >= 1):
        raise OptionError(
            f"memory, sequence length and imbalance must be above 0, 0 and at least 1, got {memory_bytes:g},"
            f" {sequence_length} and {imbalance:g}"
        )
    model_of = activations or Activations()
    left = memory_bytes - held.total - model_of.reserved_bytes
    return max(0, int(left / (model_of.per_token(model, imbalance) * sequence_length)))
