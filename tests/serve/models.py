"""Tiny models of every family, placements, and the plain transformers model that serving must equal."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.serve.load import from_config
from poise.serve.model import block_of

VOCABULARY, EXPERTS, TOP_K = 61, 8, 2
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_experts_per_tok": TOP_K,
         "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 256}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(**SMALL, intermediate_size=16, num_hidden_layers=2, num_key_value_heads=2,
                             num_local_experts=EXPERTS),
    "mixtral-window": MixtralConfig(**SMALL, intermediate_size=16, num_hidden_layers=2, num_key_value_heads=2,
                                    num_local_experts=EXPERTS, sliding_window=5),
    "qwen2_moe": Qwen2MoeConfig(**SMALL, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=2,
                                num_key_value_heads=2, num_experts=EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=3, head_dim=8,
                                num_key_value_heads=2, num_experts=EXPERTS, mlp_only_layers=[1], norm_topk_prob=True),
    "olmoe": OlmoeConfig(**SMALL, intermediate_size=16, num_hidden_layers=2, num_key_value_heads=4, num_experts=EXPERTS),
    "deepseek_v3": DeepseekV3Config(
        **SMALL, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=3, num_key_value_heads=4,
        n_routed_experts=EXPERTS, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=8,
        qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8,
    ),
    "gpt_oss": GptOssConfig(**SMALL, intermediate_size=16, num_hidden_layers=2, num_key_value_heads=2, head_dim=8,
                            num_local_experts=EXPERTS, sliding_window=4),
}  # fmt: skip
PLACEMENTS = ("contiguous", "replicas", "uneven")


def machine() -> Cluster:
    return Cluster.parse("2x2")


def dense(family: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    """The plain model; router biases, norms and sinks are random too, as nothing else would show them."""
    model = from_config(CONFIGS[family], seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.ndim == 1 and "inv_freq" not in name:
                weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
    # grouped_mm takes no float64, and sdpa no sinks
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager" if family == "gpt_oss" else "sdpa")
    return model


def moe_layers(model) -> list[int]:
    return [i for i in range(len(model.model.layers)) if hasattr(block_of(model, i), "experts")]


def placement(kind: str, layers: list[int], ranks: int, seed: int = 0) -> Placement:
    """Contiguous; with replicas on random ranks; uneven: one rank with nothing, slots that differ by layer."""
    rng = np.random.default_rng(seed)
    count = np.zeros((len(layers), EXPERTS, ranks), np.int64)
    for row in range(len(layers)):
        for expert in range(EXPERTS):
            if kind == "contiguous":
                count[row, expert, expert * ranks // EXPERTS] = 1
            elif kind == "replicas":
                count[row, expert, rng.choice(ranks, int(rng.integers(1, 3)), replace=False)] = 1
            else:
                count[row, expert, rng.choice(ranks - 1, p=[0.6, *[0.4 / (ranks - 2)] * (ranks - 2)])] = 1
    return Placement.from_counts(count, layer_ids_L=np.array(layers, np.int32), method=kind)


def prompts(count: int = 5, seed: int = 1) -> list[list[int]]:
    """Prompts of very different lengths."""
    rng = np.random.default_rng(seed)
    lengths = [1, 23, 4, 11, 2, 17, 7, 3][:count]
    return [rng.integers(2, VOCABULARY, length).tolist() for length in lengths]


@torch.no_grad()
def plain_logits(model, tokens: list[int]) -> torch.Tensor:
    """Logits of every position, [T, vocabulary]."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


@torch.no_grad()
def plain_greedy(model, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding with transformers' own cache."""
    given, cache, out = torch.tensor([prompt]), None, []
    for _ in range(count):
        got = model(input_ids=given, past_key_values=cache, use_cache=True)
        cache = got.past_key_values
        out.append(int(got.logits[0, -1].argmax()))
        given = torch.tensor([out[-1:]])
    return out


@torch.no_grad()
def stepwise_logits(model, tokens: list[int]) -> torch.Tensor:
    """The same as :func:`plain_logits`, token by token with transformers' own cache."""
    cache, rows = None, []
    for token in tokens:
        got = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = got.past_key_values
        rows.append(got.logits[0, -1])
    return torch.stack(rows)
