"""What an emulated cluster is, and what is refused."""

import numpy as np
import pytest

from poise.lab.emulate.spec import EmulatedCluster, parse_shape
from poise.machine.cluster import Cluster
from poise.util.errors import ClusterError

MUCH = 1e15


def test_links_of_a_cluster_are_divided_by_the_dilation():
    cluster = Cluster.uniform(2, 4, "h100")
    spec = EmulatedCluster.from_cluster(cluster, 5_000.0)
    assert (spec.nodes, spec.devices_per_node, spec.num_devices) == (2, 4, 8)
    assert spec.intra_bytes_per_s == cluster.intra_bytes_per_s / 5_000
    assert spec.inter_bytes_per_s == cluster.inter_bytes_per_s / 5_000
    assert spec.dilation == 5_000
    assert [spec.node_of(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_what_the_machine_cannot_carry_is_refused_with_both_numbers():
    with pytest.raises(ClusterError, match=r"8e\+08 bytes/s, this machine holds its rates up to 5e\+08") as caught:
        EmulatedCluster(2, 2, 100e6, 100e6, limit_bytes_per_s=5e8)
    assert "1.6 times more" in caught.value.hint
    with pytest.raises(ClusterError, match="all ports together"):
        EmulatedCluster.from_cluster(Cluster.uniform(2, 8, "h100"), 1.0)


def test_only_ports_with_peers_count_and_a_shared_one_counts_once():
    assert EmulatedCluster(1, 4, 1e7, 1e9, limit_bytes_per_s=MUCH).total_bytes_per_s == 4e7
    assert EmulatedCluster(4, 1, 1e9, 1e7, limit_bytes_per_s=MUCH).total_bytes_per_s == 4e7
    assert EmulatedCluster(2, 4, 1e7, 2e7, nic_shared=True, limit_bytes_per_s=MUCH).total_bytes_per_s == 12e7
    assert EmulatedCluster(2, 4).total_bytes_per_s == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 2), "0 nodes of 2 devices"),
        ((9, 8), "9 nodes of 8 devices"),
        ((2, 2, 10.0), "at least 1e"),
        ((2, 2, None, float("nan")), "inter_bytes_per_s is nan"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ClusterError, match=message):
        EmulatedCluster(*arguments)


@pytest.mark.parametrize("dilation", [0.0, -1.0, float("inf")])
def test_a_dilation_is_above_zero(dilation):
    with pytest.raises(ClusterError, match="dilation"):
        EmulatedCluster.from_cluster(Cluster.uniform(1, 2), dilation)


def test_unequal_nodes_are_refused():
    cluster = Cluster.uniform(1, 3)
    uneven = Cluster(
        np.array([0, 0, 1]), cluster.speed_D, *(getattr(cluster, name) for name in (
            "flops_per_s", "memory_bytes_per_s", "memory_bytes", "intra_bytes_per_s", "inter_bytes_per_s"))
    )  # fmt: skip
    with pytest.raises(ClusterError, match="got 1 and 2 devices"):
        EmulatedCluster.from_cluster(uneven, 1e4)


def test_shapes_are_read():
    assert parse_shape("2x4") == (2, 4)
    with pytest.raises(ClusterError, match="cannot read cluster"):
        parse_shape("2x4:h100")
