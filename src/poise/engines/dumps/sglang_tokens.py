"""SGLang's recorder, mode ``per_token``: records of all ranks as one trace."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.mapping import MAX_TABLE, agree, model_layers, num_experts
from poise.engines.dumps.ranks import RankRecord, check_ranks, one_run
from poise.engines.dumps.sglang_records import Record
from poise.engines.dumps.sglang_requests import Group, TokenCollector
from poise.util.errors import TraceError


def per_token(
    records: list[Record], maps: list[NDArray[np.int64]], options: ReadOptions, notes: list[str], name: str
) -> EngineDump:
    """Records in order of their passes as a trace, with what slots held and computed; raises TraceError."""
    num_layers, num_slots = maps[0].shape
    top_k, said = _top_k(records, num_layers, num_slots, options)
    experts, more = num_experts(options, max(int(m.max()) for m in maps), "the map", most=num_slots)
    zeros = options.zeros if num_slots == experts else 0  # with redundant slots, no id is known to be one of theirs
    short, layer_L11 = [map_LS.astype(np.int16) for map_LS in maps], np.arange(num_layers)[:, None, None]
    passes: dict[int, list[Group]] = {}
    alike: list[set[int]] = []
    copies = 0
    for r in records:
        assert r.tokens is not None
        if not len(r.tokens.input_T):
            continue
        slot_LTK = r.tokens.topk_LTK[:, :, :top_k]
        if int(slot_LTK.max()) >= num_slots + zeros:
            raise TraceError(
                f"pass {r.pass_id} names slot {slot_LTK.max()}, the map has {num_slots}" + f" and {zeros} identity "
                "experts follow" * bool(zeros),
                hint="if the router has identity (zero) experts, give --zero-experts, or a --model that has them",
            )
        zero_LTK, named_LTK = slot_LTK >= num_slots, slot_LTK  # an identity expert's id, which goes on behind E = S
        if zero_LTK.any():
            slot_LTK = np.where(zero_LTK, np.int16(-1), slot_LTK)
        expert_LTK = np.where(slot_LTK < 0, np.int16(-1), short[r.source][layer_L11, slot_LTK])
        if ((slot_LTK >= 0) & (expert_LTK < 0)).any():
            raise TraceError(f"pass {r.pass_id} names a slot that is empty in the map")
        if zero_LTK.any():
            expert_LTK = np.where(zero_LTK, named_LTK, expert_LTK)
        groups = passes.setdefault(r.pass_id, [])
        taker = next((group for group in groups if group.takes(r.tokens, expert_LTK, slot_LTK)), None)
        if taker is not None:
            copies += 1
            alike.append({taker.home, r.rank})
            continue
        for group in groups:
            if group.home == r.rank:
                one_run(r.rank, r.pass_id, group.used_L(), np.asarray((expert_LTK >= 0).any(axis=(1, 2))), "pass")
        groups.append(Group(r.rank, r.tokens, slot_LTK, expert_LTK))
    left, missing = check_ranks(_by_rank(records, num_layers, num_slots, top_k), alike, options, map_LS=maps[-1])
    passes = {pass_id: groups for pass_id, groups in passes.items() if pass_id not in left}
    notes += missing
    used_L = np.zeros(num_layers, bool)
    for groups in passes.values():
        for group in groups:
            used_L |= group.used_L()
    if not used_L.any():
        raise TraceError("no token has an expert", hint="record again with traffic")
    ids, layers = model_layers(np.flatnonzero(used_L).tolist(), options.model, "the record")
    if copies:
        notes.append(f"{copies} records hold the tokens of another rank and were merged with it")
    slots = SlotRecord(np.array(ids, np.int32), maps[-1][ids].astype(np.int32), _counts(passes, ids, num_slots),
                       agree([map_LS[ids] for map_LS in maps]))  # fmt: skip
    rows = TokenCollector()
    records.clear()
    for pass_id in list(passes):
        for group in passes.pop(pass_id):  # let go: its experts go on in the rows
            rows.add(pass_id, group, ids)
    trace = rows.trace(experts + zeros, np.array(ids, np.int32), name)
    return EngineDump("sglang", "per-token", trace=trace, slots=slots, recorded_layers=num_layers,
                      notes=(*notes, *said, *more, *layers, *rows.notes()))  # fmt: skip


def _by_rank(records: list[Record], num_layers: int, num_slots: int, top_k: int) -> list[RankRecord]:
    """Slots that each rank's tokens name, and its passes."""
    used: dict[int, NDArray[np.bool_]] = {}
    passes: dict[int, set[int]] = defaultdict(set)
    layer_L11 = np.arange(num_layers)[:, None, None]
    for r in records:
        assert r.tokens is not None
        used_LS = used.setdefault(r.rank, np.zeros((num_layers, num_slots + 1), np.bool_))
        used_LS[layer_L11, np.minimum(r.tokens.topk_LTK[:, :, :top_k], num_slots)] = True  # -1 is the last column too
        passes[r.rank].add(r.pass_id)
    return [RankRecord(rank, used[rank][:, :-1], frozenset(passes[rank])) for rank in used]


def _top_k(records: list[Record], num_layers: int, num_slots: int, options: ReadOptions) -> tuple[int, list[str]]:
    """Columns that are routed experts."""
    width, most = 0, num_slots + options.zeros
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
        shared[: topk.shape[2]] &= ((topk >= most) | ~used).all(axis=(0, 1))
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


def _counts(passes: dict[int, list[Group]], ids: list[int], num_slots: int) -> NDArray[np.float64]:
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
