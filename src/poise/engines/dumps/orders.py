"""What poise writes itself, read back as what slots hold: placements, orders of experts, relabellings.

An order of experts is a placement without replicas: of E new ids the d-th block of E/D is what device d holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from poise.engines.checkpoints.megatron import FORMAT as ORDER
from poise.engines.checkpoints.megatron import FRAMEWORKS, VERSION
from poise.engines.checkpoints.permutation import FORMAT as RELABELLING
from poise.engines.checkpoints.permutation import Relabelling, relabelling_of
from poise.engines.dump import EngineDump, ReadOptions, SlotRecord, slots_of
from poise.engines.dumps.mapping import model_layers, num_experts
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import whole
from poise.planning.placement import MAX_SIZE, Placement
from poise.util.errors import PlacementError, TraceError


def is_order(value: Any) -> bool:
    """A file of ``poise export --to megatron`` or ``deepspeed``."""
    return isinstance(value, dict) and value.get("format") == ORDER


def is_relabelling(value: Any) -> bool:
    """``poise-relabelling.json`` of a relabelled checkpoint."""
    return isinstance(value, dict) and value.get("format") == RELABELLING


def read_order(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """The placement that an order of experts is."""
    value = _one(parts).value
    if value.get("version") != VERSION or value.get("framework") not in FRAMEWORKS:
        raise TraceError(
            f"version {str(value.get('version'))[:20]} for {str(value.get('framework'))[:20]}, read is version "
            f"{VERSION} for {' or '.join(FRAMEWORKS)}"
        )
    devices = whole("ep_size", value.get("ep_size"), 1, MAX_SIZE)
    return _dump(value["framework"], _relabelling(value, "the order"), devices, options)


def read_relabelling(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """The placement that new ids of experts are; files of 0.1 do not say on how many devices."""
    made = _relabelling(_one(parts).value, "the relabelling")
    return _dump("checkpoint", made, made.num_devices, options)


def read_placement(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """A placement of poise, of the model if one is named."""
    placement = Placement.load(_one(parts).path)
    if options.experts not in (None, placement.num_experts):
        raise TraceError(f"the placement has {placement.num_experts} experts, the model {options.experts}",
                         hint="check --model or --num-experts")  # fmt: skip
    slots = slots_of(placement)
    ids, notes = model_layers(slots.layer_ids_L.tolist(), options.model, "the placement")
    if len(ids) < placement.num_layers:
        raise TraceError(f"the placement reaches layer {slots.layer_ids_L[-1]}, of multi-token prediction",
                         hint="leave --model out")  # fmt: skip
    return EngineDump("poise", "map", slots=slots, notes=tuple(notes), placement=placement)


def _one(parts: Sequence[Part]) -> Part:
    if len(parts) != 1:
        raise TraceError(f"{len(parts)} maps, one is read")
    return parts[0]


def _relabelling(value: dict[str, Any], what: str) -> Relabelling:
    try:
        return relabelling_of(value, what)
    except PlacementError as error:
        raise TraceError(error.message, hint=error.hint) from None


def _dump(engine: str, made: Relabelling, devices: int | None, options: ReadOptions) -> EngineDump:
    if devices is not None and made.num_experts % devices:
        raise TraceError(f"{made.num_experts} experts on {devices} devices are no equal blocks")
    experts, _ = num_experts(options, made.num_experts - 1, "the order")
    if experts != made.num_experts:
        raise TraceError(f"the order has {made.num_experts} experts, the model {experts}", hint="check --model")
    rows = made.rows()
    ids, notes = model_layers(list(rows), options.model, "the order")
    if not ids:
        raise TraceError(f"the order has layers {min(rows)} to {max(rows)}, none of the model's")
    slots = SlotRecord(np.array(ids, np.int32), np.stack([rows[layer] for layer in ids]), num_devices=devices)
    return EngineDump(engine, "map", slots=slots, notes=tuple(notes))
