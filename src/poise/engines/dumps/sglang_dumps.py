"""SGLang: what its expert distribution recorder writes (read in the 0.5.23 wheel, eplb/expert_distribution.py).

``stat``, ``stat_approx``
    rank 0: ``{rank, logical_count int [steps, L, E], average_utilization_rate_over_window}``; counts are of all ranks.
    The buffer may be partly unused (zeros).
``per_pass``, ``per_token``
    every rank: ``{records: [{forward_pass_id, rank, gatherer_key, global_physical_count int [L, P], ...}],
    last_physical_to_logical_map int [L, P]}``. Per token also ``input_ids, positions [T], extend_seq_lens,
    forward_mode, topk_ids_of_layer int32 [L, T, 8]``: physical ids, -1 where nothing was chosen (dense layers, padding,
    columns behind the top-k).

L counts all decoder layers; layers of multi-token prediction are not recorded. Ranks with tensor-parallel attention
hold the same tokens, stages of a pipeline the same tokens in other layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.mapping import (
    MAX_TABLE,
    agree,
    by_expert,
    decoder_layers,
    distinct,
    model_layers,
    num_experts,
    rows_of,
)
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import id_table, loads, table, whole
from poise.errors import TraceError
from poise.observe.trace import MAX_EXPERTS, LoadProfile, RoutingTrace

DECODE, MIXED, VERIFY = 2, 3, 5
"""``ForwardMode``: 1 extends sequences, 2 decodes one token of each, 3 does both, 5 verifies drafted tokens."""
BIG_ID = 2**62
FREE_BYTES = 64 << 20


def is_stat(value: Any) -> bool:
    """Loads: of mode ``stat`` or ``stat_approx``, or made for ``--init-expert-location``."""
    return isinstance(value, dict) and "logical_count" in value and "physical_count" not in value


def is_detail(value: Any) -> bool:
    """Of mode ``per_pass`` or ``per_token``."""
    return isinstance(value, dict) and isinstance(value.get("records"), list)


def is_map(value: Any) -> bool:
    """A map for ``--init-expert-location``."""
    return (
        isinstance(value, dict)
        and "physical_to_logical_map" in value
        and not value.keys() & {"physical_count", "records"}
    )


def read_stat(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Loads of one run; several files are its steps in order."""
    blocks, balance, notes = [], [], []
    for part in parts:
        count = loads("logical_count", part.value["logical_count"], 2, 3)
        blocks.append(count[None] if count.ndim == 2 else count)
        if blocks[-1].shape[1:] != blocks[0].shape[1:]:
            raise TraceError(
                f"{part.name} counts [layers, experts] {list(blocks[-1].shape[1:])}, "
                f"{parts[0].name} {list(blocks[0].shape[1:])}"
            )
        rate = part.value.get("average_utilization_rate_over_window")
        if isinstance(rate, float | int) and math.isfinite(rate) and 0 < rate <= 1.001:  # 0 means not tracked
            balance.append(min(1.0, float(rate)))
    count = np.concatenate(blocks)
    if not np.isfinite(count).all():
        raise TraceError("logical_count must be finite")
    busy = np.asarray(count.any(axis=(1, 2)))
    if not busy.any():
        raise TraceError("all loads are 0", hint="record again with traffic")
    if not busy.all():
        notes.append(
            f"{(~busy).sum()} of {len(busy)} steps have no load and were left out: an unused part of the buffer"
        )
    experts, _ = num_experts(options, count.shape[2] - 1, "logical_count")
    if experts != count.shape[2]:
        raise TraceError(f"logical_count has {count.shape[2]} experts, the model {experts}")
    rows, ids, more = decoder_layers(count.shape[1], options.model, "logical_count")
    dense = np.setdiff1d(np.flatnonzero(count.any(axis=(0, 2))), rows)
    dense = dense[dense < rows.max()]  # those behind are of multi-token prediction
    if dense.size:
        raise TraceError(
            f"logical_count has load in layer {dense[0]}, a dense layer of the model", hint="check --model"
        )
    profile = LoadProfile(count[busy][:, rows], ids, options.k or 1, parts[0].name)
    return EngineDump("sglang", "stat", profile=profile, balance_B=np.array(balance) if balance else None,
                      recorded_layers=count.shape[1], notes=(*notes, *more))  # fmt: skip


def read_map(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """The map of one file."""
    if len(parts) != 1:
        raise TraceError(f"{len(parts)} maps, one is read")
    map_LS = table("physical_to_logical_map", parts[0].value["physical_to_logical_map"], 2, high=MAX_EXPERTS - 1)
    if 0 in map_LS.shape:
        raise TraceError(f"physical_to_logical_map is empty: {list(map_LS.shape)}")
    num_experts(options, int(map_LS.max()), "the map", most=map_LS.shape[1])
    rows, ids, notes = decoder_layers(len(map_LS), options.model, "the map")
    slots = SlotRecord(ids, map_LS[rows].astype(np.int32))
    return EngineDump("sglang", "map", slots=slots, recorded_layers=len(map_LS), notes=tuple(notes))


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """Tokens of one forward pass on one rank."""

    topk_LTK: NDArray[np.int16]
    input_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    lengths: NDArray[np.int64] | None
    mode: int


@dataclass(frozen=True, slots=True, eq=False)
class _Record:
    """One rank's record of one forward pass."""

    source: int
    pass_id: int
    rank: int
    count_LS: NDArray[np.int64] | None
    tokens: _Tokens | None


def read_detail(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Records of all ranks, one file a rank, as a trace (per token) or loads (per pass)."""
    for part in parts:
        _check_size(part)
    records = [_record(raw, index, part) for index, part in enumerate(parts) for raw in part.value["records"]]
    if not records:
        raise TraceError("nothing was recorded", hint="start the recorder, send requests, then dump")
    shapes = {r.count_LS.shape for r in records if r.count_LS is not None}
    if len(shapes) > 1:
        raise TraceError(f"records count slots of shapes {sorted(shapes)[:4]}")
    num_layers = next(iter(shapes))[0] if shapes else records[0].tokens.topk_LTK.shape[0]  # type: ignore[union-attr]
    maps, notes = _maps(parts, options, num_layers, next(iter(shapes))[1] if shapes else None)
    tokens = [r for r in records if r.tokens is not None]
    if tokens and len(tokens) < len(records):
        raise TraceError(f"{len(tokens)} of {len(records)} records have tokens", hint="give the files of one mode")
    records.sort(key=lambda r: (r.pass_id, r.rank, r.source))
    read = _per_token if tokens else _per_pass
    return read(records, maps, options, notes, parts[0].name)


def _check_size(part: Part) -> None:
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


def _record(raw: dict[Any, Any], source: int, part: Part) -> _Record:
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
        tokens = _Tokens(topk, inputs, positions, lengths, whole("forward_mode", raw.get("forward_mode")))
    if tokens is None and count_LS is None:
        raise TraceError(f"{part.name}, pass {pass_id}: neither tokens nor counts")
    return _Record(source, pass_id, rank, count_LS, tokens)


def _maps(
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


def _per_pass(
    records: list[_Record], maps: list[NDArray[np.int64]], options: ReadOptions, notes: list[str], name: str
) -> EngineDump:
    sources: dict[int, dict[int, NDArray[np.int64]]] = defaultdict(dict)
    for r in records:
        assert r.count_LS is not None
        if r.pass_id in sources[r.source]:
            raise TraceError(f"rank {r.rank} recorded pass {r.pass_id} twice", hint="give the files of one run")
        sources[r.source][r.pass_id] = r.count_LS
    passes = sorted({key for found in sources.values() for key in found})
    shape = maps[0].shape
    if len(passes) * shape[0] * shape[1] > MAX_TABLE:
        raise TraceError(f"{len(passes)} passes of {shape[0]} layers and {shape[1]} slots are too many")
    experts, more = num_experts(options, max(int(m.max()) for m in maps), "the map", most=shape[1])
    order = sorted(sources)

    def loads_of(source: int) -> NDArray[np.float64]:
        counts = np.stack(list(sources[source].values()))
        return by_expert(counts, maps[source], experts)

    # ranks with the same tokens may have sent them to other replicas, or have lost the map of that time
    by_load = (dict(zip(sources[i], loads_of(i), strict=True)) for i in order)
    kept = [order[i] for i in distinct(by_load, (sources[i] for i in order))]
    if len(kept) < len(order):
        notes.append(
            f"{len(order) - len(kept)} of {len(order)} files count the tokens of another one and were left out"
        )
    at = {pass_id: index for index, pass_id in enumerate(passes)}
    count_BLS, load_BLE = np.zeros((len(passes), *shape)), np.zeros((len(passes), shape[0], experts))
    for source in kept:
        rows = [at[pass_id] for pass_id in sources[source]]
        count_BLS[rows] += np.stack(list(sources[source].values()))
        load_BLE[rows] += loads_of(source)
    busy = np.flatnonzero(count_BLS.any(axis=(0, 2))).tolist()
    if not busy:
        raise TraceError("all counts are 0", hint="record again with traffic")
    ids, said = model_layers(busy, options.model, "the record")
    profile = LoadProfile(load_BLE[:, ids], np.array(ids, np.int32), options.k or 1, name)
    slots = SlotRecord(np.array(ids, np.int32), maps[-1][ids].astype(np.int32), count_BLS[:, ids],
                       agree([map_LS[ids] for map_LS in maps]))  # fmt: skip
    return EngineDump("sglang", "per-pass", profile=profile, slots=slots, recorded_layers=shape[0],
                      notes=(*notes, *more, *said))  # fmt: skip


@dataclass(slots=True, eq=False)
class _Group:
    """Tokens that one or several ranks hold alike."""

    home: int
    tokens: _Tokens
    slot_LTK: NDArray[np.int16]
    expert_LTK: NDArray[np.int16]

    def takes(self, tokens: _Tokens, expert_LTK: NDArray[np.int16], slot_LTK: NDArray[np.int16]) -> bool:
        """Merge another rank's record, if it is of the same tokens."""
        mine = self.tokens
        if not (np.array_equal(mine.input_T, tokens.input_T) and np.array_equal(mine.position_T, tokens.position_T)):
            return False
        both = (self.expert_LTK >= 0) & (expert_LTK >= 0)
        if (self.expert_LTK[both] != expert_LTK[both]).any() and (self.slot_LTK[both] != slot_LTK[both]).any():
            return False  # neither to the same experts nor, by a map that a file has lost, to the same slots
        new = (self.expert_LTK < 0) & (expert_LTK >= 0)
        self.expert_LTK = np.where(new, expert_LTK, self.expert_LTK)
        self.slot_LTK = np.where(new, slot_LTK, self.slot_LTK)
        return True


def _per_token(
    records: list[_Record], maps: list[NDArray[np.int64]], options: ReadOptions, notes: list[str], name: str
) -> EngineDump:
    num_layers, num_slots = maps[0].shape
    top_k, said = _top_k(records, num_layers, num_slots, options)
    experts, more = num_experts(options, max(int(m.max()) for m in maps), "the map", most=num_slots)
    short, layer_L11 = [map_LS.astype(np.int16) for map_LS in maps], np.arange(num_layers)[:, None, None]
    passes: dict[int, list[_Group]] = {}
    copies = 0
    for r in records:
        assert r.tokens is not None
        if not len(r.tokens.input_T):
            continue
        slot_LTK = r.tokens.topk_LTK[:, :, :top_k]
        if int(slot_LTK.max()) >= num_slots:
            raise TraceError(f"pass {r.pass_id} names slot {slot_LTK.max()}, the map has {num_slots}")
        expert_LTK = np.where(slot_LTK < 0, np.int16(-1), short[r.source][layer_L11, slot_LTK])
        if ((slot_LTK >= 0) & (expert_LTK < 0)).any():
            raise TraceError(f"pass {r.pass_id} names a slot that is empty in the map")
        groups = passes.setdefault(r.pass_id, [])
        if any(group.takes(r.tokens, expert_LTK, slot_LTK) for group in groups):
            copies += 1
        else:
            groups.append(_Group(r.rank, r.tokens, slot_LTK, expert_LTK))
    used_L = np.zeros(num_layers, bool)
    for groups in passes.values():
        for group in groups:
            used_L |= (group.expert_LTK >= 0).any(axis=(1, 2))
    if not used_L.any():
        raise TraceError("no token has an expert", hint="record again with traffic")
    ids, layers = model_layers(np.flatnonzero(used_L).tolist(), options.model, "the record")
    if copies:
        notes.append(f"{copies} records hold the tokens of another rank and were merged with it")
    rows = _Rows()
    for pass_id, groups in passes.items():
        for group in groups:
            rows.add(pass_id, group, ids)
    trace = rows.trace(experts, np.array(ids, np.int32), name)
    slots = SlotRecord(np.array(ids, np.int32), maps[-1][ids].astype(np.int32), _counts(passes, ids, num_slots),
                       agree([map_LS[ids] for map_LS in maps]))  # fmt: skip
    return EngineDump("sglang", "per-token", trace=trace, slots=slots, recorded_layers=num_layers,
                      notes=(*notes, *said, *more, *layers, *rows.notes()))  # fmt: skip


def _top_k(records: list[_Record], num_layers: int, num_slots: int, options: ReadOptions) -> tuple[int, list[str]]:
    """Columns that are routed experts."""
    width = 0
    shared = np.ones(0, bool)
    for r in records:
        assert r.tokens is not None
        topk = r.tokens.topk_LTK
        if topk.shape[0] != num_layers:
            raise TraceError(f"pass {r.pass_id} has {topk.shape[0]} layers, others {num_layers}")
        if topk.shape[2] > len(shared):
            shared = np.concatenate([shared, np.ones(topk.shape[2] - len(shared), bool)])
        used = topk >= 0
        width = max(width, int(np.flatnonzero(used.any(axis=(0, 1))).max(initial=-1)) + 1)
        shared[: topk.shape[2]] &= ((topk >= num_slots) | ~used).all(axis=(0, 1))
    notes = []
    routed = width
    while routed and shared[routed - 1]:
        routed -= 1
    if routed < width:
        notes.append(f"{width - routed} columns of shared experts were cut")
    if options.k is not None and routed > options.k:
        notes.append(f"{routed - options.k} columns behind the top-{options.k} were cut")
        routed = options.k
    if options.k is not None and routed < options.k:
        raise TraceError(f"records hold {routed} experts a token, the model routes to {options.k}")
    if not routed:
        raise TraceError("no token has an expert", hint="record again with traffic")
    return routed, notes


def _counts(passes: dict[int, list[_Group]], ids: list[int], num_slots: int) -> NDArray[np.float64]:
    """Pairs of each slot, float64 [passes, L, S]; of all passes together where the table would be too large."""
    each = len(passes) * len(ids) * num_slots <= MAX_TABLE // 2
    out = np.zeros((len(passes) if each else 1, len(ids) * num_slots))
    offset_L = (np.arange(len(ids)) * num_slots)[:, None, None]
    for index, groups in enumerate(passes.values()):
        for group in groups:
            slot = group.slot_LTK[ids]
            flat = (slot + offset_L)[slot >= 0]
            out[index if each else 0] += np.bincount(flat, minlength=out.shape[1])
    return out.reshape(len(out), len(ids), num_slots)


@dataclass(slots=True, eq=False)
class _Rows:
    """Collects tokens in order of their passes and finds out which belong to one request."""

    experts: list[NDArray[np.int16]] = field(default_factory=list)
    columns: dict[str, list[NDArray[Any]]] = field(default_factory=lambda: defaultdict(list))
    live: dict[int, list[tuple[int, int, bool]]] = field(default_factory=dict)
    next_request: int = 0
    padding: int = 0
    partial: int = 0
    decoded: int = 0
    unlinked: int = 0
    begun: int = 0

    def add(self, pass_id: int, group: _Group, ids: list[int]) -> None:
        """One pass of one home."""
        chosen_TLK = group.expert_LTK[ids].transpose(1, 0, 2)
        some_T = np.asarray((chosen_TLK >= 0).any(axis=(1, 2)))
        all_T = np.asarray((chosen_TLK >= 0).all(axis=(1, 2)))
        self.padding += int((~some_T).sum())
        self.partial += int((some_T & ~all_T).sum())
        request_T, decode_T = self._requests(group, some_T)
        if not all_T.any():
            return
        kept = int(all_T.sum())
        self.experts.append(chosen_TLK[all_T].astype(np.int16))
        for name, column in (("request", request_T[all_T]), ("is_decode", decode_T[all_T]),
                             ("step", np.full(kept, pass_id)), ("home", np.full(kept, group.home))):  # fmt: skip
            self.columns[name].append(column)

    def trace(self, experts: int, layer_ids: NDArray[np.int32], name: str) -> RoutingTrace:
        """All of it."""
        if not self.experts:
            raise TraceError(f"none of {self.partial} tokens has experts in every layer that was recorded")
        columns = {key: np.concatenate(value) for key, value in self.columns.items()}
        chosen = np.concatenate(self.experts)
        return RoutingTrace(chosen, experts, layer_ids=layer_ids, name=name, **columns)  # type: ignore[arg-type]

    def notes(self) -> list[str]:
        """What was left out or assumed."""
        out = []
        if self.padding:
            out.append(f"{self.padding} rows without any expert were left out: padding")
        if self.partial:
            out.append(f"{self.partial} tokens lack experts in some layer and were left out")
        if self.begun:
            out.append(
                f"{self.begun} sequences begin behind their prompt's first token (a cached prefix, or a part that "
                "cannot be told from others) and are requests of their own"
            )
        if self.unlinked:
            out.append(
                f"{self.unlinked} of {self.decoded} decoded tokens are requests of their own: the record does not say "
                "which they belong to"
            )
        return out

    def _requests(self, group: _Group, real_T: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Request of each row, and whether it was decoded."""
        tokens = group.tokens
        before = self.live.get(group.home, [])
        request_T = np.full(len(real_T), -1, np.int64)
        decode_T = np.zeros(len(real_T), bool)
        extended: list[tuple[int, int, bool]] = []
        if tokens.mode in (DECODE, VERIFY) or tokens.lengths is None:
            decode_T[:] = True
        else:
            ends = np.cumsum(tokens.lengths)
            for start, end in zip((ends - tokens.lengths).tolist(), ends.tolist(), strict=True):
                if end == start:
                    continue
                first, last = int(tokens.position_T[start]), int(tokens.position_T[end - 1])
                if tokens.mode == MIXED and end - start == 1 and first > 0:
                    decode_T[start] = True
                    continue
                same = [request for position, request, decodes in before if position == first - 1 and not decodes]
                known = first > 0 and len(same) == 1
                request = same[0] if known else self._new()
                self.begun += first > 0 and not known
                request_T[start:end] = request
                extended.append((last, request, False))
        going = {request for _, request, _ in extended}
        before = [entry for entry in before if entry[1] not in going]
        if not decode_T.any():
            self.live[group.home] = before + extended
        else:
            decoding = self._decoded(np.flatnonzero(decode_T & real_T), tokens, before, request_T)
            self.live[group.home] = decoding + extended
        for row in np.flatnonzero(request_T < 0).tolist():
            request_T[row] = self._new()
        return request_T, decode_T

    def _decoded(
        self,
        rows: NDArray[np.int64],
        tokens: _Tokens,
        before: list[tuple[int, int, bool]],
        request_T: NDArray[np.int64],
    ) -> list[tuple[int, int, bool]]:
        """Give decoded rows the request whose next position theirs is; alike ones in order, if all of them go on."""
        waiting: dict[int, list[int]] = defaultdict(list)
        for position, request, _ in before:
            waiting[position].append(request)
        positions = tokens.position_T[rows]
        counts = zip(*(a.tolist() for a in np.unique(positions, return_counts=True)), strict=True)
        matched = {p for p, rows_there in counts if rows_there == len(waiting[p - 1]) and tokens.mode != VERIFY}
        out = []
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            known = position in matched
            request = waiting[position - 1].pop(0) if known else self._new()
            self.unlinked += not known
            request_T[row] = request
            out.append((position, request, True))
        self.decoded += len(rows)
        return out

    def _new(self) -> int:
        self.next_request += 1
        return self.next_request - 1
