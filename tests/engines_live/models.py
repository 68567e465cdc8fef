"""Tiny checkpoints with random weights, and prompts for them; no tokenizer, since prompts are token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS, EXPERTS, TOP_K, WORDS = 4, 16, 2, 1024
SHAPE = dict(
    vocab_size=WORDS, hidden_size=128, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=1024, eos_token_id=1, bos_token_id=0, pad_token_id=2, initializer_range=0.15,
    tie_word_embeddings=False, num_experts_per_tok=TOP_K, num_experts=EXPERTS,
)  # fmt: skip


def qwen3_moe(folder: Path, layers: int = LAYERS) -> Path:
    """The family that vLLM balances."""
    return _saved(Qwen3MoeForCausalLM, Qwen3MoeConfig(
        intermediate_size=256, moe_intermediate_size=64, norm_topk_prob=True, head_dim=32,
        **{**SHAPE, "num_hidden_layers": layers},
    ), folder)  # fmt: skip


def olmoe(folder: Path) -> Path:
    """A family without a load balancer in vLLM: it can be relabelled, and recorded."""
    return _saved(OlmoeForCausalLM, OlmoeConfig(intermediate_size=64, norm_topk_prob=False, **SHAPE), folder)


def _saved(family: type, config: object, folder: Path) -> Path:
    torch.manual_seed(0)
    family(config).to(torch.float32).eval().save_pretrained(folder)
    return folder


def with_words(folder: Path) -> Path:
    """The checkpoint with a tokenizer, which a server wants: token n is the word ``wn``."""
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w2").save_pretrained(
        folder
    )
    return folder


def prompts(count: int, tokens: int, *, seed: int, words: int = WORDS) -> list[list[int]]:
    """Prompts of so many tokens out of ``words`` words that the seed chooses: few words, few experts, another seed others."""
    rng = np.random.default_rng(seed)
    known = 3 + rng.choice(WORDS - 3, size=min(words, WORDS - 3), replace=False)
    return rng.choice(known, size=(count, tokens)).tolist()
