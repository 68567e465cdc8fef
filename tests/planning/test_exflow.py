"""ExFlow against brute force, and its descent where brute force cannot go."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, planted_affinity, random_slots, tiny_batch, tiny_cluster, tiny_model

from poise.machine.cluster import Cluster, from_preset
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.methods import exflow
from poise.planning.problem import PlacementProblem
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.util.errors import NoResultError

FAR = Budget(1e9)


def layouts(sizes):
    """Every layout of one layer, [n, M]."""
    parts = range(len(sizes))
    choices = (np.array(c) for c in product(parts, repeat=int(sum(sizes))))
    return [c for c in choices if (np.bincount(c, minlength=len(sizes)) == sizes).all()]


def least_crossings(affinity, sizes):
    """Minimum over all layouts of all layers, by going through them."""
    options = layouts(sizes)
    return min(exflow.crossings(affinity, np.array(choice)) for choice in product(options, repeat=len(affinity) + 1))


def problem_of(trace, cluster, slots, **options):
    batch = make_batch(trace, tokens_per_step=64)
    machine = Cluster.parse(cluster) if isinstance(cluster, str) else cluster
    model = ModelSpec.generic(batch.num_experts, batch.top_k, batch.layer_ids_L)
    return PlacementProblem(batch, machine, model, np.asarray(slots), **options)


def contiguous_hops(problem):
    sizes = exflow.equal_sizes(problem.batch.num_experts, problem.slots_D)
    device = np.tile(np.repeat(np.arange(len(sizes)), sizes), (problem.batch.num_layers, 1))
    return exflow.hops(exflow.expected_affinity_LEE(problem.batch), device, problem.cluster.node_D)


@given(st.integers(0, 10_000), st.sampled_from([((2, 2), 4), ((2, 1), 5), ((1, 1, 2), 3), ((2, 2, 1), 2)]))
@settings(max_examples=30, deadline=None)
def test_the_integer_programme_equals_brute_force(seed, shape):
    sizes, layers = np.array(shape[0]), shape[1]
    rng = np.random.default_rng(seed)
    members = int(sizes.sum())
    affinity = (
        rng.integers(0, 9, (layers - 1, members, members)) * (rng.random((layers - 1, members, members)) < 0.6)
    ).astype(float)
    best = least_crossings(affinity, sizes)
    begin = np.tile(rng.permutation(np.repeat(np.arange(len(sizes)), sizes)), (layers, 1))
    part, bound = exflow.integer_programme(affinity, sizes, begin, time_limit_s=20)
    assert [np.bincount(row, minlength=len(sizes)).tolist() for row in part] == [sizes.tolist()] * layers
    assert exflow.crossings(affinity, part) == pytest.approx(best, abs=1e-6)
    assert bound == pytest.approx(best, abs=1e-4)
    descended = exflow.descend(affinity, sizes, layers, seed=seed, budget=FAR)
    assert exflow.crossings(affinity, descended) >= best - 1e-9


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_layer_with_fixed_neighbours_is_solved_exactly(seed):
    rng = np.random.default_rng(seed)
    sizes = np.array([2, 1, 2])
    affinity = rng.integers(0, 9, (2, 5, 5)).astype(float)
    part = np.stack([rng.permutation(np.repeat(np.arange(3), sizes)) for _ in range(3)])
    layer = int(rng.integers(3))
    row = exflow.best_layer(affinity, part, layer, sizes, known=np.ones(3, bool))
    assert (np.bincount(row) == sizes).all()

    def value(choice):
        trial = part.copy()
        trial[layer] = choice
        return exflow.crossings(affinity, trial)

    assert value(row) == pytest.approx(min(value(choice) for choice in layouts(sizes)))


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_descent_keeps_sizes_and_is_never_worse_than_contiguous(seed, parts, layers, per_part):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, per_part + 1, parts)
    members = int(sizes.sum())
    affinity = rng.random((layers - 1, members, members)) ** 4
    part = exflow.descend(affinity, sizes, layers, seed=seed, budget=FAR)
    assert part.shape == (layers, members)
    assert all((np.bincount(row, minlength=parts) == sizes).all() for row in part)
    contiguous = np.tile(np.repeat(np.arange(parts), sizes), (layers, 1))
    assert exflow.crossings(affinity, part) <= exflow.crossings(affinity, contiguous) + 1e-9


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_any_shape_gets_a_valid_placement_and_honest_hops(seed):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, (2, 1))
    batch = tiny_batch(rng, devices=3, experts=5, layers=3)
    problem = PlacementProblem(batch, cluster, tiny_model(batch), random_slots(rng, 5, 3, int(rng.integers(4))))
    got = exflow.plan(problem, time_limit_s=20, seed=seed)
    problem.check(got.placement)
    count = got.placement.count_LED()
    assert (count.sum(axis=2) == 1).all()
    assert (count.sum(axis=1) == exflow.equal_sizes(5, problem.slots_D)).all()
    # Hops counted token by token.
    device, weight = count.argmax(axis=2), np.repeat(batch.weight_B, np.diff(batch.start_B))
    node, inside, between, total = cluster.node_D, 0.0, 0.0, 0.0
    for t, token in enumerate(batch.experts_TLK):
        for layer in range(2):
            here, there = device[layer, token[layer][0]], device[layer + 1, token[layer + 1][0]]
            total += weight[t]
            inside += weight[t] * (here != there and node[here] == node[there])
            between += weight[t] * (node[here] != node[there])
    assert got.details["hops_inside_nodes"] == pytest.approx(inside / total)
    assert got.details["hops_between_nodes"] == pytest.approx(between / total)
    assert got.details["hop_cost"] == pytest.approx((inside + 2 * between) / total)
    # the first stage cuts as few tokens between nodes as any layout of its sizes
    assert between / total <= contiguous_hops(problem)[1] + 1e-9


def test_node_stage_is_the_optimum_of_all_layouts():
    batch = tiny_batch(np.random.default_rng(4), devices=4, experts=4, layers=4, top_k=1, tokens=(20, 20))
    cluster = tiny_cluster(np.random.default_rng(4), (2, 2))
    problem = PlacementProblem(batch, cluster, tiny_model(batch), np.ones(4, int))
    got = exflow.plan(problem, time_limit_s=20)
    affinity = exflow.expected_affinity_LEE(batch)
    assert {note["by"] for note in got.details["stages"]} <= {"integer programme", "descent"}
    assert got.details["hops_between_nodes"] == pytest.approx(
        least_crossings(affinity, np.array([2, 2])) / affinity.sum()
    )


def test_planted_tokens_never_move():
    trace, _ = planted_affinity(num_tokens=480, num_layers=5, num_devices=4, experts_per_device=4)
    got = exflow.plan(problem_of(trace, "1x4", [4] * 4), time_limit_s=20)
    assert got.details["hop_cost"] == 0
    device = got.placement.count_LED().argmax(axis=2)
    on = device[np.arange(5), trace.experts.reshape(480, 5)]
    assert (on == on[:, :1]).all()


def test_large_single_node_never_has_more_hops_than_contiguous():
    trace = zipf_trace(num_tokens=1500, num_layers=6, num_experts=32, top_k=1, stickiness=0.6, seed=3)
    problem = problem_of(trace, "1x8", [4] * 8)
    got = exflow.plan(problem, time_limit_s=60)
    assert got.details["hop_cost"] < 0.75 * contiguous_hops(problem)[0]


def test_sizes_follow_uneven_slots():
    assert exflow.equal_sizes(10, np.array([1, 9, 9])).tolist() == [1, 5, 4]
    assert exflow.equal_sizes(7, np.array([3, 0, 5])).tolist() == [3, 0, 4]
    problem = problem_of(zipf_trace(num_tokens=90, num_layers=3, num_experts=7), from_preset([1, 2], "h100"), [3, 0, 5])
    got = exflow.plan(problem, time_limit_s=5)
    assert (got.placement.count_LED().sum(axis=1) == [3, 0, 4]).all()
    pooled = exflow.plan(
        problem_of(zipf_trace(num_tokens=90, num_layers=3, num_experts=7), "1x2", [5, 6], pooled=True), time_limit_s=5
    )
    assert (pooled.placement.count_LED().sum(axis=1) == [4, 3]).all()


def test_one_layer_and_one_device_leave_nothing_to_cut():
    one = exflow.plan(problem_of(zipf_trace(num_tokens=50, num_layers=1, num_experts=6), "2x1", [3, 3]), time_limit_s=5)
    assert one.details["hop_cost"] == 0
    alone = exflow.plan(problem_of(zipf_trace(num_tokens=50, num_layers=3, num_experts=6), "1x1", [6]), time_limit_s=5)
    assert alone.details["hop_cost"] == 0 and alone.details["stages"] == []


def test_the_seed_decides(monkeypatch):
    monkeypatch.setattr(exflow, "STARTS", 2)
    problem = problem_of(zipf_trace(num_tokens=200, num_layers=3, num_experts=8, stickiness=0.5), "2x2", [2] * 4)
    one, two = (exflow.plan(problem, time_limit_s=60, seed=5).placement.slot_expert_LS for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_a_tiny_limit_still_answers():
    problem = problem_of(zipf_trace(num_tokens=600, num_layers=4, num_experts=16, stickiness=0.5), "2x4", [2] * 8)
    problem.check(exflow.plan(problem, time_limit_s=1e-3).placement)


def test_loads_alone_are_not_enough():
    rng = np.random.default_rng(0)
    batch = load_batch(rng)
    problem = PlacementProblem(batch, tiny_cluster(rng, (2,)), tiny_model(batch), np.array([2, 2]))
    with pytest.raises(NoResultError, match="token-level routing"):
        exflow.plan(problem, time_limit_s=1)
