"""vllm-ascend: reads the JSON of ``expert_map_path`` and ``expert_map_record_path`` (``poise.engines.ascend`` writes).

Layers are numbered by their place among the MoE layers; the one behind the last, if there, is a draft model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.mapping import BY_PLACE, decoder_layers, num_experts
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import table, whole
from poise.routing.trace import MAX_EXPERTS
from poise.util.errors import TraceError

MAX_LAYERS = 10_000
MAX_DEVICES = 65_536


def is_map(value: Any) -> bool:
    """An expert map."""
    return isinstance(value, dict) and "layer_list" in value


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """What the slots of each MoE layer hold, devices in order of their ids."""
    if len(parts) != 1:
        raise TraceError(f"{len(parts)} maps, one is read")
    layers = parts[0].value["layer_list"]
    if not isinstance(layers, list) or not 0 < len(layers) <= MAX_LAYERS:
        raise TraceError("layer_list must list the MoE layers")
    named = parts[0].value.get("moe_layer_count", len(layers))
    if named != len(layers):
        raise TraceError(f"moe_layer_count is {str(named)[:20]}, layer_list has {len(layers)}")
    rows, devices = {}, set[int]()
    for layer in layers:
        if not isinstance(layer, dict):
            raise TraceError(f"a layer is a {type(layer).__name__}")
        number = whole("layer_id", layer.get("layer_id"), 0, MAX_LAYERS)
        try:
            rows[number], count = _row(layer)
        except TraceError as error:
            raise TraceError(f"layer_id {number}: {error.message}", hint=error.hint) from None
        devices.add(count)
    if sorted(rows) != list(range(len(layers))):
        raise TraceError(f"{len(layers)} layers, their ids are not 0 to {len(layers) - 1}")
    if len(devices) > 1:
        raise TraceError(f"layers have {min(devices)} to {max(devices)} devices")
    if len({len(row) for row in rows.values()}) > 1:
        raise TraceError(f"layers have {min(map(len, rows.values()))} to {max(map(len, rows.values()))} slots")
    map_LS = np.stack([rows[i] for i in range(len(layers))])
    num_experts(options, int(map_LS.max()), "the map", most=map_LS.shape[1])
    kept, ids, notes = decoder_layers(len(layers), options.model, "the map", moe_only=True)
    guessed = options.model is None
    if guessed:
        notes = [BY_PLACE]
    record = SlotRecord(ids, map_LS[kept].astype(np.int32), num_devices=devices.pop())
    return EngineDump("vllm-ascend", "map", slots=record, layers_by_place=guessed, notes=tuple(notes))


def _row(layer: dict[str, Any]) -> tuple[NDArray[np.int64], int]:
    """Experts of all devices of a layer, [S], and how many devices."""
    devices = layer.get("device_list")
    if not isinstance(devices, list) or not devices or not all(isinstance(device, dict) for device in devices):
        raise TraceError("device_list must list the devices of a layer")
    said = layer.get("device_count", len(devices))
    if said != len(devices):
        raise TraceError(f"device_count is {str(said)[:20]}, device_list has {len(devices)}")
    held = {
        whole("device_id", device.get("device_id"), 0, MAX_DEVICES):
        table("device_expert", device.get("device_expert"), 1, high=MAX_EXPERTS - 1) for device in devices
    }  # fmt: skip
    if sorted(held) != list(range(len(devices))):
        raise TraceError(f"{len(devices)} devices, their ids are not 0 to {len(devices) - 1}")
    if len({len(row) for row in held.values()}) > 1 or not len(held[0]):
        raise TraceError("devices hold different numbers of experts, or none")
    return np.concatenate([held[device] for device in range(len(devices))]), len(devices)
