"""DeepSpeed AutoEP, whole: its engine, its layer in place of the model's, its reduction of gradients."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from peer import model as shared
from peer.protocol import Peer, Settings
from peer.usage import held_bytes

PEER = Peer(
    "deepspeed",
    ("deepspeed==0.19.8", "transformers==5.18.0"),
    1.5,
    "deepspeed_autoep",
    "whole: AutoEP's engine and layer (ZeRO stage 0, experts in a loop, no gradient clipping)",
)


def start() -> None:
    """Gloo through DeepSpeed's own set-up."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # a reduction through shared memory for inference, which training does not call: compiling it takes minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def build(settings: Settings) -> AutoEp:
    return AutoEp(settings)


class AutoEp:
    """The engine of the model."""

    def __init__(self, settings: Settings) -> None:
        import deepspeed

        model = shared.build(settings.shape)
        settings.clock.watch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate)
        config = {
            "train_micro_batch_size_per_gpu": settings.shape.sequences,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "gradient_clipping": 0.0,  # its default scales every update
            "expert_parallel": {
                "enabled": True,
                "autoep_size": settings.mesh.size(),
                "preset_model": "mixtral",
                "use_grouped_mm": False,
            },
        }
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.layers = [one for one in self.engine.module.modules() if type(one).__name__ == "AutoEPMoELayer"]
        assert len(self.layers) == settings.shape.layers, f"AutoEP replaced {len(self.layers)} layers"
        for layer in self.layers:
            layer.experts.forward = _clocked(layer.experts.forward, settings.clock)

    def gates(self) -> list[Tensor]:  # noqa: D102
        return [layer.router.gate.weight for layer in self.layers]

    def step(self, ids: Tensor) -> float:  # noqa: D102
        loss = shared.loss_of(self.engine, ids)
        self.engine.backward(loss)
        self.engine.step()
        return loss.item()

    def held(self) -> int:  # noqa: D102
        return held_bytes(self.engine.module, self.optimizer)


def _clocked(forward: Any, clock: Any) -> Any:
    def run(x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        counts = num_tokens_per_expert.tolist()
        return clock.experts(lambda tokens: forward(tokens, num_tokens_per_expert), x, counts)

    return run
