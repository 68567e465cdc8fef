"""Traces of a model with routing groups, of which none is public: drawn as DeepSeek-V3's router chooses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.routing.trace import RoutingTrace


def grouped_trace(
    *, num_tokens: int, num_groups: int, groups_per_token: int, top_k: int, log_share_LE: NDArray[np.float64],
    tokens_per_request: int = 32, seed: int = 0,
) -> RoutingTrace:  # fmt: skip
    """Group-limited routing, as DeepSeek-V3's router does it: of equal blocks of experts those with the greatest sums
    of their two best scores, and of these blocks the best experts. Scores are ``log_share_LE`` float [L, E] and noise.
    """
    rng = np.random.default_rng(seed)
    layers, num_experts = log_share_LE.shape
    experts = np.empty((num_tokens, layers, top_k), np.int16)
    for layer in range(layers):
        score = log_share_LE[layer] + rng.gumbel(size=(num_tokens, num_experts))
        by_group = score.reshape(num_tokens, num_groups, -1)
        best = np.sort(by_group, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.argsort(-best, axis=1)[:, :groups_per_token]
        open_TG = np.zeros((num_tokens, num_groups), bool)
        np.put_along_axis(open_TG, kept, True, axis=1)
        score = np.where(np.repeat(open_TG, num_experts // num_groups, axis=1), score, -np.inf)
        experts[:, layer] = np.argsort(-score, axis=1)[:, :top_k]
    request = np.arange(num_tokens) // tokens_per_request
    name = f"synthetic {groups_per_token} of {num_groups} groups"
    return RoutingTrace(experts, num_experts, request=request.astype(np.int32), name=name)
