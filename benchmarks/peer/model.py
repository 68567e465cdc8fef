"""The model that all train: a small Mixtral of Hugging Face, whose routing can be set without touching anyone's code.

**How routing is forced.** Coordinate 0 of the residual stream is the same for every token: all embeddings have 1 there,
and nothing writes to it (rows of zeros in ``o_proj`` and ``down_proj``). Whatever a norm makes of it, the first column
of a router's weight is a bias on its experts. It is a weight of the model like any other, so whoever trains the model
routes by it, and the columns are set alike for all before a step (:func:`set_biases`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes; ``sequences`` of ``length`` tokens a rank and step."""

    hidden: int = 128
    inner: int = 256
    experts: int = 16
    top_k: int = 2
    layers: int = 2
    vocabulary: int = 128
    length: int = 64
    sequences: int = 4

    @property
    def tokens(self) -> int:
        """Of a rank in a step."""
        return self.length * self.sequences


def build(shape: Shape, seed: int = 0) -> Any:
    """The same weights on every rank and in every environment."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner, num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k, num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=shape.length, router_aux_loss_coef=0.0, use_cache=False, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    model.set_experts_implementation("eager")
    fresh = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # by name: not every release draws in the same order
            if "norm" not in name:
                weight.copy_(torch.randn(weight.shape, generator=fresh) * (0.05 if "experts" in name else 0.08))
        model.model.embed_tokens.weight.mul_(8.0)[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.experts.down_proj[:, 0] = 0.0
    return model.train()


def tokens(shape: Shape, step: int, ranks: int, rank: int | None = None) -> Tensor:
    """Of one rank, or of all (None), int64 [sequences, length]."""
    every = torch.randint(
        3, shape.vocabulary, (ranks * shape.sequences, shape.length), generator=torch.Generator().manual_seed(step)
    )
    return every if rank is None else every[rank * shape.sequences : (rank + 1) * shape.sequences]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Mean over the tokens given; every rank has as many."""
    logits = model(input_ids=ids).logits.float()
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


@torch.no_grad()
def set_biases(gates: Sequence[Tensor], bias_LE: Any) -> None:
    """The biases of all experts, in place."""
    for gate, bias_E in zip(gates, bias_LE, strict=True):
        gate[:, 0] = torch.as_tensor(np.asarray(bias_E), dtype=gate.dtype)


@torch.no_grad()
def fitted(model: Any, shape: Shape, share_LE: Any, ranks: int, rounds: int = 150) -> np.ndarray:
    """Biases float64 [L, E] with which the model's tokens choose experts by shares [L, E] (of tokens that no step has).

    Layer by layer, as what a layer chooses changes what the next one sees. The model's routers are left with them.
    """
    gates = [layer.mlp.gate for layer in model.model.layers]
    ids = torch.cat([tokens(shape, 10_000 + n, ranks) for n in range(2)])
    out = np.zeros((shape.layers, shape.experts))
    for number, gate in enumerate(gates):
        seen: list[Tensor] = []
        hook = gate.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0].reshape(-1, shape.hidden))
        )
        loss_of(model, ids)
        hook.remove()
        x_Td = seen[0]
        rest_TE = x_Td[:, 1:] @ gate.weight[:, 1:].T
        wanted_E = torch.as_tensor(np.asarray(share_LE[number])) * len(x_Td) * shape.top_k
        bias_E = torch.zeros(shape.experts, dtype=torch.float64)
        for turn in range(rounds):
            logits_TE = rest_TE + x_Td[:, :1] * bias_E.float()
            got_E = torch.bincount(logits_TE.topk(shape.top_k).indices.view(-1), minlength=shape.experts)
            bias_E += 0.5 * 0.97**turn * ((wanted_E + 1).log() - (got_E + 1).log())
            bias_E -= bias_E.mean()
        out[number] = bias_E.numpy()
        gate.weight[:, 0] = bias_E.float()
    return out
