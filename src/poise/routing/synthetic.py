"""Synthetic traces: stand-ins where no real trace exists."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.routing.trace import RoutingTrace


def zipf_trace(
    *, num_tokens: int, num_layers: int, num_experts: int, top_k: int = 1, exponent: float = 0.8,
    stickiness: float = 0.0,
    tokens_per_request: int = 32, seed: int = 0,
) -> RoutingTrace:  # fmt: skip
    """Zipf-skewed loads; with odds ``stickiness`` a token goes on to a fixed partner of its last heaviest expert."""
    rng = np.random.default_rng(seed)
    log_share = -exponent * np.log(np.arange(1, num_experts + 1))
    experts = np.empty((num_tokens, num_layers, top_k), np.int16)
    for layer in range(num_layers):
        score = rng.permutation(log_share)[None, :] + rng.gumbel(size=(num_tokens, num_experts))
        if layer and stickiness:
            partner = rng.permutation(num_experts)[experts[:, layer - 1, 0]]
            follow = rng.random(num_tokens) < stickiness
            score[follow, partner[follow]] += 50.0
        experts[:, layer] = np.argsort(-score, axis=1)[:, :top_k]
    request = np.arange(num_tokens) // tokens_per_request
    return RoutingTrace(experts, num_experts, request=request.astype(np.int32), name=f"synthetic zipf {exponent:g}")


def kinds_trace(
    *, kinds: int, num_requests: int, num_layers: int, num_experts: int, top_k: int = 1, purity: float = 0.9,
    prefill: int = 8, decode: int = 24, seed: int = 0,
) -> RoutingTrace:  # fmt: skip
    """Requests of a few kinds, in random order: with odds ``purity`` a token takes experts of its request's kind (they
    are dealt evenly to kinds, anew in every layer), else any. Domains name the kinds.
    """
    rng = np.random.default_rng(seed)
    tokens = num_requests * (prefill + decode)
    kind_R = rng.permutation(np.arange(num_requests) % kinds)
    kind_T = np.repeat(kind_R, prefill + decode)
    experts = np.empty((tokens, num_layers, top_k), np.int16)
    for layer in range(num_layers):
        kind_E = rng.permutation(np.arange(num_experts) % kinds)
        score = rng.gumbel(size=(tokens, num_experts))
        own_T = rng.random(tokens) < purity
        score[own_T] += 50.0 * (kind_E[None, :] == kind_T[own_T, None])
        experts[:, layer] = np.argsort(-score, axis=1)[:, :top_k]
    return RoutingTrace(
        experts, num_experts, np.repeat(np.arange(num_requests), prefill + decode).astype(np.int32),
        np.tile(np.arange(prefill + decode) >= prefill, num_requests), domain=kind_T.astype(np.int16),
        domain_names=tuple(f"kind {kind}" for kind in range(kinds)), name=f"synthetic {kinds} kinds, purity {purity:g}",
    )  # fmt: skip


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
