"""The four data flows against going through every token and every draw of replicas in plain loops."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, random_count, split_share_BED, tiny_batch, tiny_cluster, tiny_model, token_batch

from poise.cost.step import batch_cost, kv_seconds_per_token
from poise.cost.traffic import DATA_FLOWS
from poise.util.errors import OptionError

SEEDS = st.integers(0, 2**32 - 1)
NODES = st.sampled_from([(2, 1), (3,), (1, 2, 1), (1,), (2, 2)])


class Ports:
    """Copies through every port, counted one by one."""

    def __init__(self, cluster):
        self.cluster, self.node = cluster, cluster.node_D.tolist()
        self.intra_out, self.intra_in, self.net_out, self.net_in = ([0.0] * len(self.node) for _ in range(4))

    def send(self, amount, source, target):
        if source == target:
            return
        same = self.node[source] == self.node[target]
        out, into = (self.intra_out, self.intra_in) if same else (self.net_out, self.net_in)
        out[source] += amount
        into[target] += amount

    def send_once_per_node(self, amount, source, targets):
        """Over the network once, to the device with the sender's number in its node, and on from there."""
        members = {}
        for device, node in enumerate(self.node):
            members.setdefault(node, []).append(device)
        number = members[self.node[source]].index(source)
        for node in sorted({self.node[t] for t in targets}):
            gate = source
            if node != self.node[source]:
                gate = members[node][number % len(members[node])]
                self.send(amount, source, gate)
            for target in targets:
                if self.node[target] == node:
                    self.send(amount, gate, target)

    def seconds(self, bytes_per_copy):
        cluster, worst = self.cluster, 0.0
        for copies in (*self.intra_out, *self.intra_in):
            worst = max(worst, copies * bytes_per_copy / cluster.intra_bytes_per_s)
        for ports in (self.net_out, self.net_in):
            groups = {}
            for device, copies in enumerate(ports):
                port = self.node[device] if cluster.nic_shared else device
                groups[port] = groups.get(port, 0.0) + copies
            worst = max(worst, max(groups.values()) * bytes_per_copy / cluster.inter_bytes_per_s)
        return worst


def home_by_hand(batch, token, devices):
    return int(batch.home_of_tokens(devices)[token])  # tests/routing/test_homes.py


def latency_by_hand(cluster):
    if cluster.num_devices == 1:
        return 0.0
    return 0.25 + (0.5 if cluster.num_nodes > 1 else 0.0)


def flow_by_hand(batch, share_LBED, cluster, traffic, layer, step):
    """Ports out, ports back, and expected pairs that leave their device and node."""
    out, back = Ports(cluster), Ports(cluster)
    left_device = left_node = 0.0
    for token in range(batch.start_B[step], batch.start_B[step + 1]):
        ids = [e for e in batch.experts_TLK[token, layer].tolist() if e >= 0]
        if not ids:
            continue
        sources = [(1.0, home_by_hand(batch, token, cluster.num_devices))]
        heaviest = [(old, e) for old, e in enumerate(batch.experts_TLK[token, :layer, 0].tolist()) if e >= 0]
        if traffic == "stay" and heaviest:  # it waits where it last computed
            old, expert = heaviest[-1]
            before = share_LBED[old][step, expert]
            sources = [(float(before[d]), int(d)) for d in np.flatnonzero(before)]
        draws = list(product(*(np.flatnonzero(share_LBED[layer][step, e]).tolist() for e in ids)))
        for (odds, source), draw in product(sources, draws):
            for expert, device in zip(ids, draw, strict=True):
                odds *= float(share_LBED[layer][step, expert, device])
            left_device += odds * sum(device != source for device in draw)
            left_node += odds * sum(cluster.node_D[device] != cluster.node_D[source] for device in draw)
            if traffic == "home":
                for device in draw:
                    out.send(odds, source, device)
            elif traffic == "home_node_dedup":
                out.send_once_per_node(odds, source, sorted(set(draw)))
            else:
                for device in sorted(set(draw)):
                    out.send(odds, source, device)
            if traffic == "stay":
                for device in sorted(set(draw[1:])):
                    back.send(odds, device, draw[0])
    return out, back if traffic == "stay" else out, left_device, left_node


def shares(batch, count, cluster, split):
    out = []
    for layer in range(batch.num_layers):
        share = split_share_BED(batch.load_BLE[:, layer], count[layer], cluster.speed_D, split)
        out.append(np.broadcast_to(share, (batch.num_steps, *share.shape[1:])))
    return out


@given(
    SEEDS, st.sampled_from(DATA_FLOWS), NODES, st.integers(1, 3), st.sampled_from(["even", "exact"]),
    st.sampled_from([0.0, 0.4]),
)  # fmt: skip
@example(1, "stay", (2, 1), 1, "even", 0.4)  # tokens that skip a layer
@example(2, "stay", (1, 2, 1), 1, "exact", 0.4)
@example(3, "stay", (3,), 2, "even", 0.4)
@settings(max_examples=120, deadline=None)
def test_every_flow_equals_counting_tokens_and_draws(seed, traffic, nodes, top_k, split, idle):
    """Picks that compute nothing are not in a token's list: it is priced as if it had fewer."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes, measured=False)
    batch = tiny_batch(rng, devices=cluster.num_devices, layers=3, top_k=top_k, idle=idle)
    model = tiny_model(batch)
    count = random_count(rng, 3, 4, cluster.num_devices)
    got = batch_cost(batch, count, cluster, model, traffic=traffic, split=split)
    share = shares(batch, count, cluster, split)
    for step, layer in product(range(batch.num_steps), range(3)):
        out, back, left_device, left_node = flow_by_hand(batch, share, cluster, traffic, layer, step)
        picks = batch.experts_TLK[batch.start_B[step] : batch.start_B[step + 1], layer] >= 0
        busy = picks.any()
        start = busy * latency_by_hand(cluster)
        back_start = 0.0 if traffic == "stay" and top_k == 1 else start
        assert got.dispatch_BL[step, layer] == pytest.approx(out.seconds(4.0) + start, rel=1e-9, abs=1e-12)
        assert got.combine_BL[step, layer] == pytest.approx(back.seconds(8.0) + back_start, rel=1e-9, abs=1e-12)
        assert got.cross_device_BL[step, layer] == pytest.approx(left_device, abs=1e-9)
        assert got.cross_node_BL[step, layer] == pytest.approx(left_node, abs=1e-9)
        assert got.pairs_BL[step, layer] == picks.sum()
        attended = busy * len(picks) * (traffic == "stay")
        assert got.kv_BL[step, layer] == pytest.approx(attended * kv_seconds_per_token(cluster, model), rel=1e-9)


@given(SEEDS, NODES, st.sampled_from(["even", "exact"]))
@settings(max_examples=60, deadline=None)
def test_loads_alone_come_from_every_device_alike(seed, nodes, split):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes, measured=False)
    batch = load_batch(rng)
    model = tiny_model(batch)
    devices = cluster.num_devices
    count = random_count(rng, 2, 4, devices)
    got = batch_cost(batch, count, cluster, model, traffic="home", split=split)
    share = shares(batch, count, cluster, split)
    for step, layer in product(range(batch.num_steps), range(2)):
        ports, left_device, left_node = Ports(cluster), 0.0, 0.0
        for expert, home, device in product(range(4), range(devices), range(devices)):
            pairs = batch.load_BLE[step, layer, expert] / devices * share[layer][step, expert, device]
            ports.send(pairs, home, device)
            left_device += pairs * (home != device)
            left_node += pairs * (cluster.node_D[home] != cluster.node_D[device])
        start = latency_by_hand(cluster) * (batch.load_BLE[step, layer].sum() > 0)
        assert got.dispatch_BL[step, layer] == pytest.approx(ports.seconds(4.0) + start, rel=1e-9, abs=1e-12)
        assert got.combine_BL[step, layer] == pytest.approx(ports.seconds(8.0) + start, rel=1e-9, abs=1e-12)
        assert got.cross_device_BL[step, layer] == pytest.approx(left_device, abs=1e-9)
        assert got.cross_node_BL[step, layer] == pytest.approx(left_node, abs=1e-9)


@given(SEEDS, NODES)
@settings(max_examples=40, deadline=None)
def test_staying_pays_for_keys_and_values(seed, nodes):
    """Each new token's keys and values go once to every other device; tokens are spread evenly."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes, measured=False)
    batch = tiny_batch(rng, devices=cluster.num_devices)
    count = random_count(rng, 2, 4, cluster.num_devices)
    for traffic in DATA_FLOWS:
        kv = batch_cost(batch, count, cluster, tiny_model(batch), traffic=traffic, split="even").kv_BL
        if traffic != "stay":
            assert not kv.any()
            continue
        for step in range(batch.num_steps):
            tokens, worst = batch.start_B[step + 1] - batch.start_B[step], 0.0
            for device in range(cluster.num_devices):
                peers = int((cluster.node_D == cluster.node_D[device]).sum())
                each = 6.0 * tokens / cluster.num_devices
                worst = max(worst, each * (peers - 1) / cluster.intra_bytes_per_s)
                worst = max(worst, each * (cluster.num_devices - peers) / cluster.inter_bytes_per_s)
            assert kv[step] == pytest.approx([worst] * 2)


def test_copies_of_one_token_by_hand():
    """A token at home on device 0 of 2 + 2, with experts on 1, 2 and 3."""
    rng = np.random.default_rng(0)
    cluster = tiny_cluster(rng, (2, 2), shared=False, equal=True)
    batch = token_batch([[[0, 1, 2]]], [1], 3, home_T=[0])
    count = np.eye(4, dtype=int)[[1, 2, 3]][None]
    intra, inter = 4 / cluster.intra_bytes_per_s, 4 / cluster.inter_bytes_per_s
    for traffic, want in (
        ("home", max(intra, 2 * inter)),
        ("home_device_dedup", max(intra, 2 * inter)),
        ("home_node_dedup", max(intra, inter)),  # to 1; over the network to 2, and from there to 3
        ("stay", max(intra, 2 * inter)),
    ):
        got = batch_cost(batch, count, cluster, tiny_model(batch), traffic=traffic, split="even")
        assert got.dispatch_BL[0, 0] == pytest.approx(want + 0.75), traffic


def test_shapes_and_missing_tokens_are_refused():
    rng = np.random.default_rng(0)
    cluster, batch = tiny_cluster(rng), load_batch(rng)
    count = random_count(rng, 2, 4, 3)
    with pytest.raises(OptionError, match="needs token-level routing"):
        batch_cost(batch, count, cluster, tiny_model(batch), traffic="stay", split="even")
    with pytest.raises(OptionError, match=r"\(2, 4, 3\)"):
        batch_cost(batch, count[:, :, :2], cluster, tiny_model(batch), traffic="home", split="even")
