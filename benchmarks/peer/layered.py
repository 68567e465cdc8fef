"""A Hugging Face model whose experts another layer computes, each rank its share; DDP does the rest, as in poise's rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peer import model as shared
from peer.protocol import Settings
from peer.usage import held_bytes


class LayeredTrainer:
    """``replace(experts)`` gives the module that is called as ``experts(tokens, ids, weights)`` in their place."""

    def __init__(self, settings: Settings, replace: Callable[[nn.Module], nn.Module]) -> None:
        self.model = shared.build(settings.shape)
        settings.clock.watch(self.model)
        for layer in self.model.model.layers:
            layer.mlp.experts = replace(layer.mlp.experts)
        names = [name for name, _ in self.model.named_parameters() if ".experts." in name]
        self.owned = [weight for name, weight in self.model.named_parameters() if ".experts." in name]
        self.model._ddp_params_and_buffers_to_ignore = names
        self.dense = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        # a group a kind: some optimizers' kernels do not mix DTensors with tensors
        rest = [weight for name, weight in self.model.named_parameters() if ".experts." not in name]
        self.optimizer = torch.optim.AdamW([{"params": rest}, {"params": self.owned}], lr=settings.rate)

    def gates(self) -> list[Tensor]:  # noqa: D102
        return [layer.mlp.gate.weight for layer in self.model.model.layers]

    def step(self, ids: Tensor) -> float:  # noqa: D102
        loss = shared.loss_of(self.dense, ids)
        loss.backward()
        for weight in self.owned:  # summed over all ranks' tokens by the exchange; DDP's rest is a mean
            if weight.grad is not None:
                grad = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
                grad.div_(dist.get_world_size())
        self.optimizer.step()
        self.optimizer.zero_grad()  # after the step, as DeepSpeed's engine does
        return loss.item()

    def held(self) -> int:  # noqa: D102
        return held_bytes(self.model, self.optimizer)
