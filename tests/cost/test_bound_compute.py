"""Whole reads and filled slots against every split of a few tokens and every choice of replicas; loads under a loop."""

from itertools import combinations_with_replacement, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import few_or, load_batch, random_slots, tiny_cluster, tiny_model, with_constants

from poise.cost.bound import bound_terms
from poise.cost.bound_compute import filled_work, reads_bound
from poise.cost.compute import expert_seconds
from poise.cost.step import batch_cost
from poise.planning.placement import Placement
from poise.replay.serving import FastLoop, replay_steps
from poise.routing.batch import RoutingBatch
from poise.stepwise.registry import parse_policy

SEEDS = st.integers(0, 2**32 - 1)


def held_sets(devices: int) -> list[np.ndarray]:
    return [np.array(held) for held in product([0, 1], repeat=devices) if any(held)]


@given(SEEDS, st.integers(0, 3))
@settings(max_examples=few_or(500, 60), deadline=None)
def test_no_split_reads_fewer_weights(seed, spare):
    """Of every placement of four experts on two devices: even splits, and all splits into whole and half tokens."""
    rng = np.random.default_rng(seed)
    cluster = with_constants(tiny_cluster(rng, (1, 1)))
    model = tiny_model(load_batch(rng))
    load = rng.choice([0.0, 0.5, 1.0, 1.5, 2.0, 3.0], 4)
    slots = random_slots(rng, 4, 2, spare)
    one = float(expert_seconds(np.ones(1), cluster, model)[0])
    bound = reads_bound(load[None], one, slots, cluster.speed_D, spare=int(slots.sum()) - 4)[0]
    best = np.inf
    for sets in product(held_sets(2), repeat=4):
        count = np.array(sets)
        if (count.sum(axis=0) > slots).any():
            continue
        shares = [[held * n / held.sum()] + ([np.array([part, n - part]) for part in np.arange(0.0, n + 0.25, 0.5)]
                  if held.all() else []) for held, n in zip(sets, load, strict=True)]  # fmt: skip
        for parts in product(*shares):
            seconds = expert_seconds(np.array(parts), cluster, model).sum(axis=0) / cluster.speed_D
            best = min(best, float(seconds.max()))
    assert bound <= best * (1 + 1e-9)


def test_whole_reads_are_not_shared_out():
    """Five experts of a token on four devices: one reads two, where the mean is 1.25."""
    slots, speed = np.full(4, 3), np.ones(4)
    assert reads_bound(np.ones((1, 5)), 7.0, slots, speed, spare=0)[0] == 14.0
    assert reads_bound(np.full((1, 5), 8.0), 7.0, slots, speed, spare=7)[0] == 14.0
    assert reads_bound(np.ones((1, 5)), 7.0, slots, speed, spare=1)[0] == 7.0  # one of them may be halved
    assert reads_bound(np.full((1, 5), 0.9), 7.0, slots, speed, spare=0)[0] == 0.0
    assert reads_bound(np.ones((1, 5)), 7.0, slots, np.array([4.0, 1, 1, 1]), spare=0)[0] == 7.0


@given(SEEDS, st.integers(0, 5))
@settings(max_examples=few_or(500, 60), deadline=None)
def test_filled_slots_take_what_the_best_replicas_take(seed, spare):
    rng = np.random.default_rng(seed)
    cluster = with_constants(tiny_cluster(rng, (2, 1)))
    model = tiny_model(load_batch(rng))
    load = rng.choice([0.0, 0.4, 1.0, 2.0, 5.0, 20.0], (2, 4))
    weight = rng.dirichlet(np.ones(2))
    best = np.inf
    for more in combinations_with_replacement(range(4), spare):
        many = 1 + np.bincount(np.array(more, dtype=int), minlength=4)
        if many.max() <= cluster.num_devices:
            best = min(best, float(weight @ (many * expert_seconds(load / many, cluster, model)).sum(axis=1)))
    assert filled_work(load, weight, cluster, model, spare=spare) == pytest.approx(best, rel=1e-9)


def test_more_slots_than_copies_are_none():
    """Fails (and never ends) if the search for the least filling goes on where no expert takes another replica."""
    rng = np.random.default_rng(0)
    cluster, load = with_constants(tiny_cluster(rng, (2, 1))), rng.integers(1, 30, (2, 4)) * 1.0
    model, weight = tiny_model(load_batch(rng)), np.full(2, 0.5)
    assert filled_work(load, weight, cluster, model, spare=8) > 0
    with pytest.raises(AssertionError, match="9 slots more, 4 experts, 3 copies each"):
        filled_work(load, weight, cluster, model, spare=9)


def test_filled_slots_of_many_replicas_are_bounded_from_below(monkeypatch):
    rng = np.random.default_rng(0)
    cluster, load = with_constants(tiny_cluster(rng, (4, 4))), rng.integers(0, 30, (3, 5)) * 1.0
    model, weight = tiny_model(load_batch(rng)), np.full(3, 1 / 3)
    exact = filled_work(load, weight, cluster, model, spare=20)
    monkeypatch.setattr("poise.cost.bound_compute.FINE", 0)
    rough = filled_work(load, weight, cluster, model, spare=20)
    assert 0.5 * exact < rough <= exact


@given(SEEDS, st.sampled_from([(2,), (2, 1), (1, 1)]), st.sampled_from(["split", "poise", "full-replication"]))
@settings(max_examples=few_or(200, 12), deadline=None)
def test_a_loop_on_loads_stays_above_its_bound(seed, nodes, policy):
    """It keeps tokens at home, which a split that does not look at sources cannot."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes, measured=True)
    load = rng.integers(0, 40, (4, 1, 4)) * 1.0
    load[:, :, 0] += 1
    batch = RoutingBatch(load, np.full(4, 0.25), 1, np.zeros(1, np.int32))
    count = (rng.random((1, 4, cluster.num_devices)) < 0.4).astype(np.int32)
    count[0, np.arange(4), rng.integers(cluster.num_devices, size=4)] = 1
    got = replay_steps(batch, Placement.from_counts(count), FastLoop(parse_policy(policy), 4), cluster, tiny_model(batch),
                       traffic="home", warm_up=0)  # fmt: skip
    assert (got.bound_B <= got.step_seconds_B * (1 + 1e-9)).all()


def test_tokens_that_stay_at_home_take_less_than_homes_spread_evenly():
    cluster = tiny_cluster(np.random.default_rng(0), (2,), equal=True)
    batch = RoutingBatch(np.full((1, 1, 2), 8.0), np.ones(1), 1, np.zeros(1, np.int32))
    options = {"traffic": "home", "slots_D": np.array([2, 2])}
    blind, seeing = (bound_terms(batch, cluster, tiny_model(batch), blind=blind, **options) for blind in (True, False))
    assert seeing.dispatch_BL[0, 0] == cluster.dispatch_wire.start_s < blind.dispatch_BL[0, 0]
    cost = batch_cost(batch, np.ones((1, 2, 2), np.int64), cluster, tiny_model(batch), traffic="home", split="even")
    assert blind.dispatch_BL[0, 0] == pytest.approx(cost.dispatch_BL[0, 0])
