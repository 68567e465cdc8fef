"""What prices a step, as one record: machine, model, data flow and token split."""

from __future__ import annotations

from dataclasses import dataclass

from poise.cost.entries import SlotCounts
from poise.cost.split import Split
from poise.cost.step import BatchCost, batch_cost
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.routing.batch import RoutingBatch


@dataclass(frozen=True, slots=True, eq=False)
class Pricing:
    """Parameters of :func:`poise.cost.step.batch_cost` that stay the same for all placements and all traffic.

    Parameters
    ----------
    cluster, model : the machine and the model's sizes.
    traffic : data flow.
    split : how tokens of a replicated expert are split.
    """

    cluster: Cluster
    model: ModelSpec
    traffic: DataFlow
    split: Split

    def cost(self, batch: RoutingBatch, counts: SlotCounts, *, split: Split | None = None) -> BatchCost:
        """Seconds of every step under a placement, or under another ``split``; errors of ``batch_cost``."""
        return batch_cost(batch, counts, self.cluster, self.model, traffic=self.traffic, split=split or self.split)
