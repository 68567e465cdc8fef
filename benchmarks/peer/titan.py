"""torchtitan's token dispatcher (all-to-all) in the Hugging Face model, around experts that compute in float32.

Its own experts compute in bfloat16 whatever they are given, and its trainer asks for CUDA: the dispatch alone is its row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from peer.layered import LayeredTrainer
from peer.protocol import Peer, Settings

PEER = Peer(
    "torchtitan",
    ("torchtitan==0.3.0", "transformers==5.18.0", "triton"),
    3.0,
    "titan",
    "its dispatch alone: AllToAllTokenDispatcher around experts in float32, as its own compute in bfloat16",
)


def start() -> None:
    dist.init_process_group("gloo")
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("full_dtensor")


def build(settings: Settings) -> LayeredTrainer:
    return LayeredTrainer(settings, lambda experts: TitanExperts(experts, settings))


class TitanExperts(nn.Module):
    """Their dispatcher, and this rank's share of Hugging Face's experts one by one."""

    def __init__(self, experts: Any, settings: Settings) -> None:
        super().__init__()
        from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

        self.count, self.clock = len(experts.down_proj), settings.clock
        each, rank = self.count // settings.mesh.size(), settings.mesh.get_local_rank()
        mine = slice(rank * each, (rank + 1) * each)
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[mine].clone())
        self.down_proj = nn.Parameter(experts.down_proj.detach()[mine].clone())
        config = AllToAllTokenDispatcher.Config(num_experts=self.count, top_k=settings.shape.top_k)
        self.dispatcher = config.build()
        self.dispatcher.wire_meshes(ep_mesh=settings.mesh)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # noqa: D102
        counts = torch.bincount(ids.view(-1), minlength=self.count)
        sent, arrived, way = self.dispatcher.dispatch(x, weights, ids, counts)
        each = arrived.tolist()
        out = self.clock.experts(lambda tokens: self._experts(tokens, each), sent, each)
        return self.dispatcher.combine(out, way, x)

    def _experts(self, tokens: Tensor, counts: list[int]) -> Tensor:
        out = []
        for part, both, down in zip(tokens.split(counts), self.gate_up_proj, self.down_proj, strict=True):
            gate, up = F.linear(part, both).chunk(2, dim=-1)
            out.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(out)
