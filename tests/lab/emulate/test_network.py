"""The commands that make the network, and when none can be made."""

import os
import shutil

import pytest

from poise.lab.emulate import network
from poise.lab.emulate.spec import EmulatedCluster


def lines_of(spec, namespace, tool):
    return [line for b in network.batches(spec) if (b.namespace, b.tool) == (namespace, tool) for line in b.lines]


@pytest.mark.parametrize(("rate", "packets"), [(1e6, 1), (24e6, 1), (60e6, 3), (1e15, 65_535)])
def test_segments_last_no_longer_than_a_turn(rate, packets):
    spec = EmulatedCluster(2, 1, None, rate, limit_bytes_per_s=1e18)
    lines = lines_of(spec, 0, "ip")
    assert f"link set net0 gso_max_segs {packets} up" in lines and "link set fab0 up" in lines


def test_every_port_is_limited_both_ways():
    spec = EmulatedCluster(2, 2, 40e6, 10e6)
    root = lines_of(spec, network.ROOT, "tc")
    for rank in range(4):
        own = lines_of(spec, rank, "tc")
        assert sum("rate 320000000bit" in line and "dev fab0" in line for line in own) == 1
        assert sum("rate 80000000bit" in line and "dev net0" in line for line in own) == 1
        assert sum("rate 320000000bit" in line and f"dev f{rank} " in line for line in root) == 1
        assert sum("rate 80000000bit" in line and f"dev n{rank} " in line for line in root) == 1


def test_a_shared_port_limits_the_node_alone():
    spec = EmulatedCluster(2, 2, None, 10e6, nic_shared=True)
    limited = {line.split()[3] for line in lines_of(spec, network.ROOT, "tc") if line.startswith("qdisc")}
    assert limited == {"up0", "down0", "up1", "down1"}
    assert not any(lines_of(spec, rank, "tc") for rank in range(4))


def test_a_device_has_one_address_and_two_ways():
    spec = EmulatedCluster(2, 3)
    assert [network.address(spec, rank) for rank in (0, 2, 3)] == ["10.77.0.1", "10.77.0.3", "10.77.1.1"]
    assert lines_of(spec, 3, "ip")[-2:] == [
        "addr add 10.77.1.1/24 dev fab0",
        "route add 10.77.0.0/16 dev net0 src 10.77.1.1",
    ]
    assert not any(batch.lines for batch in network.batches(spec) if batch.tool == "tc")


def test_the_reason_not_to_shape_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda tool: "/sbin/" + tool)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert network.why_not() == "not root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "unshare").write_text("#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert network.why_not().endswith("refused: Operation not permitted")
