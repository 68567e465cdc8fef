"""Where tokens go from the experts of one layer to those of the next, and how much of it stays local."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.split import even_share
from poise.machine.cluster import Cluster
from poise.routing.profile import affinity_LEE

MOST_PAIRS = 40_000_000
"""Token pairs that are counted; of longer traces every n-th token is."""


@dataclass(frozen=True, slots=True, eq=False)
class Locality:
    """How local the affinity of two layers is under a placement whose replicas are drawn at random, as engines do.

    Parameters
    ----------
    device, node : share of all pairs whose two experts are computed on one device, on one node.
    device_F, node_F : float64 [F], the same of single pairs of experts.
    holder_F2 : int64 [F, 2], a device that holds each pair's experts (of several the first).
    """

    device: float
    node: float
    device_F: NDArray[np.float64]
    node_F: NDArray[np.float64]
    holder_F2: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerAffinity:
    """Affinity of a layer's experts to the next layer's; a token counts once for each of its K * K pairs.

    Parameters
    ----------
    layer : index of the earlier layer.
    total : pairs in all.
    expert_F2 : int64 [F, 2], the pairs of experts with the most tokens, largest first.
    pairs_F : int64 [F], how many pairs of tokens each has.
    local : one a placement.
    """

    layer: int
    total: int
    expert_F2: NDArray[np.int64]
    pairs_F: NDArray[np.int64]
    local: tuple[Locality, ...]


def sample_every(tokens: int, layers: int, top_k: int) -> int:
    """Every how many tokens are counted."""
    return max(1, -(-tokens * top_k * top_k * max(1, layers - 1) // MOST_PAIRS))


def layer_affinities(
    experts_TLK: NDArray[Any], num_experts: int, counts: Sequence[NDArray[Any]], cluster: Cluster, *, most: int = 40
) -> tuple[LayerAffinity, ...]:
    """Affinity of all neighbouring layers, the largest pairs of experts first, under each of some placements.

    Parameters
    ----------
    experts_TLK : int [T, L, K].
    counts : int [L, E, D] each, slots of each expert on each device.
    cluster : says which devices share a node.
    most : pairs of experts kept of each pair of layers.
    """
    tokens, layers, top_k = experts_TLK.shape
    some = experts_TLK[:: sample_every(tokens, layers, top_k)]
    shares = [even_share(count_LED) for count_LED in counts]
    out = []
    for layer in range(layers - 1):
        pairs_EE = affinity_LEE(some[:, layer : layer + 2], num_experts)[0]
        flat = pairs_EE.ravel()
        least = np.partition(flat, -min(most, flat.size))[-min(most, flat.size)]
        some_F = np.flatnonzero(flat >= max(1, int(least)))
        largest = some_F[np.argsort(-flat[some_F], kind="stable")][:most]
        expert_F2 = np.stack(np.divmod(largest, num_experts), axis=1)
        local = tuple(
            _locality(pairs_EE, expert_F2, share_LED[layer], share_LED[layer + 1], cluster) for share_LED in shares
        )
        out.append(LayerAffinity(layer, int(flat.sum()), expert_F2, flat[largest], local))
    return tuple(out)


def _locality(
    pairs_EE: NDArray[np.int64], expert_F2: NDArray[np.int64], from_ED: NDArray[np.float64],
    to_ED: NDArray[np.float64], cluster: Cluster,
) -> Locality:  # fmt: skip
    same_node = cluster.same_node_DD.astype(np.float64)
    affinity_DD = from_ED.T @ pairs_EE @ to_ED
    total = max(float(affinity_DD.sum()), 1e-300)
    first_FD, second_FD = from_ED[expert_F2[:, 0]], to_ED[expert_F2[:, 1]]
    holder_F2 = np.stack([first_FD.argmax(axis=1), second_FD.argmax(axis=1)], axis=1)
    return Locality(
        float(np.trace(affinity_DD)) / total, float((affinity_DD * same_node).sum()) / total,
        (first_FD * second_FD).sum(axis=1), ((first_FD @ same_node) * second_FD).sum(axis=1), holder_F2,
    )  # fmt: skip
