"""One entry for everything that engines write: :func:`read_dump`. Formats are told by what a file holds.

Formats and what becomes of them: docs/dumps.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from poise.engines.checkpoints.permutation import RELABELLING_FILE, Relabelling, load_relabelling
from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.dumps import (  # fmt: skip
    ascend_maps,
    bare,
    csv_loads,
    eplb_stats,
    hygon_maps,
    named,
    orders,
    public_traces,
    routed,
    router_lines,
    sglang_dumps,
    tensorrt_maps,
    tensorrt_stats,
    tokenspeed,
    vllm_logs,
)
from poise.engines.dumps.mapping import without_zeros
from poise.engines.dumps.parts import Part, open_part
from poise.engines.dumps.untrusted import MAX_FILE_BYTES, counts, listed
from poise.engines.proposals import PROPOSALS
from poise.routing.counters import began_anew, differences, refuse_running
from poise.routing.files import IDLE, joined, of_archive, of_tables
from poise.routing.plausible import refuse_exchanged, refuse_wrapped
from poise.routing.said import AXES, COUNTED
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import OptionError, TraceError
from poise.util.executors import Serial, in_order
from poise.util.words import close_to

__all__ = ["FORMATS", "Format", "ReadOptions", "read_dump", "read_slot_map"]

MAX_FILES = 20_000
RANKS_ASKED = ("sglang-stat", "tokenspeed", "load-table", "load-csv", "poise")
"""Formats of which several files may be those of ranks or steps."""
SOME_PICKS = ("exflow", "poise")
"""Formats that may keep fewer picks a token than the router makes."""
TYPED = ("npy", "npz", "torch")
"""Containers that keep the type that was counted in."""
TRACE, PLACEMENT, LOADS = "experts", "slot_expert", "logical_count"


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Parameters
    ----------
    holds : whether a file is of it.
    read : all files of it at once.
    """

    holds: Callable[[Part], bool]
    read: Callable[[Sequence[Part], ReadOptions], EngineDump]


def _in(*containers: str, when: Callable[[object], bool] = lambda value: True) -> Callable[[Part], bool]:
    return lambda part: part.container in containers and when(part.value)


def _own_part(part: Part, options: ReadOptions) -> RoutingTrace | LoadProfile:
    """By what it holds, as it was told: names of files say nothing."""
    if part.container != "json":
        return of_archive(part.path, options.counters)
    tables = {name: counts(name, part.value[name], *dims) for name, dims in ((LOADS, (2, 3)), (IDLE, (1, 2)))}
    return of_tables(part.path, {**part.value, **tables}, options.counters)


def _own(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    found = joined([_own_part(part, options) for part in parts], ranks=options.ranks,
                   allow_missing_ranks=options.allow_missing_ranks, counters=options.counters)  # fmt: skip
    if isinstance(found, LoadProfile):
        return EngineDump("poise", "profile", profile=found, notes=found.notes)
    return EngineDump("poise", "trace", trace=found)


FORMATS: dict[str, Format] = {
    "sglang-detail": Format(_in("torch", when=sglang_dumps.is_detail), sglang_dumps.read_detail),
    "tokenspeed": Format(_in("torch", when=tokenspeed.is_load), tokenspeed.read),
    "eplb-stats": Format(_in("torch", "json", when=eplb_stats.is_stats), eplb_stats.read),
    "sglang-stat": Format(_in("torch", "json", when=sglang_dumps.is_stat), sglang_dumps.read_stat),
    "hygon-map": Format(_in("json", when=hygon_maps.is_map), hygon_maps.read),
    "sglang-map": Format(_in("torch", "json", when=sglang_dumps.is_map), sglang_dumps.read_map),
    "routed-experts": Format(_in("json", "json-lines", when=routed.is_routed), routed.read),
    "balance-log": Format(lambda part: part.container == "text" and vllm_logs.is_log(part), vllm_logs.read),
    "tensorrt-statistics": Format(
        lambda part: (part.container == "safetensors" and tensorrt_stats.is_counts(part.value))
        or (part.container == "json" and tensorrt_stats.is_beside(part.value)),
        tensorrt_stats.read,
    ),
    "tensorrt-map": Format(_in("yaml", "json", when=tensorrt_maps.is_map), tensorrt_maps.read),
    "ascend-map": Format(_in("json", when=ascend_maps.is_map), ascend_maps.read),
    **{name: Format(one.holds, one.read) for name, one in PROPOSALS.items()},
    "expert-order": Format(_in("json", when=orders.is_order), orders.read_order),
    "relabelling": Format(_in("json", when=orders.is_relabelling), orders.read_relabelling),
    "exflow": Format(lambda part: bare.is_bare(part) and part.container != "npz", public_traces.read_exflow),
    "load-table": Format(
        lambda part: (
            bare.is_bare(part) or named.is_named(part)
            or (part.container in ("torch", "json") and bare.is_nested(part.value))
        ),
        named.read,
    ),
    "load-csv": Format(csv_loads.is_loads, csv_loads.read),
    "selection-trace": Format(_in("json", when=public_traces.is_selections), public_traces.read_selections),
    "load-history": Format(_in("json", when=public_traces.is_history), public_traces.read_history),
    "step-routing": Format(lambda part: bare.is_bare(part) and part.container == "npz", public_traces.read_step),
    "router-lines": Format(_in("json", "json-lines", when=router_lines.is_lines), router_lines.read),
    "route-log": Format(_in("json-lines", when=public_traces.is_routes), public_traces.read_routes),
    "placement": Format(
        _in("npz", when=lambda names: isinstance(names, list) and PLACEMENT in names), orders.read_placement
    ),
    "poise": Format(
        lambda part: (
            (part.container == "npz" and bool({TRACE, "counts", "cross"} & set(part.value)))
            or (part.container == "json" and isinstance(part.value, dict) and part.value.keys() >= {LOADS, IDLE})
        ),
        _own,
    ),
}  # fmt: skip


def read_dump(
    paths: str | Path | Sequence[str | Path], *, options: ReadOptions | None = None, executor: Executor | None = None
) -> EngineDump:
    """What an engine wrote about one run.

    Parameters
    ----------
    paths : files and folders; all records of one run, in one format. Of a folder all plain files are read, those of no
        known format are left out with a note.
    options : what the dump does not say of itself.
    executor : where files are opened and parsed (they must be there for its workers); None: here, one by one.

    Raises
    ------
    TraceError : missing, damaged, of no known or of several formats, too large, or its numbers make no routing.
    OptionError : an unknown format was asked for, or a relabelling of layers whose numbers the dump does not say.
    ModelError : the traffic cannot be the model's.
    NoResultError : a torch file, and PyTorch is not installed.
    """
    options = options or ReadOptions()
    relabelling = None if options.relabelling is None else load_relabelling(options.relabelling)
    if relabelling is not None and options.experts is None:
        options = replace(options, num_experts=relabelling.num_experts)
    if options.format is not None and options.format not in FORMATS:
        raise OptionError(f"unknown format {options.format!r}", hint=close_to(options.format, FORMATS))
    parts, name, notes = _sorted_out([paths] if isinstance(paths, str | Path) else list(paths), options, executor)
    if options.ranks is not None and name not in RANKS_ASKED:
        raise OptionError(f"{name} says itself which records are of one pass", hint="leave --ranks out")
    where = str(parts[0].path if len(parts) == 1 else f"{parts[0].path} and {len(parts) - 1} more")
    try:
        dump = FORMATS[name].read(parts, options)
        typed = all(part.container in TYPED for part in parts)
        parts.clear()  # what the files hold is let go
        if dump.profile is not None and options.format is None:
            if AXES not in dump.profile.said:
                refuse_exchanged(dump.profile)
            if typed:
                refuse_wrapped(dump.profile)
        dump = _counted(without_zeros(dump, options), options)
        traffic = dump.trace if dump.trace is not None else dump.profile
        if options.model is not None and traffic is not None:
            options.model.matches(num_experts=traffic.num_experts, layer_ids=traffic.layer_ids)
        top_k = options.k if traffic is None else traffic.top_k
        if None not in (options.k, top_k) and (top_k > options.k if name in SOME_PICKS else top_k != options.k):  # type: ignore[operator]
            raise TraceError(f"{top_k} experts a token, the model has top-{options.k}", hint="check --model or --top-k")
    except TraceError as error:
        raise type(error)(f"{where[:200]}: {error.message}", hint=error.hint) from None
    dump = replace(dump, notes=(*notes, *dump.notes, *_unrecorded(traffic, options)))
    if relabelling is not None and dump.layers_by_place:
        raise OptionError(
            f"{dump.engine} {dump.kind}: layer numbers are not known, ids cannot be those before the relabelling",
            hint="give --model",
        )
    return dump if relabelling is None else _original(dump, relabelling)


def _counted(dump: EngineDump, options: ReadOptions) -> EngineDump:
    """A dump whose records of loads are steps, and which says of itself what the user said."""
    profile, notes = dump.profile, list(dump.notes)
    if profile is None:
        if options.counters is not None:
            raise OptionError(f"--counters {options.counters}: {dump.engine} {dump.kind} has no records of loads",
                              hint="leave --counters out")  # fmt: skip
        return dump
    if options.counters == "running":
        return _parted(dump, profile, options.said)
    profile = replace(profile, said=profile.said | options.said)
    if COUNTED not in profile.said:
        try:
            refuse_running(profile.load_BLE, profile.layer_ids, profile.name)
        except TraceError as error:
            if not options.allow_running:
                raise
            notes.append(f"{error.message}; they are read as steps")
    return replace(dump, profile=profile, notes=tuple(notes))


def _parted(dump: EngineDump, profile: LoadProfile, said: frozenset[str]) -> EngineDump:
    """Differences of all that was counted, where its reader has not taken them (rank by rank)."""
    load_BLE, idle_BL, slots, notes = profile.load_BLE, profile.idle_BL, dump.slots, list[str]()
    count_BLS = None if slots is None else slots.count_BLS
    aside_B = None if count_BLS is None or len(count_BLS) != len(load_BLE) else count_BLS
    if COUNTED not in profile.said:
        anew_B = began_anew(*(counts for counts in (load_BLE, idle_BL, aside_B) if counts is not None))
        load_BLE, notes = differences(load_BLE, profile.name, anew_B)
        idle_BL = None if idle_BL is None else differences(idle_BL, profile.name, anew_B)[0]
        if count_BLS is not None:
            count_BLS = differences(count_BLS, profile.name, None if aside_B is None else anew_B)[0]
    busy = np.asarray(load_BLE.any(axis=(1, 2))) | (False if idle_BL is None else idle_BL.any(axis=1))
    if not busy.all():
        notes.append(f"{(~busy).sum()} of them, in which nothing came, were left out")
        load_BLE, idle_BL = load_BLE[busy], None if idle_BL is None else idle_BL[busy]
        count_BLS = count_BLS if count_BLS is None or aside_B is None else count_BLS[busy]
    slots = slots if slots is None else replace(slots, count_BLS=count_BLS)
    profile = replace(profile, load_BLE=load_BLE, idle_BL=idle_BL, said=profile.said | said)
    return replace(dump, profile=profile, slots=slots, notes=(*dump.notes, *notes))


def _unrecorded(traffic: RoutingTrace | LoadProfile | None, options: ReadOptions) -> list[str]:
    """Notes on picks of a token and MoE layers of the model that the traffic lacks."""
    notes = []
    if isinstance(traffic, RoutingTrace) and traffic.top_k < (options.k or 0):
        notes.append(f"{traffic.top_k} of the {options.k} experts that a token has were recorded")
    if traffic is None or options.model is None:
        return notes
    missing = sorted(set(options.model.moe_layer_ids) - set(traffic.layer_ids.tolist()))
    return notes + ([f"nothing was recorded of MoE layers {listed(map(str, missing))}"] if missing else [])


def read_slot_map(path: str | Path, *, options: ReadOptions | None = None) -> SlotRecord:
    """What slots hold, from any map file.

    Raises
    ------
    TraceError : no map is in it, or ranks ran different ones. Else as :func:`read_dump`.
    """
    options = replace(options or ReadOptions(), allow_missing_ranks=True)  # the map is in the file of any rank
    found = read_dump(path, options=options).slots
    if found is None or found.map_LS is None:
        raise TraceError(
            f"{str(path)[:200]} says nothing about what slots hold", hint="name a placement or an engine's map"
        )
    if not found.maps_agree:
        raise TraceError(f"{str(path)[:200]}: ranks report different maps", hint="name the file of one of them")
    return found


def _opened(asked: tuple[Path, ReadOptions]) -> tuple[Part, str] | TraceError:
    """A file and the name of its format, or what is wrong with it; in any process."""
    path, options = asked
    try:
        part = open_part(path)
        return part, _format(part, options)
    except TraceError as error:
        return error


def _sorted_out(
    paths: Sequence[str | Path], options: ReadOptions, executor: Executor | None
) -> tuple[list[Part], str, list[str]]:
    """Files of one format, its name, and notes about others."""
    if not paths:
        raise TraceError("no file was given")
    files = [file for given in map(Path, paths) for file in _files(given)]
    if len(files) > MAX_FILES:
        raise TraceError(f"{len(files)} files, at most {MAX_FILES} are read together")
    found: dict[str, list[Part]] = {}
    unknown: list[str] = []
    size = 0
    opened = in_order(executor or Serial(), _opened, [(path, options) for path, _ in files])
    for (path, by_name), one in zip(files, opened, strict=True):
        if isinstance(one, TraceError):
            if by_name or len(files) == 1 or isinstance(one, bare.AmbiguousError):
                raise one
            unknown.append(f"{path.name} ({one.message.removeprefix(str(path)).lstrip(': ')[:80]})")
            continue
        part, name = one
        size += max(part.size, part.room)
        if size > 2 * MAX_FILE_BYTES:
            raise TraceError(f"files of more than {2 * MAX_FILE_BYTES} bytes together, or in memory")
        found.setdefault(name, []).append(part)
    if len(found) > 1:
        raise TraceError(
            "files of different formats: " + ", ".join(f"{parts[0].name} ({name})" for name, parts in found.items()),
            hint="give those of one format",
        )
    if not found:
        raise TraceError(f"nothing that is read among {listed(unknown, 3)}", hint="docs/dumps.md lists formats")
    name, parts = next(iter(found.items()))
    return parts, name, [f"left out: {listed(unknown, 4)}"] if unknown else []


def _files(given: Path) -> list[tuple[Path, bool]]:
    """The file, or those of the folder, and whether it was named itself."""
    try:
        if not given.is_dir():
            return [(given, True)]
        if (given / RELABELLING_FILE).is_file():  # a relabelled checkpoint
            return [(given / RELABELLING_FILE, True)]
        inside = [(path, False) for path in sorted(given.iterdir()) if path.is_file() and not path.name.startswith(".")]
    except (OSError, ValueError) as error:
        raise TraceError(f"cannot read {str(given)[:200]!r}: {error}") from None
    if not inside:
        raise TraceError(f"no files in {str(given)[:200]}")
    return inside


def _format(part: Part, options: ReadOptions) -> str:
    """The name of a file's format, which is the one that is asked for if any is."""
    wanted = options.format
    if wanted is not None:
        if not FORMATS[wanted].holds(part):
            raise TraceError(f"{part.path}: not of format {wanted}, it holds {_content(part)}")
        return wanted
    if bare.is_bare(part):
        try:
            return bare.decide(part, options)
        except TraceError as error:
            raise type(error)(f"{part.path}: {error.message}", hint=error.hint) from None
    for name, format_ in FORMATS.items():
        if format_.holds(part):
            return name
    hint = named.odd_fact(part) or "docs/dumps.md lists what is read"
    raise TraceError(f"{part.path}: no known format, it holds {_content(part)}", hint=hint)


def _content(part: Part) -> str:
    value = part.value
    if isinstance(value, dict):
        return f"{part.container} with keys {listed([str(key)[:40] for key in value]) or 'none'}"
    if part.container == "csv":
        return (
            f"csv with columns {listed(value.head)}" if value.head else f"csv with {value.columns} columns and no head"
        )
    return f"{part.container} with {listed(value)}" if part.container == "npz" else part.container


def _original(dump: EngineDump, relabelling: Relabelling) -> EngineDump:
    """In the expert ids that the model had before it was relabelled."""
    back = {name: None if found is None else relabelling.original(found)
            for name, found in (("trace", dump.trace), ("profile", dump.profile))}  # fmt: skip
    slots = dump.slots
    if slots is not None and slots.map_LS is not None:
        rows = relabelling.rows()
        map_LS = slots.map_LS.copy()
        for index, layer in enumerate(slots.layer_ids_L.tolist()):
            if layer in rows:
                row = map_LS[index]
                if int(row.max()) >= relabelling.num_experts:
                    raise TraceError(f"the map names expert {row.max()}, the relabelling has {relabelling.num_experts}")
                map_LS[index] = np.where(row < 0, row, rows[layer][row])
        slots = replace(slots, map_LS=map_LS)
    notes = (*dump.notes, "expert ids are those before the relabelling")
    return replace(dump, slots=slots, notes=notes, placement=None, **back)  # type: ignore[arg-type]
