"""No method plans below the bound, on machines and traffic of any shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import FLOW_SPLITS, few_or, load_batch, random_slots, tiny_batch, tiny_cluster, tiny_model

from poise.cost.bound import bound_terms
from poise.cost.step import batch_cost
from poise.cost.traffic import DATA_FLOWS
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import METHODS, solve
from poise.util.errors import NoResultError

SEEDS = st.integers(0, 2**32 - 1)


def random_problem(seed, traffic, split, loads, nodes, experts, spare, pooled) -> PlacementProblem:
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    devices, top_k = cluster.num_devices, int(rng.integers(1, 4))
    if loads:
        traffic, batch = "home", load_batch(rng, experts=experts, top_k=top_k, steps=3)
    else:
        batch = tiny_batch(rng, devices=devices, experts=experts, top_k=top_k, tokens=(8, 0, 13))
    slots = random_slots(rng, experts, devices, spare)
    if spare and rng.random() < 0.3:
        slots = np.full(devices, -(-(experts + spare) // devices))
    return PlacementProblem(batch, cluster, tiny_model(batch), slots, traffic, split, pooled)


NOT_FOR_ALL = {
    "exact", "exact-balance", "moetuner", "moetuner-equal", "exflow", "grace-moe", "coactivation", "surplus-fill",
    "poise-stay",
}  # fmt: skip
"""Methods that need tokens, small layers or equal devices."""


@pytest.mark.parametrize("name", METHODS)
@given(
    SEEDS, st.sampled_from(FLOW_SPLITS), st.booleans(),
    st.sampled_from([(1, 1, 1), (2, 1, 2), (3,), (1,), (2, 2, 2), (2, 2)]), st.integers(4, 7), st.integers(0, 4),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=few_or(60, 8), deadline=None)
def test_no_method_plans_below_its_bound(name, seed, priced, loads, nodes, experts, spare, pooled):
    traffic, split = priced
    problem = random_problem(seed, traffic, split, loads, nodes, experts, spare, pooled)
    try:
        solution = solve(problem, method=name, work=3, seed=seed)
    except NoResultError:
        assert name in NOT_FOR_ALL
        return
    for kind, term in solution.terms.items():
        assert 0 <= term.lower_bound <= term.seconds * (1 + 1e-9) + 1e-12, kind
    assert solution.lower_bound <= solution.objective * (1 + 1e-9)
    assert 0 <= solution.gap + 1e-9 <= 1
    count = solution.placement.count_LED()
    room = 2 * problem.slots_D if problem.pooled or METHODS[name].pooled else problem.slots_D
    used = count.sum(axis=1)
    used = used.sum(axis=0) if problem.pooled or METHODS[name].pooled else used.max(axis=0)
    assert (used <= room).all() and (count.sum(axis=2) >= 1).all()
    cost = batch_cost(problem.batch, count, problem.cluster, problem.model, traffic=problem.traffic, split=split)
    assert solution.objective == pytest.approx(problem.batch.weight_B @ cost.seconds_BL.mean(axis=1))
    if not problem.pooled and not METHODS[name].pooled:
        step = bound_terms(
            problem.batch,
            problem.cluster,
            problem.model,
            traffic=problem.traffic,
            slots_D=problem.slots_D,
            blind=split != "near",
        ).seconds_BL
        assert (step <= cost.seconds_BL * (1 + 1e-9) + 1e-12).all()


@given(SEEDS, st.sampled_from(DATA_FLOWS), st.booleans(), st.sampled_from([(1, 1, 1), (2, 1), (3,)]))
@settings(max_examples=25, deadline=None)
def test_more_room_never_raises_the_bound(seed, traffic, loads, nodes):
    """What fits in the slots fits in more of them, so the bound may only fall."""
    rng = np.random.default_rng(seed)
    least = np.inf
    problem = random_problem(seed, traffic, "even", loads, nodes, 5, 0, False)
    slots = problem.slots_D.copy()
    for _ in range(4):
        terms = bound_terms(problem.batch, problem.cluster, problem.model, traffic=problem.traffic, slots_D=slots)
        got = terms.seconds_BL
        assert (got <= least * (1 + 1e-12)).all()
        least = got
        slots[rng.integers(3)] += 1
