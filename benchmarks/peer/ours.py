"""poise's rows, in the same processes as a peer's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peer import model as shared
from peer.protocol import Settings
from peer.usage import held_bytes
from poise.machine.cluster import Cluster
from poise.train import fully_shard_experts, parameter_groups


@dataclass(frozen=True)
class Ours:
    """A row of poise's."""

    name: str
    policy: str
    slots: int
    forced: bool = False
    traffic: str = "home"


ROWS = {
    row.name: row
    for row in (
        Ours("expert-parallelism", "expert-parallelism", 0),
        Ours("hecate", "hecate:overlap=4", 2),
        Ours("llep", "llep", 2),
        Ours("poise", "poise", 2),
        Ours("force-balanced", "expert-parallelism", 0, forced=True),
        Ours("expert-parallelism, once", "expert-parallelism", 0, traffic="home_device_dedup"),
        Ours("poise, once", "poise", 2, traffic="home_device_dedup"),
    )
}


class PoiseTrainer:
    """``fully_shard_experts`` for the experts, DDP for the rest."""

    def __init__(self, settings: Settings, row: Ours, cluster: Cluster) -> None:
        self.model = shared.build(settings.shape)
        settings.clock.watch(self.model)
        self.run = fully_shard_experts(
            self.model,
            mesh=settings.mesh,
            policy=row.policy,
            step_slots=row.slots,
            cluster=cluster,
            force_balance=row.forced,
            traffic=row.traffic,
        )
        for experts in self.run.schedule.layers:
            experts.kind = replace(experts.kind, one=_clocked(experts.kind.one, settings.clock))
        self.dense = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=settings.rate)

    def gates(self) -> list[Tensor]:  # noqa: D102
        return [layer.mlp.gate.weight for layer in self.model.model.layers]

    def step(self, ids: Tensor) -> float:  # noqa: D102
        loss = shared.loss_of(self.dense, ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # after the step, as DeepSpeed's engine does
        return loss.item()

    def held(self) -> int:  # noqa: D102
        return held_bytes(self.model, self.optimizer)

    def overload(self) -> tuple[float, float]:
        """Max / mean pairs over ranks in the layers of the last step, with and without replicas; their mean."""
        metrics = self.run.metrics
        return tuple(sum(getattr(one, key) for one in metrics) / len(metrics) for key in ("overload", "owner_overload"))


def _clocked(one: Any, clock: Any) -> Any:
    def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return clock.experts(lambda tokens: one(weights, tokens), x, [len(x)])

    return run
