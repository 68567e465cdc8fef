"""Patterns and their fullest ports, against adding up byte by byte; and they agree with the cost model's ports."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.lab.calibrate.patterns import balanced, bulk_patterns, peer_counts, port_bytes, ring


@given(st.integers(0, 2**32 - 1), st.sampled_from([(2, 2), (3, 1), (4,), (1, 2, 1)]))
@settings(max_examples=50, deadline=None)
def test_fullest_ports_by_hand(seed, shape):
    rng = np.random.default_rng(seed)
    node = np.repeat(np.arange(len(shape)), shape).astype(np.int32)
    sent = rng.integers(0, 5, (len(node), len(node))).astype(float)
    device, nodes = np.zeros((4, len(node))), np.zeros((2, len(shape)))
    for a in range(len(node)):
        for b in range(len(node)):
            if a == b:
                continue
            kind = 0 if node[a] == node[b] else 2
            device[kind, a] += sent[a, b]
            device[kind + 1, b] += sent[a, b]
            if kind:
                nodes[0, node[a]] += sent[a, b]
                nodes[1, node[b]] += sent[a, b]
    got = port_bytes(sent, node)
    assert (got.intra, got.inter, got.node) == (device[:2].max(), device[2:].max(), nodes.max())


@pytest.mark.parametrize("shape", [(2, 2), (4, 4), (3, 1), (4,), (2,), (1, 1, 1)])
def test_patterns_load_what_they_say(shape):
    node = np.repeat(np.arange(len(shape)), shape).astype(np.int32)
    devices = len(node)
    found = bulk_patterns(node, single=True)
    for name, matrix in found.items():
        ports = port_bytes(matrix, node)
        assert max(ports.intra, ports.inter) == pytest.approx(1) and (np.diag(matrix) == 0).all()
        assert (ports.intra > 0) == (name != "inter" and name != "single" and max(shape) > 1)
        assert (ports.inter > 0) == (name != "intra" and len(shape) > 1)
    assert ("intra" in found, "inter" in found) == (max(shape) > 1, len(shape) > 1)
    if "hot" in found and len(set(shape)) == 1:
        assert found["hot"][:, -1].sum() == found["hot"].sum(axis=0).max() > 1.5 * found["hot"][:, 0].sum()
    if "all" in found:
        ports = port_bytes(balanced(node, 8.0, 2.0), node)
        assert ports.intra == pytest.approx(4 * ports.inter)
    for peers in peer_counts(devices):
        assert port_bytes(ring(devices, peers), node).peers == peers
    assert peer_counts(devices)[-1] == devices - 1 and peer_counts(1) == []
