"""What the method ``exact`` minimises, of any placement without replicas."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.methods.exflow import expected_affinity_LEE
from poise.planning.solve.exact import copy_seconds_DD
from poise.routing.batch import RoutingBatch


def linear_stay_objective(
    expert_device_LE: NDArray[np.int64], batch: RoutingBatch, cluster: Cluster, model: ModelSpec
) -> float:
    """Seconds a layer and step; ``expert_device_LE`` int64 [L, E]."""
    work = expert_seconds(batch.load_LE(), cluster, model)
    move = copy_seconds_DD(cluster, model)
    flow = expected_affinity_LEE(batch, picks=batch.top_k)
    total = 0.0
    for layer, device in enumerate(expert_device_LE):
        total += float(
            (np.bincount(device, weights=work[layer], minlength=cluster.num_devices) / cluster.speed_D).max()
        )
        if layer:
            total += float((flow[layer - 1] * move[np.ix_(expert_device_LE[layer - 1], device)]).sum())
    return total / len(expert_device_LE)
