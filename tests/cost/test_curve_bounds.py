"""With a measured curve: the bounds against every placement and every split of a few tokens."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, tiny_cluster, tiny_model
from tests.test_curve import random_curve

from poise.cost.bound import bound_terms, compute_bound
from poise.cost.compute import expert_seconds
from poise.cost.step import batch_cost

SEEDS = st.integers(0, 2**32 - 1)


def with_curve(rng, model, nodes=(2, 1)):
    cluster = tiny_cluster(rng, nodes)
    object.__setattr__(
        cluster, "expert_curve", random_curve(rng, model.expert_parameters * rng.choice([0.5, 1.0, 2.0]))
    )
    return cluster


def splits(load, devices):
    """Every way to lay whole tokens of one expert on devices, and halves of them."""
    for parts in product(np.arange(0, load + 0.25, 0.5), repeat=devices - 1):
        if sum(parts) <= load:
            yield np.array([*parts, load - sum(parts)])


@given(SEEDS, st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_no_split_of_any_placement_lies_below_the_compute_bound(seed, spare):
    rng = np.random.default_rng(seed)
    cluster = with_curve(rng, model := tiny_model(load_batch(rng)), (1, 1))
    load = rng.integers(0, 6, 3).astype(float)
    slots = np.array([2, 1]) if spare == 0 else np.minimum(np.array([2, 1]) + rng.multinomial(spare, [0.5, 0.5]), 3)
    spare = int(slots.sum()) - 3
    bound = compute_bound(expert_seconds(load, cluster, model)[None], slots, cluster.speed_D, spare=spare)[0]
    best = np.inf
    for parts in product(*(list(splits(n, 2)) for n in load)):
        tokens_ED = np.array(parts)
        held = (tokens_ED > 0).sum(axis=0)
        idle = (load == 0).sum()
        if (held <= slots).all() and held.sum() + idle <= slots.sum():
            best = min(best, (expert_seconds(tokens_ED, cluster, model).sum(axis=0) / cluster.speed_D).max())
    assert bound <= best * (1 + 1e-9)


@given(SEEDS, st.sampled_from(["even", "exact"]))
@settings(max_examples=40, deadline=None)
def test_no_placement_lies_below_the_terms(seed, split):
    rng = np.random.default_rng(seed)
    batch = load_batch(rng, top_k=2, steps=2)
    model, devices, experts = tiny_model(batch), 3, batch.num_experts
    cluster = with_curve(rng, model)
    count = (rng.random((batch.num_layers, experts, devices)) < 0.4).astype(int)
    for layer, expert in product(range(batch.num_layers), range(experts)):
        count[layer, expert, rng.integers(devices)] = 1
    cost = batch_cost(batch, count, cluster, model, traffic="home", split=split)
    bound = bound_terms(batch, cluster, model, traffic="home", slots_D=count.sum(axis=1).max(axis=0))
    assert (bound.compute_BL <= cost.compute_BL * (1 + 1e-9)).all()
    assert (bound.seconds_BL <= cost.seconds_BL * (1 + 1e-9)).all()


def test_a_curve_that_per_token_rises_would_break_the_bound():
    """Why :mod:`poise.machine.curve` refuses it: half the tokens twice is faster than all at once."""
    convex = np.interp([10.0, 5.0], [0, 5, 10], [0, 1, 10])
    bound = compute_bound(np.array([[convex[0]]]), np.array([1, 1]), np.ones(2), spare=1)[0]
    assert bound > convex[1] and bound == pytest.approx(5)
