"""The robust part of the slow loop: annealed starts, proven small layers, risk, migration, stay placements."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import (
    all_counts,
    few_or,
    load_batch,
    planted_affinity,
    random_slots,
    tiny_batch,
    tiny_cluster,
    tiny_model,
)

from poise.cost.split import exact_quota
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.methods.lpt import pack_all
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve import stay
from poise.planning.solve.anneal import annealed, scenarios
from poise.planning.solve.fill import fill_layer, filled
from poise.planning.solve.small import even_optimum
from poise.planning.solve.solve import solve
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.util.errors import NoResultError, OptionError

SEEDS = st.integers(0, 2**32 - 1)
PUBLISHED = np.array([600, 560, 120, 120, 20, 10, 10, 10.0])
"""The loads of the issue: EPLB reaches 232, FlashLB 205."""


def of_loads(load_BLE, slots_D, nodes=None, **options) -> PlacementProblem:
    load = np.asarray(load_BLE, dtype=float)
    batch = RoutingBatch(load, np.full(len(load), 1 / len(load)), 1, np.arange(load.shape[1], dtype=np.int32))
    model = ModelSpec.generic(load.shape[2], 1, batch.layer_ids_L)
    cluster = Cluster.uniform(1, len(slots_D)) if nodes is None else nodes
    return PlacementProblem(batch, cluster, model, np.asarray(slots_D), "home", **options)


def fullest(count_ED, load_E):
    return float((load_E[:, None] * count_ED / count_ED.sum(axis=1, keepdims=True)).sum(axis=0).max())


def test_the_published_counterexample_is_solved_and_proven():
    plan, value = even_optimum(PUBLISHED, np.full(8, 2))
    assert value == pytest.approx(590 / 3) and fullest(plan, PUBLISHED) == pytest.approx(590 / 3)
    assert plan.sum(axis=0).max() <= 2 and plan.max() == 1
    solution = solve(of_loads(PUBLISHED[None, None] * 1000, np.full(8, 2)), work=30)
    assert solution.imbalance == pytest.approx(590 / 3 / 181.25)


@given(SEEDS, st.integers(0, 3), st.sampled_from([2, 3]))
@settings(max_examples=60, deadline=None)
def test_exact_balance_equals_brute_force(seed, spare, devices):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, 5))
    load, slots = rng.integers(0, 50, experts) * 1.0, random_slots(rng, experts, devices, spare)
    best = min(fullest(count, load) for count in all_counts(experts, slots))
    assert even_optimum(load, slots)[1] == pytest.approx(best)


def test_exact_balance_gives_up_rather_than_hang():
    with pytest.raises(NoResultError, match=r"gave up|takes"):
        even_optimum(np.arange(1.0, 41.0), np.full(8, 6))


@given(SEEDS, st.sampled_from([(2, 1), (3,), (2, 2)]), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_annealed_placements_are_valid_and_no_worse_than_their_start(seed, nodes, spare):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    batch = load_batch(rng, experts=5, steps=3)
    slots = random_slots(rng, 5, cluster.num_devices, spare)
    problem = PlacementProblem(batch, cluster, tiny_model(batch), slots, "home")
    placement = annealed(problem, proposals=4000, seed=seed % 1000)
    problem.check(placement)
    assert not placement.has_duplicates
    again = annealed(problem, proposals=4000, seed=seed % 1000)
    assert (again.slot_expert_LS == placement.slot_expert_LS).all()


def test_annealing_finds_a_balance_that_lpt_misses():
    rng = np.random.default_rng(0)
    load = rng.lognormal(sigma=1.0, size=(1, 4, 64)) * 1e5
    problem = of_loads(load, np.full(8, 9))
    placement = annealed(problem, proposals=100_000)
    for layer in range(4):
        mine = fullest(placement.count_LED()[layer], load[0, layer])
        lpt = fullest(pack_all(load[0, layer], problem.slots_D, np.ones(8)), load[0, layer])
        assert mine <= lpt and mine <= 1.02 * load[0, layer].sum() / 8


@given(SEEDS, st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_surplus_fill_is_valid_on_odd_shapes(seed, spare):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, (2, 1))
    batch = load_batch(rng, experts=5, steps=2)
    problem = PlacementProblem(batch, cluster, tiny_model(batch), random_slots(rng, 5, 3, spare), "home", "exact")
    placement = filled(problem)
    problem.check(placement)
    assert not placement.has_duplicates


def test_one_redundant_slot_a_device_balances_within_a_percent():
    rng = np.random.default_rng(3)
    for devices in (4, 8, 16, 32, 64):
        work = rng.lognormal(sigma=1.5, size=64)
        held = fill_layer(work, np.full(devices, 64 // devices + 1), np.ones(devices))
        units = np.rint(work / work.sum() * 1e6)
        most = exact_quota(units, held, np.ones(devices)).sum(axis=0).max()
        assert most <= 1.01 * max(units.sum(), units.max()) / devices


def test_many_steps_become_few_scenarios_of_the_same_mass():
    batch = load_batch(np.random.default_rng(1), steps=30)
    problem = PlacementProblem(batch, Cluster.uniform(1, 2), tiny_model(batch), np.full(2, 2), "home")
    work, weight = scenarios(problem)
    assert work.shape[0] == 8 and weight.sum() == pytest.approx(1.0)


def test_risk_trades_the_mean_for_the_worst_workload():
    """Two workloads with opposite hot experts, one of them rare."""
    load = np.full((2, 1, 8), 1e5)
    load[0, 0, :2], load[1, 0, 2:4] = 9e5, 9e5
    base = of_loads(load, np.full(4, 2))
    base = replace(base, batch=replace(base.batch, weight_B=np.array([0.95, 0.05])))
    seconds = np.array([1.0, 3.0])
    assert base.risk_seconds(seconds) == pytest.approx(1.1)
    assert replace(base, risk="worst").risk_seconds(seconds) == 3.0
    assert replace(base, risk="cvar").risk_seconds(seconds) == pytest.approx((0.05 * 3 + 0.2 * 1) / 0.25)
    found = solve(replace(base, risk="worst"), work=45)
    assert found.details["risk"] == "worst"
    for step in range(2):
        assert fullest(found.placement.count_LED()[0], load[step, 0]) <= 1e6 + 1
    with pytest.raises(OptionError, match="risk"):
        replace(base, risk="hope")


def test_a_move_that_costs_more_than_it_saves_is_not_made():
    rng = np.random.default_rng(2)
    load = rng.lognormal(sigma=0.5, size=(1, 2, 16)) * 1e4
    problem = of_loads(load, np.full(4, 4))
    current = solve(problem, method="round-robin").placement
    stuck = solve(replace(problem, current=current, migration_steps=1e-3), work=5).placement
    free = solve(replace(problem, current=current, migration_steps=1e9), work=5).placement
    assert current.diff(stuck).fetched == 0 and current.diff(free).fetched > 0
    assert problem.migration_seconds(free) == 0
    with pytest.raises(OptionError, match="current placement"):
        replace(problem, current=Placement.from_devices(np.zeros((1, 16), int), 4))


def test_stay_placements_find_planted_groups():
    trace, _ = planted_affinity(num_tokens=2048, num_layers=4, num_devices=4, experts_per_device=4)
    batch = make_batch(trace, tokens_per_step=512)
    problem = PlacementProblem(batch, Cluster.uniform(1, 4), ModelSpec.generic(16, 1, batch.layer_ids_L), np.full(4, 4),
                               "stay")  # fmt: skip
    result = stay.plan(problem, time_limit_s=5)
    problem.check(result.placement)
    assert result.details["stay_weight"] > 0.95


@given(SEEDS, st.integers(0, 9))
@settings(max_examples=few_or(60, 10), deadline=None)
def test_stay_placements_use_their_slots(seed, spare):
    rng = np.random.default_rng(seed)
    batch = tiny_batch(rng, devices=3, experts=6, layers=3)
    slots = np.full(3, 2 + spare // 3)
    problem = PlacementProblem(batch, tiny_cluster(rng, (3,)), tiny_model(batch), slots, "stay")
    result = stay.plan(problem, time_limit_s=0.01, seed=seed % 100)
    problem.check(result.placement)
    assert not result.placement.has_duplicates
    with pytest.raises(NoResultError, match="every device"):
        stay.plan(replace(problem, slots_D=slots + np.array([1, 0, 0])), time_limit_s=0.01)
