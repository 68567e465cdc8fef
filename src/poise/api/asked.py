"""What every call is asked alike: traffic of a model, a machine, placements, and the problem they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from poise.cost.split import Split
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import flow_of, settle
from poise.planning.engine_rules import parse_engine
from poise.planning.groups import Keep, groups_of
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, deal_slots
from poise.replay.rows import Traffics
from poise.replay.windows import with_top_k
from poise.routing.batch import RoutingBatch


def of_model(traffic: Traffics, model: ModelSpec | None) -> Traffics:
    """Traffic of a model that is named: recorded loads that do not say K have its, so that N tokens are N tokens."""
    return traffic if model is None else with_top_k(traffic, model.top_k)


def machine_of(cluster: str | Path | Cluster) -> Cluster:
    """A cluster, read where it is named."""
    return cluster if isinstance(cluster, Cluster) else Cluster.parse(cluster)


def placement_of(item: str | Path | Placement) -> Placement:
    """A placement, read where it is a file."""
    return item if isinstance(item, Placement) else Placement.load(item)


def slots_of(num_experts: int, redundant: int, slots: Sequence[int] | None, num_devices: int) -> NDArray[np.int64]:
    """Slots of each device, int64 [D], as they were asked for."""
    return deal_slots(num_experts, redundant, num_devices) if slots is None else np.asarray(slots, dtype=np.int64)


def problem_of(
    batch: RoutingBatch, cluster: str | Path | Cluster, redundant: int, slots: Sequence[int] | None,
    model: str | ModelSpec | None, traffic: DataFlow | None, split: Split | None, engine: str,
    keep_groups: Keep | None = None, **more: Any,
) -> PlacementProblem:  # fmt: skip
    """What :func:`plan` and :func:`compare` are asked, with what was not said filled in; ``more``: other fields."""
    machine, rules = machine_of(cluster), parse_engine(engine)
    sizes = ModelSpec.parse(model) if isinstance(model, str) else model
    sizes = sizes or ModelSpec.generic(batch.num_experts, batch.top_k, batch.layer_ids_L)
    slots_D = slots_of(batch.num_experts, redundant, slots, machine.num_devices)
    machine = settle(machine, sizes, batch.mean_tokens(), engine=rules.kernels)
    flow = traffic or (cast(DataFlow, flow_of(machine)) if batch.has_tokens else "home")
    whole = groups_of(keep_groups, batch.num_experts, sizes.num_expert_groups, machine.node_D)
    return PlacementProblem(batch, machine, sizes, slots_D, flow, rules.choose_split(split), engine=rules, whole=whole,
                            **more)  # fmt: skip
