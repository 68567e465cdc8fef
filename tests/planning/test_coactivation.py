"""Swaps by co-activation: every exchange against brute force, and what none may break."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, random_count, random_slots, tiny_batch, tiny_cluster, tiny_model, token_batch

from poise.machine.cluster import Cluster
from poise.planning.methods import coactivation, eplb
from poise.planning.problem import PlacementProblem
from poise.util.errors import NoResultError


def random_pairs(rng, experts):
    pairs = np.triu(rng.integers(0, 9, (experts, experts)), 1)
    return pairs + pairs.T


def kept_by_hand(count, pairs, group):
    """Go through every pair of experts and every pair of their slots."""
    total = 0.0
    for e, f in combinations(range(len(count)), 2):
        slots_e, slots_f = (np.repeat(np.arange(len(group)), count[x]) for x in (e, f))
        meet = [group[a] == group[b] for a, b in product(slots_e, slots_f)]
        total += pairs[e, f] * np.mean(meet)
    return total


def random_problem(seed, nodes=(2, 2), *, experts=6, layers=2, spare=3, top_k=2, even=False, equal=False):
    rng = np.random.default_rng(seed)
    devices = sum(nodes)
    batch = tiny_batch(rng, devices=devices, experts=experts, layers=layers, top_k=top_k, tokens=(9, 0, 7))
    slots = np.full(devices, -(-(experts + spare) // devices)) if even else random_slots(rng, experts, devices, spare)
    return PlacementProblem(batch, tiny_cluster(rng, nodes, equal=equal), tiny_model(batch), slots)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_kept_pairs_and_device_loads_by_hand(seed):
    rng = np.random.default_rng(seed)
    count, pairs, load = random_count(rng, 1, 5, 4)[0], random_pairs(rng, 5), rng.random(5)
    for group in (np.arange(4), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])):
        assert coactivation.kept(count, pairs, group) == pytest.approx(kept_by_hand(count, pairs, group))
    want = [sum(load[e] / count[e].sum() for e in range(5) if count[e, d]) for d in range(4)]
    np.testing.assert_allclose(coactivation.device_load(count, load), want)


@given(st.integers(0, 10_000), st.sampled_from([(2, 2), (2, 1), (1, 1, 2)]))
@settings(max_examples=60, deadline=None)
def test_one_exchange_of_devices_is_the_best_of_all(seed, nodes):
    problem = random_problem(seed, nodes, equal=True)
    rng = np.random.default_rng(seed)
    devices, node = problem.num_devices, problem.cluster.node_D
    count, pairs, load = random_count(rng, 1, 6, devices)[0], random_pairs(rng, 6), rng.permutation(6) + rng.random(6)
    problem = replace(problem, slots_D=np.maximum(count.sum(axis=0), 2) + rng.integers(0, 2, devices))

    def value(content):
        each = load / count.sum(axis=1)
        top = [max(np.flatnonzero(count[:, c]), key=lambda e: each[e], default=None) for c in content]
        couples = ((a, b) for a, b in combinations(range(devices), 2) if node[a] == node[b])
        return sum(pairs[top[a], top[b]] for a, b in couples if None not in (top[a], top[b]))

    best = value(np.arange(devices))
    for a, b in combinations(range(devices), 2):
        content = np.arange(devices)
        content[[a, b]] = b, a
        if (count[:, content].sum(axis=0) <= problem.slots_D).all():
            best = max(best, value(content))
    for rounds in (1, 20):
        got = count.copy()
        done = coactivation.exchange_devices(got, load, pairs, problem, rounds)
        assert done <= rounds and (got.sum(axis=0) <= problem.slots_D).all()
        columns = {tuple(c) for c in count.T}
        assert {tuple(c) for c in got.T} == columns
        found = [next(i for i in range(devices) if (count[:, i] == c).all()) for c in got.T]
        if len(columns) == devices:
            assert (
                value(np.array(found)) == pytest.approx(best) if rounds == 1 else value(np.array(found)) >= best - 1e-9
            )


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_spread_leaves_no_expert_twice_and_drops_only_what_cannot_stay(seed):
    rng = np.random.default_rng(seed)
    slots = rng.integers(2, 5, 3)
    count = np.zeros((5, 3), np.int32)
    device = np.repeat(np.arange(3), slots)
    for e, d in zip(np.concatenate([np.arange(5), rng.integers(5, size=9)]), rng.permutation(device), strict=False):
        count[e, d] += 1
    before = count.copy()
    dropped = coactivation.spread(count, rng.random(5), slots, np.ones(3))
    assert count.max() == 1 and (count.sum(axis=0) <= slots).all()
    assert (count.sum(axis=1) >= 1).all()
    assert (count.sum(axis=1) <= before.sum(axis=1)).all() and before.sum() - count.sum() == dropped
    assert dropped >= np.maximum(before.sum(axis=1) - 3, 0).sum()
    if before.max() == 1:
        np.testing.assert_array_equal(count, before)


def test_spread_by_hand():
    # Expert 0 twice on device 0 (3 each): if 1 comes back for it, device 1 has 6 at speed 1, if 2 does, 4; and device 0
    # has 6 at speed 2 at most.
    count = np.array([[2, 0], [0, 1], [0, 1]], np.int32)
    assert coactivation.spread(count, np.array([6.0, 1.0, 3.0]), np.array([2, 2]), np.array([2.0, 1.0])) == 0
    np.testing.assert_array_equal(count, [[1, 1], [0, 1], [1, 0]])
    full = np.array([[2, 1], [0, 1]], np.int32)
    assert coactivation.spread(full, np.array([3.0, 1.0]), np.array([2, 2]), np.ones(2)) == 1
    np.testing.assert_array_equal(full, [[1, 1], [0, 1]])


@given(st.integers(0, 10_000), st.sampled_from([(2, 2), (2, 1), (3,)]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_shape_keeps_slots_and_no_device_gets_fuller(seed, nodes, even):
    problem = random_problem(seed, nodes, spare=seed % 5, even=even, top_k=1 + seed % 3)
    got = coactivation.plan(problem, time_limit_s=30, seed=seed)
    problem.check(got.placement)
    count, details = got.placement.count_LED(), got.details
    assert count.max() == 1
    before = np.array(eplb.plan(problem, time_limit_s=30).placement.count_LED())
    slots, speed = np.minimum(problem.slots_D, problem.batch.num_experts), problem.cluster.speed_D
    for load, now, then in zip(problem.batch.load_LE(), count, before, strict=True):
        coactivation.spread(then, load, slots, speed)
        np.testing.assert_array_equal(now.sum(axis=1), then.sum(axis=1))
        worst, old = ((coactivation.device_load(c, load) / speed).max() for c in (now, then))
        assert worst <= old * (1 + 1e-9)
    assert (details["exchanges"] > 0) == (count != before).any()
    assert all(0 <= details[name] <= 1 + 1e-12 for name in details if name.startswith("kept"))


def test_hot_experts_that_go_together_meet_on_a_node():
    # 0 and 4 are hot and chosen together, 1 and 5 less so; EPLB keeps groups 0..3 and 4..7 on a node each, and every
    # device has one of these four and a cold expert.
    tokens = [[0, 4]] * 8 + [[1, 5]] * 6 + [[2, 6], [3, 7]]
    batch = token_batch(np.array(tokens)[:, None], [16], 8)
    cluster = tiny_cluster(np.random.default_rng(0), (2, 2), equal=True)
    problem = PlacementProblem(batch, cluster, tiny_model(batch), np.full(4, 2))
    got = coactivation.plan(problem, time_limit_s=5)
    node = cluster.node_D[got.placement.count_LED()[0].argmax(axis=1)]
    assert node[0] == node[4] != node[1] == node[5]
    before = eplb.plan(problem, time_limit_s=5).placement.count_LED()[0]
    assert {tuple(c) for c in before.T} == {tuple(c) for c in got.placement.count_LED()[0].T}
    assert got.details["exchanges"] == 1 and got.details["kept_on_node"] > got.details["kept_on_node_before"]


def test_where_there_is_nothing_to_swap_for():
    for problem, note in ((random_problem(1, top_k=1), "top-1"), (random_problem(1, (3,)), "one node")):
        got = coactivation.plan(problem, time_limit_s=5)
        assert got.details["exchanges"] == 0 and note in got.details["note"]


def test_pooled_memory_and_loads_alone():
    problem = random_problem(2)
    pooled = replace(problem, pooled=True)
    pooled.check(coactivation.plan(pooled, time_limit_s=5).placement)
    batch = load_batch(np.random.default_rng(0))
    alone = PlacementProblem(batch, Cluster.parse("1x2"), tiny_model(batch), np.array([2, 2]))
    with pytest.raises(NoResultError, match="token-level routing"):
        coactivation.plan(alone, time_limit_s=1)
