"""Memory in training: counted by hand, against the published totals, and the batch that fits beside it."""

import numpy as np
import pytest
from benchmarks.train_memory import Activations, largest_batch, training_memory
from hypothesis import given
from hypothesis import strategies as st

from poise.cost.memory import TrainingBytes, slots_that_fit
from poise.machine.model import ModelSpec
from poise.util.errors import OptionError

S, DEEP = ModelSpec.parse("gpt-moe-s"), ModelSpec.parse("bert-moe-deep")


def ring(model, replicas, kept, in_flight, gradient_layers):
    """Peak (weights, gradients) of replicas, layer by layer through a forward and a backward pass."""
    freed = sorted((r for r, k in zip(replicas, kept, strict=True) if not k), reverse=True)
    weights = sum(r for r, k in zip(replicas, kept, strict=True) if k) + sum(freed[:in_flight])
    gradients = sum(sorted(replicas, reverse=True)[:gradient_layers])
    return 2.0 * weights * model.expert_parameters, 2.0 * gradients * model.expert_parameters


@given(st.lists(st.integers(0, 9), min_size=12, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12),
       st.integers(1, 4), st.integers(1, 4))  # fmt: skip
def test_replicas_are_counted_as_they_live(replicas, kept, in_flight, gradient_layers):
    got = training_memory(S, 32, np.array(replicas), kept_L=np.array(kept), in_flight=in_flight,
                          gradient_layers=gradient_layers)  # fmt: skip
    assert (got.replica_weights, got.replica_gradients) == ring(S, replicas, kept, in_flight, gradient_layers)
    assert got.owned == 24 * S.expert_parameters * 16 and got.replica_states == 0
    everything = training_memory(S, 32, np.array(replicas), in_flight=in_flight, gradient_layers=gradient_layers)
    assert got.total <= everything.total  # freeing never needs more
    for_good = training_memory(S, 32, np.array(replicas), with_states=True)
    assert for_good.replicas == sum(replicas) * S.expert_parameters * 16


@pytest.mark.parametrize(("model", "slots"), [(S, 2), (DEEP, 2), (DEEP, 4)])
def test_rematerialised_poise_stays_within_five_percent_of_expert_parallelism(model, slots):
    layers = model.num_moe_layers
    plain = training_memory(model, 32, np.zeros(layers))
    got = training_memory(model, 32, np.full(layers, slots), kept_L=np.zeros(layers), in_flight=2, gradient_layers=2)
    assert plain.replicas == 0 and got.total <= 1.05 * plain.total
    # owned + (replicas a layer) x (layers in flight) x (parameter + gradient bytes)
    assert got.total == plain.total + slots * 2 * model.expert_parameters * 4


def test_the_published_totals_of_hecate():
    """Params 5.73 times expert parallelism's; total +64 %, with re-materialisation +11.6 %, 90.2 % less extra weights."""
    once = {"in_flight": 1, "gradient_layers": 1}
    plain = training_memory(S, 32, np.zeros(12))
    held = training_memory(S, 32, np.full(12, 9.46), **once)
    freed = training_memory(S, 32, np.full(12, 9.46), kept_L=np.zeros(12), **once)
    assert (held.weights + held.replica_weights) / plain.weights == pytest.approx(5.73, abs=0.01)
    assert held.overhead == pytest.approx(0.64, abs=0.005)
    assert 0.09 < freed.overhead < 0.116
    assert 1 - freed.replica_weights / held.replica_weights == pytest.approx(0.902, abs=0.02)


def test_experts_that_do_not_divide_and_other_precisions():
    got = training_memory(S, 31, np.zeros(12), sizes=TrainingBytes(4.0, 4.0, 8.0), dense_parameters=10.0)
    assert got.owned == 25 * S.expert_parameters * 16 and got.dense == 160


@given(st.floats(1e10, 1e11), st.floats(1.0, 6.0), st.floats(1.0, 6.0))
def test_the_largest_batch_fits_and_one_more_does_not(memory, one, other):
    held = training_memory(S, 32, np.full(12, 4))
    use = Activations(vocabulary=1000)
    count = largest_batch(memory, held, S, 2048, imbalance=one, activations=use)
    need = use.per_token(S, one) * 2048
    left = memory - held.total - use.reserved_bytes
    assert count * need <= left * (1 + 1e-12) and (count + 1) * need > left * (1 - 1e-12)
    low, high = sorted((one, other))
    assert largest_batch(memory, held, S, 2048, imbalance=low) >= largest_batch(memory, held, S, 2048, imbalance=high)


@given(st.floats(0, 3e9), st.booleans(), st.sampled_from((S, DEEP)))
def test_slots_fit_and_one_more_does_not(budget, again, model):
    slots, kept = slots_that_fit(budget, model, rematerialise=again), np.full(model.num_moe_layers, not again)

    def need(count):
        return training_memory(model, 32, np.full(model.num_moe_layers, count), kept_L=kept).replicas

    assert need(slots) <= budget * (1 + 1e-12)
    assert slots == model.num_experts or need(slots + 1) > budget * (1 - 1e-12)


def test_activations_by_hand():
    """12 layers: 15 bytes an element of 768, and two pairs of (768 + 1536) elements in and out, 2 bytes each."""
    assert Activations().per_token(S, 1.0) == 12 * (15 * 768 + 2 * 2 * 2 * (768 + 1536))
    assert largest_batch(1.0, training_memory(S, 32, np.zeros(12)), S, 2048, imbalance=1.0) == 0


def test_bad_numbers_are_refused():
    with pytest.raises(OptionError, match="12 MoE layers"):
        training_memory(S, 32, np.zeros(3))
    with pytest.raises(OptionError, match="in flight"):
        training_memory(S, 32, np.zeros(12), in_flight=0)
    with pytest.raises(OptionError, match="bytes a parameter"):
        TrainingBytes(weight=0.0)
    with pytest.raises(OptionError, match="at least 0 bytes"):
        slots_that_fit(-1.0, S, rematerialise=True)
    with pytest.raises(OptionError, match="in flight, got 0"):
        slots_that_fit(1e9, S, rematerialise=True, in_flight=0)
    with pytest.raises(OptionError, match="at least 1"):
        largest_batch(1e9, training_memory(S, 32, np.zeros(12)), S, 2048, imbalance=0.5)
