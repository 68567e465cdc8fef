"""Public routing data in the form its authors published it.

ExFlow (arXiv 2401.08383)
    ``.npy`` int [tokens, layers], top-1.
MoE_expert_selection_trace (arXiv 2510.05497; Llama 4, DeepSeek, Qwen3, Kimi)
    JSON, a file a request: a list, first the prompt, then one entry a generated token, each ``{layer: [[experts of a
    token], ...] or null for dense layers}``.
ADRS / OpenEvolve EPLB (``expert-load.json``, loads that vLLM recorded)
    JSON ``{"load_history": [{"logical_expert_load": [L][E]}, ...]}``.
STeP artifact
    ``.npz`` with ``data`` int [tokens, K], one layer, which only the file name ``ITERATION_LAYER`` tells.
vLLM MoE route logs (course patches of fused_moe.py)
    JSON lines ``{"type": "meta", ...}`` and ``{"type": "route", "req_id", "token_idx", "layer", "topk_ids"}``.

FLAME-MoE-Traces are Parquet (columns ``scores``, ``indices``), a file a layer: docs/dumps.md shows how to turn
them into an ``.npz``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions
from poise.engines.dumps.bare import STEP_NAME, below_head, table_of
from poise.engines.dumps.folded import refuse_folded
from poise.engines.dumps.mapping import (
    BY_PLACE,
    MAX_TABLE,
    check_ids,
    decoder_layers,
    num_experts,
    routed_loads,
    rows_alone,
)
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import id_table, loads, whole
from poise.routing.trace import LoadProfile, RoutingTrace, sealed
from poise.util.errors import TraceError

LAYER = re.compile(r"\d{1,5}")


def read_exflow(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Tokens [T, L] (or [T, L, K]) of all files."""
    tables, heads = [], list[str]()
    for part in parts:
        numbers, said = below_head(part, table_of(part), ids=True)
        tables.append(id_table(part.name, numbers, 2, 3))
        heads += said
    shapes = sorted({t.shape[1:] for t in tables})
    if len(shapes) > 1 or 0 in shapes[0] or not sum(map(len, tables)):
        raise TraceError(f"files of [layers, ...] {[list(s) for s in shapes][:4]} with {sum(map(len, tables))} tokens")
    tokens = sealed(np.concatenate(tables)) if len(tables) > 1 else tables[0]
    recorded = tokens.shape[1]
    rows, ids, notes = decoder_layers(recorded, options.model, parts[0].name)
    tokens = rows_alone(tokens, rows, 1)
    experts, more = num_experts(options, int(tokens.max()), parts[0].name)
    trace = RoutingTrace(tokens, experts, layer_ids=ids, name=parts[0].name)
    if tokens.ndim == 2 and options.format is None:
        refuse_folded(trace.experts, "exflow")
    return EngineDump("exflow", "top-1", trace=trace, recorded_layers=recorded,
                      layers_by_place=options.model is None,
                      notes=(*_by_place(options), *heads, *notes, *more))  # fmt: skip


def _by_place(options: ReadOptions) -> list[str]:
    return [BY_PLACE] if options.model is None else []


def is_selections(value: Any) -> bool:
    """One request of MoE_expert_selection_trace."""
    return isinstance(value, list) and bool(value) and all(_is_entry(entry) for entry in (value[0], value[-1]))


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict) and bool(entry) and all(LAYER.fullmatch(key) for key in entry)
        and all(rows is None or (isinstance(rows, list) and not rows[:1] == [] and isinstance(rows[0], list))
                for rows in entry.values())
    )  # fmt: skip


def read_selections(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Each file is a request."""
    pieces: list[NDArray[np.int16]] = []
    decode_T: list[NDArray[np.bool_]] = []
    counts: list[int] = []
    layers: list[int] | None = None
    recorded = 0
    for part in parts:
        before = sum(map(len, pieces))
        for index, entry in enumerate(part.value):
            if not _is_entry(entry):
                raise TraceError(f"{part.name}: entry {index} is not {{layer: experts}}")
            found = {int(key): rows for key, rows in entry.items() if rows is not None}
            check_ids(part.name, list(found))
            recorded = max(recorded, len(entry))
            if len(found) != len([key for key in entry if entry[key] is not None]) or not found:
                raise TraceError(f"{part.name}: entry {index} has a layer twice, or none")
            layers = sorted(found) if layers is None else layers
            if sorted(found) != layers:
                raise TraceError(f"{part.name}: entry {index} has layers {sorted(found)[:6]}, others {layers[:6]}")
            piece = [id_table(f"{part.name}, layer {layer}", found[layer], 2) for layer in layers]
            if len({rows.shape for rows in piece}) > 1:
                raise TraceError(
                    f"{part.name}: entry {index} has {piece[0].shape} experts in one layer, others in another"
                )
            pieces.append(np.stack(piece, axis=1))
            decode_T.append(np.full(len(piece[0]), index > 0))
        counts.append(sum(map(len, pieces)) - before)
    if layers is None or not sum(counts) or len({piece.shape[2] for piece in pieces}) > 1:
        raise TraceError("no tokens, or different numbers of experts a token")
    tokens = np.concatenate(pieces)
    experts, notes = num_experts(options, int(tokens.max()), parts[0].name)
    trace = RoutingTrace(tokens, experts, request=np.repeat(np.arange(len(parts)), counts),
                         is_decode=np.concatenate(decode_T), layer_ids=np.array(layers, np.int32),
                         name=parts[0].path.parent.name)  # fmt: skip
    return EngineDump("sglang", "selection-trace", trace=trace, recorded_layers=recorded, notes=tuple(notes))


def is_history(value: Any) -> bool:
    """ADRS's recorded loads."""
    return isinstance(value, dict) and isinstance(value.get("load_history"), list)


def read_history(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Every entry is a step."""
    steps = []
    for part in parts:
        for entry in part.value["load_history"]:
            if not isinstance(entry, dict):
                raise TraceError(f"{part.name}: an entry is a {type(entry).__name__}")
            steps.append(loads("logical_expert_load", entry.get("logical_expert_load"), 2))
            if steps[-1].shape != steps[0].shape or len(steps) * steps[0].size > MAX_TABLE:
                raise TraceError(
                    f"{part.name}: entry {len(steps)} has shape {steps[-1].shape}, others {steps[0].shape}"
                )
    if not steps:
        raise TraceError("load_history is empty")
    load_BLE, said = routed_loads(np.stack(steps), options, "load_history")
    experts, _ = num_experts(options, load_BLE.shape[2] - 1, "load_history")
    if experts != load_BLE.shape[2]:
        raise TraceError(f"load_history has {load_BLE.shape[2]} experts, the model {experts}")
    rows, ids, notes = decoder_layers(len(steps[0]), options.model, "load_history")
    profile = LoadProfile(load_BLE[:, rows], ids, options.k or 1, parts[0].name)
    return EngineDump("vllm", "load-history", profile=profile, recorded_layers=len(steps[0]),
                      layers_by_place=options.model is None, notes=(*_by_place(options), *said, *notes))  # fmt: skip


def read_step(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """One layer's tokens; all files must be of that layer."""
    pieces, layers = [], set()
    for part in parts:
        pieces.append(id_table(part.name, table_of(part), 2))
        match = STEP_NAME.fullmatch(part.path.stem)
        layers.add(int(match[1]) if match else 0)
    if len(layers) > 1 or len({piece.shape[1] for piece in pieces}) > 1 or not sum(piece.size for piece in pieces):
        raise TraceError(f"files of layers {sorted(layers)[:6]}, or of different numbers of experts a token, or empty")
    layer = layers.pop()
    check_ids(parts[0].name, [layer])
    tokens = np.concatenate(pieces)[:, None]
    experts, notes = num_experts(options, int(tokens.max()), parts[0].name)
    trace = RoutingTrace(tokens, experts, layer_ids=np.array([layer], np.int32), name=parts[0].name)
    notes.append(f"layer {layer} is what the file name says")
    return EngineDump("step", "one-layer", trace=trace, notes=tuple(notes))


def is_routes(value: Any) -> bool:
    """Lines of such a log."""
    return isinstance(value, list) and any(_is_route(line) for line in value[:3])


def _is_route(line: Any) -> bool:
    return isinstance(line, dict) and line.get("type") == "route"


def read_routes(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Tokens in the order of each layer's lines."""
    by_layer: dict[int, list[Any]] = defaultdict(list)
    requests: dict[int, list[str]] = defaultdict(list)
    for part in parts:
        for line in part.value:
            if not _is_route(line):
                continue
            layer = whole("layer", line.get("layer"), 0, 65_535)
            by_layer[layer].append(line.get("topk_ids"))
            requests[layer].append(f"{part.name}/{line.get('req_id')}")
    layers = sorted(by_layer)
    if len({len(rows) for rows in by_layer.values()}) != 1:
        raise TraceError(f"layers {layers[:6]} have different numbers of tokens")
    columns = [id_table("topk_ids", by_layer[layer], 2) for layer in layers]
    if len({column.shape for column in columns}) > 1 or not columns[0].size:
        raise TraceError("layers have different numbers of experts a token, or none")
    tokens = np.stack(columns, axis=1)
    experts, notes = num_experts(options, int(tokens.max()), parts[0].name)
    ids = {name: number for number, name in enumerate(dict.fromkeys(requests[layers[0]]))}
    trace = RoutingTrace(
        tokens, experts, request=np.array([ids[name] for name in requests[layers[0]]]),
        layer_ids=np.array(layers, np.int32), name=parts[0].name,
    )  # fmt: skip
    notes.append("padding cannot be told from tokens in such a log")
    return EngineDump("vllm", "route-log", trace=trace, notes=tuple(notes))
