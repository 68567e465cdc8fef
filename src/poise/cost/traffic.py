"""Routing + placement -> token copies between devices.

Four data flows (DESIGN 3.1). ``s[t, d]`` is the probability that token t comes from device d, ``q[e, d]`` the share
of expert e's tokens computed on d (a replica is drawn independently for each (token, expert) pair).

home
    from the home rank to each of the K experts and back: copies = sum_k q[e_k, d]
home_device_dedup
    once per destination device: copies = 1 - prod_k (1 - q[e_k, d])
home_node_dedup
    once per destination node, to the device with the sender's index in it, and fanned out inside (DeepEP)
stay
    context-coherent (ExFlow, arXiv 2401.08383): the token moves from where its heaviest expert of layer l - 1 ran to
    where its experts of layer l run (once per device); the results of the others join it where its heaviest expert
    ran. Every device keeps the key/value cache of every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from poise.cost.links import PortLoad
from poise.machine.cluster import Cluster

DataFlow = Literal["home", "home_device_dedup", "home_node_dedup", "stay"]
DATA_FLOWS: tuple[DataFlow, ...] = ("home", "home_device_dedup", "home_node_dedup", "stay")


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Expected token copies of one layer.

    Parameters
    ----------
    device_BDD : float64 [B, D, D], copies from a device to a device (the diagonal stays local).
    node_BDN : float64 [B, D, N] or None, network copies from a device to a node where they are sent once per node.
    """

    device_BDD: NDArray[np.float64]
    node_BDN: NDArray[np.float64] | None = None


def landing_DN(cluster: Cluster) -> NDArray[np.int64]:
    """Device of node n where the network copies of device d land: the one with d's index in its node; int [D, N]."""
    per_node, first = cluster.devices_per_node_N, cluster.first_N
    local = np.arange(cluster.num_devices) - first[cluster.node_D]
    landing: NDArray[np.int64] = first[None, :] + local[:, None] % per_node[None, :]
    return landing


def any_of(share_TKD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability that at least one of a token's K experts is computed on d: [T, K, D] -> [T, D]."""
    if share_TKD.shape[1] == 1:
        return share_TKD[:, 0]
    out: NDArray[np.float64] = 1.0 - np.prod(1.0 - share_TKD, axis=1)
    return out


SHARE_BITS = 28
"""Of the fixed-point shares of :func:`independent_copies`."""


def independent_copies(pairs_DD: NDArray[np.int64], top_k: int) -> NDArray[np.int64]:
    """Copies under ``home_device_dedup``, int64 [D, D], were the K devices of a token drawn independently.

    :func:`poise.cost.compute.tokens_per_pair` is the case of even pairs. In whole numbers, so that ranks that know the
    same find the same, whatever processor and library raise to the power of K.

    Parameters
    ----------
    pairs_DD : (token, expert) pairs from device to device; fewer than 2^34 from each.
    top_k : K, pairs a token.
    """
    total_D, one = pairs_DD.sum(axis=1, keepdims=True), 1 << SHARE_BITS
    misses_DD = ((total_D - pairs_DD) << SHARE_BITS) // np.maximum(total_D, 1)
    none_DD = np.full_like(pairs_DD, one)
    for _ in range(top_k):
        none_DD = none_DD * misses_DD >> SHARE_BITS
    out: NDArray[np.int64] = (total_D * (one - none_DD) + (top_k * one // 2)) // (top_k * one)
    return out


def sum_by_source(
    source_TD: NDArray[np.float64], to_TX: NDArray[np.float64], step_T: NDArray[np.int64], num_steps: int
) -> NDArray[np.float64]:
    """Sum over the tokens of each step of source x destination, [T, D], [T, X] -> [B, D, X]."""
    out = np.empty((num_steps, source_TD.shape[1], to_TX.shape[1]))
    bounds = np.searchsorted(step_T, np.arange(num_steps + 1))
    for b in range(num_steps):
        rows = slice(bounds[b], bounds[b + 1])
        out[b] = source_TD[rows].T @ to_TX[rows]
    return out


def port_load(copies: Copies, cluster: Cluster) -> PortLoad:
    """Book every copy on the ports it passes: the fabric inside a node, the network between nodes."""
    same_node = cluster.same_node_DD
    intra = copies.device_BDD * (same_node & ~np.eye(cluster.num_devices, dtype=bool))
    intra_out, intra_in = intra.sum(axis=2), intra.sum(axis=1)
    if copies.node_BDN is None:
        net = copies.device_BDD * ~same_node
        return PortLoad(intra_out, intra_in, net.sum(axis=2), net.sum(axis=1))
    landing = landing_DN(cluster)
    net_out, net_in = np.zeros_like(intra_out), np.zeros_like(intra_in)
    for node in range(cluster.num_nodes):
        inside = np.flatnonzero(cluster.node_D == node)
        for d in np.flatnonzero(cluster.node_D != node):
            land = landing[d, node]
            net_out[:, d] += copies.node_BDN[:, d, node]
            net_in[:, land] += copies.node_BDN[:, d, node]
            fan = inside[inside != land]
            intra_out[:, land] += copies.device_BDD[:, d, fan].sum(axis=1)
            intra_in[:, fan] += copies.device_BDD[:, d, fan]
    return PortLoad(intra_out, intra_in, net_out, net_in)
