"""Trace and profile files. Untrusted: every defect is a TraceError, sizes are checked before memory is taken.

``.npz`` with ``experts`` is a routing trace, with ``counts`` or ``cross`` a load profile; ``.json`` is a load profile
``{"logical_count": [L][E]}`` or ``[steps][L][E]``. A selector takes a part of a trace:
``FILE#domain=german+dutch,phase=decode,half=first``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from poise.errors import TraceError
from poise.observe.npz import Archive, Header, open_npz
from poise.observe.trace import MAX_NAME, LoadProfile, Phase, RoutingTrace

MAX_JSON_BYTES = 128 << 20
MAX_DOMAINS = 4096
SELECTOR_KEYS = ("domain", "phase", "half")


@dataclass(frozen=True, slots=True)
class Selector:
    """The part after ``#``: domains, then a half of the requests (of first appearance), then a phase."""

    domains: tuple[str, ...] = ()
    phase: Phase | None = None
    half: Literal["first", "second"] | None = None

    def apply(self, trace: RoutingTrace) -> RoutingTrace:
        """The selected part of a trace; raises TraceError where nothing is left."""
        if self.domains:
            trace = trace.select(domains=self.domains)
        if self.half is not None:
            trace = trace.split_requests()[0 if self.half == "first" else 1]
        return trace.select(phase=self.phase) if self.phase is not None else trace


def parse_selector(spec: str | os.PathLike[str]) -> tuple[Path, Selector]:
    """Split ``FILE#domain=a+b,phase=prefill|decode,half=first|second``; a file of that very name is meant as it is.

    Raises
    ------
    TraceError : an unknown, repeated or empty key.
    """
    text = os.fspath(spec)
    path, mark, tail = text.rpartition("#")
    if not mark or _is_file(Path(text)):
        return Path(text), Selector()
    given: dict[str, str] = {}
    for part in tail.split(","):
        key, equals, value = part.partition("=")
        if key not in SELECTOR_KEYS or not equals or not value or key in given:
            raise TraceError(f"cannot read {part!r} in {text}", hint="FILE#domain=NAME,phase=decode,half=first")
        given[key] = value
    for key, known in (("phase", ("prefill", "decode")), ("half", ("first", "second"))):
        if key in given and given[key] not in known:
            raise TraceError(f"{key} is {given[key]!r} in {text}", hint=f"{key}={known[0]} or {key}={known[1]}")
    domains = tuple(given["domain"].split("+")) if "domain" in given else ()
    return Path(path), Selector(domains, cast(Any, given.get("phase")), cast(Any, given.get("half")))


def read(path: str | os.PathLike[str]) -> RoutingTrace | LoadProfile:
    """Read a trace or a profile, with or without a selector.

    Raises
    ------
    TraceError : the file is missing, damaged or not in a known form; its content is out of range; the selector names
        what the file does not have.
    """
    file, selector = parse_selector(path)
    if not _is_file(file):
        raise TraceError(f"{file} is not a file", hint="give a routing trace (.npz) or a load profile (.npz, .json)")
    try:
        with file.open("rb") as handle:
            start = handle.read(8)
    except OSError as err:
        raise TraceError(f"cannot read {file}: {err}") from err
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06") or file.suffix == ".npz":
        found = _read_npz(file)
    elif start[:6] == b"\x93NUMPY" or file.suffix == ".npy":
        raise TraceError(f"{file} is a bare .npy array", hint="numpy.savez_compressed(..., experts=ids, num_experts=E)")
    else:
        found = _read_json(file)
    if selector == Selector():
        return found
    if isinstance(found, LoadProfile):
        raise TraceError(
            f"{file} is a load profile: it has no tokens to select from", hint="leave out the part after #"
        )
    return selector.apply(found)


def read_many(paths: Iterable[str | os.PathLike[str]]) -> RoutingTrace | LoadProfile:
    """Read several files as one.

    Traces are concatenated: request ids and recorded steps are made distinct; ``step``, ``home`` and ``weights`` are
    kept where every file has them; a file without domains becomes a domain of its name. Profiles become one profile
    whose steps are those of the files; pair counts are summed where every file has the same.

    Raises
    ------
    TraceError : as :func:`read`; no file; traces and profiles mixed; layers, experts or top_k differ.
    """
    names = [os.fspath(path) for path in paths]
    found = [read(name) for name in names]
    if not found:
        raise TraceError("no trace was given", hint="give at least one file")
    traces = [part for part in found if isinstance(part, RoutingTrace)]
    profiles = [part for part in found if isinstance(part, LoadProfile)]
    if traces and profiles:
        raise TraceError(
            f"{len(traces)} traces and {len(profiles)} load profiles cannot be mixed", hint="give one kind of file"
        )
    if len(found) == 1:
        return found[0]
    _check_same_shape(found, names)
    return concat_traces(traces) if traces else concat_profiles(profiles)


def concat_traces(traces: list[RoutingTrace]) -> RoutingTrace:
    """Traces of one shape, one after the other; see :func:`read_many`."""
    _check_same_shape(traces, [t.name for t in traces])
    labels, domain = _merge_domains(traces)
    step = None
    if all(t.step is not None for t in traces):
        step = _distinct([cast(NDArray[np.int32], t.step) for t in traces])
    joined = {
        attr: np.concatenate([getattr(t, attr) for t in traces])
        for attr in ("home", "weights")
        if all(getattr(t, attr) is not None for t in traces)
    }
    return RoutingTrace(
        np.concatenate([t.experts for t in traces]), traces[0].num_experts,
        request=_distinct([t.request_T for t in traces]), is_decode=np.concatenate([t.is_decode_T for t in traces]),
        step=step, layer_ids=traces[0].layer_ids, domain=domain, domain_names=labels,
        name="+".join(t.name for t in traces), **joined,
    )  # fmt: skip


def concat_profiles(profiles: list[LoadProfile]) -> LoadProfile:
    """Profiles of one shape as one; see :func:`read_many`."""
    _check_same_shape(profiles, [p.name for p in profiles])
    affinity: dict[tuple[int, int], NDArray[np.float64]] = {}
    if all(p.affinity.keys() == profiles[0].affinity.keys() for p in profiles):
        affinity = {pair: np.sum([p.affinity[pair] for p in profiles], axis=0) for pair in profiles[0].affinity}
    load = np.concatenate([p.load_BLE for p in profiles])
    name = "+".join(p.name for p in profiles)
    return LoadProfile(load, profiles[0].layer_ids, profiles[0].top_k, affinity=affinity, name=name)


def _distinct(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Concatenate ids of several files so that no two files share one, in file order, dense."""
    out, base = [], 0
    for part in parts:
        ids, dense = np.unique(part, return_inverse=True)
        out.append(dense.astype(np.int32) + np.int32(base))
        base += ids.size
    return np.concatenate(out)


def _merge_domains(traces: list[RoutingTrace]) -> tuple[tuple[str, ...], NDArray[np.int16]]:
    names: list[str] = []
    parts = []
    for trace in traces:
        own = trace.domain_names or (trace.name[-MAX_NAME:] or "trace",)
        names += [name for name in own if name not in names]
        place = np.array([names.index(name) for name in own], dtype=np.int16)
        index = np.zeros(trace.num_tokens, np.int16) if trace.domain is None else trace.domain
        parts.append(place[index])
    return tuple(names), np.concatenate(parts)


def _check_same_shape(found: list[Any], names: list[str]) -> None:
    first = found[0]
    for part, name in zip(found[1:], names[1:], strict=True):
        for what in ("num_experts", "num_layers", "top_k"):
            if getattr(part, what) != getattr(first, what):
                raise TraceError(
                    f"{what} is {getattr(first, what)} in {names[0]} and {getattr(part, what)} in {name}",
                    hint="give files of one model",
                )
        if not np.array_equal(part.layer_ids_L, first.layer_ids_L):
            differ = int(np.flatnonzero(part.layer_ids_L != first.layer_ids_L)[0])
            raise TraceError(
                f"layer {differ} has index {first.layer_ids_L[differ]} in {names[0]} and "
                f"{part.layer_ids_L[differ]} in {name}",
                hint="give files of one model",
            )


def _read_npz(path: Path) -> RoutingTrace | LoadProfile:
    with open_npz(path) as archive:
        if "experts" in archive:
            return _trace_of(archive, path.stem)
        if "counts" in archive or "cross" in archive:
            return _profile_of(archive, path.stem)
        raise TraceError(
            f"array 'experts' is missing, the file has {', '.join(archive.names[:12]) or 'no arrays'}",
            hint="a trace needs experts [tokens, layers, top_k] and num_experts; a profile counts [layers, experts]",
        )


def _trace_of(archive: Archive, name: str) -> RoutingTrace:
    """All headers first: per-token arrays must have the rows of ``experts`` before any of them is read."""
    if "num_experts" not in archive:
        raise TraceError("array 'num_experts' is missing", hint="add num_experts=E, ids alone do not tell it")
    experts = archive.header("experts")
    experts.require((None, None), (None, None, None))
    rows = experts.shape[0]
    headers: dict[str, Header] = {"num_experts": archive.header("num_experts"), "experts": experts}
    headers["num_experts"].require((), (1,))
    for attr, kinds in (("request", "iu"), ("is_decode", "biu"), ("step", "iu"), ("home", "iu"), ("domain", "iu")):
        if attr in archive:
            headers[attr] = archive.header(attr)
            headers[attr].require((rows,), kinds=kinds)
    if "weights" in archive:
        headers["weights"] = archive.header("weights")
        headers["weights"].require(experts.shape, kinds="f")
    if "layer_ids" in archive:
        headers["layer_ids"] = archive.header("layer_ids")
        headers["layer_ids"].require((experts.shape[1],))
    if "domain_names" in archive:
        headers["domain_names"] = archive.header("domain_names")
        headers["domain_names"].require((None,), kinds="U")
        if not 0 < headers["domain_names"].shape[0] <= MAX_DOMAINS:
            raise TraceError(f"{headers['domain_names'].shape[0]} domain names, 1 to {MAX_DOMAINS} are read")
    arrays: dict[str, Any] = {attr: archive.read(header) for attr, header in headers.items()}
    arrays["num_experts"] = arrays["num_experts"].reshape(())
    if "domain_names" in arrays:
        arrays["domain_names"] = _texts(arrays["domain_names"])
    return RoutingTrace(**arrays, name=name)


def _texts(values: NDArray[Any]) -> tuple[str, ...]:
    try:
        return tuple(str(v) for v in values)
    except (ValueError, SystemError) as err:  # code points beyond Unicode
        raise TraceError(f"domain_names is not text: {err}") from err


def _profile_of(archive: Archive, name: str) -> LoadProfile:
    top_k: Any = 1
    if "top_k" in archive:
        header = archive.header("top_k")
        header.require((), (1,))
        top_k = archive.read(header).reshape(())
    affinity, marginal = _pair_counts(archive) if "cross" in archive else ({}, {})
    if "counts" not in archive:
        ids = np.array(sorted(marginal))
        return LoadProfile(np.stack([marginal[i] for i in sorted(marginal)]), ids, top_k, affinity, name)
    counts = archive.header("counts")
    counts.require((None, None), (None, None, None), kinds="iuf")
    layers = None
    if "layers" in archive:
        header = archive.header("layers")
        header.require((counts.shape[-2],))
        layers = archive.read(header)
    return LoadProfile(archive.read(counts), layers, top_k, affinity, name)


def _pair_counts(
    archive: Archive,
) -> tuple[dict[tuple[int, int], NDArray[np.float64]], dict[int, NDArray[np.float64]]]:
    """Pair counts by (layer, layer), and the loads they imply for each layer."""
    cross, pairs = archive.header("cross"), archive.header("layer_pairs")
    cross.require((None, None, None), kinds="iuf")
    if cross.shape[1] != cross.shape[2] or 0 in cross.shape:
        raise TraceError(f"cross must be [pairs, experts, experts], got {list(cross.shape)}")
    pairs.require((cross.shape[0], 2))
    affinity: dict[tuple[int, int], NDArray[np.float64]] = {}
    marginal: dict[int, NDArray[np.float64]] = {}
    for (before, after), count in zip(archive.read(pairs).tolist(), archive.read(cross), strict=True):
        if not 0 <= before < after or (before, after) in affinity:
            raise TraceError(f"layer pair ({before}, {after}) is repeated or does not ascend from 0")
        affinity[before, after] = count.astype(np.float64)
        for layer, load in (
            (before, affinity[before, after].sum(axis=1)),
            (after, affinity[before, after].sum(axis=0)),
        ):
            known = marginal.setdefault(layer, load)
            if "counts" not in archive and not np.allclose(known, load, rtol=1e-6, equal_nan=True):
                raise TraceError(
                    f"layer {layer} has {known.sum():g} tokens in one pair and {load.sum():g} in another, or spread "
                    "otherwise",
                    hint="add counts [layers, experts] and layers",
                )
    return affinity, marginal


def _read_json(path: Path) -> LoadProfile:
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise TraceError(f"{path} has {size} bytes, at most {MAX_JSON_BYTES} of JSON are read", hint="use .npz")
        data = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except TraceError as err:
        raise TraceError(f"{path}: {err.message}", hint=err.hint) from err
    except (OSError, ValueError, RecursionError, MemoryError) as err:
        raise TraceError(f"{path} is neither .npz nor JSON: {err}", hint="poise convert reads other forms") from err
    if not isinstance(data, dict) or "logical_count" not in data:
        kind = f"keys {', '.join(map(str, list(data)[:8]))}" if isinstance(data, dict) else type(data).__name__
        raise TraceError(
            f"{path}: no logical_count, got {kind}", hint='{"logical_count": [[...], ...]}, layers x experts'
        )
    if not isinstance(data["logical_count"], list):
        raise TraceError(f"{path}: logical_count must be nested lists, got {type(data['logical_count']).__name__}")
    try:
        load = np.array(data["logical_count"])
    except (ValueError, OverflowError, TypeError) as err:
        raise TraceError(f"{path}: logical_count is ragged: {err}", hint="every layer needs the same experts") from err
    try:
        return LoadProfile(load, top_k=data.get("top_k", 1), name=path.stem)
    except TraceError as err:
        raise TraceError(f"{path}: {err.message}", hint=err.hint) from err


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise TraceError(f"key {twice[:80]!r} appears twice", hint="keep one of them")
    return out


def _no_constant(text: str) -> float:
    raise TraceError(f"{text} is not a load", hint="loads are finite numbers of at least 0")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # name too long, NUL inside
        return False
