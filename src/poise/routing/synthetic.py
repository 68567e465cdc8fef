"""Synthetic traces: stand-ins where no real trace exists."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.routing.trace import RoutingTrace
from poise.util.errors import OptionError
from poise.util.words import close_to

WORKLOADS = {
    "balanced": "W0: every expert alike",
    "hot-experts": "W1: a few experts, anywhere, are hot",
    "hot-rank": "W2: all experts of the first rank are hot",
    "spread-hot": "W3: one expert of every rank is hot",
    "ragged-source": "W4: experts alike, ranks bring 1, 2, 3, ... parts of the tokens",
    "zero-load": "W5: the first rank and every fourth expert get nothing",
    "rotating": "W6: other experts are hot in every step",
    "burst": "W7: alike, but in every fourth step one expert is very hot",
}
"""Traffic of :func:`workload_trace`, numbered as Megatron's list of token imbalances does (docs/trace-format.md)."""
HOT, BURST = 8.0, 32.0
"""Weight of a hot expert, and of one in a burst, where others have 1."""


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


def workload_trace(
    workload: str, *, steps: int, tokens_per_step: int, num_layers: int, num_experts: int, top_k: int, ranks: int,
    seed: int = 0,
) -> RoutingTrace:  # fmt: skip
    """One of :data:`WORKLOADS`, with its steps and home ranks: which experts are hot hangs on the workload alone, which
    tokens take them on the seed.

    Raises
    ------
    OptionError : an unknown workload, or fewer experts with tokens than a token takes.
    """
    if workload not in WORKLOADS:
        raise OptionError(f"unknown workload {workload!r}", hint=close_to(workload, WORKLOADS))
    if (busy := int((_weights(workload, 0, 0, num_experts, ranks) > 0).sum())) < top_k:
        raise OptionError(f"{busy} of {num_experts} experts get tokens, and a token takes {top_k}")
    rng = np.random.default_rng(seed)
    tokens = steps * tokens_per_step
    experts = np.empty((tokens, num_layers, top_k), np.int16)
    for step in range(steps):
        rows = slice(step * tokens_per_step, (step + 1) * tokens_per_step)
        for layer in range(num_layers):
            with np.errstate(divide="ignore"):
                log_share = np.log(_weights(workload, step, layer, num_experts, ranks))
            score = log_share + rng.gumbel(size=(tokens_per_step, num_experts))
            experts[rows, layer] = np.argsort(-score, axis=1)[:, :top_k]
    place_T = np.arange(tokens) % tokens_per_step
    parts_D = np.arange(1, ranks + 1) if workload == "ragged-source" else np.ones(ranks, np.int64)
    ends_D = np.cumsum(parts_D) * tokens_per_step // parts_D.sum()
    return RoutingTrace(
        experts, num_experts, request=np.arange(tokens, dtype=np.int32), is_decode=np.ones(tokens, bool),
        step=(np.arange(tokens) // tokens_per_step).astype(np.int32),
        home=np.searchsorted(ends_D, place_T, side="right").astype(np.int32), name=f"synthetic {workload}",
    )  # fmt: skip


def _weights(workload: str, step: int, layer: int, num_experts: int, ranks: int) -> NDArray[np.float64]:
    """Of the experts of a layer in a step, float64 [E]."""
    weight_E, each = np.ones(num_experts), max(1, num_experts // ranks)
    anywhere_E = np.random.default_rng(layer).permutation(num_experts)
    if workload == "hot-experts":
        weight_E[anywhere_E[:each]] = HOT
    elif workload == "hot-rank":
        weight_E[:each] = HOT
    elif workload == "spread-hot":
        weight_E[layer % each :: each] = HOT
    elif workload == "zero-load":
        weight_E[:each] = weight_E[::4] = 0.0
    elif workload == "rotating":
        weight_E[np.roll(anywhere_E, -each * step)[:each]] = HOT
    elif workload == "burst" and step % 4 == 3:
        weight_E[anywhere_E[step // 4 % num_experts]] = BURST
    return weight_E
