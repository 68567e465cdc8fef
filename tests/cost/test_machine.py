"""What compiled code says of the machine is what the readable evaluators say: an expert, ports, a fetch, its exposure."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, tiny_cluster, tiny_model
from tests.test_curve import random_curve

from poise.cost import step
from poise.cost.compute import expert_seconds
from poise.cost.links import PortLoad, port_seconds
from poise.cost.machine import (
    book,
    book_even_homes,
    combine_seconds,
    dispatch_seconds,
    exchange_seconds,
    expert_work,
    expert_works,
    fullest_of_sums,
    fullest_ports,
    make_machine,
    weight_seconds,
)
from poise.cost.traffic import Copies, port_load
from poise.cost.weights import (
    StepPrice,
    attention_parameters,
    compiled_price,
    dense_gradient_seconds,
    exposed_seconds,
    fetch_seconds,
    gather_seconds,
)
from poise.machine.kernel import AllToAllLinks, ExchangeWay, ExpertKernel

SEEDS = st.integers(0, 2**32 - 1)
NODES = st.sampled_from([(2, 1), (3,), (1, 1, 1), (1, 2, 2), (1,), (3, 3)])


def make(seed, nodes):
    """A cluster of the roofline, of a measured kernel or of a measured curve, with and without measured links."""
    rng = np.random.default_rng(seed)
    cluster, model = tiny_cluster(rng, nodes, measured=False), tiny_model(load_batch(rng))
    kind = seed % 3
    if kind == 1:
        factors = rng.uniform(0.5, 3.0, 3)
        cluster = replace(cluster, kernel=ExpertKernel("k", "bf16", model.weight_bytes, 0.3, *factors, 7.0, 5.0))
    elif kind == 2:
        cluster = replace(cluster, expert_curve=random_curve(rng))
    if seed % 2:
        ways = [ExchangeWay(0.2, *rng.uniform(1, 9, 2), peer_s=0.1, nodes_start_s=0.4) for _ in range(2)]
        cluster = replace(cluster, links=AllToAllLinks("l", *ways))
    return rng, cluster, model, make_machine(cluster, model)


@given(SEEDS, NODES, st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_an_experts_seconds(seed, nodes, passes):
    rng, cluster, model, _ = make(seed, nodes)
    machine = make_machine(cluster, model, compute_passes=passes)
    tokens = np.concatenate([rng.exponential(2.0, 20), rng.uniform(1, 500, 20), [0.0, 1.0]])
    want = expert_seconds(tokens, cluster, model) * passes
    np.testing.assert_allclose([expert_work(n, machine) for n in tokens], want, rtol=1e-12)
    np.testing.assert_allclose(expert_works(tokens, machine), want, rtol=1e-12)


@given(SEEDS, NODES)
@settings(max_examples=60, deadline=None)
def test_ports_of_pairs(seed, nodes):
    rng, cluster, model, machine = make(seed, nodes)
    pairs_DD = rng.exponential(1.0, (cluster.num_devices,) * 2) * (rng.random((cluster.num_devices,) * 2) < 0.6)
    port_PD = np.zeros((4, cluster.num_devices))
    for (source, target), amount in np.ndenumerate(pairs_DD):
        book(port_PD, source, target, amount, machine.node_D)
    load = port_load(Copies(pairs_DD[None]), cluster)
    want = [load.intra_out_BD[0], load.intra_in_BD[0], load.net_out_BD[0], load.net_in_BD[0]]
    np.testing.assert_allclose(port_PD, want, rtol=1e-12)
    ports = fullest_ports(port_PD, machine)
    out = port_seconds(load, model.dispatch_bytes_per_token, cluster, cluster.dispatch_wire)[0]
    back = port_seconds(load, model.combine_bytes_per_token, cluster, cluster.combine_wire)[0]
    assert dispatch_seconds(ports, machine) == pytest.approx(out, rel=1e-12)
    assert combine_seconds(ports, machine) == pytest.approx(back, rel=1e-12)
    assert exchange_seconds(ports, machine) == pytest.approx(out + back, rel=1e-12)
    assert weight_seconds(ports, machine) == pytest.approx(
        port_seconds(load, 1.0, cluster, cluster.plain_wire)[0], rel=1e-12
    )


@given(SEEDS, NODES)
@settings(max_examples=60, deadline=None)
def test_ports_where_homes_are_spread_evenly(seed, nodes):
    rng, cluster, _, machine = make(seed, nodes)
    tokens_D, port_PD = rng.exponential(5.0, cluster.num_devices), np.full((4, cluster.num_devices), np.nan)
    book_even_homes(port_PD, tokens_D, machine)
    load = step._ports_of_loads(tokens_D[None], cluster)
    want = [load.intra_out_BD[0], load.intra_in_BD[0], load.net_out_BD[0], load.net_in_BD[0]]
    np.testing.assert_allclose(port_PD, want, rtol=1e-12, atol=1e-12)


@given(SEEDS, NODES)
@settings(max_examples=60, deadline=None)
def test_ports_of_sums(seed, nodes):
    """The part that crosses, over the node's ports evenly; the rest inside, as each device has it."""
    rng, cluster, _, machine = make(seed, nodes)
    node_D, size_N = cluster.node_D, cluster.devices_per_node_N
    both_2D = rng.exponential(5.0, (2, cluster.num_devices)) * (rng.random((2, cluster.num_devices)) < 0.8)
    sums_2N = np.stack([np.bincount(node_D, weights=one, minlength=size_N.size) for one in both_2D])
    share_2N = rng.random(sums_2N.shape) * (size_N.size > 1)
    near_2D, far_2D = both_2D * (1 - share_2N)[:, node_D], (share_2N * sums_2N / size_N)[:, node_D]
    load = PortLoad(near_2D[:1], near_2D[1:], far_2D[:1], far_2D[1:])
    got = fullest_of_sums(*both_2D, np.ascontiguousarray((share_2N * sums_2N).T), machine)
    want = port_seconds(load, 1.0, cluster, cluster.plain_wire)[0]
    assert weight_seconds(got, machine) == pytest.approx(want, rel=1e-9)


def fetched_by_the_rule(held_ED, fetched_ED, price):
    """:func:`poise.cost.weights.fetch_seconds` as its docstring says it."""
    node_D, devices = price.cluster.node_D, held_ED.shape[1]
    pairs_DD = np.zeros((devices, devices))
    for e, d in np.argwhere(fetched_ED):
        landed = price.fan_out & fetched_ED[e] & (node_D == node_D[d]) & (np.arange(devices) < d)
        have = [s for s in np.flatnonzero(held_ED[e] | landed) if s != d]
        if have:
            pairs_DD[min(have, key=lambda s: (node_D[s] != node_D[d], pairs_DD[s].sum(), s)), d] += 1
    load = port_load(Copies(pairs_DD[None]), price.cluster)
    wire = price.cluster.plain_wire
    return port_seconds(load, price.gathered_bytes, price.cluster, wire)[0] + wire.start_s


@given(SEEDS, NODES, st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_one_price_of_a_fetch(seed, nodes, fan_out, training, again):
    rng, cluster, model, _ = make(seed, nodes)
    price = StepPrice(cluster, model, float(rng.choice([0.0, 2.0, 40.0])), 0.0, training=training, rematerialise=again,
                      gradient_ratio=float(rng.choice([1.0, 2.0])), fan_out=fan_out,
                      gather_ratio=float(rng.choice([0.5, 1.0])), hidden_share=float(rng.choice([0.0, 0.25])),
                      dense_s=float(rng.choice([0.0, 3.0])))  # fmt: skip
    held = rng.random((5, cluster.num_devices)) < 0.4
    fetched = (rng.random(held.shape) < 0.4) & ~held
    compiled, got = compiled_price(price), fetch_seconds(held, fetched, price)
    assert got == pytest.approx(fetched_by_the_rule(held, fetched, price) if fetched.any() else 0.0, rel=1e-12)
    assert gather_seconds(held, fetched, compiled) == got
    late = float(rng.choice([0.0, 3.0]))
    assert exposed_seconds(got, late, compiled) == pytest.approx(price.exposed_seconds(got, late), rel=1e-12)
    assert price.exposed_seconds(got, late) == pytest.approx(seen_of_weights(got, late, price), rel=1e-12)


def seen_of_weights(early, late, price):
    """What does not fit its window, and a share of what does; gradients of the dense rest take their part of a window."""
    passes = (price.gradient_ratio + price.rematerialise) * price.training
    ways = [(early, price.window_s), ((early + late) * passes, max(0.0, 2.0 * price.window_s - price.dense_s))]
    hidden = sum(min(seconds, window) for seconds, window in ways)
    return late + sum(seconds for seconds, _ in ways) - hidden + price.hidden_share * hidden


def test_gradients_of_the_dense_rest_take_a_ring_over_all_devices():
    _, cluster, model, _ = make(0, (2, 2))
    got = dense_gradient_seconds(cluster, model, 4.0)
    layers = model.num_hidden_layers / model.num_moe_layers
    sent = attention_parameters(model) * layers * 4.0 * 2 * 3 / 4  # reduce-scatter and all-gather, 3 of 4 parts each
    assert got == pytest.approx(sent / cluster.inter_bytes_per_s, rel=1e-12)


def test_a_price_is_compiled_once_and_anew_when_it_changes():
    _, cluster, model, _ = make(0, (2, 1))
    price = StepPrice(cluster, model, 1.0, 0.0)
    assert compiled_price(price) is compiled_price(replace(price))
    assert compiled_price(replace(price, window_s=2.0)).window_s == 2.0
    assert (
        compiled_price(replace(price, compute_passes=3.0)).machine.compute_s
        == 3.0 * make_machine(cluster, model).compute_s
    )
