"""The cost model against counting token by token, and the bounds against every placement there is."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from tests.helpers import no_experts

from poise.cost import step as step_module
from poise.cost.bound import compute_bound
from poise.cost.compute import expert_seconds
from poise.cost.links import latency_seconds
from poise.cost.split import even_share, exact_quota
from poise.cost.step import batch_cost, kv_seconds_per_token
from poise.cost.traffic import TRAFFIC_MODELS, landing_DN
from poise.machine.cluster import from_preset
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem
from poise.planning.solve.solve import evaluate
from poise.planning.solve.state import STAY, TIE_BREAK, change, layer_seconds, make_data, make_state, rebuild
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace

SEEDS = st.integers(0, 100_000)


def case(seed, *, experts=4, layers=2, top_k=2, tokens=10, nodes=(2, 1), loads=False, steps=2, shared=False,
         idle=0.0):  # fmt: skip
    rng = np.random.default_rng(seed)
    devices = sum(nodes)
    if loads:
        batch = RoutingBatch(rng.integers(0, 9, (steps, layers, experts)).astype(float) + (np.arange(experts) == 0),
                             np.full(steps, 1 / steps), 1, np.arange(layers, dtype=np.int32))  # fmt: skip
    else:
        trace = zipf_trace(
            num_tokens=tokens, num_layers=layers, num_experts=experts, top_k=top_k, tokens_per_request=1, seed=seed
        )
        trace = replace(trace, experts=no_experts(rng, trace.experts, idle)) if idle else trace
        batch = make_batch(trace, tokens_per_step=-(-tokens // steps), order="file")
    cluster = from_preset(list(nodes), "h100", speed=rng.choice([0.5, 1.0, 2.0], devices), nic_shared=shared,
                          flops_per_s=float(rng.choice([1e9, 1e15])))  # fmt: skip
    model = ModelSpec("tiny", layers, tuple(range(layers)), experts, batch.top_k, 64, 32, kv_bytes_per_token_layer=64)
    return rng, batch, cluster, model


def placement_of(rng, layers, experts, devices, share=0.3):
    count = (rng.random((layers, experts, devices)) < share).astype(int)
    for layer, expert in product(range(layers), range(experts)):
        count[layer, expert, rng.integers(devices)] = 1
    return count


def ports_by_hand(copies, cluster, home_node_dedup, token_copies):
    """Expected copies through each port, from (probability, source, set of destinations) of every token and draw."""
    devices = cluster.num_devices
    port = np.zeros((4, devices))
    node, landing = cluster.node_D, landing_DN(cluster)

    def book(p, a, b):
        if a != b:
            out, into = (0, 1) if node[a] == node[b] else (2, 3)
            port[out, a] += p
            port[into, b] += p

    for p, source, targets in token_copies:
        if not home_node_dedup or cluster.num_nodes == 1:
            for target in targets:
                book(p, source, target)
            continue
        for n in sorted({node[t] for t in targets}):
            inside = [t for t in targets if node[t] == n]
            enter = source if n == node[source] else landing[source, n]
            if enter != source:
                book(p, source, enter)
            for target in inside:
                book(p, enter, target)
    return port


def seconds_by_hand(port, cluster, bytes_per_copy):
    net = port[2:]
    if cluster.nic_shared:
        net = np.stack([np.bincount(cluster.node_D, weights=row) for row in net])
    return bytes_per_copy * max(port[:2].max() / cluster.intra_bytes_per_s, net.max() / cluster.inter_bytes_per_s)


@given(
    SEEDS, st.sampled_from(TRAFFIC_MODELS), st.sampled_from([(2, 1), (3,), (1, 1, 2)]), st.integers(1, 3), st.booleans(),
    st.sampled_from([0.0, 0.4]),
)  # fmt: skip
@example(1, "stay", (2, 1), 1, False, 0.4)  # tokens that skip a layer
@example(2, "stay", (1, 1, 2), 1, True, 0.4)
@example(3, "stay", (3,), 2, False, 0.4)
@settings(max_examples=90, deadline=None)
def test_traffic_equals_counting_tokens_and_draws(seed, traffic, nodes, top_k, shared, idle):
    """Picks that compute nothing are not in the token's list: it is priced as if it had fewer."""
    rng, batch, cluster, model = case(seed, top_k=top_k, tokens=6, nodes=nodes, shared=shared, idle=idle, layers=3)
    count = placement_of(rng, 3, 4, cluster.num_devices)
    got = batch_cost(batch, count, cluster, model, traffic=traffic, split="even")
    home = batch.home_of_tokens(cluster.num_devices)
    share = even_share(count)
    for b, layer in product(range(batch.num_steps), range(3)):
        out, back, crossing, crossing_node = [], [], 0.0, 0.0
        for t in range(batch.start_B[b], batch.start_B[b + 1]):
            ids = [e for e in batch.experts_TLK[t, layer].tolist() if e >= 0]
            sources = [(1.0, int(home[t]))]
            if not ids:
                continue
            heaviest = [(old, e) for old, e in enumerate(batch.experts_TLK[t, :layer, 0].tolist()) if e >= 0]
            if traffic == "stay" and heaviest:  # it waits where it last computed
                before = share[heaviest[-1]]
                sources = [(before[d], d) for d in np.flatnonzero(before)]
            for (ps, source), draw in product(sources, product(*(np.flatnonzero(share[layer, e]) for e in ids))):
                p = ps * np.prod([share[layer, e, d] for e, d in zip(ids, draw, strict=True)])
                out.append((p, source, list(draw) if traffic == "home" else sorted(set(draw))))
                crossing += p * sum(d != source for d in draw)
                crossing_node += p * sum(cluster.node_D[d] != cluster.node_D[source] for d in draw)
                if traffic == "stay":
                    back += [(p, int(d), [int(draw[0])]) for d in set(draw[1:])]
        dedup = traffic == "home_node_dedup"
        first = seconds_by_hand(ports_by_hand(None, cluster, dedup, out), cluster, model.dispatch_bytes_per_token)
        busy = any(batch.experts_TLK[t, layer, 0] >= 0 for t in range(batch.start_B[b], batch.start_B[b + 1]))
        assert got.dispatch_BL[b, layer] == pytest.approx(first + busy * latency_seconds(cluster), rel=1e-9)
        second = seconds_by_hand(ports_by_hand(None, cluster, dedup, back if traffic == "stay" else out), cluster,
                                 model.combine_bytes_per_token)  # fmt: skip
        second += busy * latency_seconds(cluster) if traffic != "stay" or top_k > 1 else 0
        tokens = busy * (batch.start_B[b + 1] - batch.start_B[b]) * (traffic == "stay")
        assert got.kv_BL[b, layer] == pytest.approx(tokens * kv_seconds_per_token(cluster, model), rel=1e-9)
        assert got.combine_BL[b, layer] == pytest.approx(second, rel=1e-9)
        assert got.cross_device_BL[b, layer] == pytest.approx(crossing)
        assert got.cross_node_BL[b, layer] == pytest.approx(crossing_node)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_compute_is_the_slowest_device(seed):
    rng, batch, cluster, model = case(seed)
    count = placement_of(rng, 2, 4, 3)
    got = batch_cost(batch, count, cluster, model, traffic="home", split="even")
    for b, layer in product(range(batch.num_steps), range(2)):
        device = np.zeros(3)
        for e, d in product(range(4), range(3)):
            n = batch.load_BLE[b, layer, e] * count[layer, e, d] / count[layer, e].sum()
            work = max(
                n * model.flops_per_token / cluster.flops_per_s,
                min(n, 1) * model.expert_bytes / cluster.memory_bytes_per_s,
            )
            device[d] += work / cluster.speed_D[d]
        assert got.compute_BL[b, layer] == pytest.approx(device.max())


@given(SEEDS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_exact_split_is_the_integer_optimum(seed, equal_speeds):
    rng = np.random.default_rng(seed)
    load, count = rng.integers(0, 7, 3), placement_of(rng, 1, 3, 3)[0]
    speed = np.ones(3) if equal_speeds else rng.choice([0.5, 1.0, 2.0], 3)
    quota = exact_quota(load, count, speed)
    assert (quota.sum(axis=1) == load).all() and (quota[count == 0] == 0).all() and quota.min() >= 0
    best = np.inf
    options = []
    for e in range(3):
        on = np.flatnonzero(count[e])
        rows = []
        for parts in product(range(load[e] + 1), repeat=len(on)):
            if sum(parts) == load[e]:
                row = np.zeros(3)
                row[on] = parts
                rows.append(row)
        options.append(rows)
    for choice in product(*options):
        best = min(best, (np.sum(choice, axis=0) / speed).max())
    assert (quota.sum(axis=0) / speed).max() == pytest.approx(best)


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_exact_split_is_the_linear_programme_rounded_up(seed):
    rng = np.random.default_rng(seed)
    load, count = rng.integers(0, 300, 12), placement_of(rng, 1, 12, 5)[0]
    e, d = np.nonzero(count)
    top = len(e)
    equal = np.zeros((12, top + 1))
    equal[e, np.arange(top)] = 1
    below = np.zeros((5, top + 1))
    below[d, np.arange(top)], below[:, top] = 1, -1
    least = linprog(np.eye(top + 1)[top], A_ub=below, b_ub=np.zeros(5), A_eq=equal, b_eq=load).fun
    assert exact_quota(load, count, np.ones(5)).sum(axis=0).max() == int(np.ceil(least - 1e-6))


@given(SEEDS, st.sampled_from(TRAFFIC_MODELS), st.sampled_from(["even", "exact"]), st.booleans(), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_no_placement_lies_below_the_bounds(seed, traffic, split, loads, spare):
    """Every placement of three or four experts in one layer, or a sample of those in two."""
    traffic = "home" if loads else traffic
    rng, batch, cluster, model = case(seed, experts=3, layers=2, top_k=2, loads=loads, shared=bool(seed % 2))
    slots = np.array([1, 1, 1])
    for _ in range(spare):
        slots[rng.integers(3)] += 1
    problem = PlacementProblem(batch, cluster, model, slots, traffic, split)
    options = [
        held for held in product(product([0, 1], repeat=3), repeat=3)
        if np.min(np.sum(held, axis=1)) >= 1 and (np.sum(held, axis=0) <= slots).all()
    ]  # fmt: skip
    for _ in range(12):
        counts = np.array([options[rng.integers(len(options))] for _ in range(2)])
        got = evaluate(problem, MethodResult(Placement.from_counts(counts, slots_D=slots)), method="any")
        for name, term in got.terms.items():
            assert term.lower_bound <= term.seconds * (1 + 1e-9) + 1e-15, name


@given(SEEDS, st.integers(0, 2), st.sampled_from([(1, 1, 1), (2, 1, 0), (2, 2, 1)]))
@settings(max_examples=80, deadline=None)
def test_compute_bound_is_below_every_placement_and_often_attained(seed, spare, extra):
    rng = np.random.default_rng(seed)
    work = rng.integers(1, 20, 4).astype(float)
    speed = rng.choice([1.0, 2.0], 3)
    slots = np.array(extra) + 1
    held_PED = np.array(list(product([h for h in product([0, 1], repeat=3) if sum(h)], repeat=4)))
    held_PED = held_PED[(held_PED.sum(axis=1) <= slots).all(axis=1) & (held_PED.sum(axis=(1, 2)) <= 4 + spare)]
    # the best split of each: the fullest group of experts over the speed of all devices that hold one of them
    groups_GE = np.array(list(product([False, True], repeat=4)))[1:]
    speed_PG = np.array([held_PED[:, group].any(axis=1) @ speed for group in groups_GE]).T
    best_P = (groups_GE @ work / speed_PG).max(axis=1)
    for count, least in zip(held_PED[seed % 5 :: 97], best_P[seed % 5 :: 97], strict=True):  # a linear programme agrees
        e, d = np.nonzero(count)
        top = len(e)
        equal, below = np.zeros((4, top + 1)), np.zeros((3, top + 1))
        equal[e, np.arange(top)] = 1
        below[d, np.arange(top)], below[:, top] = 1, -speed
        solved = linprog(np.eye(top + 1)[top], A_ub=below, b_ub=np.zeros(3), A_eq=equal, b_eq=work).fun
        assert solved == pytest.approx(least)
    best = best_P.min(initial=np.inf)
    bound = compute_bound(work[None], slots, speed, spare=spare)[0]
    assert bound <= best * (1 + 1e-9)


def test_bounds_are_attained_where_they_can_be():
    ones = np.ones(2)
    assert compute_bound(np.array([[10.0, 1, 1, 1]]), np.array([2, 2]), ones, spare=0)[0] == 11  # slot counting
    assert compute_bound(np.array([[3.0, 3, 3]]), np.array([3, 3]), ones, spare=0)[0] == 6  # pigeonhole
    assert compute_bound(np.array([[8.0, 1]]), np.array([2, 2]), ones, spare=1)[0] == 4.5  # averaging
    assert (
        compute_bound(np.array([[9.0, 1, 1]]), np.array([2, 2, 2]), np.ones(3), spare=1)[0] == 4.5
    )  # one expert, two copies


@given(SEEDS, st.sampled_from(TRAFFIC_MODELS))
@settings(max_examples=20, deadline=None)
def test_chunks_change_nothing(seed, traffic):
    rng, batch, cluster, model = case(seed, tokens=24, steps=4)
    count = placement_of(rng, 2, 4, 3)
    whole = batch_cost(batch, count, cluster, model, traffic=traffic, split="exact")
    keep, step_module._CHUNK_ELEMENTS = step_module._CHUNK_ELEMENTS, 40
    try:
        parts = batch_cost(batch, count, cluster, model, traffic=traffic, split="exact")
    finally:
        step_module._CHUNK_ELEMENTS = keep
    np.testing.assert_allclose(parts.seconds_BL, whole.seconds_BL, rtol=1e-12)
    np.testing.assert_allclose(parts.tokens_BLD, whole.tokens_BLD, rtol=1e-12)


@given(SEEDS, st.sampled_from(TRAFFIC_MODELS), st.booleans(), st.sampled_from([(2, 1), (3,), (1, 1, 1)]))
@settings(max_examples=40, deadline=None)
def test_the_searchs_running_sums_are_the_cost(seed, traffic, loads, nodes):
    """The search and ``batch_cost`` share no code: they must agree on any placement, and after any changes."""
    traffic = "home" if loads else traffic
    rng, batch, cluster, model = case(seed, tokens=12, nodes=nodes, loads=loads, shared=bool(seed % 2))
    problem = PlacementProblem(batch, cluster, model, np.full(3, 4), traffic)
    data = make_data(problem, 10**9)
    state = make_state(data, problem, placement_of(rng, 2, 4, 3) > 0)
    for _ in range(8):
        e, d = np.array([rng.integers(4)]), np.array([rng.integers(3)])
        if state.held_LED[(layer := int(rng.integers(2))), e[0], d[0]] and state.copies_LE[layer, e[0]] == 1:
            continue
        change(data, state, layer, e, d, np.inf)
    cost = batch_cost(batch, state.held_LED.astype(int), cluster, model, traffic=traffic, split="even")
    busy = (batch.load_BLE.sum(axis=2) > 0) * latency_seconds(cluster)
    constant = busy * (2 if traffic != "stay" or batch.top_k > 1 else 1) + cost.kv_BL
    tie = TIE_BREAK * (cost.tokens_BLD / cluster.speed_D).max(axis=2) * data.machine.per_token
    want = batch.weight_B @ (cost.seconds_BL - constant + tie)
    for layer in range(2):
        assert layer_seconds(data, state, layer) == pytest.approx(want[layer], rel=1e-6, abs=1e-15)
        rebuild(data, state, layer)
        assert layer_seconds(data, state, layer) == pytest.approx(want[layer], rel=1e-9, abs=1e-15)
    assert (data.flow == STAY) == (traffic == "stay")


def test_a_fraction_of_a_token_reads_weights_as_often():
    _, _, cluster, model = case(0)
    per_expert = model.expert_bytes / cluster.memory_bytes_per_s
    fast = from_preset([1], "h100")
    seconds = expert_seconds(np.array([0.0, 0.25, 1.0]), fast, model)
    np.testing.assert_allclose(seconds, [0, 0.25 * per_expert, per_expert])
