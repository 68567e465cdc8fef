"""Owners over all layers, which layers keep their replicas, and expert parallelism."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import tiny_cluster
from tests.stepwise.step_cases import random_case, run

from poise.cost.weights import training_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.stepwise.methods.expert_parallelism import ExpertParallelism
from poise.stepwise.rematerialise import layers_to_keep
from poise.stepwise.sharding import (
    MEAN_STEPS,
    Balanced,
    Even,
    Heterogeneous,
    check_sharding,
    even_sharding,
    heterogeneous_sharding,
    lasting_load,
    moves,
    owned_ED,
)
from poise.util.errors import OptionError, PlacementError

SEEDS = st.integers(0, 2**32 - 1)


@given(st.integers(1, 7), st.integers(1, 20), st.integers(1, 9))
def test_even_sharding_is_even_in_each_layer_and_over_all(layers, experts, devices):
    owner = even_sharding(layers, experts, devices)
    check_sharding(owner, devices)
    assert (np.diff(owner, axis=1) >= 0).all()  # contiguous blocks
    for row in owner:
        count = np.bincount(row, minlength=devices)
        assert count.max() - count.min() <= 1
    np.testing.assert_array_equal(owned_ED(owner[0], devices).sum(axis=1), 1)


@given(SEEDS, st.integers(0, 12), st.sampled_from([(2, 2), (3,), (2, 1), (1, 1, 2)]))
@settings(max_examples=60, deadline=None)
def test_algorithm_2_gives_every_device_its_slots(seed, overlap, nodes):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    load = rng.exponential(size=(int(rng.integers(1, 5)), int(rng.integers(1, 12)))) ** 3
    owner = heterogeneous_sharding(load, overlap, cluster)
    check_sharding(owner, cluster.num_devices)
    np.testing.assert_array_equal(owner, heterogeneous_sharding(load * 7, overlap, cluster))  # scale does not matter


def algorithm_2(load, t, devices_of_node):
    """Steps 1 to 3 as they are printed, literally and slowly, equal speeds; J stays -1."""
    layers, experts = load.shape
    devices = sum(len(node) for node in devices_of_node)
    slots = [layers * experts // devices + (d < layers * experts % devices) for d in range(devices)]
    owner = [[-1] * experts for _ in range(layers)]
    for layer in sorted(range(layers), key=lambda i: (-max(load[i]), i)):
        of = [0.0] * devices
        order = sorted(range(experts), key=lambda e, row=load[layer]: (-row[e], e))
        for e in order[t:]:
            open_nodes = [n for n in devices_of_node if any(slots[d] for d in n)]
            node = min(open_nodes, key=lambda n: (sum(of[d] for d in n) / len(n), sum(slots[d] for d in n), n[0]))
            d = min((d for d in node if slots[d]), key=lambda d: (of[d], slots[d], d))
            owner[layer][e] = d
            of[d] += load[layer][e]
            slots[d] -= 1
    return np.array(owner)


@given(SEEDS, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_algorithm_2_is_the_printed_one(seed, overlap):
    rng = np.random.default_rng(seed)
    cluster = Cluster.uniform(2, 2)
    load = rng.integers(1, 1000, (3, 8)).astype(float)
    got = heterogeneous_sharding(load, overlap, cluster)
    wanted = algorithm_2(load, overlap, [(0, 1), (2, 3)])
    placed = wanted >= 0
    np.testing.assert_array_equal(got[placed], wanted[placed])
    assert (~placed).sum() == 3 * overlap


def test_a_heavy_expert_stands_alone_and_the_other_layer_makes_up_for_it():
    """One heavy expert a layer: it stands alone, and its device makes up for it in the other layer."""
    load = np.array([[100.0, 1, 1, 1], [50.0, 1, 1, 1]])
    owner = heterogeneous_sharding(load, 0, Cluster.uniform(1, 2))
    assert (owner[0] == owner[0, 0]).sum() == 1 and (owner[0] == owner[0, 1]).sum() == 3


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_moves_turn_the_old_owners_into_the_new(seed):
    rng = np.random.default_rng(seed)
    old, new = rng.integers(0, 4, (2, 3, 5))
    out = old.copy()
    for layer, expert, source, target in moves(old, new):
        assert out[layer, expert] == source != target
        out[layer, expert] = target
    np.testing.assert_array_equal(out, new)


def test_bad_owners_are_refused():
    with pytest.raises(PlacementError, match="device 0 owns 3 experts, device 1 owns 1"):
        check_sharding(np.array([[0, 0, 0, 1]]), 2)
    with pytest.raises(PlacementError, match="owners reach"):
        check_sharding(np.array([[0, 2]]), 2)
    with pytest.raises(PlacementError, match="whole numbers"):
        check_sharding(np.array([0.5]), 2)
    with pytest.raises(PlacementError, match="cannot be compared"):
        moves(np.zeros((1, 2)), np.zeros((2, 1)))
    with pytest.raises(OptionError, match="at least 1"):
        even_sharding(0, 2, 2)
    with pytest.raises(OptionError, match="finite"):
        heterogeneous_sharding(np.array([[np.nan, 1.0]]), 0, Cluster.uniform(1, 2))
    with pytest.raises(OptionError, match="overlap"):
        heterogeneous_sharding(np.ones((1, 2)), -1, Cluster.uniform(1, 2))


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_sharding_policies_are_pure_and_even_over_all_layers(seed):
    rng = np.random.default_rng(seed)
    cluster, model = Cluster.uniform(2, 2), ModelSpec.generic(6, 2, np.arange(3))
    price = training_price(4096, 6, cluster, model)
    load, now = rng.exponential(size=(3, 6)) ** 2, even_sharding(3, 6, 4)
    for policy in (Even(), Heterogeneous(), Heterogeneous(overlap=2), Balanced(), Balanced(gain=0.1)):
        new = policy.plan(load, now, price)
        check_sharding(new, 4)
        np.testing.assert_array_equal(new, policy.plan(load, now, price))


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_expert_parallelism_sends_every_token_to_an_owner(seed):
    view, load_SE = random_case(np.random.default_rng(seed), replicas=False)
    plan = run(ExpertParallelism(), view, load_SE)
    np.testing.assert_array_equal(plan.quota_ED, load_SE.sum(axis=0)[:, None] * view.static_ED)


def best_value(size, value, budget):
    best = 0.0
    for keep in product([False, True], repeat=len(size) - 1):
        taken = np.flatnonzero([*keep, False])
        if size[taken].sum() <= budget:
            best = max(best, value[taken].sum())
    return best


@given(SEEDS, st.integers(1, 10), st.booleans())
@settings(max_examples=80, deadline=None)
def test_the_layers_kept_save_most_seconds(seed, layers, equal):
    rng = np.random.default_rng(seed)
    size = np.full(layers, 3.0) if equal else rng.integers(0, 20, layers).astype(float)
    value = rng.integers(0, 20, layers) * 1e-3
    budget = float(rng.integers(0, 60))
    keep = layers_to_keep(size, value, budget)
    assert keep[-1] and size[:-1][keep[:-1]].sum() <= budget
    assert value[:-1][keep[:-1]].sum() == pytest.approx(best_value(size, value, budget))
    np.testing.assert_array_equal(keep, layers_to_keep(size, value, budget))


def test_all_layers_are_kept_under_an_endless_budget_and_bad_numbers_are_refused():
    assert layers_to_keep(np.ones(40), np.ones(40), np.inf).all()
    assert layers_to_keep(np.ones(24), np.ones(24), 11.0).sum() == 12
    for size, value, budget in (
        ([1.0], [1.0, 2.0], 1),
        ([], [], 1),
        ([-1.0], [1.0], 1),
        ([1.0], [np.inf], 1),
        ([1.0], [1.0], -1),
    ):
        with pytest.raises(OptionError):
            layers_to_keep(np.array(size), np.array(value), budget)


def test_owners_are_planned_from_the_mean_of_the_last_steps():
    load = np.arange(1.0, 2 * MEAN_STEPS + 1)[:, None, None] * [[1.0, 3.0]]
    np.testing.assert_array_equal(lasting_load(load), load[MEAN_STEPS:].mean(axis=0))
    np.testing.assert_array_equal(lasting_load(load[:3]), [[2.0, 6.0]])
    np.testing.assert_array_equal(lasting_load(load[:0]), [[1.0, 1.0]])
