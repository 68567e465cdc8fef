"""Replay: a batch of traffic on a placement, step by step and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.cost.bound import bound_terms
from poise.cost.split import Split
from poise.cost.step import BatchCost, batch_cost
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.routing.batch import RoutingBatch


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """What a batch costs under a placement.

    Parameters
    ----------
    cost : per step and layer (:class:`poise.cost.step.BatchCost`).
    bound_B : float64 [B], least seconds of each step for any placement with the same slots.
    moved_bytes_B : float64 [B] or None, expert weights that a fast loop fetches in each step.
    """

    cost: BatchCost
    bound_B: NDArray[np.float64]
    moved_bytes_B: NDArray[np.float64] | None = None

    @property
    def moved_bytes_per_step(self) -> float:
        """Mean bytes of expert weights moved in a step, all layers and devices together."""
        return 0.0 if self.moved_bytes_B is None else float(self.moved_bytes_B.mean())

    @property
    def step_seconds_B(self) -> NDArray[np.float64]:
        """Seconds of all MoE layers of each step, float64 [B]."""
        return self.cost.seconds_BL.sum(axis=1)

    @property
    def imbalance(self) -> float:
        """Mean over steps and layers with tokens of max / mean tokens."""
        return float(np.nanmean(self.cost.imbalance_BL()))

    @property
    def imbalance_p99(self) -> float:
        """99th percentile of the same."""
        return float(np.nanpercentile(self.cost.imbalance_BL(), 99))

    @property
    def cross_device_share(self) -> float:
        """Share of (token, expert) pairs computed on another device than the token came from."""
        return float(self.cost.cross_device_BL.sum() / self.cost.pairs_BL.sum())

    @property
    def cross_node_share(self) -> float:
        """Share of (token, expert) pairs computed on another node than the token came from."""
        return float(self.cost.cross_node_BL.sum() / self.cost.pairs_BL.sum())

    @property
    def efficiency(self) -> float:
        """Bound / time, summed over steps; at most 1."""
        return float(self.bound_B.sum() / self.step_seconds_B.sum())

    def relative_load_LD(self) -> NDArray[np.float64]:
        """Tokens of each device relative to the layer's mean, over all steps, float64 [L, D]."""
        tokens = self.cost.tokens_BLD.sum(axis=0)
        return tokens / np.maximum(tokens.mean(axis=1, keepdims=True), 1e-300)


def replay(
    batch: RoutingBatch,
    placement: Placement,
    cluster: Cluster,
    model: ModelSpec,
    *,
    traffic: DataFlow,
    split: Split,
    pooled: bool = False,
) -> Replay:
    """Price every step; ``pooled`` counts the placement's memory over all layers together in the bound."""
    slots_D, spare = placement.slots_D, placement.redundant
    if pooled:
        used = placement.count_LED().sum(axis=(0, 1))
        slots_D = np.minimum(used, placement.num_experts)
        spare = int(used.sum()) - placement.num_experts * placement.num_layers
    cost = batch_cost(batch, placement.count_LED(), cluster, model, traffic=traffic, split=split)
    bound = bound_terms(batch, cluster, model, traffic=traffic, slots_D=slots_D, spare=max(0, spare),
                        blind=split != "near")  # fmt: skip
    return Replay(cost, bound.seconds_BL.sum(axis=1))
