"""From what an engine counts to logical experts of decoder layers: slots, dense layers, layers that predict ahead."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.untrusted import BIG, listed
from poise.machine.model import ModelSpec
from poise.routing.profile import load_LE
from poise.routing.trace import NO_EXPERT, LoadProfile, RoutingTrace, row_blocks, sealed, twice
from poise.util.errors import TraceError

MAX_TOP_K = 64
"""Most experts a token of any model."""
MAX_MTP_LAYERS = 8
"""Most layers of multi-token prediction behind a model's own that are taken for such."""
BY_PLACE = "layers are numbered by their place in the record: --model gives decoder layers"
GUESSED = "the largest id seen is"
FEW = 8
"""Times that an expert is chosen which may have been missed by chance."""
MAX_SHARED = 8
"""Most shared experts of a layer that are taken for such."""
MAX_TABLE = 1 << 28
"""Most numbers that a table of loads may unfold to."""


def decoder_layers(
    count: int, model: ModelSpec | None, what: str, *, moe_only: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int32], list[str]]:
    """Rows to keep of ``count`` layers that an engine numbered from 0, their decoder layers, and notes.

    Engines list either all decoder layers or the MoE layers alone (``moe_only``: surely the latter), and may add layers
    of multi-token prediction.

    Raises
    ------
    TraceError : the number fits neither way.
    """
    if model is None:
        return np.arange(count), np.arange(count, dtype=np.int32), []
    ids = np.array(model.moe_layer_ids, np.int32)
    ways = [(len(ids), np.arange(len(ids)))]
    if not moe_only:
        ways.insert(0, (model.num_hidden_layers, ids.astype(np.int64)))
    for own, rows in ways:
        if count == own:
            return rows, ids, []
    for own, rows in ways:
        if 0 < count - own <= MAX_MTP_LAYERS:
            return rows, ids, [f"{count - own} layers behind the model's own were left out: multi-token prediction"]
    raise TraceError(
        f"{what} has {count} layers, {model.name} has {model.num_hidden_layers}, of them {len(ids)} MoE layers",
        hint="check --model",
    )


def model_layers(ids: Sequence[int], model: ModelSpec | None, what: str) -> tuple[list[int], list[str]]:
    """Of decoder layers that an engine named, those to keep, and notes.

    Raises
    ------
    TraceError : a layer is a dense one of the model.
    """
    if model is None:
        return list(ids), []
    moe, notes = set(model.moe_layer_ids), []
    ahead = [i for i in ids if i >= model.num_hidden_layers]
    if len(ahead) > MAX_MTP_LAYERS:
        raise TraceError(f"{what} reaches layer {max(ahead)}, {model.name} has {model.num_hidden_layers}")
    kept = [i for i in ids if i < model.num_hidden_layers]
    dense = [i for i in kept if i not in moe]
    if dense:
        raise TraceError(f"{what} has traffic in layer {dense[0]}, a dense layer of {model.name}", hint="check --model")
    if sorted(ids) == [i + 1 for i in model.moe_layer_ids]:
        raise TraceError(
            f"{what} names layers {min(ids)} to {max(ids)}, {model.name} has MoE layers {min(moe)} to {max(moe)}: it "
            "seems to number layers from 1",
            hint="number them from 0",
        )
    if ahead:
        notes.append(f"layers {listed(map(str, ahead))} were left out: multi-token prediction")
    return kept, notes


def num_experts(
    options: ReadOptions, largest: int, what: str, *, most: int | None = None, routers: bool = False
) -> tuple[int, list[str]]:
    """E as known, or one more than the largest id seen, with a note.

    Where the router names identity experts as well (``options.zeros``, or, in answers of requests, ``routers``, a few
    ids beyond an E given by hand: ``options.zeros_open``), they are counted as long as some id is one:
    :func:`without_zeros` takes them out of what was read. Slots (``most`` of them) never hold one.

    Raises
    ------
    TraceError : an id is not below E, or E exceeds ``most``.
    """
    known, zeros = options.experts, 0 if most is not None else options.zeros
    experts = largest + 1 if known is None else known
    if largest >= experts:
        experts += zeros
    if routers and options.zeros_open and experts <= largest < experts + experts // 2:
        return largest + 1, []  # taken for identity experts, with a note: without_zeros
    if largest >= experts:
        raise TraceError(
            f"{what} names expert {largest}, the model has {known}" + (f" and {zeros} identity experts" * bool(zeros)),
            hint=_beyond(options, largest, most is not None),
        )
    if most is not None and experts > most:
        raise TraceError(f"{what} has {most} slots for {experts} experts", hint="check --model or --num-experts")
    return experts, [] if known is not None else [f"{experts} experts: {GUESSED} {largest}"]


def _beyond(options: ReadOptions, largest: int, is_map: bool) -> str:
    """What an id that is not below E may mean."""
    if is_map:
        return "check --model or --num-experts" + "; identity experts have no slots" * bool(options.zeros)
    if options.zeros:
        return "check --model, --num-experts and --zero-experts"
    first, count = options.experts, largest + 1 - (options.experts or 0)
    fused = "; does the engine fuse shared experts, as ids behind the routed ones? Record without"
    return (
        f"check --model or --num-experts; or, if ids from {first} on are identity (zero) experts, which compute "
        f"nothing, give --zero-experts {count} (the number that the router has)" + fused * (count <= MAX_SHARED)
    )


def without_zeros(dump: EngineDump, options: ReadOptions) -> EngineDump:
    """A dump whose traffic names E experts: picks of identity experts become -1, their loads are set apart.

    Raises
    ------
    TraceError : a slot holds one.
    """
    trace, profile, notes = dump.trace, dump.profile, list(dump.notes)
    traffic = trace if trace is not None else profile
    experts, zeros = options.experts or 0, options.zeros
    if options.zeros_open and trace is not None and trace.num_experts > experts:
        zeros = trace.num_experts - experts
        notes.append(
            f"ids from {experts} on, beyond the experts given, are taken for {zeros} identity (zero) experts; "
            f"--zero-experts {zeros} says so, --zero-experts 0 refuses them"
        )
    by_hand = options.zeros_open and zeros == 1
    if traffic is not None and (by_hand or any(GUESSED in note for note in notes)) and _from_one(traffic):
        last = traffic.num_experts - 1
        way = (
            "--zero-experts 1, if the last id is an identity (zero) expert" if by_hand else f"--num-experts {last + 1}"
        )
        raise TraceError(
            f"experts 1 to {last} are all named and expert 0 never: ids seem to be counted from 1",
            hint=f"count them from 0; or, if expert 0 is never chosen, give {way}",
        )
    if not zeros:
        return dump
    wide = experts + zeros
    slots = dump.slots
    if slots is not None and slots.map_LS is not None and int(slots.map_LS.max(initial=0)) >= experts:
        raise TraceError(
            f"the map names expert {slots.map_LS.max()}, the model has {experts} and {zeros} identity experts",
            hint="identity experts have no slots",
        )
    if trace is not None and trace.num_experts == wide:
        load_E = load_LE(trace.experts, wide).sum(axis=0)
        notes.append(
            f"{load_E[experts:].sum()} of {load_E.sum()} picks are of identity experts (ids {experts} to "
            f"{wide - 1}) and compute nothing"
        )
        real = np.empty_like(trace.experts)
        for rows in row_blocks(real):
            real[rows] = np.where(trace.experts[rows] >= experts, NO_EXPERT, trace.experts[rows])
        trace = replace(trace, experts=sealed(real), num_experts=experts)
    if profile is not None and profile.num_experts == wide:
        real_BLE, idle_BLE = profile.load_BLE[:, :, :experts], profile.load_BLE[:, :, experts:]
        idle_BL, all_ = idle_BLE.sum(axis=2, dtype=np.float64), profile.load_BLE.sum(dtype=np.float64)
        notes.append(
            f"{idle_BL.sum() / all_:.1%} of the load is of identity experts (ids {experts} to "
            f"{wide - 1}) and computes nothing"
        )
        profile = replace(profile, load_BLE=real_BLE, idle_BL=idle_BL)
    return replace(dump, trace=trace, profile=profile, notes=tuple(notes))


def _from_one(traffic: RoutingTrace | LoadProfile) -> bool:
    """Whether all experts were chosen more than a few times, and the first one never."""
    if isinstance(traffic, RoutingTrace):
        load_E = load_LE(traffic.experts, traffic.num_experts).sum(axis=0)
    else:
        load_E = traffic.load_BLE.sum(axis=(0, 1), dtype=np.float64)
    return len(load_E) > 2 and load_E[0] == 0 and bool((load_E[1:] >= FEW).all())


def rows_alone(array: NDArray[Any], rows: NDArray[np.int64], axis: int) -> NDArray[Any]:
    """Some rows along an axis: a copy, unless they are all in order."""
    return array if np.array_equal(rows, np.arange(array.shape[axis])) else sealed(array.take(rows, axis=axis))


def routed_loads(load_BLE: NDArray[Any], options: ReadOptions, what: str) -> tuple[NDArray[Any], list[str]]:
    """Loads of routed experts alone, [B, L, E], and notes.

    Engines may fuse shared experts with the routed ones: ids from E on, which every token takes. Such columns are cut
    where E is known and they do hold one pair a token (a K-th of the routed pairs); else they stay, for the reader to
    refuse, or with a note where E is not known.
    """
    known, top_k = options.router_experts, options.k
    width = load_BLE.shape[2]
    if known is None:
        last = load_BLE[..., -1].sum(axis=0, dtype=np.float64)
        rest = load_BLE[..., :-1].sum(axis=(0, 2), dtype=np.float64)
        times = np.divide(rest, last, out=np.zeros_like(rest), where=last > 0)[rest > 0]
        seen = times.size > 1 and 1 <= times[0] < width - 1 and times[0] == round(times[0])
        if not seen or (times != times[0]).any():
            return load_BLE, []
        return load_BLE, [f"in every layer of {what} expert {width - 1} has 1/{times[0]:.0f} of what all others have "
                          "together, as a shared expert that an engine fuses has: --model tells"]  # fmt: skip
    if not 0 < width - known <= MAX_SHARED or top_k is None:
        return load_BLE, []
    tokens_BL1 = load_BLE[..., :known].sum(axis=2, keepdims=True, dtype=np.float64) / top_k
    if not np.allclose(load_BLE[..., known:], tokens_BL1, rtol=1e-6, atol=0):
        return load_BLE, []
    return load_BLE[..., :known], [f"{width - known} fused shared experts behind the {known} routed ones were left out"]


def routed_picks(experts_TLK: NDArray[np.int16], options: ReadOptions) -> tuple[NDArray[np.int16], list[str]]:
    """Routed picks alone, [T, L, K], and notes: columns behind the K-th that are ids from E on everywhere are cut.

    Padding (-1) may stand in their place; anything else stays, for the reader to refuse.
    """
    known, top_k = options.router_experts, options.k
    width = experts_TLK.shape[2]
    if known is None and width > 1 and len(experts_TLK) > 1:
        last = experts_TLK[..., -1]
        if (last == last[0, 0]).all() and int(experts_TLK[..., :-1].max()) < last[0, 0]:
            return experts_TLK, [f"the last pick is expert {last[0, 0]} throughout, as of a shared expert that an "
                                 "engine fuses: --model tells"]  # fmt: skip
    if known is None or top_k is None or not 0 < width - top_k <= MAX_SHARED:
        return experts_TLK, []
    behind = experts_TLK[..., top_k:]
    if not ((behind >= known) | (behind < 0)).all() or int(experts_TLK[..., :top_k].max(initial=-1)) >= known:
        return experts_TLK, []
    return experts_TLK[..., :top_k], [f"{width - top_k} picks of fused shared experts a token were left out"]


def rows_of(slots: SlotRecord, layer_ids: Sequence[int], num_slots: int, what: str) -> NDArray[np.int64]:
    """The map of some layers, int64 [layers, S].

    Raises
    ------
    TraceError : it has no map, another number of slots, or not all of the layers.
    """
    if slots.map_LS is None:
        raise TraceError("what was given as a placement has no map")
    if slots.map_LS.shape[1] != num_slots:
        raise TraceError(f"{what} has {num_slots} slots a layer, the placement {slots.map_LS.shape[1]}")
    at = {int(layer): row for row, layer in enumerate(slots.layer_ids_L)}
    missing = [layer for layer in layer_ids if layer not in at]
    if missing:
        raise TraceError(f"{what} has traffic in layer {missing[0]}, the placement has no row for it")
    return slots.map_LS[[at[layer] for layer in layer_ids]].astype(np.int64)


def by_expert(
    count_BLS: NDArray[Any], map_LS: NDArray[np.int64], experts: int, layer_ids: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Pairs of each expert, float64 [B, L, E], from those of its slots; empty slots must have none.

    ``layer_ids`` are the decoder layers of the rows, for messages; default 0, 1, ...

    Raises
    ------
    TraceError : an empty slot computed something, or the table would be too large.
    """
    steps, layers, _ = count_BLS.shape
    if steps * layers * experts > MAX_TABLE:
        raise TraceError(f"{steps} records of {layers} layers and {experts} experts are too many")
    out = np.zeros((steps, layers, experts))
    for layer, row in enumerate(map_LS):
        held = row >= 0
        if count_BLS[:, layer, ~held].any():
            name = layer if layer_ids is None else layer_ids[layer]
            raise TraceError(f"a slot that is empty in the map has tokens in layer {name}")
        np.add.at(out[:, layer].T, row[held], count_BLS[:, layer, held].T)
    return out


def copies(*views: Iterable[Mapping[Any, NDArray[Any]]]) -> list[list[int]]:
    """Sources by what they hold: each with those that are a copy of it in any view; every view lists the same sources.

    Ranks that share their tokens (tensor-parallel attention) count the same: two sources are copies if what both have
    is equal throughout and not all zero.
    """
    marks = [[{key: _mark(array) for key, array in source.items()} for source in view] for view in views]
    groups: list[list[int]] = []
    for index in range(len(marks[0])):
        same = next((g for g in groups if any(_copy(view[index], view[g[0]]) for view in marks)), None)
        if same is None:
            groups.append([index])
        else:
            same.append(index)
    return groups


def names_twice(experts: NDArray[Any]) -> bool:
    """Whether some token, along the last axis, names an expert (or -1) twice, which no router chooses."""
    return twice(experts.reshape(len(experts), -1, experts.shape[-1]), free=None) is not None


def agree(maps: Sequence[NDArray[Any]]) -> bool:
    """Whether all maps are the same."""
    return all(np.array_equal(maps[0], other) for other in maps[1:])


def _mark(array: NDArray[Any]) -> bytes | None:
    if not array.any():
        return None
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest() + str(array.shape).encode()


def _copy(mine: Mapping[Any, bytes | None], other: Mapping[Any, bytes | None]) -> bool:
    shared = mine.keys() & other.keys()
    return any(mine[key] is not None for key in shared) and all(mine[key] == other[key] for key in shared)


def check_ids(what: str, ids: Sequence[int]) -> None:
    """Raise TraceError unless layer numbers are whole, each once, and small."""
    if len(set(ids)) != len(ids):
        raise TraceError(f"{what} names a layer twice")
    if any(i > 65_535 or i < 0 for i in ids):
        raise TraceError(f"{what} names layer {max(ids)}", hint=f"layers up to 65535, numbers up to {BIG}")
