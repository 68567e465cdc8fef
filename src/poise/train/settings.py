"""What a run of sharded experts was told, and what its experts are computed on: plain data that all of it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from poise.cost.transfers import Form
from poise.machine.cluster import Cluster
from poise.stepwise.protocol import StepPolicy
from poise.stepwise.sharding import ShardingPolicy
from poise.train.packing import Packing

TrainingFlow = Literal["home", "home_device_dedup", "auto"]
"""Data flows that training runs (:mod:`poise.cost.traffic`); ``auto``: of both the faster one, layer by layer."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run is scheduled; see :func:`poise.train.api.fully_shard_experts`."""

    policy: StepPolicy
    step_slots: int
    window: int
    prefetch: int
    rematerialise: bool | float
    sharding: ShardingPolicy | None
    window_s: float | None
    force_balance: bool
    accumulate_bytes: float | None = None
    traffic: TrainingFlow = "home"


@dataclass(frozen=True, slots=True, eq=False)
class Deployment:
    """Where the experts of a run are computed, and how they travel.

    Parameters
    ----------
    cluster : its devices are the ranks of both groups.
    tokens_group, weights_group : two communicators of the same ranks: tokens do not wait behind weights.
    device : where this rank computes experts.
    compute_dtype, reduce_dtype : of materialised weights, and of gradients on the wire.
    form : how sparse collectives travel (:mod:`poise.cost.transfers`).
    expert_numel : parameters of one expert; all layers have the same.
    rank : this rank in both groups.
    packing : how weights are packed to be gathered; None: as they are computed with.
    packed_bytes : of one expert's weights, where they are packed.
    """

    cluster: Cluster
    tokens_group: Any
    weights_group: Any
    device: torch.device
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    form: Form
    expert_numel: int
    rank: int
    packing: Packing | None = None
    packed_bytes: float = 0.0

    @property
    def held_bytes(self) -> float:
        """Bytes of one expert's weights as they are computed with."""
        return float(self.expert_numel * self.compute_dtype.itemsize)

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights on the wire."""
        return self.held_bytes if self.packing is None else self.packed_bytes

    @property
    def gradient_bytes(self) -> float:
        """Bytes of one expert's gradients on the wire."""
        return float(self.expert_numel * self.reduce_dtype.itemsize)
