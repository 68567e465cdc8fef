"""The poise planner and the baselines: feasible on any shape, never worse than another method, optimal where small."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import few_or, planted_affinity

from poise.machine.cluster import Cluster, from_preset
from poise.machine.model import ModelSpec
from poise.planning.engine_rules import ANY, NONE
from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem
from poise.planning.solve.solve import METHODS, evaluate, solve
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.util.errors import NoResultError, OptionError

SHAPES = st.sampled_from(
    [([2, 1, 2], [3, 2, 3, 2, 2], [1, 1, 0.5, 2, 1]), ([3], [4, 4, 4], [1, 1, 1]), ([1, 1, 1], [5, 3, 4], [1, 2, 1]),
     ([2, 2], [3, 3, 3, 3], [1, 1, 1, 1])]
)  # fmt: skip


def make_problem(seed, shape, traffic, split="even", tokens=96, top_k=2):
    per_node, slots, speed = shape
    trace = zipf_trace(num_tokens=tokens, num_layers=2, num_experts=9, top_k=top_k, tokens_per_request=8, seed=seed)
    batch = make_batch(trace, tokens_per_step=48, seed=seed)
    model = ModelSpec.generic(9, top_k, batch.layer_ids_L)
    return PlacementProblem(batch, from_preset(per_node, "h100", speed=speed), model, np.array(slots), traffic, split)


@given(st.integers(0, 1000), SHAPES, st.sampled_from(["home", "home_device_dedup", "home_node_dedup", "stay"]),
       st.sampled_from(["even", "exact"]))  # fmt: skip
@settings(max_examples=few_or(12, 2), deadline=None)
def test_poise_is_never_worse_and_every_bound_holds(seed, shape, traffic, split):
    problem = make_problem(seed, shape, traffic, split)
    best = solve(problem, method="poise", work=9, seed=1)
    assert 0 <= best.gap < 1
    for name in METHODS:
        try:
            other = solve(problem, method=name, work=few_or(15, 9), seed=1)  # random starts are those of this seed
        except NoResultError:
            continue
        assert other.lower_bound <= other.objective * (1 + 1e-9)
        for term in other.terms.values():
            assert term.lower_bound <= term.seconds * (1 + 1e-9) + 1e-15
        if name != "poise" and not METHODS[name].pooled:
            slack = 0.02 if name in ("exflow", "moetuner-equal") else 1e-9  # as a start they have less to spend
            assert best.objective <= other.objective * (1 + slack), name


@given(st.integers(0, 1000), st.sampled_from(["home", "home_node_dedup", "stay"]), st.sampled_from([ANY, NONE]))
@settings(max_examples=few_or(30, 3), deadline=None)
def test_small_problems_are_solved_to_the_optimum(seed, traffic, engine):
    """Under ``any`` among the placements without an empty slot, else among all."""
    trace = zipf_trace(num_tokens=40, num_layers=1, num_experts=4, top_k=2, tokens_per_request=5, seed=seed)
    batch = make_batch(trace, tokens_per_step=20)
    model = ModelSpec.generic(4, 2, batch.layer_ids_L)
    problem = PlacementProblem(batch, Cluster.parse("2x1"), model, np.array([3, 2]), traffic, engine=engine)
    best = np.inf
    for held in product([(1, 0), (0, 1), (1, 1)], repeat=4):
        count = np.array(held)[None]
        used = count.sum(axis=1)
        if (used <= problem.slots_D).all() and (engine is NONE or (used == problem.slots_D).all()):
            result = MethodResult(Placement.from_counts(count, slots_D=problem.slots_D))
            best = min(best, evaluate(problem, result, method="brute force").objective)
    got = solve(problem, method="poise", work=few_or(30, 10))
    assert got.objective == pytest.approx(best, rel=1e-9)


def test_planted_affinity_is_found():
    trace, groups = planted_affinity(num_tokens=256, num_layers=3, num_devices=4, experts_per_device=3)
    batch = make_batch(trace, tokens_per_step=256, order="file")
    model = ModelSpec.generic(12, 1, batch.layer_ids_L)
    problem = PlacementProblem(batch, Cluster.parse("1x4"), model, np.full(4, 3), "stay")
    planted = evaluate(problem, MethodResult(Placement.from_devices(groups, 4)), method="planted")
    got = solve(problem, method="poise", work=20)
    # The search may name the devices otherwise than the homes of the first layer would like.
    assert got.objective <= planted.objective * 1.02
    assert got.imbalance <= planted.imbalance + 1e-9


def test_the_seed_decides():
    problem = make_problem(3, ([2, 2], [3, 3, 3, 3], [1, 1, 1, 1]), "home_node_dedup")
    one, two = (solve(problem, method="poise", work=3, seed=7).placement for _ in range(2))
    np.testing.assert_array_equal(one.slot_expert_LS, two.slot_expert_LS)


def test_redundancy_never_hurts_in_sample_where_slots_may_stay_empty():
    few = make_problem(5, ([4], [3, 3, 3, 3], [1, 1, 1, 1]), "home")
    many = replace(few, slots_D=np.full(4, 5), engine=NONE)
    least = solve(few, method="poise", work=5).objective
    assert solve(many, method="poise", work=5).objective <= least * 1.01  # two descents share the work


def test_options_are_checked():
    problem = make_problem(0, ([3], [4, 4, 4], [1, 1, 1]), "home")
    with pytest.raises(OptionError, match="unknown method"):
        solve(problem, method="magic")
    with pytest.raises(OptionError, match="above 0"):
        solve(problem, work=0)
    with pytest.raises(OptionError, match="6 slots on 3 devices cannot hold 9"):
        PlacementProblem(problem.batch, problem.cluster, problem.model, np.full(3, 2))
