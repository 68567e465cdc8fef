"""NeMo Automodel's expert-parallel layer (all-gather, experts, all-reduce) in the Hugging Face model.

Its model class asks for a CUDA device; its layer does not.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peer.layered import LayeredTrainer
from peer.protocol import Peer, Settings

PEER = Peer(
    "nemo-automodel",
    ("nemo-automodel==0.7.0", "transformers==5.18.0"),
    3.5,
    "nemo",
    "its layer: GroupedExperts under ExpertParallel, all-gather dispatch; its model class asks for a CUDA device",
)


def start() -> None:
    dist.init_process_group("gloo")


def build(settings: Settings) -> LayeredTrainer:
    return LayeredTrainer(settings, lambda experts: NemoExperts(experts, settings))


class NemoExperts(nn.Module):
    """Their grouped experts with the weights of Hugging Face's."""

    def __init__(self, experts: Any, settings: Settings) -> None:
        super().__init__()
        from nemo_automodel.components.moe.config import MoEConfig
        from nemo_automodel.components.moe.experts import GroupedExperts
        from nemo_automodel.components.moe.parallelizer import ExpertParallel
        from torch.distributed.tensor.parallel import parallelize_module

        count, hidden, inner = experts.down_proj.shape
        wanted = dict(
            n_routed_experts=count, n_shared_experts=0, n_activated_experts=settings.shape.top_k, n_expert_groups=1,
            n_limited_groups=1, train_gate=True, gate_bias_update_factor=0.0, aux_loss_coeff=0.0, score_func="softmax",
            route_scale=1.0, dim=hidden, inter_dim=inner, moe_inter_dim=inner, norm_topk_prob=True,
            expert_activation="swiglu", dtype=torch.float32,
        )  # fmt: skip
        known = inspect.signature(MoEConfig).parameters
        self.grouped = GroupedExperts(MoEConfig(**{key: value for key, value in wanted.items() if key in known}))
        with torch.no_grad():
            self.grouped.gate_and_up_projs.copy_(experts.gate_up_proj.transpose(1, 2))
            self.grouped.down_projs.copy_(experts.down_proj.transpose(1, 2))
        parallelize_module(self.grouped, settings.mesh, ExpertParallel())
        each = count // settings.mesh.size()
        self.mine = range(settings.mesh.get_local_rank() * each, (settings.mesh.get_local_rank() + 1) * each)
        self.grouped._forward_loop = self._clocked(self.grouped._forward_loop, settings.clock)

    def _clocked(self, loop: Any, clock: Any) -> Any:
        def run(x: Tensor, weights: Tensor, indices: Tensor, *rest: Any) -> Tensor:
            counts = torch.bincount(indices.reshape(-1), minlength=self.mine.stop)[self.mine.start : self.mine.stop]
            return clock.experts(lambda tokens: loop(tokens, weights, indices, *rest), x, counts.tolist())

        return run

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # noqa: D102
        return self.grouped(x, torch.ones(len(x), dtype=torch.bool), weights, ids)
