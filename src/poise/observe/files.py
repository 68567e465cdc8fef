"""Read traces and load profiles from untrusted files, and choose parts of them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from poise.errors import OptionError, TraceError
from poise.observe.trace import LoadProfile, RoutingTrace, integers

MAX_JSON_BYTES = 512 * 2**20
MAX_ARRAY_BYTES = 8 * 2**30
OPTIONAL = ("request", "is_decode", "step", "home", "weights", "layer_ids", "domain", "domain_names")
SELECTORS = "FILE#domain=a+b,phase=prefill|decode,half=first|second"


def read(path: str | Path) -> RoutingTrace | LoadProfile:
    """A routing trace (``.npz``) or a load profile (``.json``, ``.npz``), with an optional selection behind ``#``.

    ``FILE#domain=german,phase=decode,half=first`` keeps one domain, one phase and the first half of the requests.

    Raises
    ------
    TraceError : the file is missing, truncated, pickled, too large, or its arrays break the format (docs/formats.md).
    """
    name, _, selection = str(path).partition("#")
    found = _read_json(Path(name)) if name.endswith(".json") else _read_npz(Path(name))
    return _select(found, selection) if selection else found


def read_many(paths: Sequence[str | Path]) -> RoutingTrace | LoadProfile:
    """Several files as one: traces back to back with requests kept apart, profiles as the steps of one."""
    return join([read(path) for path in paths])


def join(parts: Sequence[RoutingTrace | LoadProfile]) -> RoutingTrace | LoadProfile:
    """What :func:`read_many` does, for objects.

    Raises
    ------
    TraceError : no part, traces mixed with profiles, or layers, experts or top-k that disagree.
    """
    if not parts:
        raise TraceError("no trace was given")
    if len(parts) == 1:
        return parts[0]
    head = parts[0]
    for part in parts[1:]:
        for what, a, b in (
            ("experts", head.num_experts, part.num_experts), ("layers", head.num_layers, part.num_layers),
            ("experts a token", head.top_k, part.top_k),
        ):  # fmt: skip
            if a != b:
                raise TraceError(f"{head.name} has {a} {what}, {part.name} has {b}", hint="join files of one model")
        if not np.array_equal(head.layer_ids, part.layer_ids):  # type: ignore[arg-type]
            raise TraceError(f"{head.name} and {part.name} record different layers")
    if all(isinstance(part, LoadProfile) for part in parts):
        loads = np.concatenate([part.load_BLE for part in parts])  # type: ignore[union-attr]
        return LoadProfile(loads, head.layer_ids, head.top_k, " + ".join(part.name for part in parts))
    traces = [part for part in parts if isinstance(part, RoutingTrace)]
    if len(traces) != len(parts):
        raise TraceError("routing traces and load profiles cannot be joined", hint="give one kind")
    requests, steps, next_request, next_step = [], [], 0, 0
    names = tuple(dict.fromkeys(name for trace in traces for name in trace.domain_names))
    domains = []
    for trace in traces:
        assert trace.request is not None
        ids, inverse = np.unique(trace.request, return_inverse=True)
        requests.append(inverse + next_request)
        next_request += ids.size
        if trace.step is not None:
            steps.append(trace.step.astype(np.int64) + next_step)
            next_step = int(steps[-1].max()) + 1
        if trace.domain is not None:
            domains.append(np.array([names.index(name) for name in trace.domain_names])[trace.domain])

    def stack(attr: str) -> NDArray[Any] | None:
        values = [getattr(trace, attr) for trace in traces]
        return None if any(value is None for value in values) else np.concatenate(values)

    return RoutingTrace(
        np.concatenate([trace.experts for trace in traces]),
        traces[0].num_experts,
        request=np.concatenate(requests),
        is_decode=stack("is_decode"),
        step=np.concatenate(steps) if len(steps) == len(traces) else None,
        home=stack("home"),
        weights=stack("weights"),
        layer_ids=traces[0].layer_ids,
        domain=np.concatenate(domains) if len(domains) == len(traces) else None,
        domain_names=names if len(domains) == len(traces) else (),
        name=" + ".join(trace.name for trace in traces),
    )


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
        else:
            raise OptionError(f"unknown selection {item!r}", hint=SELECTORS)
    return replace(found, name=f"{found.name}#{selection}")


def _size(path: Path, most: int) -> int:
    if not path.is_file():
        raise TraceError(f"no such file: {path}")
    size = path.stat().st_size
    if size > most:
        raise TraceError(f"{path} has {size} bytes, at most {most} are read")
    return size


def _read_json(path: Path) -> LoadProfile:
    _size(path, MAX_JSON_BYTES)
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path} is not JSON: {error}", hint="was it cut short?") from None
    if not isinstance(data, dict) or "logical_count" not in data:
        raise TraceError(f"{path} has no 'logical_count'", hint='a load profile is {"logical_count": [L][E]}')
    try:
        load = np.array(data["logical_count"], dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise TraceError(f"{path}: logical_count is not a full table of numbers: {error}") from None
    return LoadProfile(load, name=path.name)


class Npz:
    """The members of an ``.npz``, each checked against its own header before anything is allocated."""

    def __init__(self, path: Path) -> None:
        _size(path, MAX_ARRAY_BYTES)
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
            self.names = {info.filename.removesuffix(".npy"): info for info in self.zip.infolist()}
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise TraceError(f"{path} is not an .npz: {error}", hint="was it cut short?") from None

    def header(self, stream: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
        """Shape, dtype and order of a member whose stream stands at its start."""
        version = npy.read_magic(stream)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
        if dtype.hasobject:
            raise TraceError(f"{self.path}: {name} is pickled, which is not read", hint="store plain number arrays")
        need = int(np.prod([int(x) for x in shape], dtype=object)) * dtype.itemsize
        if need > MAX_ARRAY_BYTES or need > self.names[name].file_size:
            raise TraceError(f"{self.path}: {name} claims {need} bytes, the file holds {self.names[name].file_size}")
        return shape, dtype, fortran

    def array(self, name: str) -> NDArray[Any]:
        """One member as an array."""
        if name not in self.names:
            raise TraceError(f"{self.path} has no array {name!r}", hint=f"it has: {', '.join(sorted(self.names)[:12])}")
        try:
            with self.zip.open(self.names[name]) as stream:
                self.header(stream, name)
            with self.zip.open(self.names[name]) as stream:
                return npy.read_array(io.BytesIO(stream.read()), allow_pickle=False)
        except TraceError:
            raise
        except Exception as error:  # a damaged member can fail in zlib, zipfile, numpy and ast alike
            raise TraceError(f"{self.path}: cannot read {name}: {error}", hint="was it cut short?") from None


def _read_npz(path: Path) -> RoutingTrace | LoadProfile:
    members = Npz(path)
    with members.zip:
        if "experts" not in members.names and "counts" in members.names:
            return _read_counts(members)
        if "experts" not in members.names and "cross" in members.names:
            return _read_cross(members)
        experts = members.array("experts")
        optional = {name: members.array(name) for name in OPTIONAL if name in members.names}
        if "num_experts" in members.names:
            number = members.array("num_experts")
            if number.size != 1 or number.dtype.kind not in "iu":
                raise TraceError(f"{path}: num_experts must be one whole number, got {number.dtype} {number.shape}")
            num_experts = int(number.reshape(-1)[0])
        elif experts.size and experts.dtype.kind in "iu":
            num_experts = int(experts.max()) + 1
        else:
            raise TraceError(
                f"{path}: experts must be whole numbers and not empty, got {experts.dtype} {experts.shape}"
            )
    names = optional.pop("domain_names", np.array([], dtype="U1"))
    if names.ndim != 1 or names.dtype.kind != "U" or names.size > 10_000:
        raise TraceError(f"{path}: domain_names must be at most 10000 strings, got {names.dtype} {names.shape}")
    return RoutingTrace(experts, num_experts, domain_names=tuple(str(x) for x in names), name=path.name, **optional)


def _read_counts(members: Npz) -> LoadProfile:
    """``counts [L, E]`` with ``layers [L]``, as the OLMoE authors publish them."""
    ids = members.array("layers") if "layers" in members.names else None
    return LoadProfile(members.array("counts"), ids, name=members.path.name)


def _read_cross(members: Npz) -> LoadProfile:
    """``cross [P, E, E]`` with ``layer_pairs [P, 2]`` (pair counts between two layers): the loads are its sums."""
    cross, pairs = members.array("cross"), members.array("layer_pairs")
    if cross.ndim != 3 or cross.shape[1] != cross.shape[2] or cross.dtype.kind not in "iuf":
        raise TraceError(f"{members.path}: cross must be numbers [P, E, E], got {cross.dtype} {cross.shape}")
    pairs = integers("layer_pairs", pairs, 0, 65_535, np.int64)
    if pairs.shape != (len(cross), 2):
        raise TraceError(f"{members.path}: layer_pairs {pairs.shape} for {len(cross)} tables")
    loads: dict[int, NDArray[Any]] = {}
    for table, (first, second) in zip(cross.astype(np.float64), pairs.tolist(), strict=True):
        loads.setdefault(first, table.sum(axis=1))
        loads.setdefault(second, table.sum(axis=0))
    ids = np.array(sorted(loads), np.int32)
    return LoadProfile(np.stack([loads[int(i)] for i in ids]), ids, name=members.path.name)
