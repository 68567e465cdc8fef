"""Synthetic traces: oracles with a known best placement, and stand-ins where no real trace exists."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.routing.trace import RoutingTrace


def planted_affinity(
    *, num_tokens: int = 512, num_layers: int = 4, num_devices: int = 4, experts_per_device: int = 4, seed: int = 0
) -> tuple[RoutingTrace, NDArray[np.int64]]:
    """Tokens that stay in one group of experts through all layers, and the placement [L, E] that keeps groups whole.

    Under ``stay`` that placement moves nothing after the first layer, and every device gets the same number of tokens:
    no placement can do better. ``num_tokens`` should be a multiple of num_devices * experts_per_device.
    """
    rng = np.random.default_rng(seed)
    num_experts = num_devices * experts_per_device
    group_LE = np.stack(
        [rng.permutation(np.repeat(np.arange(num_devices), experts_per_device)) for _ in range(num_layers)]
    )
    members = np.stack([np.argsort(row, kind="stable").reshape(num_devices, -1) for row in group_LE])
    token_group = np.arange(num_tokens) % num_devices
    even = (np.arange(num_tokens) // num_devices) % experts_per_device
    pick = (even[:, None] + rng.integers(experts_per_device, size=num_layers)) % experts_per_device
    experts = members[np.arange(num_layers)[None, :], token_group[:, None], pick]
    return RoutingTrace(experts.astype(np.int16), num_experts, name="synthetic planted affinity"), group_LE


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


def mixtral_like(*, num_tokens: int = 20_000, seed: int = 0) -> RoutingTrace:
    """A synthetic trace of Mixtral's scale (32 layers, 8 experts, top-2) with mild skew and sparse transitions."""
    return zipf_trace(
        num_tokens=num_tokens, num_layers=32, num_experts=8, top_k=2, exponent=0.35, stickiness=0.5, seed=seed
    )
