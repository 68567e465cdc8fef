"""Plans for the split ``near``: against every placement there is, and their starts against what they promise."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import all_counts, load_batch, random_slots, tiny_batch, tiny_cluster, tiny_model

import poise
from poise.cost.compute import expert_seconds, expert_times
from poise.cost.step import layer_works
from poise.planning.budget import Budget
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.near_anneal import near_annealed, proposals_within
from poise.planning.solve.node_first import node_first
from poise.planning.solve.solve import solve
from poise.routing.batch import RoutingBatch
from poise.routing.synthetic import zipf_trace
from poise.util.errors import OptionError

SEEDS = st.integers(0, 2**32 - 1)
NODES = st.sampled_from([(2, 2), (2, 1), (1, 1, 1), (1, 2, 2)])


def near_problem(seed, nodes, *, loads=False, experts=6, spare=None, traffic="home") -> PlacementProblem:
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    if loads:
        batch = load_batch(rng, experts=experts, steps=3)
    else:
        batch = tiny_batch(rng, devices=cluster.num_devices, experts=experts, tokens=(20, 0, 31))
    slots = random_slots(rng, experts, cluster.num_devices, int(rng.integers(5)) if spare is None else spare)
    return PlacementProblem(batch, cluster, tiny_model(batch), slots, traffic, "near")


def balanced(problem: PlacementProblem, placement: Placement) -> float:
    """What annealing minimises, by the cost's own numbers: norms of power 8 over devices, and the exchanges."""
    batch, cluster, model = problem.batch, problem.cluster, problem.model
    times, out = expert_times(cluster, model), 0.0
    cost = problem.pricing.cost(batch, placement.count_LED())
    starts = (cost.pairs_BL > 0) * (cluster.dispatch_wire.start_s + cluster.combine_wire.start_s)
    out += float(batch.weight_B @ (cost.dispatch_BL + cost.combine_BL - starts).sum(axis=1))
    options = {"traffic": problem.traffic, "split": problem.split}
    for (steps, _), work in layer_works(batch, placement.count_LED(), cluster, **options):
        seconds_BD = work.by_device(expert_seconds(work.tokens_BH, cluster, model)) / cluster.speed_D
        tokens_BD = work.tokens_BD / cluster.speed_D * (times.compute_s + times.activation_s)
        norms = [((x**8).sum(axis=1)) ** 0.125 for x in (seconds_BD, tokens_BD)]
        out += float(batch.weight_B[steps] @ (norms[0] + 2.0 * norms[1]))
    return out


@given(SEEDS, st.booleans(), st.sampled_from(["home", "home_device_dedup", "home_node_dedup"]))
@settings(max_examples=12, deadline=None)
def test_the_search_is_near_the_best_of_all_placements(seed, loads, traffic):
    """Within 5 % on layers that can be enumerated (a plan that shifted loads hurt less may be taken); slots filled."""
    problem = near_problem(seed, (2, 1), loads=loads, experts=4, traffic="home" if loads else traffic)
    full = [count for count in all_counts(4, problem.slots_D) if (count.sum(axis=0) == problem.slots_D).all()]
    layers = [problem.pricing.cost(problem.batch, np.stack([c, c])).seconds_BL for c in full]
    best = (problem.batch.weight_B @ np.stack(layers)).min(axis=0).mean()
    found = solve(problem, work=10)
    assert best * (1 - 1e-9) <= found.objective <= best * 1.05
    assert found.lower_bound <= best * (1 + 1e-9)


@given(SEEDS, NODES, st.booleans())
@settings(max_examples=40, deadline=None)
def test_starts_hold_every_expert_in_the_slots_there_are(seed, nodes, loads):
    problem = near_problem(seed, nodes, loads=loads)
    first = node_first(problem)
    problem.check(first)
    budget = Budget(1.0, work=10)
    better = near_annealed(problem, first, proposals=200, seed=seed % 1000, budget=budget)
    problem.check(better)
    for count in (first.count_LED(), better.count_LED()):
        assert (count.sum(axis=2) >= 1).all() and count.max() == 1
    np.testing.assert_array_equal(better.count_LED().sum(axis=1), first.count_LED().sum(axis=1))


@given(SEEDS, NODES)
@settings(max_examples=30, deadline=None)
def test_annealing_on_loads_is_never_worse_than_its_start(seed, nodes):
    """On loads alone, which are all it looks at; the best of 3,000 proposals is kept."""
    problem = near_problem(seed, nodes, loads=True)
    first = node_first(problem)
    better = near_annealed(problem, first, proposals=3000, seed=1, budget=Budget(1.0, work=10))
    assert balanced(problem, better) <= balanced(problem, first) * (1 + 1e-9)
    assert np.array_equal(
        better.count_LED(),
        near_annealed(problem, first, proposals=3000, seed=1, budget=Budget(1.0, work=1)).count_LED(),
    )


@given(SEEDS, st.booleans())
@settings(max_examples=20, deadline=None)
def test_room_for_all_experts_in_every_node_keeps_all_tokens_there_if_that_pays(seed, loads):
    """Four devices of three slots hold six experts twice: once a node, with a network so slow that nothing else pays."""
    problem = near_problem(seed, (2, 2), loads=loads, spare=6)
    slow = replace(problem.cluster, inter_bytes_per_s=1e-6, links=None)
    problem = replace(problem, cluster=slow, slots_D=np.full(4, 3))
    cost = problem.pricing.cost(problem.batch, node_first(problem).count_LED())
    assert cost.cross_node_BL.max() <= 1e-9


def test_recorded_homes_decide_where_experts_are_present():
    """Node 0 asks for expert 0 alone, node 1 for the others: expert 0 is on node 0 however the loads are."""
    experts = np.array([[[0]]] * 8 + [[[1]]] * 2 + [[[2]]] * 2, np.int16)
    home = np.array([0, 1] * 4 + [2, 3] * 2, np.int32)
    load = np.array([[[8.0, 2.0, 2.0, 0.0]]])
    batch = RoutingBatch(load, np.ones(1), 1, np.zeros(1, np.int32), experts, np.array([0, 12]), None, home)
    cluster = tiny_cluster(np.random.default_rng(0), (2, 2), equal=True)
    problem = PlacementProblem(batch, cluster, tiny_model(batch), np.full(4, 2), "home", "near")
    count = node_first(problem).count_LED()[0]
    assert count[0, :2].any() and (count[1, 2:].any() and count[2, 2:].any())


def test_proposals_fit_the_seconds_they_are_given():
    problem = near_problem(3, (2, 2))
    few, took = proposals_within(problem, 0.01)
    assert took <= 0.01 and few > 0
    assert proposals_within(problem, 0.0) == (0, 0.0)
    assert proposals_within(problem, 1e9)[0] == 60_000


def test_plans_for_near_are_better_than_plans_for_even_on_such_an_engine():
    """Held to the same slots; and an engine that has no such split refuses it."""
    trace = zipf_trace(num_tokens=4000, num_layers=2, num_experts=16, top_k=1, exponent=1.1, tokens_per_request=10)
    options = {"cluster": "2x4:h100+datasheet", "redundant": 8, "work": 6, "tokens_per_step": 500}
    near, even = (poise.plan(trace, split=split, **options) for split in ("near", "even"))
    table = poise.compare(trace, placements=[near.placement, even.placement], split="near", engine="sglang", **options)
    ours, theirs = table.rows()[:2]
    assert ours["step_seconds"]["mean"] < theirs["step_seconds"]["mean"]
    assert near.placement.fitted.about["split"] == "near" and "split" not in even.placement.fitted.about
    with pytest.raises(OptionError, match="vllm splits tokens over replicas even, --split asks for near"):
        poise.plan(trace, split="near", engine="vllm", **options)
