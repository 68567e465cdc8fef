"""Swaps by co-activation: every exchange against brute force, and what no setting may break."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, random_count, random_slots, tiny_batch, tiny_cluster, tiny_model, token_batch

from poise.machine.cluster import Cluster
from poise.planning.methods import coactivation, eplb
from poise.planning.methods.coactivation import GRID, PUBLISHED, CoactivationSetting
from poise.planning.problem import PlacementProblem
from poise.util.errors import NoResultError

EXPERTS = CoactivationSetting(unit="expert", affinity="all", hot=0, rounds=1)


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


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.5]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_one_exchange_of_experts_is_the_best_of_all(seed, tolerance, by_node):
    rng = np.random.default_rng(seed)
    count, pairs, load = random_count(rng, 1, 6, 4)[0], random_pairs(rng, 6), rng.random(6)
    speed = rng.choice([0.5, 1.0], 4)
    group = np.array([0, 0, 1, 1]) if by_node else np.arange(4)
    cap = (coactivation.device_load(count, load) / speed).max() * (1 + tolerance)
    before = best = kept_by_hand(count, pairs, group)
    for (e, d), (f, other) in combinations([tuple(x) for x in np.argwhere(count)], 2):
        trial = count.copy()
        trial[e, d] -= 1
        trial[e, other] += 1
        trial[f, other] -= 1
        trial[f, d] += 1
        if group[d] != group[other] and trial.max() == 1:
            if (coactivation.device_load(trial, load) / speed).max() <= cap * (1 + 1e-9):
                best = max(best, kept_by_hand(trial, pairs, group))
    got = count.copy()
    done = coactivation.exchange_experts(got, load, pairs, group, speed, replace(EXPERTS, tolerance=tolerance))
    assert kept_by_hand(got, pairs, group) == pytest.approx(best)
    assert done == (best > before + 1e-9)
    assert (got.sum(axis=0) == count.sum(axis=0)).all() and (got.sum(axis=1) == count.sum(axis=1)).all()


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_only_the_hottest_replica_of_a_device_starts_an_exchange(seed):
    rng = np.random.default_rng(seed)
    device = rng.permutation(np.repeat(np.arange(4), 3))
    count = np.eye(4, dtype=np.int64)[device]
    load, pairs = rng.permutation(12) + 1.0, random_pairs(rng, 12)
    got = count.copy()
    setting = replace(EXPERTS, hot=1, tolerance=9.0)
    if coactivation.exchange_experts(got, load, pairs, np.arange(4), np.ones(4), setting):
        moved = np.flatnonzero((got != count).any(axis=1))
        hottest = {int(max(np.flatnonzero(device == d), key=lambda e: load[e])) for d in range(4)}
        assert len(moved) == 2 and hottest & set(moved.tolist())


@given(st.integers(0, 10_000), st.sampled_from(["all", "hottest"]), st.sampled_from([(2, 2), (2, 1), (1, 1, 2)]))
@settings(max_examples=60, deadline=None)
def test_one_exchange_of_devices_is_the_best_of_all(seed, affinity, nodes):
    problem = random_problem(seed, nodes, equal=True)
    rng = np.random.default_rng(seed)
    devices, node = problem.num_devices, problem.cluster.node_D
    count, pairs, load = random_count(rng, 1, 6, devices)[0], random_pairs(rng, 6), rng.permutation(6) + rng.random(6)
    problem = replace(problem, slots_D=np.maximum(count.sum(axis=0), 2) + rng.integers(0, 2, devices))

    def value(content):
        if affinity == "all":
            return kept_by_hand(count[:, content], pairs, node)
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
        done = coactivation.exchange_devices(
            got, load, pairs, problem, CoactivationSetting(affinity=affinity, rounds=rounds)
        )
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


def test_cooccurrence_start_by_hand():
    # No redundant slots; 80 % of 5 slots are 4, 80 % of the mean load (50) are 40.
    load = np.array([30.0, 20, 10, 10, 9, 9, 8, 2, 1, 1])
    pairs = np.zeros((10, 10))
    for e, f, tokens in ((0, 7, 5), (0, 8, 9), (7, 9, 8), (1, 2, 4), (2, 3, 6)):
        pairs[e, f] = pairs[f, e] = tokens
    count = coactivation.cooccurrence_start(load, pairs, np.array([5, 5]), np.ones(2), 0.8)
    # Device 0: hottest 0, then 8 (9 tokens with 0), 7 (5), 9 (8): four slots. Device 1: hottest left 1, 2 (4), then
    # 3 (6 with 2), 40 of 40. Then hottest first onto the least loaded: 4 to 0 (34), which is full; the rest to 1.
    assert np.flatnonzero(count[:, 0]).tolist() == [0, 4, 7, 8, 9]
    assert np.flatnonzero(count[:, 1]).tolist() == [1, 2, 3, 5, 6]


@given(st.integers(0, 10_000), st.sampled_from(GRID), st.sampled_from([(2, 2), (2, 1), (3,)]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_shape_keeps_slots_and_the_tolerance(seed, setting, nodes, even):
    problem = random_problem(seed, nodes, spare=seed % 5, even=even, top_k=1 + seed % 3)
    got = coactivation.plan(problem, time_limit_s=30, seed=seed, setting=setting)
    problem.check(got.placement)
    count, details = got.placement.count_LED(), got.details
    assert count.max() == 1
    still = coactivation.plan(problem, time_limit_s=30, setting=replace(setting, rounds=0))
    assert still.details["exchanges"] == 0
    np.testing.assert_array_equal(still.placement.replicas_LE(), got.placement.replicas_LE())
    for load, now, then in zip(problem.batch.load_LE(), count, still.placement.count_LED(), strict=True):
        worst, old = ((coactivation.device_load(c, load) / problem.cluster.speed_D).max() for c in (now, then))
        assert worst <= old * (1 + setting.tolerance) * (1 + 1e-9)
    if setting.affinity == "all":
        name = "kept_on_device" if setting.scope == "device" or len(nodes) == 1 else "kept_on_node"
        assert details[name] >= details[f"{name}_before"] - 1e-12
        assert (details[name] > details[f"{name}_before"]) == (details["exchanges"] > 0)
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


def test_settings_are_distinct_and_the_default_is_the_published_one():
    assert len(set(GRID)) == len(GRID) and GRID[0] == PUBLISHED
    problem = random_problem(3)
    one = coactivation.plan(problem, time_limit_s=5)
    two = coactivation.plan(problem, time_limit_s=5, setting=PUBLISHED)
    np.testing.assert_array_equal(one.placement.slot_expert_LS, two.placement.slot_expert_LS)


def test_pooled_memory_and_loads_alone():
    problem = random_problem(2)
    pooled = replace(problem, pooled=True)
    pooled.check(coactivation.plan(pooled, time_limit_s=5, setting=GRID[-1]).placement)
    batch = load_batch(np.random.default_rng(0))
    alone = PlacementProblem(batch, Cluster.parse("1x2"), tiny_model(batch), np.array([2, 2]))
    with pytest.raises(NoResultError, match="token-level routing"):
        coactivation.plan(alone, time_limit_s=1)
