"""Statistics that hold a map and the loads under it, as patches of vLLM's EPLB state write them.

``{"physical_to_logical_map": [[...]], "per_layer_stats": [{"layer", "physical_load", "logical_load"}, ...]}``, or
``logical_load`` [L][E] beside the map. Layers are numbered by their place among the MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.mapping import BY_PLACE, MAX_TABLE, agree, by_expert, decoder_layers
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import loads, table, whole
from poise.routing.trace import MAX_EXPERTS, LoadProfile
from poise.util.errors import TraceError

MAP, PER_LAYER, LOGICAL, PHYSICAL = "physical_to_logical_map", "per_layer_stats", "logical_load", "physical_load"


def is_stats(value: Any) -> bool:
    """A map and loads of experts."""
    return isinstance(value, dict) and MAP in value and (PER_LAYER in value or LOGICAL in value)


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Loads of experts and of slots, each file a step, and the map of the last one."""
    found = [_one(part) for part in parts]
    shapes = {(load.shape, map_LS.shape) for map_LS, load, _ in found}
    if len(shapes) > 1 or len(found) * found[0][1].size > MAX_TABLE:
        raise TraceError(f"files of different [layers, experts] or [layers, slots]: {sorted(map(str, shapes))[:2]}")
    map_LS, load_LE, _ = found[-1]
    if options.experts not in (None, load_LE.shape[1]):
        raise TraceError(
            f"{parts[0].name} has {load_LE.shape[1]} experts, the model {options.experts}", hint="check --model"
        )
    rows, ids, notes = decoder_layers(len(load_LE), options.model, parts[0].name, moe_only=True)
    guessed = options.model is None
    slots = [count for _, _, count in found if count is not None]
    record = SlotRecord(
        ids, map_LS[rows].astype(np.int32), np.stack(slots)[:, rows] if len(slots) == len(found) else None,
        maps_agree=agree([found_map for found_map, _, _ in found]),
    )  # fmt: skip
    profile = LoadProfile(np.stack([load for _, load, _ in found])[:, rows], ids, options.k or 1, parts[0].name)
    return EngineDump("vllm", "eplb-stats", profile=profile, slots=record, recorded_layers=len(load_LE),
                      layers_by_place=guessed, notes=(*([BY_PLACE] if guessed else []), *notes))  # fmt: skip


def _one(part: Part) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64] | None]:
    """Map [L, S], loads [L, E] and counts of slots [L, S] of a file, which must agree."""
    map_LS = table(MAP, part.value[MAP], 2, high=MAX_EXPERTS - 1, low=-1)
    logical, physical = _tables(part)
    if logical.shape[0] != map_LS.shape[0] or not logical.size:
        raise TraceError(f"{part.name}: the map has {map_LS.shape[0]} layers, {LOGICAL} {list(logical.shape)}")
    if int(map_LS.max()) >= logical.shape[1]:
        raise TraceError(f"{part.name}: the map names expert {map_LS.max()}, {LOGICAL} has {logical.shape[1]}")
    if physical is None:
        return map_LS, logical, None
    if physical.shape != map_LS.shape:
        raise TraceError(f"{part.name}: the map is {list(map_LS.shape)}, {PHYSICAL} {list(physical.shape)}")
    added = by_expert(physical[None], map_LS, logical.shape[1])[0]
    if not np.allclose(added, logical, rtol=1e-6):
        layer, expert = (int(i) for i in np.argwhere(~np.isclose(added, logical, rtol=1e-6))[0])
        raise TraceError(
            f"{part.name}: slots of expert {expert} have {added[layer, expert]:g} in layer {layer}, {LOGICAL} says "
            f"{logical[layer, expert]:g}",
            hint="the map may be newer than the loads",
        )
    return map_LS, logical, physical


def _tables(part: Part) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    entries = part.value.get(PER_LAYER)
    if entries is None:
        physical = part.value.get(PHYSICAL)
        return loads(LOGICAL, part.value[LOGICAL], 2), None if physical is None else loads(PHYSICAL, physical, 2)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise TraceError(f"{part.name}: {PER_LAYER} must list the layers")
    by_layer = {whole("layer", entry.get("layer", at), high=65_535): entry for at, entry in enumerate(entries)}
    if sorted(by_layer) != list(range(len(entries))):
        raise TraceError(f"{part.name}: {len(entries)} layers, their numbers are not 0 to {len(entries) - 1}")
    rows = [by_layer[layer] for layer in range(len(entries))]
    has = [PHYSICAL in row for row in rows]
    physical = [row.get(PHYSICAL) for row in rows]
    return loads(LOGICAL, [row.get(LOGICAL) for row in rows], 2), loads(PHYSICAL, physical, 2) if all(has) else None
