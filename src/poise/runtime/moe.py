"""A plain MoE module: router and stacked experts, dense on one process. The shape that poise shards and serves.

Called like Hugging Face's: ``experts(tokens [T, d], ids [T, K], weights [T, K])``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.runtime.dispatch import out_of_range
from poise.util.errors import ModelError


class DenseExperts(nn.Module):
    """All experts on one device, one after the other: the reference. Each computes with its own code."""

    def expert(self, e: int, x_nd: Tensor) -> Tensor:
        """What expert ``e`` makes of its tokens, [n, d]."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts, [T, d]; ids of -1 and E mean none.

        Raises
        ------
        ModelError : ids outside -1..E.
        """
        count = len(self) if isinstance(self, nn.ModuleList) else len(next(iter(self.parameters())))
        if (wrong := out_of_range(top_k_index, count)) is not None:
            raise wrong
        out = torch.zeros_like(hidden_states)
        for e in range(count):
            token, k = torch.where(top_k_index == e)
            if len(token):
                y = self.expert(e, hidden_states[token])
                out = out.index_add(0, token, (y * top_k_weights[token, k, None]).to(out.dtype))
        return out


class GatedExperts(DenseExperts):
    """Experts of three matrices, gate and up in one: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, num_experts: int, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.act_fn = F.silu
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size))
        for weight in (self.gate_up_proj, self.down_proj):
            if not weight.is_meta:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def expert(self, e: int, x_nd: Tensor) -> Tensor:  # noqa: D102
        gate, up = F.linear(x_nd, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[e])


class ExpertList(DenseExperts, nn.ModuleList):
    """Experts as equal modules of one input each; a raw ``ModuleList`` has no call to stand in for."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        nn.ModuleList.__init__(self, experts)

    def expert(self, e: int, x_nd: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self[e](x_nd)
        return out


class MoE(nn.Module):
    """Top-k router with softmax weights, and experts.

    Parameters
    ----------
    experts : one of the classes above.
    hidden_size, num_experts, top_k : d, E, K.
    """

    def __init__(self, experts: nn.Module, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ModelError(f"top_k {top_k} does not lie in 1..{num_experts}")
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts, self.top_k = experts, top_k

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        probabilities = self.gate(x).float().softmax(dim=-1) if x.dtype != torch.float64 else self.gate(x).softmax(-1)
        weights, ids = probabilities.topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        return self.experts(x, ids, weights).view(hidden_states.shape)
