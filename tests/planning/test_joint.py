"""The joint bound against every placement of small layers, and the programme behind it against integer points."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cost.test_bounds import layer_again
from tests.helpers import (
    all_counts,
    few_or,
    load_batch,
    random_slots,
    tiny_batch,
    tiny_cluster,
    tiny_model,
    token_batch,
)

from poise.cost.split import SPLITS
from poise.cost.step import batch_cost
from poise.planning.budget import Budget
from poise.planning.engine_rules import ANY, NONE
from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem
from poise.planning.solve.membership import Groups, Limits, Programme, Sent
from poise.planning.solve.solve import evaluate, solve

SEEDS = st.integers(0, 2**32 - 1)
NODES = ((2, 2), (2, 1), (1, 1), (1, 1, 1), (3,), (2,))
FLOWS = ("home", "home_device_dedup", "home_node_dedup")
MOST = 250


def problem_of(
    seed: int, nodes, traffic, split, loads: bool, spare: int
) -> tuple[PlacementProblem, np.random.Generator]:
    """A problem of 3 to 6 experts on a few devices with constants as measured or not, tokens or loads."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes, equal=bool(rng.integers(2)), measured=bool(rng.integers(2)))
    experts = int(rng.integers(3, 7))
    top_k = int(rng.integers(1, min(4, experts) + 1))
    if loads:
        batch = load_batch(rng, experts=experts, top_k=top_k, layers=1)
    else:
        batch = tiny_batch(rng, devices=cluster.num_devices, experts=experts, top_k=top_k, layers=1,
                           tokens=((9, 0, 6), (3,), (24, 24))[seed % 3], idle=(0.0, 0.3)[seed % 2])  # fmt: skip
    slots = random_slots(rng, experts, cluster.num_devices, spare)
    engine = (ANY, NONE)[int(rng.integers(2))]
    return PlacementProblem(batch, cluster, tiny_model(batch), slots, traffic, split, engine=engine), rng


def placements(problem: PlacementProblem, rng) -> list[np.ndarray]:
    """All that the engine can hold, or some of them."""
    room = np.minimum(problem.slots_D, problem.batch.num_experts)
    out = [count for count in all_counts(problem.batch.num_experts, room)
           if problem.engine.empty_slots or (count.sum(axis=0) == room).all()]  # fmt: skip
    return [out[i] for i in rng.permutation(len(out))[:MOST]] if len(out) > MOST else out


def cheapest(problem: PlacementProblem, counts: list[np.ndarray]) -> tuple[float, int]:
    """Seconds of the best of some placements of the only layer, and which it is."""
    batch = layer_again(problem.batch, [0] * len(counts))
    cost = batch_cost(
        batch, np.stack(counts), problem.cluster, problem.model, traffic=problem.traffic, split=problem.split
    )
    seconds = problem.batch.weight_B @ cost.seconds_BL
    return float(seconds.min()), int(seconds.argmin())


def bound_of(problem: PlacementProblem, count: np.ndarray, *, seconds: float = 5.0):
    """The solution that a placement is, with its joint bound."""
    plan = MethodResult(Placement.from_counts(count[None]))
    return evaluate(problem, plan, method="any", joint=Budget(1.0, work=30 * seconds))


@given(SEEDS, st.sampled_from(NODES), st.sampled_from(FLOWS), st.sampled_from(SPLITS), st.booleans(), st.integers(0, 3))
@settings(max_examples=few_or(10_000, 200), deadline=None)
def test_no_placement_lies_below_the_joint_bound(seed, nodes, traffic, split, loads, spare):
    traffic = "home" if loads else traffic
    problem, rng = problem_of(seed, nodes, traffic, split, loads, spare)
    counts = placements(problem, rng)
    if not counts:
        return
    best, which = cheapest(problem, counts)
    found = bound_of(problem, counts[which])
    assert found.objective == pytest.approx(best, rel=1e-9)
    assert found.lower_bound <= best * (1 + 1e-9)
    terms = sum(term.lower_bound for term in found.terms.values())
    assert found.lower_bound >= terms * (1 - 1e-9)


def programme_of(rng, mixed: bool, experts: int = 5) -> tuple[Programme, Sent, Groups]:
    """A programme of random groups, pairs and tokens, with one step."""
    rooms = rng.integers(2, experts + 1, int(rng.integers(2, 4)))
    while rooms.sum() < experts:
        rooms[rng.integers(len(rooms))] += 1
    rooms = np.minimum(rooms, experts)
    groups = Groups(rooms, np.maximum(0, experts - (rooms.sum() - rooms)), np.ones(len(rooms)), mixed)
    first, second = np.triu_indices(experts, 1)
    some = rng.random(len(first)) < 0.7
    pairs = np.column_stack([first[some], second[some]])
    many = 12
    picks = np.argsort(rng.random((many, experts)), axis=1)[:, :3]
    picks[rng.random(many) < 0.3, 2] = -1
    sent = Sent(picks, rng.integers(len(rooms), size=many), np.zeros(many, np.int64), rng.random(many),
                np.arange(len(rooms)), int(rng.integers(1, 4)))  # fmt: skip
    one = np.ones(1)
    limits = Limits(one, np.zeros(1), np.full(1, 3 * sent.weight_T.sum()), np.zeros(1), np.full(1, 50.0))
    return Programme(groups, pairs, experts, limits, spare=int(rooms.sum()) - experts), sent, groups


def copies(sent: Sent, held_EG: np.ndarray) -> np.ndarray:
    """What each port sends at least where groups hold experts, one token after the other."""
    out = np.zeros(len(sent.group_R))
    for picks, port, weight in zip(sent.picks_TK, sent.port_T, sent.weight_T, strict=True):
        away = sum(not held_EG[e, sent.group_R[port]] for e in picks if e >= 0)
        out[port] += weight * -(-away // sent.most)
    return out


@given(SEEDS, st.booleans())
@settings(max_examples=few_or(1000, 30), deadline=None)
def test_whatever_groups_hold_meets_all_rows(seed, mixed):
    """Every placement of experts in groups, with its products and seconds, is a point of the programme and its cuts."""
    rng = np.random.default_rng(seed)
    programme, sent, groups = programme_of(rng, mixed)
    work_E = rng.random(5)
    programme.compute(work_E[None], np.array([0.5]), 0.0)
    budget = Budget(1.0, work=100)
    for _ in range(3):
        programme.cut(sent)
        value = programme.solve(budget, "bound")
    best = np.inf
    for held in product(product([0, 1], repeat=len(groups.room_G)), repeat=5):
        held_EG = np.array(held)
        many = held_EG.sum(axis=1)
        if many.min() < 1 or (mixed and many.max() > 1) or (held_EG.sum(axis=0) > groups.room_G).any():
            continue
        port = copies(sent, held_EG).max()
        compute = 0.5 + (work_E @ held_EG).max() if mixed else 0.0
        first, second = programme.pairs_P2.T
        sides = slice(0, programme.sides)
        both = (held_EG[first] * held_EG[second])[:, sides]
        point = np.concatenate([held_EG[:, sides].ravel(), both.ravel(), [port, compute]])
        rows = programme.matrix @ point
        assert (rows >= programme.row_low - 1e-9).all() and (rows <= programme.row_high + 1e-9).all()
        assert (point >= programme.low_X).all() and (point <= programme.high_X + 1e-9).all()
        best = min(best, port + compute)
    assert value <= best * (1 + 1e-9)
    price = np.array(programme.model.getSolution().row_dual)
    assert programme.proven(price) == pytest.approx(value, rel=1e-6, abs=1e-6)
    for size in (0.01, 0.1, 1.0):  # prices that no solver would choose
        other = price + size * rng.normal(size=len(price)) * (rng.random(len(price)) < 0.2)
        assert programme.proven(other) <= best * (1 + 1e-9)
    assert programme.proven(np.zeros(len(programme.row_low))) == pytest.approx(0, abs=1e-12)


@given(SEEDS, st.sampled_from(FLOWS), st.sampled_from(SPLITS))
@settings(max_examples=15, deadline=None)
def test_more_time_never_makes_it_looser(seed, traffic, split):
    problem, rng = problem_of(seed, (2, 2), traffic, split, False, 2)
    count = placements(problem, rng)[0]
    found = [bound_of(problem, count, seconds=seconds).lower_bound for seconds in (1e-6, 0.1, 0.3, 5.0)]
    terms = sum(term.lower_bound for term in bound_of(problem, count).terms.values())
    assert found[0] == pytest.approx(terms, rel=1e-12)
    assert (np.diff(found) >= -1e-9 * found[0]).all()


def groups_of_experts() -> PlacementProblem:
    """Two nodes, two groups of three experts that tokens pick two of; every node is the home of both kinds."""
    rng = np.random.default_rng(0)
    tokens = [rng.permutation(3)[:2] + 3 * (t % 2) for t in range(80)]
    batch = token_batch(np.array(tokens)[:, None], [40, 40], 6, home_T=rng.integers(2, size=80))
    cluster = tiny_cluster(rng, (1, 1), equal=True, shared=False)
    return PlacementProblem(batch, cluster, tiny_model(batch), np.array([3, 3]), "home_node_dedup", "even")


def test_it_knows_that_no_node_has_all_that_it_would_like():
    """Per term each node keeps the pairs it likes best, K to a copy; together both have one partition."""
    problem = groups_of_experts()
    counts = placements(problem, np.random.default_rng(0))
    best, which = cheapest(problem, counts)
    found = bound_of(problem, counts[which])
    terms = sum(term.lower_bound for term in found.terms.values())
    assert found.details["bound"] == "joint"
    assert found.lower_bound == found.joint_bound == pytest.approx(best, rel=1e-6)
    assert terms < 0.985 * best


def test_a_split_that_changes_from_step_to_step_may_do_better_than_any_share():
    """Expert 0 is on both nodes, and the exact split computes it where there is time: in step 0 on node 1, then on 0."""
    rows = [(0, 1)] * 8 + [(1, 0)] * 8 + [(1, 2)] * 8 + [(0, 0)] * 8
    batch = token_batch([[[expert]] for _, expert in rows], [16, 16], 3, home_T=[home for home, _ in rows])
    cluster = tiny_cluster(np.random.default_rng(0), (1, 1), equal=True, shared=False)
    count = np.array([[1, 1], [1, 0], [0, 1]])
    problem = PlacementProblem(batch, cluster, tiny_model(batch), np.array([2, 2]), "home", "exact")
    found = bound_of(problem, count)
    assert found.lower_bound == pytest.approx(found.objective, rel=1e-9)
    even = bound_of(replace(problem, split="even"), count)
    assert even.objective >= even.lower_bound > 1.1 * found.objective


def test_no_time_leaves_the_bounds_per_term_and_says_so():
    problem = groups_of_experts()
    plan = MethodResult(Placement.from_counts(placements(problem, np.random.default_rng(0))[0][None]))
    times = iter([0.0, *[9.0] * 50])
    budget = Budget(1.0, now=lambda: next(times))
    found = evaluate(problem, plan, method="any", joint=budget)
    assert "bound" not in found.details and budget.cuts == {"bound"}
    assert found.lower_bound == pytest.approx(sum(term.lower_bound for term in found.terms.values()), rel=1e-12)


def test_layers_have_it_in_order_as_far_as_the_time_reaches():
    problem = groups_of_experts()
    batch = problem.batch
    twice = replace(problem, batch=layer_again(batch, [0, 0]), model=tiny_model(layer_again(batch, [0, 0])))
    count = placements(problem, np.random.default_rng(0))[0]
    plan = MethodResult(Placement.from_counts(np.stack([count, count])))
    one, two = bound_of(problem, count), evaluate(twice, plan, method="any", joint=Budget(1.0, work=0.4))
    assert two.details["bound"] == "joint in 1 of 2 layers, else per term"
    terms = sum(term.lower_bound for term in one.terms.values())
    assert terms < two.lower_bound <= (one.lower_bound + terms) / 2 * (1 + 1e-9)


def test_a_plan_is_the_same_with_and_without_a_joint_bound_by_work():
    problem = groups_of_experts()
    plain, tight = (solve(problem, work=5, joint=joint) for joint in (0.0, 0.5))
    np.testing.assert_array_equal(plain.placement.slot_expert_LS, tight.placement.slot_expert_LS)
    assert plain.joint_bound == 0.0 < tight.joint_bound and "bound" not in plain.details
    assert tight.gap < plain.gap


@pytest.mark.parametrize(("traffic", "loads"), [("stay", False), ("home", True)])
def test_traffic_without_a_joint_bound_has_those_per_term(traffic, loads):
    problem, rng = problem_of(1, (2, 1), traffic, "even", loads, 1)
    found = bound_of(problem, placements(problem, rng)[0])
    assert found.joint_bound == 0.0 and "bound" not in found.details


def test_more_tokens_than_memory_should_hold_have_those_per_term(monkeypatch):
    problem = groups_of_experts()
    count = placements(problem, np.random.default_rng(0))[0]
    assert bound_of(problem, count).joint_bound > 0
    monkeypatch.setattr("poise.planning.solve.joint.MOST_TERMS", 80 * 3 - 1)
    assert bound_of(problem, count).joint_bound == 0
