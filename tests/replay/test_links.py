"""Links and lanes: every byte and second of the cost model, kept apart by port and device."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import FLOW_SPLITS, load_batch, random_count, tiny_batch, tiny_cluster, tiny_model

from poise.cost.links import port_seconds
from poise.cost.pricing import Pricing
from poise.cost.split import SPLITS
from poise.cost.step import batch_cost
from poise.cost.traffic import Copies, port_load
from poise.machine.cluster import Cluster
from poise.replay.links import device_seconds, layer_bytes, link_bytes, wire_BDD
from poise.simulate.lanes import step_lanes

SEEDS = st.integers(0, 2**32 - 1)
NODES = st.sampled_from([(2, 1), (3,), (1, 1, 1), (2, 2, 3)])


def make(seed, nodes, traffic, loads=False):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    idle = (0.0, 0.4)[seed % 2]  # picks that compute nothing
    tokens = tiny_batch(rng, devices=cluster.num_devices, tokens=(5, 0, 4), idle=idle)
    batch = load_batch(rng, steps=3) if loads else tokens
    return cluster, batch, random_count(rng, 2, 4, cluster.num_devices), "home" if loads else traffic


@given(SEEDS, NODES)
@settings(max_examples=40, deadline=None)
def test_wires_pass_the_ports_that_copies_are_booked_on(seed, nodes):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    devices = cluster.num_devices
    copies = Copies(rng.random((2, devices, devices)), rng.random((2, devices, cluster.num_nodes)))
    wire = wire_BDD(copies, cluster)
    booked, wired = port_load(copies, cluster), port_load(Copies(wire), cluster)
    np.testing.assert_array_equal(np.diagonal(wire, axis1=1, axis2=2), np.diagonal(copies.device_BDD, axis1=1, axis2=2))
    for name in ("intra_out_BD", "intra_in_BD", "net_out_BD", "net_in_BD"):
        np.testing.assert_allclose(getattr(wired, name), getattr(booked, name))
    np.testing.assert_allclose(
        device_seconds(booked, cluster, cluster.plain_wire).max(axis=1),
        port_seconds(booked, 1.0, cluster, cluster.plain_wire),
    )


@given(SEEDS, NODES, st.sampled_from(FLOW_SPLITS), st.booleans())
@settings(max_examples=60, deadline=None)
def test_lanes_add_up_to_the_modelled_step(seed, nodes, priced, loads):
    split = priced[1]
    cluster, batch, count, traffic = make(seed, nodes, priced[0], loads)
    model = tiny_model(batch)
    cost = batch_cost(batch, count, cluster, model, traffic=traffic, split=split)
    for step in range(batch.num_steps):
        lanes = step_lanes(batch, step, count, Pricing(cluster, model, traffic, split))
        terms = np.stack(
            [cost.kv_BL[step], cost.dispatch_BL[step], cost.compute_BL[step], cost.combine_BL[step]], axis=1
        )
        np.testing.assert_allclose(lanes.span_LP, terms, atol=1e-12)
        assert lanes.seconds == pytest.approx(float(cost.seconds_BL[step].sum()))
        waiting = lanes.waiting_P()
        assert (waiting >= -1e-12).all() and waiting.sum() < 1
        idle = sum(span - busy for layer, lane in zip(lanes.span_LP, lanes.busy_LDP, strict=True)
                   for device in lane for span, busy in zip(layer, device, strict=True))  # fmt: skip
        assert waiting.sum() * lanes.seconds * cluster.num_devices == pytest.approx(idle, abs=1e-9)


@given(SEEDS, NODES, st.booleans(), st.sampled_from(SPLITS))
@settings(max_examples=40, deadline=None)
def test_home_traffic_has_the_shares_of_the_table(seed, nodes, loads, split):
    cluster, batch, count, _ = make(seed, nodes, "home", loads)
    model = tiny_model(batch)
    cost = batch_cost(batch, count, cluster, model, traffic="home", split=split)
    links = link_bytes(batch, count, Pricing(cluster, model, "home", split))
    stay, near, far = links.by_class()
    pairs = float(cost.pairs_BL.sum())
    total = pairs / batch.num_steps * (model.dispatch_bytes_per_token + model.combine_bytes_per_token)
    assert stay + near + far == pytest.approx(total)
    assert (near + far) / total == pytest.approx(float(cost.cross_device_BL.sum()) / pairs, abs=1e-12)
    assert far / total == pytest.approx(float(cost.cross_node_BL.sum()) / pairs, abs=1e-12)


@given(SEEDS, NODES, st.sampled_from(FLOW_SPLITS))
@settings(max_examples=40, deadline=None)
def test_ports_are_the_sums_of_their_links(seed, nodes, priced):
    split = priced[1]
    cluster, batch, count, traffic = make(seed, nodes, priced[0])
    model = tiny_model(batch)
    links = link_bytes(batch, count, Pricing(cluster, model, traffic, split))
    ports = {each.kind: each for each in links.ports()}
    assert set(ports) == ({"inside the node", "network"} if cluster.num_nodes > 1 else {"inside the node"})
    node = cluster.node_D
    wires = (cluster.dispatch_wire, cluster.combine_wire)
    for row, (matrix, wire) in enumerate(zip((links.out_DD, links.back_DD), wires, strict=True)):
        for kind, each in ports.items():
            near, rate = (
                kind != "network",
                wire.intra_bytes_per_s if kind != "network" else wire.inter_bytes_per_s,
            )
            for p in range(each.out_2P.shape[1]):
                mine = [p] if each.owner == "device" else np.flatnonzero(node == p).tolist()
                pairs = [
                    (a, b) for a, b in product(range(len(node)), repeat=2) if a != b and (node[a] == node[b]) == near
                ]
                assert each.out_2P[row, p] == pytest.approx(sum(matrix[a, b] for a, b in pairs if a in mine) / rate)
                assert each.in_2P[row, p] == pytest.approx(sum(matrix[a, b] for a, b in pairs if b in mine) / rate)
    full = max((each.fullest() for each in ports.values()), key=lambda one: one.seconds)
    assert full.seconds == max(x.sum(axis=0).max() for each in ports.values() for x in (each.out_2P, each.in_2P))
    # no port is busy longer than the exchanges last
    cost = batch_cost(batch, count, cluster, model, traffic=traffic, split=split)
    wires = cost.dispatch_BL + cost.combine_BL
    assert full.seconds <= wires.sum(axis=1).mean() + 1e-12


def test_tokens_one_by_one():
    """Without replicas under ``home``: every token goes from its home to its experts' devices, and back."""
    rng = np.random.default_rng(3)
    cluster = Cluster.parse("2x2:h100+datasheet")
    batch = tiny_batch(rng, devices=4, experts=6, tokens=(7, 5))
    model, device_LE = tiny_model(batch), rng.integers(4, size=(2, 6))
    count = np.zeros((2, 6, 4), int)
    np.put_along_axis(count, device_LE[:, :, None], 1, axis=2)
    home, out = batch.home_of_tokens(4), np.zeros((4, 4))
    for token in range(12):
        for layer in range(2):
            for expert in batch.experts_TLK[token, layer]:
                out[home[token], device_LE[layer, expert]] += model.dispatch_bytes_per_token
    links = link_bytes(batch, count, Pricing(cluster, model, "home", "even"))
    np.testing.assert_allclose(links.out_DD, out / 2)
    np.testing.assert_allclose(links.back_DD, out.T * 2 / 2)
    alone = list(layer_bytes(batch, count, Pricing(cluster, model, "home", "even"), step=1))
    assert [part.layer for part in alone] == [0, 1] and sum(part.out_BDD.sum() for part in alone) == 5 * 2 * 2 * 4


def test_one_device_waits_for_nobody():
    batch = load_batch(np.random.default_rng(0))
    cluster, count = Cluster.parse("1x1:h100+datasheet"), np.ones((2, 4, 1), int)
    lanes = step_lanes(batch, 0, count, Pricing(cluster, tiny_model(batch), "home", "even"))
    assert lanes.waiting_P().sum() == 0 and cluster.plain_wire.start_s == 0
    assert link_bytes(batch, count, Pricing(cluster, tiny_model(batch), "home", "even")).by_class()[1:] == (0, 0)
