"""Read traces and load profiles from untrusted files, and choose parts of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.routing.counters import Counters, began_anew, differences, refuse_running
from poise.routing.json_tables import Ragged, read_tables
from poise.routing.npz import Archive, open_npz
from poise.routing.plausible import refuse_exchanged
from poise.routing.ranks import ASK, Reading, Recorded, named_rank, one_workload, spans
from poise.routing.said import AXES, COUNTED, SAID, said_in
from poise.routing.trace import FORMAT, MAX_EXPERTS, NO_EXPERT, LoadProfile, RoutingTrace, integers, sealed
from poise.util.errors import OptionError, TraceError
from poise.util.files import open_regular
from poise.util.jsonfile import strict_decoder

MAX_JSON_BYTES = 8 << 30
OPTIONAL = ("request", "is_decode", "step", "home", "weights", "layer_ids", "domain", "domain_names")
IDLE = "identity_count"
"""Key of the picks that compute nothing, beside the loads of a profile."""
SELECTORS = "FILE#domain=a+b,phase=prefill|decode,half=first|second|even|odd"


def read(path: str | Path, *, counters: Literal["steps"] | None = None) -> RoutingTrace | LoadProfile:
    """A routing trace (``.npz``) or a load profile (``.json``, ``.npz``), with an optional selection behind ``#``.

    ``FILE#domain=german,phase=decode,half=first`` keeps one domain, one phase and the first half of the requests.

    Parameters
    ----------
    counters : ``steps``: the user says that records of loads are such; None: unless the counts show that they are none.

    Raises
    ------
    TraceError : the file is missing, truncated, pickled, too large, or its arrays break the format (docs/formats.md);
        or its records are running totals (:mod:`poise.routing.counters`), or its axes exchanged, and it does not say
        that it is right (:mod:`poise.routing.said`).
    """
    name, _, selection = str(path).partition("#")
    found = unchecked(name, counters)
    if isinstance(found, LoadProfile) and AXES not in found.said:
        refuse_exchanged(found)
    if isinstance(found, LoadProfile) and COUNTED not in found.said:
        refuse_running(found.load_BLE, found.layer_ids, found.name)
    return _select(found, selection) if selection else found


def unchecked(path: str | Path, counters: Counters | None = None) -> RoutingTrace | LoadProfile:
    """As :func:`read`, all of it, whatever counts show: the caller looks at them.

    Parameters
    ----------
    counters : what the user says that records of loads are, whatever the file says.
    """
    if str(path).endswith(".json"):
        return of_tables(path, _read_json(Path(path)), counters)
    return of_archive(path, counters)


def of_archive(path: str | Path, counters: Counters | None = None) -> RoutingTrace | LoadProfile:
    """As :func:`unchecked`, of an ``.npz`` of any name."""
    return _with(_read_npz(Path(path), _given(counters)), counters)


def of_tables(path: str | Path, tables: Mapping[str, Any], counters: Counters | None = None) -> LoadProfile:
    """As :func:`unchecked`, of what JSON holds, whatever the name of its file.

    Raises
    ------
    TraceError : no loads, or what it says of itself is not known.
    """
    path = Path(path)
    if "logical_count" not in tables:
        raise TraceError(f"{path} has no 'logical_count'", hint='a load profile is {"logical_count": [L][E]}')
    load, idle = (np.asarray(tables[name]) if name in tables else None for name in ("logical_count", IDLE))
    rank, said = named_rank(path, tables.get("rank")), said_in(path.name, tables, _given(counters))
    return _with(LoadProfile(load, name=path.name, rank=rank, idle_BL=idle, said=said), counters)  # type: ignore[arg-type]


def _given(counters: Counters | None) -> frozenset[str]:
    """What of its loads a file need not say, as the user did."""
    return frozenset() if counters is None else frozenset({COUNTED})


def _with(found: Any, counters: Counters | None) -> Any:
    if isinstance(found, LoadProfile) and counters == "steps":
        return replace(found, said=found.said | {COUNTED})
    return found


def join(
    parts: Sequence[RoutingTrace | LoadProfile], *, ranks: Reading | None = None, allow_missing_ranks: bool = False,
    counters: Literal["steps"] | None = None,
) -> RoutingTrace | LoadProfile:  # fmt: skip
    """Several as one: traces back to back with requests kept apart, profiles as the steps of one.

    Profiles whose counts show that each is of one rank's experts, or that name ranks, are one workload: as
    :func:`poise.routing.ranks.one_workload`.

    Parameters
    ----------
    parts : of one model.
    ranks : what files of several ranks are, where they do not show it: parts of the same steps, or steps of their own.
    allow_missing_ranks : whether a rank that recorded nothing is no error.
    counters : as of :func:`read`, of profiles that become the steps of one.

    Raises
    ------
    TraceError : no part, traces mixed with profiles, layers, experts or top-k that disagree, files of several ranks
        that may be read in two ways, a rank that is missing, or running totals.
    """
    found = joined(parts, ranks=ranks, allow_missing_ranks=allow_missing_ranks, counters=counters)
    each = [part for part in parts if isinstance(part, LoadProfile) and part.num_steps == 1]
    if isinstance(found, LoadProfile) and COUNTED not in found.said and 1 < len(each) == len(parts):
        refuse_running(found.load_BLE, found.layer_ids, f"{len(parts)} files")
    return found


def joined(
    parts: Sequence[RoutingTrace | LoadProfile], *, ranks: Reading | None = None, allow_missing_ranks: bool = False,
    counters: Counters | None = None,
) -> RoutingTrace | LoadProfile:  # fmt: skip
    """As :func:`join`, whatever counts show: the caller looks at them.

    Parameters
    ----------
    counters : what the user says that records of loads are: ``steps``; or ``running`` totals, taken apart rank by rank
        (profiles that then do not say so, of which there is one or that have idle picks, are left to the caller).
    """
    if not parts:
        raise TraceError("no trace was given")
    if len(parts) == 1 and (isinstance(parts[0], RoutingTrace) or parts[0].rank is None):
        return parts[0]
    if all(isinstance(part, LoadProfile) for part in parts):
        idle = list[str]()
        if any(part.rank is None for part in parts):  # type: ignore[union-attr]
            idle = _other_layers(parts)  # type: ignore[arg-type]
        merged = _of_ranks(parts, ranks, allow_missing_ranks, counters)  # type: ignore[arg-type]
        return replace(merged, notes=(*merged.notes, *idle)) if idle else merged
    head = parts[0]
    for part in parts[1:]:
        for what, a, b in (
            ("experts", head.num_experts, part.num_experts), ("layers", head.num_layers, part.num_layers),
            ("experts a token", head.top_k, part.top_k),
        ):  # fmt: skip
            if a != b:
                raise TraceError(f"{head.name} has {a} {what}, {part.name} has {b}", hint="join files of one model")
        if not np.array_equal(head.layer_ids, part.layer_ids):
            raise TraceError(f"{head.name} and {part.name} record different layers")
    traces = [part for part in parts if isinstance(part, RoutingTrace)]
    if len(traces) != len(parts):
        raise TraceError("routing traces and load profiles cannot be joined", hint="give one kind")
    together = _same_steps(traces, ranks)
    requests, steps, next_request, next_step = [], [], 0, 0
    names = tuple(dict.fromkeys(name for trace in traces for name in trace.domain_names))
    domains = []
    for trace in traces:
        ids, inverse = np.unique(trace.request, return_inverse=True)
        requests.append(inverse + next_request)
        next_request += ids.size
        if trace.step is not None:
            steps.append(trace.step.astype(np.int64) + next_step)
            next_step = 0 if together else int(steps[-1].max()) + 1
        if trace.domain is not None:
            domains.append(np.array([names.index(name) for name in trace.domain_names])[trace.domain])

    def stack(attr: str) -> NDArray[Any] | None:
        values = [getattr(trace, attr) for trace in traces]
        return None if any(value is None for value in values) else np.concatenate(values)

    joined = RoutingTrace(
        sealed(np.concatenate([trace.experts for trace in traces])),
        traces[0].num_experts,
        request=np.concatenate(requests),
        is_decode=np.concatenate([trace.is_decode for trace in traces]),
        step=np.concatenate(steps) if len(steps) == len(traces) else None,
        home=stack("home"),
        weights=stack("weights"),
        layer_ids=traces[0].layer_ids,
        domain=np.concatenate(domains) if len(domains) == len(traces) else None,
        domain_names=names if len(domains) == len(traces) else (),
        name=" + ".join(trace.name for trace in traces),
    )
    return joined.rows(np.argsort(joined.step, kind="stable")) if together else joined  # type: ignore[arg-type]


def _other_layers(profiles: Sequence[LoadProfile]) -> list[str]:
    """Notes on layers between others that were idle in a file: they count as such in its steps.

    Raises
    ------
    TraceError : profiles share no more than half of all layers, or one begins or ends at another layer: that is how
        records of a part of the model look, and nothing tells them from idle layers.
    """
    shared, all_ = set(profiles[0].layer_ids.tolist()), set[int]()
    for part in profiles:
        ids = set(part.layer_ids.tolist())
        shared &= ids
        all_ |= ids
        if 2 * len(shared) <= len(all_):
            raise TraceError(
                f"{profiles[0].name} has {profiles[0].num_layers} layers with load, {part.name} {part.num_layers}, and "
                f"{len(shared)} of {len(all_)} are in each: different layers of a model, or files of two models",
                hint="join files of one model that record the same layers",
            )
    first, last = min(all_), max(all_)
    notes = list[str]()
    for part in profiles:
        mine = part.layer_ids.tolist()
        if (mine[0], mine[-1]) != (first, last):
            whole = next(p for p in profiles if {first if mine[0] != first else last} <= set(p.layer_ids.tolist()))
            raise TraceError(
                f"{part.name} has load in layers {mine[0]} to {mine[-1]}, {whole.name} in layers "
                f"{whole.layer_ids[0]} to {whole.layer_ids[-1]}: idle in one of them, or not recorded",
                hint="join files that record the same layers",
            )
        if idle := sorted(all_ - set(mine)):
            notes.append(f"{part.name} has no load in layers {spans(idle)}: they count as idle in its steps")
    return notes


def _of_ranks(
    profiles: Sequence[LoadProfile], ranks: Reading | None, allow_missing: bool, counters: Counters | None
) -> LoadProfile:
    """Profiles as one; where a rank's experts have no load in a layer, its row is empty."""
    head = profiles[0]
    ids = np.unique(np.concatenate([part.layer_ids for part in profiles]))
    files = []
    for part in profiles:
        if (part.num_experts, part.top_k) != (head.num_experts, head.top_k):
            raise TraceError(
                f"{head.name} has {head.num_experts} experts, top-{head.top_k}, {part.name} {part.num_experts}, "
                f"top-{part.top_k}",
                hint="join files of one model",
            )
        load_BLE = part.load_BLE
        if not np.array_equal(ids, part.layer_ids):
            load_BLE = np.zeros((part.num_steps, ids.size, part.num_experts), load_BLE.dtype)
            load_BLE[:, np.searchsorted(ids, part.layer_ids)] = part.load_BLE
        files.append(Recorded(part.name, part.rank, load_BLE))
    apart = counters == "running" and all(part.idle_BL is None for part in profiles)
    loads, notes = one_workload(
        files, ranks, allow_missing=allow_missing, unnamed="steps", counters=counters if apart else None
    )
    if counters == "running" and not apart and 1 < len(loads) != sum(part.num_steps for part in profiles):
        each, more = _taken_apart(profiles)
        return replace(_of_ranks(each, ranks, allow_missing, "steps"), notes=(*more, *notes))
    name = " + ".join(part.name for part in profiles)
    said = frozenset.intersection(*(part.said for part in profiles))
    said |= {COUNTED} if apart or counters == "steps" else set()
    return LoadProfile(loads, ids, head.top_k, name, idle_BL=_idle_together(profiles, ids, loads), notes=tuple(notes),
                       said=said)  # fmt: skip


def _taken_apart(profiles: Sequence[LoadProfile]) -> tuple[list[LoadProfile], list[str]]:
    """What came between the running totals of each rank, a profile each; and notes. A rank may begin anew alone.

    Picks that compute nothing begin anew with the loads beside them. Files without a rank are of one each.
    """
    by_rank: dict[int, list[LoadProfile]] = {}
    for at, part in enumerate(profiles):
        by_rank.setdefault(-1 - at if part.rank is None else part.rank, []).append(part)
    out, notes = [], list[str]()
    for mine in by_rank.values():
        whole = mine[0] if len(mine) == 1 else _of_ranks(mine, "steps", True, None)
        load_BLE, idle_BL = whole.load_BLE, whole.idle_BL
        anew_B = began_anew(*(counts for counts in (load_BLE, idle_BL) if counts is not None))
        loads, more = differences(load_BLE, whole.name, anew_B)
        idle = None if idle_BL is None else differences(idle_BL, whole.name, anew_B)[0]
        notes += [f"{whole.name}: {note}" for note in more]
        out.append(replace(whole, load_BLE=loads, idle_BL=idle, rank=mine[0].rank))
    return out, notes


def _idle_together(
    profiles: Sequence[LoadProfile], ids: NDArray[Any], load_BLE: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Picks that compute nothing, joined as the loads were: in order, added up, or those of one of several copies."""
    if any(part.idle_BL is None for part in profiles):
        return None
    parts = []
    for part in profiles:
        parts.append(np.zeros((part.num_steps, ids.size)))
        parts[-1][:, np.searchsorted(ids, part.layer_ids)] = part.idle_BL
    steps = len(load_BLE)
    if sum(len(idle) for idle in parts) == steps:
        return np.concatenate(parts)
    if any(len(idle) != steps for idle in parts):
        return None
    each, total = (sum(float(x.sum(dtype=np.float64)) for x in found) for found in (
        (part.load_BLE for part in profiles), (load_BLE,)))  # fmt: skip
    summed = each <= total * (1 + 1e-9)
    out: NDArray[np.float64] = np.sum(parts, axis=0) if summed else parts[0]
    return out


def _same_steps(traces: Sequence[RoutingTrace], ranks: Reading | None) -> bool:
    """Whether traces hold tokens of other homes of the same steps, not steps one after another."""
    if ranks is not None or any(trace.step is None or trace.home is None for trace in traces):
        return ranks == "sum" and all(trace.step is not None for trace in traces)
    homes = [set(np.unique(trace.home).tolist()) for trace in traces]  # type: ignore[arg-type]
    steps = [np.unique(trace.step) for trace in traces]  # type: ignore[arg-type]
    apart = len(set().union(*homes)) == sum(map(len, homes))
    if apart and all(np.intersect1d(steps[0], other).size for other in steps[1:]):
        raise TraceError(
            f"{traces[0].name} has tokens of homes {spans(sorted(homes[0]))}, {traces[1].name} of homes "
            f"{spans(sorted(homes[1]))}, in the same steps: parts of them, or steps one after another",
            hint=ASK,
        )
    return False


def _select(found: RoutingTrace | LoadProfile, selection: str) -> RoutingTrace | LoadProfile:
    if isinstance(found, LoadProfile):
        raise OptionError(f"{found.name} holds loads only: it has no requests to select by #{selection}")
    for item in selection.split(","):
        key, _, value = item.partition("=")
        if key == "domain":
            found = found.select(domains=value.split("+"))
        elif key == "phase":
            found = found.select(phase=value)  # type: ignore[arg-type]
        elif key == "half" and value in ("first", "second"):
            found = found.split_requests()[value == "second"]
        elif key == "half" and value in ("even", "odd"):
            found = found.every_second_request()[value == "odd"]
        else:
            raise OptionError(f"unknown selection {item!r}", hint=SELECTORS)
    return replace(found, name=f"{found.name}#{selection}")


def _read_json(path: Path) -> Mapping[str, Any]:
    """The tables of a profile, and what is beside them."""
    try:
        with open_regular(path, TraceError) as stream:
            if (size := os.fstat(stream.fileno()).st_size) > MAX_JSON_BYTES:
                raise TraceError(f"{size} bytes, at most {MAX_JSON_BYTES} are read")
            data = read_tables(stream, ("logical_count", IDLE), strict_decoder())
    except TraceError as error:
        where = "" if str(path)[:200] in error.message else f"{path}: "
        raise TraceError(f"{where}{error.message}", hint=error.hint) from None
    except Ragged as error:
        raise TraceError(f"{path}: logical_count is not a full table of numbers: {error}") from None
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path} is not JSON: {error}", hint="was it cut short?") from None
    return data if isinstance(data, dict) else {}


def _read_npz(path: Path, given: frozenset[str]) -> RoutingTrace | LoadProfile:
    """What is in it; what loads say of themselves, unless that is ``given``."""
    with open_npz(path, ["a routing trace", "a load profile"]) as archive:
        if "experts" not in archive and "counts" in archive:
            said = said_in(path.name, {key: _array(archive, key) for key in SAID if key in archive}, given)
            return _read_counts(archive, path.name, said)
        if "experts" not in archive and "cross" in archive:
            return _read_cross(archive, path.name)
        _check_format(archive)
        header = archive.header("experts")
        experts = archive.read_integers(header, NO_EXPERT, MAX_EXPERTS - 1, np.int16)
        optional = {name: _array(archive, name) for name in OPTIONAL if name in archive}
        if "num_experts" in archive:
            num_experts = _whole(archive, "num_experts")
        elif experts.size and header.dtype.kind in "iu":
            num_experts = int(experts.max()) + 1
        else:
            raise TraceError(f"experts must be whole numbers and not empty, got {header.dtype} {header.shape}")
        names = optional.pop("domain_names", np.array([], dtype="U1"))
        if names.ndim != 1 or names.dtype.kind != "U" or names.size > 10_000:
            raise TraceError(f"domain_names must be at most 10000 strings, got {names.dtype} {names.shape}")
        try:
            texts = tuple(str(x) for x in names)
        except ValueError:
            raise TraceError("domain_names holds bytes that are no text") from None
        return RoutingTrace(experts, num_experts, domain_names=texts, name=path.name, **optional)


def _check_format(archive: Archive) -> None:
    """A file that does not say its format is of the first one."""
    if "format" in archive and (form := _whole(archive, "format")) != FORMAT:
        raise TraceError(
            f"the trace is of format {form}, this poise reads format {FORMAT}", hint="a newer poise reads it"
        )


def _whole(archive: Archive, name: str) -> int:
    number = _array(archive, name)
    if number.size != 1 or number.dtype.kind not in "iu":
        raise TraceError(f"{name} must be one whole number, got {number.dtype} {number.shape}")
    return int(number.reshape(-1)[0])


def _array(archive: Archive, name: str) -> NDArray[Any]:
    return archive.read(archive.header(name))


def _read_counts(archive: Archive, name: str, said: frozenset[str]) -> LoadProfile:
    """``counts [L, E]`` with ``layers [L]``, as the OLMoE authors publish them."""
    more: dict[str, Any] = {"layer_ids": _array(archive, "layers")} if "layers" in archive else {}
    idle = _array(archive, IDLE) if IDLE in archive else None
    return LoadProfile(_array(archive, "counts"), name=name, idle_BL=idle, said=said, **more)


def _read_cross(archive: Archive, name: str) -> LoadProfile:
    """``cross [P, E, E]`` with ``layer_pairs [P, 2]`` (pair counts between two layers): the loads are its sums."""
    cross, pairs = _array(archive, "cross"), _array(archive, "layer_pairs")
    if cross.ndim != 3 or cross.shape[1] != cross.shape[2] or cross.dtype.kind not in "iuf":
        raise TraceError(f"cross must be numbers [P, E, E], got {cross.dtype} {cross.shape}")
    pairs = integers("layer_pairs", pairs, 0, 65_535, np.int64)
    if pairs.shape != (len(cross), 2) or not len(cross):
        raise TraceError(f"layer_pairs {pairs.shape} for {len(cross)} tables")
    loads: dict[int, NDArray[Any]] = {}
    for table, (first, second) in zip(cross.astype(np.float64), pairs.tolist(), strict=True):
        for layer, load in ((first, table.sum(axis=1)), (second, table.sum(axis=0))):
            known = loads.setdefault(layer, load)
            if not np.allclose(known, load, rtol=1e-6, equal_nan=True):
                raise TraceError(
                    f"layer {layer} has {known.sum():g} tokens in one pair and {load.sum():g} in another, or spread "
                    "otherwise",
                    hint="give counts [L, E] and layers [L] instead",
                )
    ids = np.array(sorted(loads), np.int32)
    return LoadProfile(np.stack([loads[int(i)] for i in ids]), ids, name=name)
