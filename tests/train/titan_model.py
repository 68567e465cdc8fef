"""A stand-in of torchtitan's MoE layout (0.3.0): names, calls and arithmetic of its classes, without its packages.

``tests/train/titan_real.py`` holds it against the real source where that is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class GroupedExperts(nn.Module):
    """Stacked experts that take sorted tokens; theirs computes in bfloat16 whatever it is given."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, short: bool = True) -> None:
        super().__init__()
        self.num_experts, self.short = num_experts, short
        self.w1_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        offsets_E = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        x, w1, w2, w3 = (self._of(one) for one in (x_RD, self.w1_EFD, self.w2_EDF, self.w3_EFD))
        h_RF = F.silu(self._grouped_mm(A=x, B_t=w1.transpose(-2, -1), offs=offsets_E))
        h_RF = h_RF * self._grouped_mm(A=x, B_t=w3.transpose(-2, -1), offs=offsets_E)
        return self._grouped_mm(A=h_RF, B_t=w2.transpose(-2, -1), offs=offsets_E).type_as(x_RD)

    def _of(self, one: Tensor) -> Tensor:
        return one.bfloat16() if self.short else one

    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        if self.short:
            return torch._grouped_mm(A, B_t, offs=offs)
        counts = offs.diff(prepend=offs.new_zeros(1)).tolist()
        return torch.cat([part @ weight for part, weight in zip(A.split(counts), B_t, strict=True)])


@dataclass(frozen=True)
class Metadata:
    order_N: Tensor
    scores_N: Tensor


class LocalTokenDispatcher:
    """Theirs for one rank."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k = num_experts, top_k

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        pass

    def dispatch(self, x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E):
        order_N = torch.argsort(topk_expert_ids_TK.view(-1), stable=True)
        scores_N = topk_scores_TK.view(-1)[order_N]
        order_N = order_N // self.top_k
        return x_TD[order_N], num_local_tokens_per_expert_E, Metadata(order_N, scores_N)

    def combine(self, routed_output_RD: Tensor, metadata: Metadata, x_TD: Tensor) -> Tensor:
        out = routed_output_RD.to(metadata.scores_N.dtype) * metadata.scores_N.reshape(-1, 1)
        index = metadata.order_N.reshape(-1, 1).expand(-1, x_TD.shape[-1])
        return torch.zeros_like(x_TD).scatter_add(0, index, out.to(routed_output_RD.dtype))


class RoutedExperts(nn.Module):
    def __init__(self, inner_experts: GroupedExperts, token_dispatcher: LocalTokenDispatcher) -> None:
        super().__init__()
        self.inner_experts, self.token_dispatcher = inner_experts, token_dispatcher

    def forward(self, x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E):
        B, L, D = x_BLD.shape
        K, x_TD = topk_scores_BLK.size(-1), x_BLD.view(B * L, D)
        routed, counts, metadata = self.token_dispatcher.dispatch(
            x_TD, topk_scores_BLK.view(B * L, K), topk_expert_ids_BLK.view(B * L, K), num_local_tokens_per_expert_E
        )
        out_TD = self.token_dispatcher.combine(self.inner_experts(routed, counts), metadata, x_TD)
        return out_TD.view(B, -1, D)


class TokenChoiceTopKRouter(nn.Module):
    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.gate, self.top_k = nn.Linear(dim, num_experts, bias=False), top_k

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores_BLE = torch.sigmoid(self.gate(x_BLD))
        ids_BLK = torch.topk(scores_BLE + expert_bias_E, k=self.top_k, dim=-1, sorted=False).indices
        scores_BLK = scores_BLE.gather(dim=-1, index=ids_BLK)
        return scores_BLK / (scores_BLK.sum(dim=-1, keepdim=True) + 1e-20), ids_BLK, scores_BLE


class MoE(nn.Module):
    """With the buffers of balancing by a bias: loads are counted in the forward pass, the bias moves before a step."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, top_k: int, short: bool) -> None:
        super().__init__()
        self.routed_experts = RoutedExperts(
            GroupedExperts(dim, hidden_dim, num_experts, short), LocalTokenDispatcher(num_experts, top_k)
        )
        self.router = TokenChoiceTopKRouter(dim, num_experts, top_k)
        self.shared_experts = nn.Linear(dim, dim, bias=False)
        self.load_balance_coeff = 1e-2
        self.register_buffer("expert_bias_E", torch.zeros(num_experts))
        self.register_buffer("tokens_per_expert_E", torch.zeros(num_experts), persistent=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        scores_BLK, ids_BLK, scores_BLE = self.router(x_BLD, self.expert_bias_E)
        chosen_BLE = torch.zeros_like(scores_BLE, dtype=torch.bool).scatter_(-1, ids_BLK, True)
        counts_E = chosen_BLE.sum(dim=(0, 1))
        if self.training:
            with torch.no_grad():
                self.tokens_per_expert_E.add_(counts_E)
        return self.routed_experts(x_BLD, scores_BLK, ids_BLK, counts_E) + self.shared_experts(x_BLD)

    def init_buffers(self) -> None:
        """As their ``_init_self_buffers``: it asks the experts how many they are."""
        self.tokens_per_expert_E = torch.zeros(self.routed_experts.inner_experts.num_experts)


class Block(nn.Module):
    moe_enabled = True

    def __init__(self, *sizes: Any) -> None:
        super().__init__()
        self.mix, self.moe = nn.Linear(sizes[0], sizes[0]), MoE(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.mix(x))
        return x + self.moe(x)


class Decoder(nn.Module):
    """``layers`` by name, as theirs."""

    def __init__(
        self, layers: int = 2, *, dim: int = 16, hidden: int = 24, experts: int = 6, top_k: int = 2, short: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(n): Block(dim, hidden, experts, top_k, short) for n in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers.values():
            x = block(x)
        return x


def build(dtype: torch.dtype = torch.float64, **options: Any) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Decoder(**options)
        for name, weight in model.named_parameters():
            nn.init.normal_(weight, std=0.4 if "experts" in name else 0.3)
    return model.to(dtype)


def tokens(step: int, world: int, rank: int | None = None, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Tokens and targets [B, L, D] of a rank, or of all."""
    made = torch.randn(2, world * 2, 5, dim, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    x, target = made if rank is None else made[:, 2 * rank : 2 * rank + 2]
    return x, target


def loss_of(model: nn.Module, step: int, world: int, rank: int | None = None) -> Tensor:
    """Mean over the tokens at hand."""
    dtype = next(model.parameters()).dtype
    x, target = (one.to(dtype) for one in tokens(step, world, rank))
    return (model(x) - target).square().mean()


@torch.no_grad()
def update_expert_bias(model: Any, group: Any = None) -> None:
    """As their ``register_moe_load_balancing_hook``: loads of all ranks, in a hook before the optimizer's step."""
    blocks = [block for block in model.layers.values() if getattr(block, "moe_enabled", False)]
    loads_LE = torch.vstack([block.moe.tokens_per_expert_E for block in blocks])
    if group is not None:
        dist.all_reduce(loads_LE, group=group)
    for block, load_E in zip(blocks, loads_LE.float(), strict=True):
        delta_E = block.moe.load_balance_coeff * torch.sign(load_E.mean() - load_E)
        block.moe.expert_bias_E.add_(delta_E - delta_E.mean())
        block.moe.tokens_per_expert_E.zero_()
