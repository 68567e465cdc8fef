"""SGLang: what its expert distribution recorder writes (read in the 0.5.23 wheel, eplb/expert_distribution.py).

``stat``, ``stat_approx``
    rank 0 (of each stage of a pipeline, which then hold the same): ``{rank, logical_count int [steps, L, E],
    average_utilization_rate_over_window}``; counts are of all ranks. The buffer may be partly unused (zeros). Forks and
    scripts save what each rank counted before the sum.
``per_pass``, ``per_token``
    every rank its records (:mod:`poise.engines.dumps.sglang_records`).

L counts all decoder layers; layers of multi-token prediction are not recorded. Ranks with tensor-parallel attention
hold the same tokens, stages of a pipeline the same tokens in other layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.mapping import (
    MAX_TABLE,
    agree,
    by_expert,
    copies,
    decoder_layers,
    model_layers,
    num_experts,
    routed_loads,
    rows_alone,
)
from poise.engines.dumps.parts import Part
from poise.engines.dumps.ranks import RankRecord, check_ranks, one_run
from poise.engines.dumps.sglang_records import Record, check_size, maps_of, record_of
from poise.engines.dumps.sglang_tokens import per_token
from poise.engines.dumps.untrusted import counts, table
from poise.routing.files import IDLE
from poise.routing.ranks import Recorded, named_rank, one_workload
from poise.routing.said import said_in
from poise.routing.trace import MAX_EXPERTS, LoadProfile, finite
from poise.util.errors import NoTrafficError, TraceError


def is_stat(value: Any) -> bool:
    """Loads: of mode ``stat`` or ``stat_approx``, or made for ``--init-expert-location``."""
    return isinstance(value, dict) and "logical_count" in value and not value.keys() & {"physical_count", IDLE}


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
    """Loads of one run; files of one rank are its steps in order, those of several ranks parts of the same steps."""
    files: list[Recorded] = []
    balance: list[float] = []
    for part in parts:
        count = counts("logical_count", part.value["logical_count"], 2, 3)
        if not finite(count) or (count.size and count.min() < 0):
            raise TraceError(f"{part.name}: logical_count must be finite and at least 0")
        rank = named_rank(part.path, part.value.get("rank"))
        files.append(Recorded(part.name, rank, count[None] if count.ndim == 2 else count))
        if files[-1].load_BLE.shape[1:] != files[0].load_BLE.shape[1:]:
            raise TraceError(
                f"{part.name} counts [layers, experts] {list(files[-1].load_BLE.shape[1:])}, "
                f"{parts[0].name} {list(files[0].load_BLE.shape[1:])}"
            )
        rate = part.value.get("average_utilization_rate_over_window")
        known = isinstance(rate, float | int) and math.isfinite(rate) and 0 < rate <= 1.001  # 0 means not tracked
        if known and rank == files[0].rank:  # all ranks are told the same
            balance.append(min(1.0, float(rate)))
    count, notes = one_workload(
        files, options.ranks, allow_missing=options.allow_missing_ranks, counters=options.counters
    )
    busy = np.asarray(count.any(axis=(1, 2)))
    if not busy.any():
        raise NoTrafficError("all loads are 0", hint="record again with traffic")
    if not busy.all():
        why = "nothing came in them" if options.counters == "running" else "an unused part of the buffer"
        notes.append(f"{(~busy).sum()} of {len(busy)} steps have no load and were left out: {why}")
    count, more = routed_loads(count, options, "logical_count")
    notes += more
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
    recorded, count = count.shape[1], rows_alone(rows_alone(count, np.flatnonzero(busy), 0), rows, 1)
    said = options.said | frozenset.intersection(*(said_in(part.name, part.value, options.said) for part in parts))
    profile = LoadProfile(count, ids, options.k or 1, parts[0].name, said=said)
    return EngineDump("sglang", "stat", profile=profile, balance_B=np.array(balance) if balance else None,
                      recorded_layers=recorded, notes=(*notes, *more))  # fmt: skip


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


def read_detail(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Records of all ranks, one file a rank, as a trace (per token) or loads (per pass)."""
    for part in parts:
        check_size(part)
    records = [record_of(raw, index, part) for index, part in enumerate(parts) for raw in _taken(part.value["records"])]
    if not records:
        raise TraceError("nothing was recorded", hint="start the recorder, send requests, then dump")
    shapes = {r.count_LS.shape for r in records if r.count_LS is not None}
    if len(shapes) > 1:
        raise TraceError(f"records count slots of shapes {sorted(shapes)[:4]}")
    num_layers = next(iter(shapes))[0] if shapes else records[0].tokens.topk_LTK.shape[0]  # type: ignore[union-attr]
    maps, notes = maps_of(parts, options, num_layers, next(iter(shapes))[1] if shapes else None)
    tokens = [r for r in records if r.tokens is not None]
    if tokens and len(tokens) < len(records):
        raise TraceError(f"{len(tokens)} of {len(records)} records have tokens", hint="give the files of one mode")
    records.sort(key=lambda r: (r.pass_id, r.rank, r.source))
    read = per_token if tokens else _per_pass
    return read(records, maps, options, notes, parts[0].name)


def _taken(items: list[Any]) -> Iterator[Any]:
    """The items, let go one after another."""
    items.reverse()
    while items:
        yield items.pop()


def _per_pass(
    records: list[Record], maps: list[NDArray[np.int64]], options: ReadOptions, notes: list[str], name: str
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
    rank_of = {r.source: r.rank for r in records}

    def loads_of(source: int) -> NDArray[np.float64]:
        counts = np.stack(list(sources[source].values()))
        return by_expert(counts, maps[source], experts)

    # ranks with the same tokens may have sent them to other replicas, or have lost the map of that time
    by_load = (dict(zip(sources[i], loads_of(i), strict=True)) for i in order)
    groups = [[order[i] for i in group] for group in copies(by_load, (sources[i] for i in order))]
    if len(groups) < len(order):
        notes.append(
            f"{len(order) - len(groups)} of {len(order)} files count the tokens of another one and were left out"
        )
    found = [
        RankRecord(rank_of[i], np.stack(list(sources[i].values())).max(axis=0) > 0, frozenset(sources[i]))
        for i in order
    ]
    left, missing = check_ranks(found, [{rank_of[i] for i in group} for group in groups], options, map_LS=maps[-1])
    passes = [pass_id for pass_id in passes if pass_id not in left]
    notes += missing
    at = {pass_id: index for index, pass_id in enumerate(passes)}
    count_BLS, load_BLE = np.zeros((len(passes), *shape)), np.zeros((len(passes), shape[0], experts))
    held: dict[tuple[int, int], NDArray[np.bool_]] = {}
    for group in groups:
        done: set[int] = set()
        for source in group:  # of copies the passes that those before them lack
            new = [i for i, key in enumerate(sources[source]) if key in at and key not in done]
            done |= sources[source].keys()
            keys = [list(sources[source])[i] for i in new]
            for key in keys:
                _apart(held, rank_of[source], key, np.asarray(sources[source][key].any(axis=1)))
            rows = [at[key] for key in keys]
            count_BLS[rows] += np.stack(list(sources[source].values()))[new]
            load_BLE[rows] += loads_of(source)[new]
    busy = np.flatnonzero(count_BLS.any(axis=(0, 2))).tolist()
    if not busy:
        raise TraceError("all counts are 0", hint="record again with traffic")
    ids, said = model_layers(busy, options.model, "the record")
    profile = LoadProfile(load_BLE[:, ids], np.array(ids, np.int32), options.k or 1, name)
    slots = SlotRecord(np.array(ids, np.int32), maps[-1][ids].astype(np.int32), count_BLS[:, ids],
                       agree([map_LS[ids] for map_LS in maps]))  # fmt: skip
    return EngineDump("sglang", "per-pass", profile=profile, slots=slots, recorded_layers=shape[0],
                      notes=(*notes, *more, *said))  # fmt: skip


def _apart(held: dict[tuple[int, int], NDArray[np.bool_]], rank: int, pass_id: int, used_L: NDArray[np.bool_]) -> None:
    """Note layers that a file of a rank counts in a pass; stages of a pipeline are files of other layers."""
    before_L = held.get((rank, pass_id), np.zeros_like(used_L))
    one_run(rank, pass_id, before_L, used_L, "pass")
    held[rank, pass_id] = before_L | used_L
