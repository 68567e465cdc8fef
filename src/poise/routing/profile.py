"""What a trace says about its model: load, affinity, co-activation, skew, mutual information."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.routing.trace import NO_EXPERT, row_blocks

CACHED = 1 << 17
"""Counters up to which small blocks, which stay in the cache, are counted faster than large ones."""


def load_LE(experts_TLK: NDArray[Any], num_experts: int) -> NDArray[np.int64]:
    """Tokens of each expert, int64 [L, E] (MoETuner's P; a token counts once for each of its K experts).

    Here and below a pick of -1, which computes nothing, counts nowhere.
    """
    layers = experts_TLK.shape[1]
    out = np.zeros((layers, num_experts + 1), np.int64)
    first_L1 = np.arange(layers)[:, None] * (num_experts + 1) - NO_EXPERT  # picks of -1 in a column of their own
    for rows in row_blocks(experts_TLK, 256 if out.size < CACHED else 8):
        out += np.bincount((experts_TLK[rows] + first_L1).ravel(), minlength=out.size).reshape(out.shape)
    return np.ascontiguousarray(out[:, 1:])


def count_pairs(
    first_T: NDArray[np.int64], second_T: NDArray[np.int64], num_experts: int, weight_T: NDArray[Any] | None = None
) -> NDArray[Any]:
    """How often (or with which weight) an expert of one list meets one of the other, [E * E]; -1 meets nobody."""
    both = (first_T != NO_EXPERT) & (second_T != NO_EXPERT)
    weight = None if weight_T is None else weight_T[both]
    return np.bincount(first_T[both] * num_experts + second_T[both], weight, minlength=num_experts * num_experts)


def affinity_LEE(experts_TLK: NDArray[Any], num_experts: int) -> NDArray[np.int64]:
    """Tokens that go from e1 of layer l to e2 of layer l + 1, int64 [L - 1, E, E].

    MoETuner's R (arXiv 2502.06643, section 3): all K * K pairs of a token count.
    """
    layers, top_k = experts_TLK.shape[1:]
    out = np.zeros((max(0, layers - 1), num_experts * num_experts), np.int64)
    for layer in range(layers - 1):
        here, there = experts_TLK[:, layer].astype(np.int64), experts_TLK[:, layer + 1].astype(np.int64)
        for i in range(top_k):
            for j in range(top_k):
                out[layer] += count_pairs(here[:, i], there[:, j], num_experts)
    return out.reshape(-1, num_experts, num_experts)


def coactivation_LEE(experts_TLK: NDArray[Any], num_experts: int) -> NDArray[np.int64]:
    """Tokens that choose both e1 and e2 of a layer, int64 [L, E, E]; the diagonal is the load."""
    layers, top_k = experts_TLK.shape[1:]
    out = np.zeros((layers, num_experts * num_experts), np.int64)
    for layer in range(layers):
        ids = experts_TLK[:, layer].astype(np.int64)
        for i in range(top_k):
            for j in range(top_k):
                out[layer] += count_pairs(ids[:, i], ids[:, j], num_experts)
    return out.reshape(layers, num_experts, num_experts)


def skew_L(load: NDArray[Any]) -> NDArray[np.float64]:
    """Largest over mean expert load of each layer, float64 [L], from loads [L, E]."""
    return load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-300)


def dead_share_L(load: NDArray[Any]) -> NDArray[np.float64]:
    """Share of experts with less than a hundredth of the mean load, float64 [L], from loads [L, E]."""
    return (load < 0.01 * load.mean(axis=1, keepdims=True)).mean(axis=1)


def mutual_information(
    experts_TLK: NDArray[Any], num_experts: int, *, shuffles: int = 3, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Between the heaviest experts of neighbouring layers, nats, float64 [L - 1]: as recorded, and a shuffled null.

    The null is the mean over ``shuffles`` permutations of the tokens of the later layer: what the finite sample alone
    gives. Loads stay as they are, so it is the right yardstick for a skewed router. Of a pair of layers, tokens that
    compute in both are counted.
    """
    rng = np.random.default_rng(seed)
    layers = experts_TLK.shape[1]
    real, null = np.zeros(layers - 1), np.zeros(layers - 1)
    there_T = experts_TLK[:, 0, 0].astype(np.int32)
    for layer in range(layers - 1):
        here_T, there_T = there_T, experts_TLK[:, layer + 1, 0].astype(np.int32)
        both = (here_T != NO_EXPERT) & (there_T != NO_EXPERT)
        here, there = here_T[both], there_T[both]
        real[layer] = _information(here, there, num_experts)
        for _ in range(shuffles):
            null[layer] += _information(here, rng.permutation(there), num_experts) / shuffles
    return real, null


def _information(a: NDArray[np.int32], b: NDArray[np.int32], size: int) -> float:
    joint = np.bincount(a * size + b, minlength=size * size).reshape(size, size) / max(1, a.size)
    outer = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    used = joint > 0
    return float((joint[used] * np.log(joint[used] / outer[used])).sum())
