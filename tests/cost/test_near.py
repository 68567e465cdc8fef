"""The split ``near`` against tokens sent one by one, where tokens or only loads are known."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, random_count, random_slots, tiny_batch, tiny_cluster, tiny_model, with_unseen

from poise.cost.bound import bound_terms
from poise.cost.compute import device_compute
from poise.cost.entries import LayerEntries
from poise.cost.near import near_count, near_groups
from poise.cost.pricing import Pricing
from poise.cost.step import batch_cost
from poise.planning.problem import PlacementProblem
from poise.replay.links import link_bytes
from poise.util.errors import OptionError

SEEDS = st.integers(0, 2**32 - 1)
NODES = st.sampled_from([(2, 1), (3,), (1, 1, 1), (2, 2, 3), (1,)])
HOME_FLOWS = st.sampled_from(["home", "home_device_dedup", "home_node_dedup"])


def make(seed, nodes, *, loads=False, top_k=2):
    """Machine, traffic, and slots of which some devices have two of an expert.

    Every third has tokens in its loads that nobody has seen (:mod:`poise.planning.solve.scenarios`).
    """
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    if loads:
        batch = load_batch(rng, top_k=top_k, steps=3)
    else:
        idle = (0.0, 0.4)[seed % 2]
        batch = tiny_batch(rng, devices=cluster.num_devices, tokens=(5, 0, 4), top_k=top_k, idle=idle)
    if seed % 3 == 0:
        batch = with_unseen(batch)
    count = random_count(rng, 2, 4, cluster.num_devices)
    return rng, cluster, batch, count * rng.integers(1, 3, count.shape)


def takers(count_ED, cluster, expert, source):
    """Share of one token on each device, by the words of the definition."""
    slots = [int(x) for x in count_ED[expert]]
    if slots[source]:
        slots = [many if d == source else 0 for d, many in enumerate(slots)]
    else:
        node = [many if cluster.node_D[d] == cluster.node_D[source] else 0 for d, many in enumerate(slots)]
        slots = node if sum(node) else slots
    return [many / sum(slots) for many in slots]


def ports(cluster, flow, node_flow):
    """Copies through each kind of port, [4, D], of copies from device to device and, or None, from device to node."""
    devices, node_D = cluster.num_devices, cluster.node_D
    out = np.zeros((4, devices))
    local = [d - int(np.flatnonzero(node_D == node_D[d])[0]) for d in range(devices)]
    for s, d in product(range(devices), repeat=2):
        if node_D[s] == node_D[d]:
            if s != d:
                out[0, s] += flow[s, d]
                out[1, d] += flow[s, d]
            continue
        land = d
        if node_flow is not None:
            inside = np.flatnonzero(node_D == node_D[d])
            land = inside[local[s] % len(inside)]
            if land != d:
                out[0, land] += flow[s, d]
                out[1, d] += flow[s, d]
            continue
        out[2, s] += flow[s, d]
        out[3, d] += flow[s, d]
    if node_flow is not None:
        for s, n in product(range(devices), range(cluster.num_nodes)):
            if n != node_D[s]:
                inside = np.flatnonzero(node_D == n)
                out[2, s] += node_flow[s, n]
                out[3, inside[local[s] % len(inside)]] += node_flow[s, n]
    return out


def port_time(cluster, load, size, wire):
    net = load[2:]
    if cluster.nic_shared:
        net = np.stack([net[:, cluster.node_D == n].sum(axis=1) for n in range(cluster.num_nodes)], axis=1)
    longest = max(load[:2].max() / wire.intra_bytes_per_s, net.max() / wire.inter_bytes_per_s)
    return longest * size + wire.start_s


def by_hand(batch, count_LED, cluster, model, traffic, b, layer):
    """Compute, dispatch, combine, tokens, pairs elsewhere on devices and nodes; of loads, 1 / D of each pair a home."""
    devices, nodes, node_D = cluster.num_devices, cluster.num_nodes, cluster.node_D
    rows = []  # weight, home, experts
    if batch.has_tokens:
        home = batch.home_of_tokens(devices)
        for t in range(batch.start_B[b], batch.start_B[b + 1]):
            rows.append((1.0, home[t], [int(e) for e in batch.experts_TLK[t, layer] if e >= 0]))
    else:
        rows = [(batch.load_BLE[b, layer, e] / devices, s, [e]) for e in range(4) for s in range(devices)]
    tokens, known = np.zeros((4, devices)), np.zeros(4)
    pairs, flow = np.zeros((devices, devices)), np.zeros((devices, devices))
    node_flow = np.zeros((devices, nodes))
    for weight, home, experts in rows:
        shares = [np.array(takers(count_LED[layer], cluster, e, home)) for e in experts]
        missed_D, missed_N = np.ones(devices), np.ones(nodes)
        for e, share in zip(experts, shares, strict=True):
            known[e] += weight
            tokens[e] += weight * share
            pairs[home] += weight * share
            missed_D *= 1 - share
            missed_N *= [1 - share[node_D == n].sum() for n in range(nodes)]
        flow[home] += weight * (sum(shares) if traffic == "home" and shares else 1 - missed_D)
        node_flow[home] += weight * (1 - missed_N)
    for e in range(4):
        if known[e] > 0:
            tokens[e] *= batch.load_BLE[b, layer, e] / known[e]
            continue
        for s in range(devices):
            part = batch.load_BLE[b, layer, e] / devices
            tokens[e] += part * np.array(takers(count_LED[layer], cluster, e, s))
    load = ports(cluster, flow, node_flow if traffic == "home_node_dedup" and nodes > 1 else None)
    same = node_D[:, None] == node_D[None, :]
    if batch.load_BLE[b, layer].sum() == 0:
        return (0.0, 0.0, 0.0), np.zeros(devices), 0.0, 0.0
    seconds = (
        device_compute(tokens, cluster, model).max(),
        port_time(cluster, load, model.dispatch_bytes_per_token, cluster.dispatch_wire),
        port_time(cluster, load, model.combine_bytes_per_token, cluster.combine_wire),
    )
    return seconds, tokens.sum(axis=0), pairs.sum() - np.trace(pairs), pairs.sum() - (pairs * same).sum()


@given(SEEDS, NODES, HOME_FLOWS, st.booleans(), st.integers(1, 3))
@settings(max_examples=120, deadline=None)
def test_every_token_goes_to_the_nearest(seed, nodes, traffic, loads, top_k):
    _, cluster, batch, count = make(seed, nodes, loads=loads, top_k=top_k)
    traffic, model = "home" if loads else traffic, tiny_model(batch)
    got = batch_cost(batch, count, cluster, model, traffic=traffic, split="near")
    for b, layer in product(range(batch.num_steps), range(2)):
        seconds, tokens, elsewhere, other_node = by_hand(batch, count, cluster, model, traffic, b, layer)
        terms = [getattr(got, f"{name}_BL")[b, layer] for name in ("compute", "dispatch", "combine")]
        assert terms == pytest.approx(seconds, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(got.tokens_BLD[b, layer], tokens, rtol=1e-9, atol=1e-12)
        assert got.cross_device_BL[b, layer] == pytest.approx(elsewhere, rel=1e-9, abs=1e-9)
        assert got.cross_node_BL[b, layer] == pytest.approx(other_node, rel=1e-9, abs=1e-9)


@given(SEEDS, NODES)
@settings(max_examples=60, deadline=None)
def test_groups_are_what_a_source_may_use(seed, nodes):
    _, cluster, _, count = make(seed, nodes)
    groups = near_groups(LayerEntries.of_counts(count[0]), cluster)
    for expert, source in product(range(4), range(cluster.num_devices)):
        g = groups.group_ED[expert, source]
        x = slice(groups.ptr_G[g], groups.ptr_G[g + 1])
        share = np.zeros(cluster.num_devices)
        share[groups.device_X[x]] = groups.share_X[x]
        np.testing.assert_allclose(share, takers(count[0], cluster, expert, source))
        may = near_count(count[0], cluster.node_D, source)[expert]
        np.testing.assert_allclose(may / may.sum(), share)


@given(SEEDS, NODES, st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_device_that_holds_all_keeps_all(seed, nodes, loads):
    """And one expert alone is split as under ``even``."""
    _, cluster, batch, count = make(seed, nodes, loads=loads)
    everywhere, once = np.ones_like(count), np.zeros_like(count)
    once[:, :, 0] = 1
    model = tiny_model(batch)
    kept = batch_cost(batch, everywhere, cluster, model, traffic="home", split="near")
    assert kept.cross_device_BL.max() <= 1e-9
    pair = [batch_cost(batch, once, cluster, model, traffic="home", split=split) for split in ("near", "even")]
    np.testing.assert_allclose(pair[0].seconds_BL, pair[1].seconds_BL, rtol=1e-9, atol=1e-12)


@given(SEEDS, NODES, HOME_FLOWS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_plan_beats_the_bound(seed, nodes, traffic, loads):
    rng, cluster, batch, _ = make(seed, nodes, loads=loads)
    traffic, slots = "home" if loads else traffic, random_slots(rng, 4, cluster.num_devices, int(rng.integers(4)))
    bound = bound_terms(batch, cluster, tiny_model(batch), traffic=traffic, slots_D=slots, blind=False)
    for _ in range(20):
        count = np.zeros((2, 4, cluster.num_devices), int)
        for layer in range(2):
            while (count[layer].sum(axis=1) == 0).any():
                count[layer] = 0
                for d, room in enumerate(slots):
                    count[layer, rng.choice(4, min(int(room), 4), replace=False), d] = 1
        cost = batch_cost(batch, count, cluster, tiny_model(batch), traffic=traffic, split="near")
        for name in ("compute", "dispatch", "combine"):
            assert (getattr(bound, f"{name}_BL") <= getattr(cost, f"{name}_BL") * (1 + 1e-9) + 1e-12).all(), name


@given(SEEDS, NODES, HOME_FLOWS, st.booleans())
@settings(max_examples=40, deadline=None)
def test_links_carry_the_pairs_that_leave(seed, nodes, traffic, loads):
    _, cluster, batch, count = make(seed, nodes, loads=loads)
    model = tiny_model(batch)
    bytes_DD = link_bytes(batch, count, Pricing(cluster, model, "home", "near")).out_DD
    cost = batch_cost(batch, count, cluster, model, traffic="home", split="near")
    away = bytes_DD.sum() - np.trace(bytes_DD)
    assert away * batch.num_steps == pytest.approx(
        cost.cross_device_BL.sum() * model.dispatch_bytes_per_token, abs=1e-9
    )


def test_tokens_that_leave_their_home_have_no_near():
    _, cluster, batch, count = make(1, (2, 1))
    with pytest.raises(OptionError, match=r"near.*stay"):
        batch_cost(batch, count, cluster, tiny_model(batch), traffic="stay", split="near")
    with pytest.raises(OptionError, match=r"near.*stay"):
        PlacementProblem(batch, cluster, tiny_model(batch), np.full(3, 4), "stay", "near")
