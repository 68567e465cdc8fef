"""HYGON's vLLM plugin: reads its map files, recorded and written (:mod:`poise.engines.hygon` says what they hold)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.mapping import BY_PLACE, decoder_layers, num_experts
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import listed, table
from poise.engines.hygon import FORMAT
from poise.routing.trace import MAX_EXPERTS
from poise.util.errors import TraceError

MAP = "physical_to_logical_map"


def is_map(value: Any) -> bool:
    """Either form."""
    return isinstance(value, dict) and str(value.get("format", "")).startswith(FORMAT)


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """What slots hold. Of several models the one with most layers is taken: drafts have few."""
    if len(parts) != 1:
        raise TraceError(f"{len(parts)} maps, one is read")
    value, notes = parts[0].value, list[str]()
    if "model_maps" in value:
        models = value["model_maps"]
        if not isinstance(models, dict) or not models or not all(isinstance(one, dict) for one in models.values()):
            raise TraceError("model_maps must have a map for each class of model")
        name = max(models, key=lambda key: len(models[key].get(MAP, ())) if _listed(models[key]) else -1)
        others = [str(key)[:40] for key in models if key != name]
        notes += [f"left out: the maps of {listed(others)}"] if others else []
        value = models[name]
    if not _listed(value):
        raise TraceError(f"there is no {MAP} in it")
    map_LS = table(MAP, value[MAP], 2, high=MAX_EXPERTS - 1)
    if 0 in map_LS.shape:
        raise TraceError(f"{MAP} is empty: {list(map_LS.shape)}")
    said = value.get("num_logical_experts")
    top = num_experts(options, int(map_LS.max()), "the map", most=map_LS.shape[1])
    if isinstance(said, int) and not isinstance(said, bool) and top[0] != said:
        raise TraceError(f"num_logical_experts is {said}, the map has {top[0]} experts")
    rows, ids, more = decoder_layers(len(map_LS), options.model, "the map", moe_only=True)
    guessed = options.model is None
    record = SlotRecord(ids, map_LS[rows].astype(np.int32))
    return EngineDump("vllm", "map", slots=record, recorded_layers=len(map_LS), layers_by_place=guessed,
                      notes=(*([BY_PLACE] if guessed else []), *notes, *more))  # fmt: skip


def _listed(value: Any) -> bool:
    return isinstance(value.get(MAP), list)
