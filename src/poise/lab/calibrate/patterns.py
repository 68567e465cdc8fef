"""Which rank sends how much to which in a measured exchange.

A pattern is a matrix float64 [D, D] of relative bytes from each rank to each other, scaled so that the fullest port
carries 1. Multiplied by a size it is one exchange. Patterns load the two classes of ports alone and together, evenly
and with one hot receiver, since real traffic is skewed and the model says that the fullest port decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.cost.exchange import evenness
from poise.machine.cluster import same_node


@dataclass(frozen=True, slots=True)
class PortBytes:
    """Bytes through the fullest port of each class, and what start-up depends on.

    Parameters
    ----------
    intra, inter : of one device, into its node's fabric and into the network, the larger of out and in.
    node : of one node into the network, should its devices share a port.
    peers : ranks that one rank sends to and receives from, the mean of both; of the rank with most.
    intra_even, inter_even : mean over fullest port of a device (:func:`poise.cost.exchange.evenness`).
    """

    intra: float
    inter: float
    node: float
    peers: float
    intra_even: float
    inter_even: float


def port_bytes(bytes_DD: NDArray[np.float64], node_D: NDArray[np.int32]) -> PortBytes:
    """The fullest ports of an exchange; what stays on its rank passes none."""
    sent = bytes_DD * ~np.eye(len(node_D), dtype=bool)
    near = same_node(node_D)
    inside, between = sent * near, sent * ~near
    out_N = np.bincount(node_D, weights=between.sum(axis=1))
    in_N = np.bincount(node_D, weights=between.sum(axis=0))
    posts = ((sent > 0).sum(axis=0) + (sent > 0).sum(axis=1)) / 2
    return PortBytes(
        float(max(inside.sum(axis=0).max(), inside.sum(axis=1).max())),
        float(max(between.sum(axis=0).max(), between.sum(axis=1).max())),
        float(max(out_N.max(), in_N.max())),
        float(posts.max()),
        evenness(inside),
        evenness(between),
    )


def peer_counts(num_devices: int) -> list[int]:
    """1, 2, 4, ... and all other ranks."""
    powers = [2**i for i in range(17) if 2**i < num_devices - 1]
    return [*powers, num_devices - 1] if num_devices > 1 else []


def ring(num_devices: int, peers: int) -> NDArray[np.float64]:
    """Every rank to the next ``peers`` ranks; scaled to 1 a port of any class."""
    step_DD = (np.arange(num_devices)[None, :] - np.arange(num_devices)[:, None]) % num_devices
    return ((step_DD > 0) & (step_DD <= peers)) / float(peers)


def bulk_patterns(node_D: NDArray[np.int32], *, single: bool = False) -> dict[str, NDArray[np.float64]]:
    """Patterns of many bytes by name, those that this shape has.

    ``intra``, ``inter``: evenly inside nodes, between nodes. ``all``: evenly to everyone. ``hot``: as much to the last
    rank from everyone, and a quarter of it between all. ``single``: the first devices of nodes only, which tells a
    port of a device from one of a node.
    """
    devices = len(node_D)
    far = ~same_node(node_D)
    near = ~far & ~np.eye(devices, dtype=bool)
    out: dict[str, NDArray[np.float64]] = {}
    if near.any():
        out["intra"] = near.astype(float)
    if far.any():
        out["inter"] = far.astype(float)
    if near.any() and far.any():
        out["all"] = (near | far).astype(float)
    if devices > 2:
        hot = 0.25 * (near | far).astype(float)
        hot[:-1, -1] = 1.0
        out["hot"] = hot
    if single and far.any() and near.any():
        first = np.diff(node_D, prepend=-1) > 0
        out["single"] = (far & first[:, None] & first[None, :]).astype(float)
    return {name: scaled(matrix, node_D) for name, matrix in out.items()}


def balanced(node_D: NDArray[np.int32], intra_bytes_per_s: float, inter_bytes_per_s: float) -> NDArray[np.float64]:
    """Inside and between nodes at once, in proportion to the rates, so that all ports should end together."""
    far = ~same_node(node_D)
    near = ~far & ~np.eye(len(node_D), dtype=bool)
    most_near, most_far = near.sum(axis=1).max(), far.sum(axis=1).max()
    return scaled(near * (intra_bytes_per_s / most_near) + far * (inter_bytes_per_s / most_far), node_D)


def scaled(matrix_DD: NDArray[np.float64], node_D: NDArray[np.int32]) -> NDArray[np.float64]:
    """The same with 1 through the fullest port of a device."""
    ports = port_bytes(matrix_DD, node_D)
    return matrix_DD / max(ports.intra, ports.inter)
