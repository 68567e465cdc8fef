"""TokenSpeed: ``*.expert-load.pt`` of its EXPERT_LOAD profile, one a rank and window.

``{ep_rank, ep_size, physical_count int [L, P], logical_count int [L, E], physical_to_logical_map int [L, P]}``. A rank
counts what its own router chose, and the engine adds ranks up where it reads them; ranks with replicated inputs count
the same, and one of them is all traffic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps.mapping import MAX_TABLE, agree, copies, decoder_layers, num_experts
from poise.engines.dumps.parts import Part
from poise.engines.dumps.ranks import RankRecord, check_ranks
from poise.engines.dumps.untrusted import table, whole
from poise.routing.counters import began_anew, differences
from poise.routing.ranks import ASK, MAX_RANKS
from poise.routing.trace import MAX_EXPERTS, LoadProfile
from poise.util.errors import TraceError


def is_load(value: Any) -> bool:
    """One rank's record."""
    return isinstance(value, dict) and {"physical_count", "logical_count"} <= value.keys()


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Loads of all ranks together; the n-th file of each rank, in order of names, is of the n-th window."""
    ranks: dict[int, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = defaultdict(list)
    maps: list[NDArray[np.int64]] = []
    notes = []
    nameless = sum("ep_rank" not in part.value for part in parts)
    if nameless and len(parts) > 1 and options.ranks is None:
        raise TraceError(
            f"{nameless} of {len(parts)} files name no ep_rank: of several ranks, or of one, one after another?",
            hint=ASK,
        )
    expected = max(whole("ep_size", part.value.get("ep_size", 1), 1, MAX_RANKS) for part in parts)
    for index, part in enumerate(parts):
        slots, experts = (table(name, part.value[name], 2, high=2**50) for name in ("physical_count", "logical_count"))
        if not slots.size or len(slots) != len(experts):
            raise TraceError(f"{part.name} has {len(slots)} layers of slots and {len(experts)} of experts")
        raw = part.value.get("physical_to_logical_map")
        if raw is not None:
            found = table("physical_to_logical_map", raw, 2, low=-1, high=MAX_EXPERTS - 1)
            if found.shape != slots.shape:
                raise TraceError(f"{part.name} has a map of {list(found.shape)} for counts of {list(slots.shape)}")
            maps.append(found)
        ranks[whole("ep_rank", part.value.get("ep_rank", index if options.ranks == "sum" else 0))].append(
            (slots, experts)
        )
    first = next(iter(ranks.values()))[0]
    shapes = {(s.shape, e.shape) for found in ranks.values() for s, e in found}
    if len(shapes) > 1:
        raise TraceError(
            f"records of shapes {first[0].shape}, {first[1].shape} and others", hint="give those of one run"
        )
    if not agree(maps):
        notes.append("files have different maps: slots are told by the last one")
    order = sorted(ranks)
    groups = [
        [order[i] for i in group] for group in copies(dict(enumerate(e for _, e in ranks[rank])) for rank in order)
    ]
    kept = [max(group, key=lambda rank: len(ranks[rank])) for group in groups]
    if len(kept) < len(order):
        notes.append(f"{len(order) - len(kept)} ranks count the tokens of another one and were left out")
    records = [
        RankRecord(rank, np.asarray(sum(s for s, _ in ranks[rank])) > 0, frozenset(range(len(ranks[rank]))))
        for rank in order
    ]
    _, missing = check_ranks(records, [set(group) for group in groups], options, expected=expected,
                             map_LS=maps[-1] if maps else None, unit="windows", ragged=0)  # fmt: skip
    notes += missing
    windows = max(len(ranks[rank]) for rank in kept)
    if windows * max(first[0].size, first[1].size) > MAX_TABLE:
        raise TraceError(f"{windows} windows of {first[0].shape} are too many")
    count_BLS, load_BLE = np.zeros((windows, *first[0].shape)), np.zeros((windows, *first[1].shape))
    for rank in kept:
        slots_B, experts_B = (np.stack(counted) for counted in zip(*ranks[rank], strict=True))
        if options.counters == "running":  # a rank may begin anew alone
            anew_B = began_anew(slots_B, experts_B)
            (slots_B, _), (experts_B, added) = (differences(x, f"rank {rank}", anew_B) for x in (slots_B, experts_B))
            notes += [f"rank {rank}: {note}" for note in added]
        count_BLS[: len(slots_B)] += slots_B
        load_BLE[: len(experts_B)] += experts_B
    known, _ = num_experts(options, load_BLE.shape[2] - 1, "logical_count")
    if known != load_BLE.shape[2]:
        raise TraceError(f"logical_count has {load_BLE.shape[2]} experts, the model {known}")
    rows, ids, more = decoder_layers(count_BLS.shape[1], options.model, "physical_count")
    profile = LoadProfile(load_BLE[:, rows], ids, options.k or 1, parts[0].name, said=options.said)
    record = SlotRecord(ids, maps[-1][rows].astype(np.int32) if maps else None, count_BLS[:, rows],
                        agree([map_LS[rows] for map_LS in maps]))  # fmt: skip
    return EngineDump("tokenspeed", "expert-load", profile=profile, slots=record, recorded_layers=count_BLS.shape[1],
                      notes=(*notes, *more))  # fmt: skip
