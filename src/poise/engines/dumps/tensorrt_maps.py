"""TensorRT-LLM: reads the YAML of ``moe_config.load_balancer`` (:mod:`poise.engines.tensorrt` writes it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.mapping import check_ids, model_layers, num_experts
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import table, whole
from poise.routing.trace import MAX_EXPERTS
from poise.util.errors import TraceError

MAX_SLOTS = 65_536


def is_map(value: Any) -> bool:
    """A load balancer's file with its assignments."""
    return isinstance(value, dict) and "initial_global_assignments" in value


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """What the slots of each decoder layer hold."""
    if len(parts) != 1:
        raise TraceError(f"{len(parts)} maps, one is read")
    rows = parts[0].value["initial_global_assignments"]
    if not isinstance(rows, dict) or not rows or not all(type(layer) is int for layer in rows):
        raise TraceError("initial_global_assignments must list the experts of each layer")
    slots = whole("num_slots", parts[0].value.get("num_slots"), 1, MAX_SLOTS)
    check_ids("initial_global_assignments", list(rows))
    ids, notes = model_layers(sorted(rows), options.model, "initial_global_assignments")
    if not ids:
        raise TraceError(f"the map has layers {min(rows)} to {max(rows)}, none of the model's")
    held = [table(f"initial_global_assignments, layer {layer}", rows[layer], 1, high=MAX_EXPERTS - 1) for layer in ids]
    for layer, row in zip(ids, held, strict=True):
        if len(row) != slots:
            raise TraceError(f"num_slots is {slots}, layer {layer} lists {len(row)}")
    map_LS = np.stack(held)
    num_experts(options, int(map_LS.max()), "the map", most=slots)
    record = SlotRecord(np.array(ids, np.int32), map_LS.astype(np.int32))
    return EngineDump("tensorrt-llm", "map", slots=record, notes=tuple(notes))
