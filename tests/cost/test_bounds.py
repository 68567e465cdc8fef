"""Bounds against every placement there is, and planted cases in which a placement attains them."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from tests.helpers import (
    FLOW_SPLITS,
    all_counts,
    few_or,
    load_batch,
    random_slots,
    tiny_batch,
    tiny_cluster,
    tiny_model,
    token_batch,
)

from poise.cost.bound import bound_terms, compute_bound
from poise.cost.step import batch_cost
from poise.planning.engine_rules import NONE
from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem
from poise.planning.solve.solve import evaluate
from poise.routing.batch import RoutingBatch

SEEDS = st.integers(0, 2**32 - 1)
NODES = st.sampled_from([(1, 1), (2,), (2, 1), (3,), (1, 1, 1)])
TERMS = ("compute", "dispatch", "combine", "kv")
ATOL = 1e-12


def layer_again(batch: RoutingBatch, layers: list[int]) -> RoutingBatch:
    """The batch with its layers picked, any number of times: one call then prices many placements."""
    tokens = None if batch.experts_TLK is None else batch.experts_TLK[:, layers]
    ids = np.arange(len(layers), dtype=np.int32)
    return RoutingBatch(batch.load_BLE[:, layers], batch.weight_B.copy(), batch.top_k, ids, tokens, batch.start_B,
                        batch.request_T, batch.home_T)  # fmt: skip


def terms_of(got) -> np.ndarray:
    return np.stack([getattr(got, f"{name}_BL") for name in TERMS])


def price_all(batch, counts, cluster, model, traffic, split):
    """Terms [term, B, L, P, P] of every pair of placements of two layers (the first axis P: of layer 0)."""
    num = len(counts)

    def price(layers, placements):
        got = batch_cost(layer_again(batch, layers), np.stack(placements), cluster, model, traffic=traffic, split=split)
        return terms_of(got)

    out = np.empty((4, batch.num_steps, 2, num, num))
    if traffic != "stay":
        for layer in range(2):
            cost = price([layer] * num, counts)
            out[:, :, layer] = cost[..., :, None] if layer == 0 else cost[..., None, :]
        return out
    for i, count in enumerate(counts):
        out[:, :, 0, i] = price([0], [count])
    pairs = list(product(range(num), repeat=2))
    if batch.experts_TLK is not None and (batch.experts_TLK < 0).any():  # tokens may come from further back
        for i, j in pairs:
            out[:, :, 1, i, j] = price([0, 1], [counts[i], counts[j]])[:, :, 1]
        return out
    # layer 0, 1, 0, 1, ...: every other one is layer 1 whose tokens come from layer 0
    cost = price([0, 1] * num**2, [counts[i] for pair in pairs for i in pair])
    out[:, :, 1] = cost[:, :, 1::2].reshape(4, batch.num_steps, num, num)
    return out


def tiny_case(seed, nodes, traffic, loads, spare, most):
    """Traffic, machine, slots and all placements of a layer; the number of experts fits ``most`` placements."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    experts = int(rng.integers(3, 5))
    while True:
        slots = random_slots(rng, experts, cluster.num_devices, spare)
        counts = list(all_counts(experts, slots))
        if len(counts) <= most or experts == 2:
            break
        experts -= 1
    top_k = int(rng.integers(1, min(3, experts) + 1))
    if loads:
        batch = load_batch(rng, experts=experts, top_k=top_k)
    else:
        batch = tiny_batch(rng, devices=cluster.num_devices, experts=experts, top_k=top_k, tokens=(6, 0, 4),
                           idle=(0.0, 0.4)[seed % 2])  # fmt: skip
    return batch, cluster, tiny_model(batch), slots, counts


@given(SEEDS, NODES, st.sampled_from(FLOW_SPLITS), st.booleans(), st.integers(0, 2))
@settings(max_examples=few_or(300, 40), deadline=None)
def test_no_placement_lies_below_a_bound(seed, nodes, priced, loads, spare):
    traffic, split = priced
    traffic = "home" if loads else traffic
    batch, cluster, model, slots, counts = tiny_case(
        seed, nodes, traffic, loads, spare, 20 if traffic == "stay" else 150
    )
    cost = price_all(batch, counts, cluster, model, traffic, split)
    bound = bound_terms(batch, cluster, model, traffic=traffic, slots_D=slots, blind=split != "near")
    least = cost.min(axis=(3, 4))
    for name, mine, best in zip(TERMS, terms_of(bound), least, strict=True):
        assert (mine <= best * (1 + 1e-9) + ATOL).all(), name
    total = cost.sum(axis=0).min(axis=(2, 3))
    step = bound.seconds_BL
    assert (step <= total * (1 + 1e-9) + ATOL).all()
    np.testing.assert_allclose(step, terms_of(bound).sum(axis=0))
    assert (terms_of(bound)[:3].sum(axis=0) > 0)[batch.load_BLE.sum(axis=2) > 0].all()


@given(
    SEEDS,
    NODES,
    st.sampled_from(FLOW_SPLITS),
    st.booleans(),
    st.integers(0, 2),
    st.booleans(),
)
@settings(max_examples=few_or(300, 30), deadline=None)
def test_no_plan_lies_below_the_bound_of_a_solution(seed, nodes, priced, loads, spare, pooled):
    """The same for a static plan of two layers and its expectation over steps; with ``pooled`` slots too."""
    traffic, split = ("home", priced[1]) if loads else priced
    most = 20 if traffic == "stay" else 150
    batch, cluster, model, slots, counts = tiny_case(seed, nodes, traffic, loads, spare, most)
    problem = PlacementProblem(batch, cluster, model, slots, traffic, split, pooled, engine=NONE)
    used = np.array([count.sum(axis=0) for count in counts])
    if pooled:
        more = list(all_counts(batch.num_experts, problem.layer_slots_D))
        counts = more if len(more) <= most else counts
        used = np.array([count.sum(axis=0) for count in counts])
        fits = (used[:, None] + used[None] <= 2 * slots).all(axis=2)
    else:
        fits = (used[:, None] <= slots).all(axis=2) & (used[None] <= slots).all(axis=2)
    cost = np.einsum("b,xblpq->xpq", batch.weight_B, price_all(batch, counts, cluster, model, traffic, split)) / 2
    first, second = np.argwhere(fits)[seed % fits.sum()]
    plan = Placement.from_counts(np.stack([counts[first], counts[second]]))
    solution = evaluate(problem, MethodResult(plan), method="any")
    for name, term, values in zip(TERMS, solution.terms.values(), cost, strict=True):
        assert term.seconds == pytest.approx(values[first, second], rel=1e-9, abs=ATOL)
        assert term.lower_bound <= values[fits].min() * (1 + 1e-9) + ATOL, name
    assert solution.lower_bound <= cost.sum(axis=0)[fits].min() * (1 + 1e-9)
    assert list(solution.terms) == list(TERMS)


@given(SEEDS, NODES, st.sampled_from(["even", "exact"]))
@settings(max_examples=few_or(100, 15), deadline=None)
def test_no_plan_lies_below_a_bound_where_tokens_skip_layers(seed, nodes, split):
    """Under ``stay``, three layers: who computes nothing in one comes to the next from further back."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    batch = tiny_batch(rng, devices=cluster.num_devices, layers=3, tokens=(9, 6), idle=0.5)
    slots = random_slots(rng, 4, cluster.num_devices, int(rng.integers(3)))
    counts, options = list(all_counts(4, slots)), {"traffic": "stay", "slots_D": slots}
    bound = terms_of(bound_terms(batch, cluster, tiny_model(batch), **options))
    for _ in range(40):
        plan = np.stack([counts[rng.integers(len(counts))] for _ in range(3)])
        cost = terms_of(batch_cost(batch, plan, cluster, tiny_model(batch), traffic="stay", split=split))
        assert (bound <= cost * (1 + 1e-9) + ATOL).all()


@given(SEEDS, st.integers(0, 2), st.sampled_from([2, 3]))
@settings(max_examples=60, deadline=None)
def test_compute_bound_is_below_the_best_fractional_split_of_every_placement(seed, spare, devices):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, 5))
    work, speed = rng.integers(0, 20, experts) * 1.0, rng.choice([0.5, 1.0, 2.0], devices)
    slots, best = random_slots(rng, experts, devices, spare), np.inf
    for count in all_counts(experts, slots):
        if (count.sum(axis=1) == 1).all():
            best = min(best, (work @ count / speed).max())
            continue
        expert, device = np.nonzero(count)
        pairs = len(expert)
        give, below = np.zeros((experts, pairs + 1)), np.zeros((devices, pairs + 1))
        give[expert, np.arange(pairs)] = 1
        below[device, np.arange(pairs)], below[:, pairs] = 1, -speed
        best = min(best, linprog(np.eye(pairs + 1)[pairs], below, np.zeros(devices), give, work).fun)
    spare = int(slots.sum()) - experts
    assert compute_bound(work[None], slots, speed, spare=spare)[0] <= best * (1 + 1e-9)


def plain(rng, nodes, **options):
    return tiny_cluster(rng, nodes, equal=True, shared=options.pop("shared", False))


def flow(pairs: list[tuple[int, tuple[int, ...], int]], experts: int, layers: int = 1) -> RoutingBatch:
    """A batch of one step: (home device, experts, how many tokens)."""
    rows = [(home, ids) for home, ids, many in pairs for _ in range(many)]
    tokens = np.array([[ids] * layers for _, ids in rows])
    return token_batch(tokens, [len(rows)], experts, home_T=[home for home, _ in rows])


def loads(load) -> RoutingBatch:
    return RoutingBatch(np.array([[load]], dtype=float), np.ones(1), 1, np.zeros(1, np.int32))


# name: (traffic, batch, nodes, shared network port, slots, term)
ATTAINED = {
    "averaging": ("home", lambda: loads([6, 6, 6, 6]), (2,), False, [2, 2], "compute"),
    "averaging, split": ("home", lambda: loads([8, 8, 8]), (2,), False, [3, 3], "compute"),
    "one expert": ("home", lambda: loads([9, 1]), (2,), False, [1, 1], "compute"),
    "one expert, two copies": ("home", lambda: loads([18, 1, 1]), (3,), False, [2, 1, 1], "compute"),
    "pigeonhole": ("home", lambda: loads([5, 4, 4]), (2,), False, [2, 1], "compute"),
    "slot counting": ("home", lambda: loads([10, 2, 2, 2]), (2,), False, [2, 2], "compute"),
    "spread homes, fabric": ("home", lambda: loads([8, 8]), (2,), False, [1, 1], "dispatch"),
    "spread homes, network": ("home", lambda: loads([8, 8]), (1, 1), False, [1, 1], "combine"),
    "spread homes, fullest device": ("home", lambda: loads([5, 4, 4]), (2,), False, [2, 1], "dispatch"),
    "spread homes, heaviest expert": ("home", lambda: loads([9, 2, 2, 1]), (1, 1), False, [2, 2], "combine"),
    "spread homes, shared port": ("home", lambda: loads([8, 8, 8, 8]), (2, 2), True, [1] * 4, "dispatch"),
    "home, fabric": ("home", lambda: flow([(0, (0,), 5), (0, (1,), 3)], 2), (2,), False, [1, 1], "dispatch"),
    "home, network": ("home", lambda: flow([(0, (0,), 5), (0, (1,), 3)], 2), (1, 1), False, [1, 1], "combine"),
    "home, shared port": (
        "home", lambda: flow([(h, (e,), n) for h in (0, 1) for e, n in enumerate((9, 9, 2))], 4), (2, 2), True,
        [1] * 4, "dispatch",
    ),
    "device dedup": (
        "home_device_dedup", lambda: flow([(0, (0, 1), 3), (0, (2, 3), 2)], 4), (2,), False, [2, 2], "dispatch",
    ),
    "node dedup": (
        "home_node_dedup", lambda: flow([(0, (0, 1), 3), (0, (2, 3), 2)], 4), (1, 1), False, [2, 2], "combine",
    ),
    "node dedup, one node": (
        "home_node_dedup", lambda: flow([(0, (0, 1), 3), (0, (2, 3), 2)], 4), (2,), False, [2, 2], "dispatch",
    ),
    "stay, first layer": ("stay", lambda: flow([(0, (0, 1), 3), (0, (2, 3), 2)], 4), (2,), False, [2, 2], "dispatch"),
    "stay, one expert": ("stay", lambda: flow([(0, (0,), 5), (0, (1,), 3)], 2), (2,), False, [1, 1], "combine"),
    "stay, keys and values": ("stay", lambda: flow([(0, (0,), 5), (1, (1,), 3)], 2), (1, 1), False, [1, 1], "kv"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTAINED)
def test_some_placement_attains_the_bound(name):
    """A bound one per cent larger would lie above this placement."""
    traffic, make, nodes, shared, slots, term = ATTAINED[name]
    batch, rng = make(), np.random.default_rng(0)
    cluster, slots = plain(rng, nodes, shared=shared), np.array(slots)
    if shared:  # the network decides
        cluster = type(cluster)(cluster.node_D, cluster.speed_D, 32.0, 128.0, 1.0, 1e6, 2.0, nic_shared=True)
    counts = list(all_counts(batch.num_experts, slots))
    best = min(
        float(getattr(batch_cost(batch, count[None], cluster, tiny_model(batch), traffic=traffic, split="even"),
                      f"{term}_BL")[0, 0])
        for count in counts
    )  # fmt: skip
    bound = bound_terms(batch, cluster, tiny_model(batch), traffic=traffic, slots_D=slots)
    assert getattr(bound, f"{term}_BL")[0, 0] == pytest.approx(best, rel=1e-9)
    assert best > 0 or name == "stay, one expert"


@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_some_placement_attains_the_bound_of_a_later_layer_under_stay(keep, leave, top_k):
    """Two groups of experts: ``keep`` tokens of a group stay in it, ``leave`` go over to the other."""
    cluster = plain(np.random.default_rng(0), (2,))
    groups = np.arange(2 * top_k).reshape(2, top_k)
    tokens = [(groups[a], groups[b]) for a in (0, 1) for b in (0, 1) for _ in range(keep + leave if a == b else leave)]
    batch = token_batch(tokens, [len(tokens)], 2 * top_k)
    slots = np.full(2, top_k)
    cost = price_all(batch, list(all_counts(2 * top_k, slots)), cluster, tiny_model(batch), "stay", "even")
    bound = bound_terms(batch, cluster, tiny_model(batch), traffic="stay", slots_D=slots)
    assert bound.dispatch_BL[0, 1] == pytest.approx(cost[1, 0, 1].min(), rel=1e-9)
    assert bound.dispatch_BL[0, 1] - 0.25 == pytest.approx(leave * 4.0 / cluster.intra_bytes_per_s)
