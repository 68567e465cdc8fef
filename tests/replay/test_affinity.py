"""Flow between layers against counting one by one."""

from itertools import product

import numpy as np
import pytest
from tests.helpers import planted_affinity

from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.replay import affinity as flow_module
from poise.replay.affinity import layer_affinities, sample_every
from poise.routing.synthetic import zipf_trace


def test_flows_and_locality_one_by_one():
    rng = np.random.default_rng(1)
    experts = zipf_trace(num_tokens=60, num_layers=3, num_experts=6, top_k=2, stickiness=0.5).experts
    cluster = Cluster.parse("2x2")
    held = rng.random((3, 6, 4)) < 0.3
    held[:, np.arange(6), rng.integers(4, size=6)] = True
    count = held.astype(int)
    flows = layer_affinities(experts, 6, [count], cluster, most=5)
    assert [pair.layer for pair in flows] == [0, 1]
    for pair in flows:
        counted = {}
        for token in experts:
            for e1, e2 in product(token[pair.layer], token[pair.layer + 1]):
                counted[int(e1), int(e2)] = counted.get((int(e1), int(e2)), 0) + 1
        assert pair.total == 60 * 4 == sum(counted.values())
        largest = sorted(counted, key=lambda pair: (-counted[pair], pair))[:5]
        assert [tuple(each) for each in pair.expert_F2.tolist()] == largest
        assert pair.pairs_F.tolist() == [counted[each] for each in largest]

        def odds(e1, e2, same, layer=pair.layer):
            """Of all ways to draw a replica of each, the share on one device or node."""
            ways = list(product(np.flatnonzero(held[layer, e1]), np.flatnonzero(held[layer + 1, e2])))
            return sum(same(a, b) for a, b in ways) / len(ways)

        def node(a, b):
            return a // 2 == b // 2

        (local,) = pair.local
        for share, per_flow, same in ((local.device, local.device_F, np.equal), (local.node, local.node_F, node)):
            assert share == pytest.approx(sum(n * odds(*each, same) for each, n in counted.items()) / pair.total)
            assert per_flow.tolist() == pytest.approx([odds(*each, same) for each in largest])
        for (e1, e2), (d1, d2) in zip(largest, local.holder_F2, strict=True):
            assert held[pair.layer, e1, d1] and held[pair.layer + 1, e2, d2]


def test_the_planted_placement_keeps_everything():
    trace, group_LE = planted_affinity(num_tokens=128)
    own, other = (Placement.from_devices(x, 4).count_LED() for x in (group_LE, np.roll(group_LE, 1, axis=0)))
    for pair in layer_affinities(trace.experts, trace.num_experts, [own, other], Cluster.parse("2x2")):
        assert pair.local[0].device == 1 and pair.local[1].device < 0.7
        assert (pair.pairs_F > 0).all() and pair.pairs_F.sum() <= pair.total == 128


def test_long_traces_are_sampled(monkeypatch):
    assert sample_every(1000, 4, 2) == 1 and sample_every(10, 1, 1) == 1
    monkeypatch.setattr(flow_module, "MOST_PAIRS", 100)
    assert sample_every(60, 3, 2) == 5
    experts = zipf_trace(num_tokens=60, num_layers=3, num_experts=6, top_k=2).experts
    count = np.ones((3, 6, 2), int)
    assert [pair.total for pair in layer_affinities(experts, 6, [count], Cluster.parse("1x2"))] == [12 * 4] * 2
