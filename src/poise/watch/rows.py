"""What engines run, and what dumps hold, in the shape of the traffic that is watched."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import SlotRecord
from poise.planning.placement import Placement
from poise.routing.batch import RoutingBatch
from poise.util.errors import OptionError


def served(record: SlotRecord, steps: RoutingBatch, num_devices: int) -> Placement:
    """The placement that an engine says it runs; slot s lies on device s // (S / D).

    Raises
    ------
    OptionError : slots are not shared evenly by the devices, or a layer of the traffic is not in the record.
    PlacementError : the map leaves out experts.
    """
    assert record.map_LS is not None
    slots = record.map_LS.shape[1]
    if slots % num_devices:
        raise OptionError(f"{slots} slots cannot be shared evenly by {num_devices} devices")
    row = {int(layer): at for at, layer in enumerate(record.layer_ids_L)}
    missing = [int(layer) for layer in steps.layer_ids_L if int(layer) not in row]
    if missing:
        raise OptionError(f"the engine's map has no layer {missing[0]}, the traffic has it")
    table = record.map_LS[[row[int(layer)] for layer in steps.layer_ids_L]]
    device = np.repeat(np.arange(num_devices, dtype=np.int32), slots // num_devices)
    return Placement(table, device, steps.num_experts, num_devices, steps.layer_ids_L, method="engine")


def rows_of(placement: Placement, layer_ids_L: NDArray[np.int32]) -> Placement:
    """The placement's rows of these decoder layers.

    Raises
    ------
    OptionError : it has no row for one of them.
    """
    row = {int(layer): at for at, layer in enumerate(placement.layer_ids_L)}
    missing = [int(layer) for layer in layer_ids_L if int(layer) not in row]
    if missing:
        raise OptionError(
            f"the placement has no row for layer {missing[0]}, the traffic has {len(layer_ids_L)} layers from "
            f"{layer_ids_L[0]} to {layer_ids_L[-1]}"
        )
    if len(row) == len(layer_ids_L):
        return placement
    return Placement(
        placement.slot_expert_LS[[row[int(layer)] for layer in layer_ids_L]], placement.slot_device_S,
        placement.num_experts, placement.num_devices, layer_ids_L, placement.method,
    )  # fmt: skip


def unlike(steps: RoutingBatch, first: RoutingBatch) -> str:
    """How steps differ in shape from the first ones; "" if they do not."""
    if steps.layer_ids_L.tolist() != first.layer_ids_L.tolist():
        return (
            f"a dump has {steps.num_layers} layers from {steps.layer_ids_L[0]} to {steps.layer_ids_L[-1]}, "
            f"the first had {first.num_layers} from {first.layer_ids_L[0]} to {first.layer_ids_L[-1]}"
        )
    have, want = ((x.num_experts, x.top_k, x.has_tokens) for x in (steps, first))
    return "" if have == want else f"a dump has (experts, top-k, tokens) {have}, the first had {want}"
