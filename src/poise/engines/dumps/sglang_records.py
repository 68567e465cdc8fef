"""SGLang's recorder, modes ``per_pass`` and ``per_token``: what one rank wrote of one forward pass, checked.

Every rank: ``{records: [{forward_pass_id, rank, gatherer_key, global_physical_count int [L, P], ...}],
last_physical_to_logical_map int [L, P]}``. Per token also ``input_ids, positions [T], extend_seq_lens, forward_mode,
topk_ids_of_layer int32 [L, T, 8]``: physical ids, -1 where nothing was chosen (dense layers, padding, columns behind
the top-k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import ReadOptions
from poise.engines.dumps.mapping import agree, rows_of
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import id_table, table, whole
from poise.routing.trace import MAX_EXPERTS
from poise.util.errors import TraceError

BIG_ID = 2**62
FREE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Tokens of one forward pass on one rank."""

    topk_LTK: NDArray[np.int16]
    input_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    lengths: NDArray[np.int64] | None
    mode: int


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One rank's record of one forward pass."""

    source: int
    pass_id: int
    rank: int
    count_LS: NDArray[np.int64] | None
    tokens: Tokens | None


def check_size(part: Part) -> None:
    """Records may name one tensor many times, each of which would take memory."""
    held = 0
    for raw in part.value["records"]:
        if not isinstance(raw, dict):
            raise TraceError(f"{part.name}: a record is a {type(raw).__name__}")
        held += sum(
            8 * (v.size if isinstance(v, np.ndarray) else len(v))
            for v in raw.values()
            if isinstance(v, list | np.ndarray)
        )
        if held > 8 * part.size + FREE_BYTES:
            raise TraceError(f"{part.name}: its records unfold to more than {held} bytes from {part.size}")


def record_of(raw: dict[Any, Any], source: int, part: Part) -> Record:
    """One record of the file ``part``, the ``source``-th of the run; raises TraceError."""
    pass_id, rank = (whole(name, raw.get(name)) for name in ("forward_pass_id", "rank"))
    count = raw.get("global_physical_count")
    count_LS = None if count is None else table("global_physical_count", count, 2)
    tokens = None
    if raw.get("topk_ids_of_layer") is not None:
        topk = id_table("topk_ids_of_layer", raw["topk_ids_of_layer"], 3, low=-1, high=MAX_EXPERTS)
        inputs, positions = (
            table(name, raw.get(name), 1, low=-BIG_ID, high=BIG_ID) for name in ("input_ids", "positions")
        )
        if not len(inputs) == len(positions) == topk.shape[1]:
            raise TraceError(
                f"{part.name}, pass {pass_id}: {len(inputs)} input ids, {len(positions)} positions, "
                f"{topk.shape[1]} tokens with experts"
            )
        lengths = raw.get("extend_seq_lens")
        lengths = None if lengths is None else table("extend_seq_lens", lengths, 1)
        if lengths is not None and int(lengths.sum()) > len(inputs):
            raise TraceError(
                f"{part.name}, pass {pass_id}: sequences of {lengths.sum()} tokens, {len(inputs)} recorded"
            )
        tokens = Tokens(topk, inputs, positions, lengths, whole("forward_mode", raw.get("forward_mode")))
    if tokens is None and count_LS is None:
        raise TraceError(f"{part.name}, pass {pass_id}: neither tokens nor counts")
    return Record(source, pass_id, rank, count_LS, tokens)


def maps_of(
    parts: Sequence[Part], options: ReadOptions, num_layers: int, num_slots: int | None
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """The map of each file, int64 [L, P], -1 where it does not tell."""
    out, notes = [], []
    for part in parts:
        raw = part.value.get("last_physical_to_logical_map")
        if raw is not None:
            found = table("last_physical_to_logical_map", raw, 2, low=-1, high=MAX_EXPERTS - 1)
        elif options.slot_map is not None and options.slot_map.map_LS is not None:
            given = options.slot_map
            assert given.map_LS is not None
            found = np.full((num_layers, given.map_LS.shape[1]), -1, np.int64)
            ids = [int(i) for i in given.layer_ids_L if i < num_layers]
            found[ids] = rows_of(given, ids, given.map_LS.shape[1], part.name)
        else:
            raise TraceError(f"{part.name} counts slots and has no map", hint="give --placement, what the engine ran")
        if len(found) != num_layers or (num_slots is not None and found.shape[1] != num_slots) or 0 in found.shape:
            raise TraceError(
                f"{part.name}: a map of {list(found.shape)} for records of {num_layers} layers and {num_slots} slots"
            )
        out.append(found)
    if len({found.shape for found in out}) > 1:
        raise TraceError(f"files have maps of shapes {sorted({found.shape for found in out})[:4]}")
    if not agree(out):
        notes.append("files have different maps: each file was read with its own last one")
    return out, notes
