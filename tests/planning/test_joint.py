"""The joint bound against every placement of small layers, and the programme behind it against integer points."""

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
from poise.cost.traffic import DATA_FLOWS
from poise.planning.budget import Budget
from poise.planning.engine_rules import ANY, NONE
from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem
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
