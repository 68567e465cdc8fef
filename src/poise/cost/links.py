"""Seconds of an all-to-all: its start plus the fullest port. Ports saturate, not pairs (DESIGN 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.machine.cluster import Cluster, Wire


@dataclass(frozen=True, slots=True, eq=False)
class PortLoad:
    """Token copies through every port, float64 [B, D] each. Ports are symmetric: the way back is the mirror image.

    Parameters
    ----------
    intra_out_BD, intra_in_BD : through a device's port into its node's fabric.
    net_out_BD, net_in_BD : between nodes, booked on the sending and receiving device.
    """

    intra_out_BD: NDArray[np.float64]
    intra_in_BD: NDArray[np.float64]
    net_out_BD: NDArray[np.float64]
    net_in_BD: NDArray[np.float64]


def pair_ports(rows: Sequence[Iterable[tuple[int, int]]], cluster: Cluster) -> PortLoad:
    """What goes once from a device to a device, (source, target) each, a row of ports for each of ``rows``."""
    port = np.zeros((4, len(rows), cluster.num_devices))
    for at, pairs in enumerate(rows):
        for source, target in pairs:
            out = 0 if cluster.node_D[source] == cluster.node_D[target] else 2
            port[out, at, source] += 1
            port[out + 1, at, target] += 1
    return PortLoad(*port)


def network_ports(copies_BD: NDArray[np.float64], cluster: Cluster) -> NDArray[np.float64]:
    """Copies per network port: of each device, or summed over each node's shared one; float64 [B, D or N]."""
    return cluster.sum_by_node(copies_BD) if cluster.nic_shared else copies_BD


def fullest_ports(load: PortLoad, cluster: Cluster) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Copies through the fullest port inside nodes and the fullest between them, of each step; float64 [B] each."""
    intra = np.maximum(load.intra_out_BD, load.intra_in_BD).max(axis=1)
    net = np.maximum(network_ports(load.net_out_BD, cluster), network_ports(load.net_in_BD, cluster)).max(axis=1)
    return intra, net


def port_seconds(load: PortLoad, bytes_per_copy: float, cluster: Cluster, wire: Wire) -> NDArray[np.float64]:
    """Seconds until the fullest port of each step is drained by ``wire``, one of the cluster's, without the start;
    float64 [B].
    """
    intra, net = fullest_ports(load, cluster)
    return np.maximum(intra / wire.intra_bytes_per_s, net / wire.inter_bytes_per_s) * bytes_per_copy
