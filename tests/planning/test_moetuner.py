"""MoETuner's two programmes and the exact chain, against brute force."""

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from benchmarks.linear_stay import linear_stay_objective
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.methods import moetuner
from poise.planning.problem import PlacementProblem
from poise.planning.solve import exact
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.util.errors import InfeasibleError, NoResultError


def problem(trace, cluster, slots, **options):
    batch = make_batch(trace, tokens_per_step=64)
    machine = Cluster.parse(cluster)
    model = ModelSpec.generic(batch.num_experts, batch.top_k, batch.layer_ids_L)
    return PlacementProblem(batch, machine, model, np.full(machine.num_devices, slots), **options)


def brute_force_deviation(load, clusters, sizes):
    best = np.inf
    for choice in product(range(clusters), repeat=len(load)):
        count = np.bincount(choice, minlength=clusters)
        if (count > 0).all() and (sizes is None or (count == sizes).all()):
            best = min(best, moetuner.deviation(load, np.array(choice), clusters))
    return best


@given(st.lists(st.integers(0, 100), min_size=4, max_size=7), st.integers(2, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_ilp1_is_within_its_gap_of_brute_force(loads, clusters, fixed):
    load = np.array(loads, dtype=float) + 1
    sizes = None
    if fixed:
        sizes = np.full(clusters, len(loads) // clusters)
        sizes[: len(loads) % clusters] += 1
    best = brute_force_deviation(load, clusters, sizes)
    cluster, value, bound, _ = moetuner.ilp1(load, clusters, sizes, time_limit_s=5)
    assert moetuner.deviation(load, cluster, clusters) == pytest.approx(value)
    assert value <= best + moetuner.ILP1_GAP * load.sum() + 1e-6
    assert bound <= best + 1e-6 and moetuner.deviation_bound(load, clusters, sizes) <= best + 1e-6
    count = np.bincount(cluster, minlength=clusters)
    assert (count > 0).all() and (sizes is None or (count == sizes).all())


def test_bound_is_attained_by_a_hot_expert():
    load = np.array([80.0, 5, 5, 5, 5])
    assert moetuner.deviation_bound(load, 2, None) == moetuner.ilp1(load, 2, None, time_limit_s=5)[1] == 60


@given(st.integers(0, 10_000), st.sampled_from([(2, 4), (3, 3)]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ilp2_equals_brute_force(seed, shape, equal):
    gpus, layers = shape
    rng = np.random.default_rng(seed)
    flow = rng.integers(0, 50, (layers - 1, gpus, gpus)).astype(float)
    bandwidth = np.where(np.eye(gpus) > 0, np.inf, rng.integers(1, 4, (gpus, gpus)).astype(float))
    size = np.full((layers, gpus), 2)
    if not equal:
        size = np.stack([rng.permutation([1] + [2] * (gpus - 2) + [3]) for _ in range(layers)])
    want = size.sum() // gpus
    best = np.inf
    for choice in product(permutations(range(gpus)), repeat=layers):
        gpu = np.array(choice)
        held = np.bincount(gpu.ravel(), weights=size.ravel(), minlength=gpus)
        if (held == want).all():
            best = min(best, moetuner.ilp2_objective(flow, gpu, bandwidth))
    if not np.isfinite(best):
        with pytest.raises(InfeasibleError):
            moetuner.ilp2(flow, size, bandwidth, time_limit_s=10)
        return
    gpu, value, bound = moetuner.ilp2(flow, size, bandwidth, time_limit_s=10)
    assert moetuner.ilp2_objective(flow, gpu, bandwidth) == pytest.approx(value)
    assert bound <= best * (1 + 1e-6) + 1e-9
    assert best - 1e-9 <= value <= best * (1 + moetuner.ILP2_GAP) + 1e-6
    assert (np.bincount(gpu.ravel(), weights=size.ravel(), minlength=gpus) == want).all()


def test_ilp2_by_hand():
    # All tokens of cluster 0 go on to cluster 1 and back: the second layer must swap, then nothing crosses.
    flow = np.array([[[0.0, 10], [10, 0]], [[0, 10], [10, 0]]])
    bandwidth = np.array([[np.inf, 2.0], [2.0, np.inf]])
    gpu, value, _ = moetuner.ilp2(flow, np.full((3, 2), 4), bandwidth, time_limit_s=5)
    assert value == 0 and gpu[0].tolist() == gpu[2].tolist() != gpu[1].tolist()
    # One token in three crosses whatever is done: 5 of 15 over bandwidth 2.
    gpu, value, _ = moetuner.ilp2(np.array([[[10.0, 5], [5, 10]]]), np.full((2, 2), 4), bandwidth, time_limit_s=5)
    assert value == 2.5


def test_memory_that_cannot_be_equal_is_a_typed_error():
    flow, bandwidth = np.zeros((1, 2, 2)), moetuner.pair_bandwidth(Cluster.parse("1x2"))
    with pytest.raises(InfeasibleError, match="7 experts over all layers cannot be shared equally by 2"):
        moetuner.ilp2(flow, np.array([[1, 2], [2, 2]]), bandwidth, time_limit_s=5)
    with pytest.raises(InfeasibleError, match="leave no assignment with 5"):
        moetuner.ilp2(flow, np.array([[1, 5], [1, 3]]), bandwidth, time_limit_s=5)


def test_synthetic_mixtral_scale_both_variants():
    trace = zipf_trace(num_tokens=3000, num_layers=32, num_experts=8, top_k=2, exponent=0.35, stickiness=0.5)
    published = problem(trace, "1x4", 2, traffic="stay", pooled=True)
    got = moetuner.plan(published, time_limit_s=20)
    held = got.placement.count_LED().sum(axis=(0, 1))
    assert (held == 32 * 8 // 4).all()
    assert got.details["ilp1_worst_gap_of_tokens"] <= moetuner.ILP1_GAP
    assert got.details["ilp2_objective"] <= got.details["ilp2_bound"] * (1 + moetuner.ILP2_GAP) / (
        1 - moetuner.ILP2_GAP
    )
    equal = moetuner.plan_equal(replace(published, pooled=False), time_limit_s=20)
    assert (equal.placement.count_LED().sum(axis=1) == 2).all()
    assert equal.details["ilp2_objective"] == pytest.approx(equal.details["ilp2_bound"])


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_exact_equals_brute_force_and_beats_the_two_stages(seed):
    trace = zipf_trace(num_tokens=64, num_layers=3, num_experts=4, top_k=2, stickiness=0.5, seed=seed)
    p = problem(trace, "1x2", 2, traffic="stay")
    got = exact.plan(p, time_limit_s=10)

    def value(device):
        return linear_stay_objective(np.array(device), p.batch, p.cluster, p.model)

    options = exact.all_placements(np.array([2, 2]))
    assert len(options) == 6
    best = min(value(choice) for choice in product(options, repeat=3))
    assert got.details["linear_stay_objective"] == pytest.approx(best)
    device = got.placement.count_LED().argmax(axis=2)
    assert value(device) == pytest.approx(best)
    two_stages = moetuner.plan_equal(p, time_limit_s=10).placement.count_LED().argmax(axis=2)
    assert value(two_stages) >= best * (1 - 1e-9)


def test_exact_says_when_a_layer_is_too_large():
    trace = zipf_trace(num_tokens=64, num_layers=2, num_experts=16)
    with pytest.raises(NoResultError, match="6000"):
        exact.plan(problem(trace, "1x4", 4, traffic="stay"), time_limit_s=5)
