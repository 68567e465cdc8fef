"""vLLM: reads the map files of open proposals (:mod:`poise.engines.vllm` writes them and names them).

#49572 is a bare list: the expert of each slot, once for all layers, or a list a MoE layer. #53022 is one of every
decoder layer, dense ones included, and of multi-token prediction behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.bare import table_of
from poise.engines.dumps.mapping import BY_PLACE, decoder_layers, num_experts
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import table
from poise.routing.trace import MAX_EXPERTS
from poise.util.errors import TraceError

RANKS = "expert_to_ep_rank"


def is_ranks(value: Any) -> bool:
    """#34811: rank of each expert."""
    return isinstance(value, dict) and RANKS in value


def read_every_layer(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """#53022: what slots hold, a list a decoder layer by its number, or one list for all."""
    found = table("the map", table_of(parts[0]), 1, 2, high=MAX_EXPERTS - 1) if len(parts) == 1 else None
    if found is None or found.ndim == 1 or not found.size:
        return read(parts, options)
    num_experts(options, int(found.max()), "the map", most=found.shape[1])
    rows, ids, notes = decoder_layers(len(found), options.model, "the map")
    record = SlotRecord(ids, found[rows].astype(np.int32))
    return EngineDump("vllm", "map", slots=record, recorded_layers=len(found), notes=tuple(notes))


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """What slots hold; a file with one list is of every MoE layer, so the model has to be known."""
    if len(parts) != 1:
        raise TraceError(f"{len(parts)} maps, one is read")
    value = parts[0].value
    devices = None
    if isinstance(value, dict):
        rank_E = table(RANKS, value[RANKS], 1, high=MAX_EXPERTS)
        held_D = np.bincount(rank_E)
        if held_D.size and (held_D != held_D[0]).any():
            raise TraceError(f"ranks hold {held_D.min()} to {held_D.max()} experts", hint="all hold equally many")
        devices = len(held_D)
        map_LS = np.argsort(rank_E, kind="stable")[None]
    else:
        map_LS = table("the map", table_of(parts[0]), 1, 2, high=MAX_EXPERTS - 1)
    if not map_LS.size:
        raise TraceError("the map is empty")
    one = isinstance(value, dict) or map_LS.ndim == 1
    map_LS = np.atleast_2d(map_LS)
    num_experts(options, int(map_LS.max()), "the map", most=map_LS.shape[1])
    model = options.model
    if not one and options.format is None and model is not None:
        dense = model.num_hidden_layers > len(model.moe_layer_ids)
        if dense and len(map_LS) == model.num_hidden_layers:  # of #53022; of #49572 with layers that predict ahead
            raise TraceError(
                f"{len(map_LS)} lists: {model.name} has as many decoder layers, and {len(model.moe_layer_ids)} MoE "
                "layers, which #49572 numbers",
                hint="--format vllm-53022 (lists of decoder layers) or --format vllm-49572 (of MoE layers alone)",
            )
    if one:
        if options.model is None:
            raise TraceError("one list for all layers, whose number it does not say", hint="give --model")
        ids, notes = np.array(options.model.moe_layer_ids, np.int32), list[str]()
        map_LS = np.repeat(map_LS, len(ids), axis=0)
    else:
        rows, ids, notes = decoder_layers(len(map_LS), options.model, "the map", moe_only=True)
        map_LS = map_LS[rows]
    guessed = options.model is None
    if guessed:
        notes = [BY_PLACE]
    record = SlotRecord(ids, map_LS.astype(np.int32), num_devices=devices)
    return EngineDump("vllm", "map", slots=record, layers_by_place=guessed, notes=tuple(notes))
