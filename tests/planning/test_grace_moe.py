"""GRACE-MoE: each step against its equation or algorithm, and placements that hold on any shape."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, random_slots, tiny_batch, tiny_cluster, tiny_model, token_batch

from poise.machine.cluster import Cluster
from poise.planning.methods import grace_moe
from poise.planning.methods.lpt import pack
from poise.planning.problem import PlacementProblem
from poise.routing.profile import coactivation_LEE
from poise.util.errors import NoResultError


def random_affinity(rng, experts):
    half = np.triu(rng.integers(0, 9, (experts, experts)) * (rng.random((experts, experts)) < 0.6), 1)
    return half + half.T


def same_partition(a, b):
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


@given(st.integers(0, 10_000), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_spectral_clustering_finds_planted_groups_of_any_size(seed, groups):
    rng = np.random.default_rng(seed)
    planted = rng.permutation(np.repeat(np.arange(groups), rng.integers(2, 7, groups)))
    inside = planted[:, None] == planted
    half = np.triu(np.where(inside, rng.integers(20, 40, inside.shape), rng.integers(0, 2, inside.shape)), 1)
    label = grace_moe.spectral_groups(half + half.T, groups, np.random.default_rng(0))
    assert same_partition(label, planted)


@given(st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_groups_fit_their_bounds_and_stay_where_they_already_do(seed):
    rng = np.random.default_rng(seed)
    experts, groups = int(rng.integers(3, 12)), int(rng.integers(1, 5))
    affinity, label = random_affinity(rng, experts), rng.integers(groups, size=experts)
    most = random_slots(rng, experts, groups, int(rng.integers(4)))
    least = np.minimum(most, rng.integers(0, experts // groups + 1, groups))
    group = grace_moe.fit_groups(affinity, label, least, most)
    size = np.bincount(group, minlength=groups)
    assert (least <= size).all() and (size <= most).all()
    free = grace_moe.fit_groups(affinity, label, np.zeros(groups, int), np.full(groups, experts))
    assert grace_moe.affinity_inside(affinity, free) == grace_moe.affinity_inside(affinity, label)
    np.testing.assert_array_equal(free[:, None] == free, label[:, None] == label)


def test_fitting_by_hand():
    # Cluster 0 has 0..4, at most 3 may stay: 3 and 4 have least affinity to it. 3 has 2 tokens with 5, 4 has 1 with 6.
    affinity = np.zeros((8, 8), int)
    for e, f, tokens in ((0, 1, 9), (0, 2, 9), (1, 2, 9), (3, 0, 3), (3, 5, 2), (4, 1, 1), (4, 6, 1), (5, 7, 4)):
        affinity[e, f] = affinity[f, e] = tokens
    label = np.array([0, 0, 0, 0, 0, 1, 2, 1])
    group = grace_moe.fit_groups(affinity, label, np.array([1, 1, 1]), np.array([3, 3, 3]))
    assert group.tolist() == [0, 0, 0, 1, 2, 1, 2, 1]
    # Cluster 2 is empty and must have two: the weakest of those that can be spared, twice.
    label = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    group = grace_moe.fit_groups(affinity, label, np.array([2, 2, 2]), np.array([4, 4, 4]))
    assert group.tolist() == [0, 0, 0, 0, 2, 1, 2, 1]


@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from(grace_moe.RATIOS))
@settings(max_examples=100, deadline=None)
def test_sizes_are_those_of_algorithm_2_where_slots_allow(experts, groups, ratio):
    least, most = grace_moe.size_bounds(experts, np.full(groups, experts), ratio)
    ideal = experts // groups
    delta = max(1, round(ideal * ratio))
    if groups <= experts and groups * (ideal + delta) >= experts:
        assert (least == max(1, ideal - delta)).all() and (most == min(experts, ideal + delta)).all()
    tight = np.full(groups, -(-experts // groups))
    for room in (tight, np.full(groups, experts), np.concatenate([[experts], tight[1:] * 0])):
        least, most = grace_moe.size_bounds(experts, room, ratio)
        assert (0 <= least).all() and (least <= most).all() and (most <= room).all()
        assert least.sum() <= experts <= most.sum()


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_affinity_inside_is_equation_1(seed):
    rng = np.random.default_rng(seed)
    affinity, group = random_affinity(rng, 7), rng.integers(3, size=7)
    pairs = list(combinations(range(7), 2))
    total = sum(affinity[i, j] for i, j in pairs)
    inside = sum(affinity[i, j] for i, j in pairs if group[i] == group[j])
    assert grace_moe.affinity_inside(affinity, group) == pytest.approx(inside / max(total, 1))


def test_the_knee_is_where_affinity_stops_to_pay():
    deviation = np.array([0.0, 1.0, 2.0, 4.0])
    assert grace_moe.knee(np.array([0.2, 0.5, 0.78, 0.8]), deviation) == 2
    assert grace_moe.knee(np.array([0.2, 0.7, 0.78, 0.8]), deviation) == 1
    assert grace_moe.knee(np.array([0.5, 0.5, 0.5, 0.5]), deviation) == 0
    assert grace_moe.knee(np.array([0.1, 0.5]), np.array([1.0, 1.0])) == 0


def test_replication_by_hand():
    # Loads 60, 10, 20, 10: rho = 2.4, n = 2; hot are experts with more than 60 * 2 / 3 = 40 together: 30 + 25.
    device = np.array([0, 0, 0, 1, 2, 3])
    load = np.array([25.0, 5, 30, 10, 20, 10])
    count = np.eye(4, dtype=np.int32)[device]
    assert grace_moe.replicate_hot(count, load, np.full(4, 6)) == 4
    want = np.eye(4, dtype=int)[device]
    want[[0, 2], 1] = want[[0, 2], 3] = 1
    np.testing.assert_array_equal(count, want)
    # Device 3 has one slot more, device 1 none: the second hot expert finds room on device 2 alone.
    count = np.eye(4, dtype=np.int32)[device]
    assert grace_moe.replicate_hot(count, load, np.array([3, 1, 3, 2])) == 3
    assert np.flatnonzero(count[2]).tolist() == [0, 2, 3] and np.flatnonzero(count[0]).tolist() == [0, 2]


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_replication_follows_equation_3(seed, devices):
    rng = np.random.default_rng(seed)
    device, load = rng.integers(devices, size=9), rng.random(9) ** 3 + 0.01
    count = np.eye(devices, dtype=np.int32)[device]
    load_D = load @ count
    top = int(load_D.argmax())
    copies = min(max(1, int(np.floor(load_D[top] / load_D.mean()))), devices - 1)
    made = grace_moe.replicate_hot(count, load, np.full(devices, 9))
    hot = np.flatnonzero(count.sum(axis=1) > 1)
    assert made == copies * len(hot) and (count.sum(axis=1)[hot] == copies + 1).all()
    if copies == 0:
        return
    assert (device[hot] == top).all()
    assert load[hot].sum() > load_D[top] * copies / (1 + copies) >= load[hot].sum() - load[hot].min()
    assert load[hot].min() >= max((load[e] for e in np.flatnonzero(device == top) if e not in hot), default=0)
    targets = np.flatnonzero(count[hot[0]] & (np.arange(devices) != top))
    assert load_D[targets].max() <= min((load_D[d] for d in range(devices) if d not in targets), default=np.inf)


@given(st.integers(0, 10_000), st.sampled_from([(2, 2), (2, 1), (3,), (1,)]))
@settings(max_examples=80, deadline=None)
def test_any_shape_gets_a_valid_placement(seed, nodes):
    rng = np.random.default_rng(seed)
    devices = sum(nodes)
    batch = tiny_batch(rng, devices=devices, experts=7, layers=3, top_k=1 + seed % 3, tokens=(8, 0, 5))
    slots = random_slots(rng, 7, devices, seed % 6)
    problem = PlacementProblem(batch, tiny_cluster(rng, nodes), tiny_model(batch), slots, pooled=bool(seed % 2))
    got = grace_moe.plan(problem, time_limit_s=5, seed=seed)
    problem.check(got.placement)
    count = got.placement.count_LED()
    assert count.max() == 1 and (count.sum(axis=1) <= slots).all()
    assert count.sum() == 3 * 7 + got.details["replicas"]
    if slots.sum() == 7 or devices == 1:
        assert got.details["replicas"] == 0


def planted_problem(slots, sizes=(4, 3, 6, 3), nodes=(2, 2)):
    """Top-2 tokens inside four groups; groups 0 and 1, and 2 and 3, also go together now and then."""
    group = np.repeat(np.arange(4), sizes)
    tokens = [pair for pair in combinations(range(len(group)), 2) if group[pair[0]] == group[pair[1]] for _ in range(8)]
    tokens += [
        pair for pair in combinations(range(len(group)), 2) if {group[pair[0]], group[pair[1]]} in ({0, 1}, {2, 3})
    ]
    mix = np.random.default_rng(0).permutation(len(group))
    batch = token_batch(mix[np.array(tokens)][:, None], [len(tokens)], len(group))
    cluster = tiny_cluster(np.random.default_rng(1), nodes, equal=True)
    return PlacementProblem(batch, cluster, tiny_model(batch), np.array(slots)), group[np.argsort(mix)]


def test_groups_are_whole_where_slots_and_the_ratio_allow():
    problem, group = planted_problem([8] * 4)
    affinity = coactivation_LEE(problem.tokens_for("the test"), len(group))[0]
    np.fill_diagonal(affinity, 0)
    node_D = problem.cluster.node_D
    clusters = grace_moe._cluster(affinity, node_D, problem.slots_D, np.random.default_rng(0))
    device = clusters.devices(node_D, problem.slots_D, 0.5)
    assert same_partition(device, group)
    assert same_partition(node_D[device], group // 2)


def test_tight_slots_force_equal_groups_and_replicas_use_the_spare_ones():
    problem, _ = planted_problem([4] * 4)
    got = grace_moe.plan(problem, time_limit_s=5)
    assert (got.placement.count_LED()[0].sum(axis=0) == 4).all() and got.details["replicas"] == 0
    spare, _ = planted_problem([6] * 4)
    got = grace_moe.plan(spare, time_limit_s=5)
    assert got.details["replicas"] > 0 and got.placement.replicas_LE().max() > 1


def test_the_knee_is_taken_from_the_curve_that_is_told():
    problem, _ = planted_problem([8] * 4)
    got = grace_moe.plan(problem, time_limit_s=5)
    assert [point["r"] for point in got.details["curve"]] == list(grace_moe.RATIOS)
    uses, deviations = (np.array([point[name] for point in got.details["curve"]]) for name in "US")
    assert got.details["ratio"] == grace_moe.RATIOS[grace_moe.knee(uses, deviations)]
    assert (np.diff(uses) >= -1e-12).all() and uses[-1] > uses[0]


def test_top_1_models_are_grouped_by_load_alone():
    rng = np.random.default_rng(2)
    batch = token_batch(rng.choice(6, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1], size=(200, 2, 1)), [100, 100], 6)
    problem = PlacementProblem(batch, tiny_cluster(rng, (3,), equal=True), tiny_model(batch), np.full(3, 3))
    got = grace_moe.plan(problem, time_limit_s=5)
    assert got.details["grouping"] == "load only in 2 of 2 layers: no co-activation"
    count, load = got.placement.count_LED(), batch.load_LE()
    for layer in range(2):  # the hottest expert has more than a third of the load: nothing else is as heavy
        want = pack(load[layer], np.ones(6, np.int64), problem.slots_D, np.ones(3))
        assert (load[layer] @ want).max() == pytest.approx(load[layer].max())
        assert grace_moe.replicate_hot(want, load[layer], problem.slots_D) > 0
        np.testing.assert_array_equal(count[layer], want)


def test_the_seed_decides():
    problem, _ = planted_problem([6] * 4, sizes=(5, 4, 3, 4))
    one, two = (grace_moe.plan(problem, time_limit_s=5, seed=3).placement.slot_expert_LS for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_loads_alone_are_not_enough():
    batch = load_batch(np.random.default_rng(0))
    problem = PlacementProblem(batch, Cluster.parse("1x2"), tiny_model(batch), np.array([2, 2]))
    with pytest.raises(NoResultError, match="token-level routing"):
        grace_moe.plan(problem, time_limit_s=1)
