"""TensorRT-LLM: the folder of ``EXPERT_STATISTIC_PATH`` (_torch/modules/fused_moe, class ExpertStatistic).

``meta_info.json`` ``{num_experts, num_experts_per_token}``, and of every rank ``rank{r}.safetensors`` with
``"{iteration}_{layer}"`` -> counts int [num_experts]; some versions also ``rank{r}_raw.safetensors`` with the same keys
-> ``token_selected_experts`` int [tokens, K]. Decoder layers; those of multi-token prediction are numbered on behind.

With a load balancer these are slots, not experts, and ``num_experts`` is the number of slots: only the placement that
ran tells the experts. The raw file keeps the last chunk of a pass alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.mapping import MAX_TABLE, by_expert, check_ids, copies, model_layers, num_experts, rows_of
from poise.engines.dumps.parts import Part
from poise.engines.dumps.ranks import RankRecord, check_ranks
from poise.engines.dumps.untrusted import table, whole
from poise.engines.shards import Shard, StoredTensor
from poise.routing.ranks import MAX_RANKS, named_rank
from poise.routing.trace import MAX_EXPERTS, LoadProfile, RoutingTrace
from poise.util.errors import TraceError

IterationLayer = tuple[int, int]
KEY = re.compile(r"(\d{1,9})_(\d{1,5})")
DTYPES = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4"}


def is_meta(value: Any) -> bool:
    """``meta_info.json``."""
    return isinstance(value, dict) and {"num_experts", "num_experts_per_token"} <= value.keys()


def is_beside(value: Any) -> bool:
    """``meta_info.json``, or ``rank{r}_numtokens.json`` of forks, which is not needed."""
    return is_meta(value) or (isinstance(value, dict) and bool(value) and all(KEY.fullmatch(key) for key in value))


def is_counts(value: Any) -> bool:
    """A safetensors file with such keys."""
    return isinstance(value, Shard) and bool(value.tensors) and all(KEY.fullmatch(t.name) for t in value.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class _RankFile:
    """One file of one rank: counts int64 [S] or tokens int16 [T, K], -1 for padding, by (iteration, layer)."""

    name: str
    arrays: dict[IterationLayer, NDArray[Any]]
    rank: int | None


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Loads of all iterations, and the tokens themselves where they were kept."""
    metas = [part.value for part in parts if is_meta(part.value)]
    if len(metas) > 1:
        raise TraceError(f"{len(metas)} files like meta_info.json, one belongs to a run")
    width = whole("num_experts of meta_info.json", metas[0]["num_experts"], 1, MAX_EXPERTS) if metas else None
    top_k = whole("num_experts_per_token", metas[0]["num_experts_per_token"], 1, MAX_EXPERTS) if metas else options.k
    counts, raw, notes = _ranks([part for part in parts if part.container == "safetensors"], width)
    if not counts and not raw:
        raise TraceError("meta_info.json alone holds no statistics", hint="give the folder, rank*.safetensors in it")
    slots_known = width if not counts else len(next(iter(counts[0].arrays.values())))
    expected = max([0, *(1 + rank for part in parts if (rank := named_rank(part.path)) is not None)])
    if metas and "ep_size" in metas[0]:  # forks
        expected = max(expected, whole("ep_size of meta_info.json", metas[0]["ep_size"], 1, MAX_RANKS))
    for ranks in (counts, raw):
        notes += _one_run(ranks, expected, options)
    ids = sorted({layer for rank in (*counts, *raw) for _, layer in rank.arrays})
    check_ids("the statistics", ids)
    kept, said = model_layers(ids, options.model, "the statistics")
    notes += said
    if not kept:
        raise TraceError(f"the statistics have layers {ids[0]} to {ids[-1]}, none of the model's")
    given = options.slot_map
    map_LS = None
    if given is not None and given.map_LS is not None:
        map_LS = rows_of(given, kept, slots_known or given.map_LS.shape[1], "the statistics")
    widths = () if options.experts is None else (options.experts, options.experts + options.zeros)
    if map_LS is None and slots_known is not None and widths and slots_known not in widths:
        raise TraceError(
            f"{slots_known} are counted, the model has {options.experts} experts: these are slots",
            hint="give --placement, the map that the load balancer ran"
            + f"; or --zero-experts {slots_known - widths[0]}, if they are such" * (slots_known > widths[0]),
        )
    if map_LS is None:
        notes.append("ids are taken for experts; with a load balancer TensorRT-LLM counts slots: give --placement then")
    profile, slots, trace = None, None, None
    seen = max((int(array.max(initial=0)) for rank in raw for array in rank.arrays.values()), default=0)
    largest = int(map_LS.max()) if map_LS is not None else (slots_known or seen + 1) - 1
    experts, more = num_experts(options, largest, "the statistics")
    if counts:
        count_BLS = _table(counts, kept, notes)
        load_BLE = count_BLS if map_LS is None else by_expert(count_BLS, map_LS, experts, kept)
        if load_BLE.shape[2] != experts:
            raise TraceError(f"{load_BLE.shape[2]} experts are counted, the model has {experts}")
        profile = LoadProfile(load_BLE, np.array(kept, np.int32), top_k or 1, parts[0].path.parent.name)
        if map_LS is not None:
            slots = SlotRecord(np.array(kept, np.int32), None, count_BLS)
    if raw:
        if map_LS is not None and options.zeros:
            raise TraceError(
                f"tokens name slots, and which of them are the {options.zeros} identity experts is not known",
                hint="leave the files with tokens out, or --zero-experts where the router has none",
            )
        wide = experts if options.experts is None else options.experts + options.zeros
        trace = _trace(raw, kept, map_LS, wide, notes, parts[0].path.parent.name)
        if trace is not None and profile is not None:
            pairs, all_ = trace.num_tokens * trace.num_layers * trace.top_k, float(profile.load_BLE.sum())
            if pairs < all_:
                notes.append(f"the raw files hold {pairs / all_:.1%} of what was counted: the last chunk of each pass")
    return EngineDump("tensorrt-llm", "statistics", trace=trace, profile=profile, slots=slots,
                      notes=(*notes, *(more if map_LS is not None else ())))  # fmt: skip


def _ranks(parts: Sequence[Part], width: int | None) -> tuple[list[_RankFile], list[_RankFile], list[str]]:
    """Files of counts and files of tokens."""
    numbers = sum(prod(tensor.shape) for part in parts for tensor in part.value.tensors)
    if numbers > MAX_TABLE:
        raise TraceError(f"{numbers} numbers, at most {MAX_TABLE} are read together", hint="record fewer iterations")
    counts, raw, notes = [], [], []
    for part in parts:
        arrays = {}
        for tensor in part.value.tensors:
            match = KEY.fullmatch(tensor.name)
            assert match is not None
            arrays[int(match[1]), int(match[2])] = _array(part, tensor)
        if len(arrays) != len(part.value.tensors):
            raise TraceError(f"{part.name} has an iteration and layer twice")
        dims = {array.ndim for array in arrays.values()}
        if dims == {1}:
            sizes = {len(array) for array in arrays.values()} | ({width} if width is not None else set())
            if len(sizes) > 1 or 0 in sizes:
                raise TraceError(f"{part.name} counts {sorted(sizes)} experts")
            counts.append(_RankFile(part.name, arrays, named_rank(part.path)))
        elif dims == {2}:
            if width is not None and width > 1 and all(array.shape == (width, width) for array in arrays.values()):
                notes.append(f"{part.name} holds pairs of experts and was left out")
                continue
            raw.append(_RankFile(part.name, arrays, named_rank(part.path)))
        else:
            raise TraceError(f"{part.name} holds arrays of {sorted(dims)} dimensions")
    if len({len(next(iter(rank.arrays.values()))) for rank in counts}) > 1:
        raise TraceError("ranks count different numbers of experts")
    return counts, raw, notes


def _array(part: Part, tensor: StoredTensor) -> NDArray[Any]:
    kind = DTYPES.get(tensor.dtype)
    if kind is None or len(tensor.shape) not in (1, 2) or 0 in tensor.shape[1:]:
        raise TraceError(f"{part.name}: {tensor.name} is {tensor.dtype} {list(tensor.shape)[:8]}, not counts or tokens")
    try:
        with part.path.open("rb") as stream:
            stream.seek(len(part.value.header) + tensor.begin)
            data = stream.read(tensor.end - tensor.begin)
        array = np.frombuffer(data, kind).reshape(tensor.shape)
    except (OSError, ValueError):
        raise TraceError(f"{part.name}: {tensor.name} is cut short") from None
    if array.ndim == 2:
        real = (array >= 0) & (array < MAX_EXPERTS)
        tokens = np.full(array.shape, -1, np.int16)
        tokens[real] = array[real]
        return tokens
    return table(tensor.name, array, 1, high=2**40)


def _one_run(ranks: list[_RankFile], expected: int, options: ReadOptions) -> list[str]:
    """Merge, in place, ranks that counted the same tokens; raises TraceError if one is missing."""
    groups = [[ranks[i] for i in group] for group in copies(rank.arrays for rank in ranks)] if ranks else []
    notes = []
    if len(groups) < len(ranks):
        notes.append(f"{len(ranks) - len(groups)} files count the tokens of another rank and were left out")
    known = [(rank, rank.rank) for rank in ranks if rank.rank is not None]
    left: set[int] = set()
    if known and len(known) == len(ranks):
        alike = [{number for rank in group if (number := rank.rank) is not None} for group in groups]
        records = _records(known)
        left, missing = check_ranks(records, alike, options, expected=expected, what="experts", unit="iterations")
        notes += missing
    merged = []
    for group in groups:
        arrays = {key: array for rank in reversed(group) for key, array in rank.arrays.items() if key[0] not in left}
        merged.append(_RankFile(group[0].name, arrays, group[0].rank))
    ranks[:] = merged
    seen: set[tuple[int, IterationLayer]] = set()
    for rank in ranks:
        mine = set() if rank.rank is None else {(rank.rank, key) for key, array in rank.arrays.items() if array.any()}
        if twice := sorted(mine & seen):
            number, (step, layer) = twice[0]
            raise TraceError(
                f"two files of rank {number} hold different counts of iteration {step} in layer {layer}",
                hint="give the files of one run",
            )
        seen |= mine
    return notes


def _records(ranks: Sequence[tuple[_RankFile, int]]) -> list[RankRecord]:
    """What each rank counted, for :func:`check_ranks`."""
    layers = sorted({layer for rank, _ in ranks for _, layer in rank.arrays})
    at = {layer: row for row, layer in enumerate(layers)}
    arrays = [array for rank, _ in ranks for array in rank.arrays.values()]
    width = max(len(a) if a.ndim == 1 else int(a.max(initial=0)) + 1 for a in arrays)
    out = []
    for rank, number in ranks:
        used_LS = np.zeros((len(layers), width + 1), np.bool_)
        for (_, layer), array in rank.arrays.items():
            used_LS[at[layer], np.flatnonzero(array) if array.ndim == 1 else array] = True  # padding: the last column
        out.append(RankRecord(number, used_LS[:, :-1], frozenset(step for step, _ in rank.arrays)))
    return out


def _table(ranks: list[_RankFile], layers: list[int], notes: list[str]) -> NDArray[np.float64]:
    """Counts of all ranks together, float64 [iterations, L, S]."""
    steps = sorted({step for rank in ranks for step, _ in rank.arrays})
    width = len(next(iter(ranks[0].arrays.values())))
    if len(steps) * len(layers) * width > MAX_TABLE:
        raise TraceError(f"{len(steps)} iterations of {len(layers)} layers and {width} experts are too many")
    at_step, at_layer = ({value: i for i, value in enumerate(values)} for values in (steps, layers))
    out = np.zeros((len(steps), len(layers), width))
    seen = np.zeros((len(steps), len(layers)), bool)
    for rank in ranks:
        for (step, layer), count in rank.arrays.items():
            if layer in at_layer:
                out[at_step[step], at_layer[layer]] += count
                seen[at_step[step], at_layer[layer]] = True
    if not seen.all():
        notes.append(f"{(~seen).sum()} of {seen.size} pairs of iteration and layer are missing: counted as 0")
    return out


def _trace(
    ranks: list[_RankFile],
    layers: list[int],
    map_LS: NDArray[np.int64] | None,
    experts: int,
    notes: list[str],
    name: str,
) -> RoutingTrace | None:
    """Tokens of the passes in which every layer kept as many."""
    named = all(rank.rank is not None for rank in ranks)
    ranks = sorted(ranks, key=lambda rank: (rank.rank or 0, rank.name))
    short_LS = None if map_LS is None else map_LS.astype(np.int16)
    pieces, step_T, home_T, uneven, padded = [], [], [], 0, 0
    for home, rank in enumerate(ranks):
        by_step: dict[int, dict[int, NDArray[np.int16]]] = defaultdict(dict)
        for (step, layer), tokens in rank.arrays.items():
            by_step[step][layer] = tokens
        for step, found in sorted(by_step.items()):
            shapes = {found[layer].shape if layer in found else None for layer in layers}
            if len(shapes) > 1 or None in shapes:
                uneven += 1
                continue
            slot_TLK = np.stack([found[layer] for layer in layers], axis=1)
            top = experts if map_LS is None else map_LS.shape[1]
            real_T = ((slot_TLK >= 0) & (slot_TLK < top)).all(axis=(1, 2))
            padded += int((~real_T).sum())
            slot_TLK = slot_TLK[real_T]
            pieces.append(slot_TLK if short_LS is None else short_LS[np.arange(len(layers))[:, None], slot_TLK])
            step_T.append(np.full(len(slot_TLK), step))
            home_T.append(np.full(len(slot_TLK), rank.rank if named else home))
    if uneven:
        notes.append(f"{uneven} passes have other tokens in one layer than in another and were left out of the tokens")
    if padded:
        notes.append(f"{padded} tokens name no expert: padding")
    if not sum(map(len, pieces)):
        notes.append("no token is known in every layer: loads alone were read")
        return None
    if len({piece.shape[2] for piece in pieces}) > 1:
        raise TraceError("passes have different numbers of experts a token")
    notes.append("each token is a request of its own: the engine does not say which it belongs to, nor its phase")
    order = np.argsort(np.concatenate(step_T), kind="stable")
    return RoutingTrace(
        np.concatenate(pieces)[order], experts, step=np.concatenate(step_T)[order],
        home=np.concatenate(home_T)[order],
        layer_ids=np.array(layers, np.int32), name=name,
    )  # fmt: skip
