"""RoutingTrace: which experts each token chose, in every MoE layer. LoadProfile: how many tokens each expert got."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.util.errors import NoTrafficError, OptionError, TraceError
from poise.util.files import replacing
from poise.util.room import blocks

FORMAT = 1
"""Of a trace file (docs/trace-format.md): one more where an array goes or means something else."""
MAX_EXPERTS = 32_767
MAX_LOAD = 1e15
FEW_PICKS = 16
"""Up to so many picks a token, comparing each with each is faster than sorting them."""
NO_EXPERT = -1
"""In place of an expert: this pick of the token computes nothing."""
Phase = Literal["prefill", "decode"]


def integers(name: str, value: Any, low: int, high: int, dtype: Any) -> NDArray[Any]:
    """A read-only integer array with all entries in ``low..high``, or TraceError: a copy where ``value`` may be written
    to or is of another type.
    """
    arr = np.asarray(value)
    if arr.dtype.kind not in "iub":
        raise TraceError(f"{name} must be whole numbers, got {arr.dtype}", hint=f"store {name} as an integer array")
    if arr.size and (int(arr.min()) < low or int(arr.max()) > high):
        raise TraceError(f"{name} must lie in {low}..{high}, got {arr.min()}..{arr.max()}")
    return kept(arr, dtype)


def kept(array: NDArray[Any], dtype: Any = None) -> NDArray[Any]:
    """The array as ``dtype`` (default: its own), read-only: itself if nobody can write to it, else a copy."""
    dtype = np.dtype(dtype or array.dtype).newbyteorder("=")
    return sealed(array if array.dtype == dtype and not array.flags.writeable else array.astype(dtype))


def sealed(array: NDArray[Any]) -> NDArray[Any]:
    """An array that nobody else has, read-only: nothing copies it again."""
    array.flags.writeable = False
    return array


def row_blocks(array: NDArray[Any], bytes_each: int | None = None) -> Iterator[slice]:
    """Slices of the rows of a large array, for temporaries of ``bytes_each`` (default: its own) bytes a number."""
    return blocks(len(array), array[:1].size * (bytes_each or array.itemsize))


def twice(experts_TLK: NDArray[Any], free: int | None = NO_EXPERT) -> tuple[int, int] | None:
    """The first token and layer of which an expert, ``free`` apart, is listed twice; None: no such."""
    top_k = experts_TLK.shape[2]
    for rows in row_blocks(experts_TLK, 64):  # blocks that stay in the cache
        if top_k <= FEW_PICKS:
            ids_KTL = np.ascontiguousarray(experts_TLK[rows].transpose(2, 0, 1))
            found = np.zeros(ids_KTL.shape[1:], bool)
            for i in range(1, top_k):
                same = ids_KTL[:i] == ids_KTL[i]
                if same.any():
                    found |= same.any(axis=0) & (free is None or ids_KTL[i] != free)
        else:
            ordered = np.sort(experts_TLK[rows], axis=2)
            same = ordered[..., 1:] == ordered[..., :-1]
            found = (same & (free is None or ordered[..., 1:] != free)).any(axis=2)
        if found.any():
            token, layer = (int(x) for x in np.argwhere(found)[0])
            return rows.start + token, layer
    return None


def finite(array: NDArray[Any]) -> bool:
    """Whether all numbers are finite."""
    return array.dtype.kind != "f" or all(bool(np.isfinite(array[rows]).all()) for rows in row_blocks(array, 1))


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """Routing of T tokens through L MoE layers, K experts each. Arrays are read-only.

    Parameters
    ----------
    experts : int16 [T, L, K], logical expert ids, heaviest first where the recorder knew ([T, L] is read as K = 1).
        -1 is a pick that computes nothing (an identity expert); those of a token are moved behind its others.
    num_experts : E, identity experts not among them.
    request : int32 [T], request a token belongs to; rows of one request keep their order. Default: one request each.
    is_decode : bool [T], token was generated (else prefill). Default: all prefill.
    step : int32 [T] or None, forward pass of the token, if the recorder knew it.
    home : int32 [T] or None, home rank, if the recorder knew it.
    weights : float32 [T, L, K] or None, router weights.
    layer_ids : int32 [L], index of each MoE layer among the model's decoder layers, ascending. Default 0..L-1.
    domain : int16 [T] or None, index into domain_names.
    domain_names : names of the domains.
    name : file or generator it came from.

    Raises
    ------
    TraceError : shapes disagree, ids out of range, a token lists one expert of a layer twice, or no pick computes.
    """

    experts: NDArray[np.int16]
    num_experts: int
    request: NDArray[np.int32] = None  # type: ignore[assignment]  # filled in
    is_decode: NDArray[np.bool_] = None  # type: ignore[assignment]  # filled in
    step: NDArray[np.int32] | None = None
    home: NDArray[np.int32] | None = None
    weights: NDArray[np.float32] | None = None
    layer_ids: NDArray[np.int32] = None  # type: ignore[assignment]  # filled in
    domain: NDArray[np.int16] | None = None
    domain_names: tuple[str, ...] = ()
    name: str = field(default="trace")

    def __post_init__(self) -> None:
        if not isinstance(self.num_experts, int | np.integer) or not 1 <= self.num_experts <= MAX_EXPERTS:
            raise TraceError(f"num_experts must be a whole number in 1..{MAX_EXPERTS}, got {self.num_experts}")
        experts = integers("experts", self.experts, NO_EXPERT, self.num_experts - 1, np.int16)
        if experts.ndim == 2:
            experts = experts[:, :, None]
        if experts.ndim != 3 or 0 in experts.shape:
            raise TraceError(f"experts must be [T, L] or [T, L, K] and not empty, got shape {experts.shape}")
        tokens, layers, top_k = experts.shape
        if top_k > self.num_experts:
            raise TraceError(f"{top_k} experts a token, the model has {self.num_experts}")
        if (at := twice(experts)) is not None:
            token, layer = at
            named = self.layer_ids
            name = named[layer] if isinstance(named, np.ndarray) and named.shape == (layers,) else layer
            raise TraceError(f"token {token} lists one expert twice in layer {name}: {experts[token, layer]}")
        if int(experts.max()) == NO_EXPERT:
            raise NoTrafficError("no pick of any token computes", hint="record again with traffic")
        given, idle = experts, top_k > 1 and int(experts.min()) == NO_EXPERT
        self._set("experts", _idle_last(given, given) if idle else given)
        big = 2**31 - 1
        request = np.arange(tokens) if self.request is None else self.request
        self._set("request", integers("request", request, -big, big, np.int32))
        decode = np.zeros(tokens, bool) if self.is_decode is None else self.is_decode
        self._set("is_decode", integers("is_decode", decode, 0, 1, np.bool_))
        if self.step is not None:
            self._set("step", integers("step", self.step, 0, big, np.int32))
        if self.home is not None:
            self._set("home", integers("home", self.home, 0, 65_535, np.int32))
        if self.domain is not None:
            self._set("domain", integers("domain", self.domain, 0, len(self.domain_names) - 1, np.int16))
        for name in ("request", "is_decode", "step", "home", "domain"):
            value = getattr(self, name)
            if value is not None and value.shape != (tokens,):
                raise TraceError(f"{name} has shape {value.shape}, experts has {tokens} tokens")
        ids = np.arange(layers) if self.layer_ids is None else self.layer_ids
        ids = integers("layer_ids", ids, 0, 65_535, np.int32)
        if ids.shape != (layers,) or (np.diff(ids) <= 0).any():
            raise TraceError(f"layer_ids must be {layers} ascending numbers, got {np.atleast_1d(ids).tolist()[:8]}")
        self._set("layer_ids", ids)
        if self.weights is not None:
            weights = np.asarray(self.weights)
            if weights.shape != experts.shape or weights.dtype.kind != "f":
                raise TraceError(f"weights {weights.dtype} {weights.shape} must be floats like experts {experts.shape}")
            if not finite(weights):
                raise TraceError("weights must be finite")
            weights = kept(weights, np.float32)
            self._set("weights", _idle_last(given, weights) if idle else weights)

    def _set(self, name: str, value: NDArray[Any]) -> None:
        value.flags.writeable = False
        object.__setattr__(self, name, value)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.experts.shape[2])

    def requests(self) -> NDArray[np.int32]:
        """Request ids in order of first appearance, int32."""
        ids, first = np.unique(self.request, return_index=True)
        return ids[np.argsort(first)]

    def rows(self, mask_T: NDArray[np.bool_] | NDArray[np.int64]) -> RoutingTrace:
        """The tokens of a bool mask [T], in order, or of numbers of rows; those that lie together are not copied."""
        at = np.flatnonzero(mask_T) if mask_T.dtype == bool else mask_T
        if not at.size:
            raise TraceError(f"the selection leaves 0 of {self.num_tokens} tokens of {self.name}")
        together = mask_T.dtype == bool and int(at[-1]) - int(at[0]) + 1 == at.size
        rows = slice(int(at[0]), int(at[-1]) + 1) if together else at
        parts: dict[str, Any] = {}
        for name in ("experts", "request", "is_decode", "step", "home", "weights", "domain"):
            value = getattr(self, name)
            parts[name] = None if value is None else value[rows]
            if value is not None:
                parts[name].flags.writeable = False
        return replace(self, **parts)

    def select(self, *, domains: Sequence[str] | None = None, phase: Phase | None = None) -> RoutingTrace:
        """The tokens of some domains and / or of one phase."""
        mask = np.ones(self.num_tokens, dtype=bool)
        if domains is not None:
            unknown = [name for name in domains if name not in self.domain_names]
            if unknown or self.domain is None:
                known = ", ".join(self.domain_names) or "none"
                raise TraceError(
                    f"{self.name} has no domain {unknown[0] if unknown else domains[0]!r}", hint=f"it has: {known}"
                )
            assert self.domain is not None
            mask &= np.isin(self.domain, [self.domain_names.index(name) for name in domains])
        if phase is not None:
            if phase not in ("prefill", "decode"):
                raise OptionError(f"unknown phase {phase!r}", hint="prefill or decode")
            mask &= self.is_decode == (phase == "decode")
        return self.rows(mask)

    def split_requests(self, share: float = 0.5) -> tuple[RoutingTrace, RoutingTrace]:
        """The first ``share`` of the requests of every domain (in order of appearance), and the rest."""
        mask = self.first_requests(share)
        return self.rows(mask), self.rows(~mask)

    def every_second_request(self) -> tuple[RoutingTrace, RoutingTrace]:
        """Every second request in order of appearance, beginning with the first, and the others."""
        mask = np.isin(self.request, self.requests()[::2])
        return self.rows(mask), self.rows(~mask)

    def first_requests(self, share: float = 0.5) -> NDArray[np.bool_]:
        """Which tokens are of the first part of :meth:`split_requests`, bool [T]."""
        first: list[NDArray[np.int32]] = []
        domain = np.zeros(self.num_tokens, np.int16) if self.domain is None else self.domain
        for index in np.unique(domain):
            part = self.request[domain == index]
            ids, at = np.unique(part, return_index=True)
            if ids.size < 2:
                raise TraceError(
                    f"{self.name} has {ids.size} request to split into two parts", hint="name --fit traces"
                )
            ids = ids[np.argsort(at)]
            first.append(ids[: min(ids.size - 1, max(1, round(share * ids.size)))])
        return np.isin(self.request, np.concatenate(first))

    def save(self, path: str | Path) -> None:
        """Write the promised ``.npz`` (docs/formats.md), compressed, without pickles; it appears whole or not at all.

        Raises
        ------
        TraceError : as :func:`poise.util.files.replacing`.
        """
        small: Any = np.uint8 if self.num_experts <= 256 else np.int16
        if int(self.experts.min()) == NO_EXPERT:
            small = np.int8 if self.num_experts <= 128 else np.int16
        arrays: dict[str, Any] = {
            "format": np.int32(FORMAT), "experts": self.experts.astype(small),
            "num_experts": np.int32(self.num_experts),
        }  # fmt: skip
        for name in ("request", "is_decode", "step", "home", "weights", "layer_ids", "domain"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        if self.domain_names:
            arrays["domain_names"] = np.array(self.domain_names)
        with replacing(path, TraceError) as stream:
            np.savez_compressed(stream, **arrays)

    def __repr__(self) -> str:
        return (
            f"RoutingTrace({self.name}: {self.num_tokens} tokens, {len(self.requests())} requests, "
            f"{self.num_layers} layers, top-{self.top_k} of {self.num_experts})"
        )


@dataclass(frozen=True, slots=True, eq=False)
class LoadProfile:
    """Loads without tokens: how many tokens each expert got, per recorded step.

    Parameters
    ----------
    load_BLE : [B, L, E], tokens of each expert in each of B recorded steps (or whole workloads), in the type of the
        record: whole numbers or floats. Sums of it want ``dtype=float``.
    layer_ids : int32 [L].
    top_k : K if known, else 1 (a token then counts K times in load_BLE).
    name : file it came from.
    rank : the rank that counted it, where the file says so: of several such files not each is a step.
    idle_BL : float64 [B, L] or None, picks of identity experts beside those of load_BLE: they compute nothing, and
        count only for how many tokens a step has.
    notes : what a reader should know of how several files became one.
    part : these are some of a recording's steps (:meth:`steps`): layers that are idle in them stay.
    said : what the file, or the user, says of the numbers, keys of :data:`poise.routing.said.SAID`.
    """

    load_BLE: NDArray[Any]
    layer_ids: NDArray[np.int32] = None  # type: ignore[assignment]  # filled in
    top_k: int = 1
    name: str = field(default="profile")
    rank: int | None = None
    idle_BL: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = ()
    part: bool = False
    said: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        load = np.asarray(self.load_BLE)
        if load.dtype.kind not in "iuf":
            raise TraceError(f"loads must be numbers, got {load.dtype}")
        if not isinstance(self.top_k, int | np.integer) or self.top_k < 1:
            raise TraceError(f"top_k must be a whole number of at least 1, got {self.top_k}")
        load = kept(load, {2: np.float32, 16: np.float64}.get(load.itemsize) if load.dtype.kind == "f" else None)
        if load.ndim == 2:
            load = load[None]
        if load.ndim != 3 or 0 in load.shape:
            raise TraceError(f"loads must be [L, E] or [steps, L, E] and not empty, got shape {load.shape}")
        if load.shape[2] > MAX_EXPERTS:
            raise TraceError(f"{load.shape[2]} experts, at most {MAX_EXPERTS} are supported")
        if not finite(load) or load.min() < 0 or load.max() > MAX_LOAD:
            raise TraceError(f"loads must be finite and within 0..{MAX_LOAD:g}")
        ids = np.arange(load.shape[1]) if self.layer_ids is None else self.layer_ids
        ids = integers("layer_ids", ids, 0, 65_535, np.int32)
        if ids.shape != (load.shape[1],) or (np.diff(ids) <= 0).any():
            raise TraceError(
                f"layer_ids must be {load.shape[1]} ascending numbers, got {np.atleast_1d(ids).tolist()[:8]}"
            )
        busy = np.asarray(load.any(axis=(0, 2)))
        if not busy.any():
            raise NoTrafficError("all loads are 0", hint="record again with traffic, or drop the file")
        busy |= self.part
        if self.idle_BL is not None:
            object.__setattr__(self, "idle_BL", _idle(self.idle_BL, load.shape[:2])[:, busy])
        if not busy.all():
            load, ids = np.ascontiguousarray(load[:, busy]), ids[busy]
            load.flags.writeable = ids.flags.writeable = False
        object.__setattr__(self, "load_BLE", load)
        object.__setattr__(self, "layer_ids", ids)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load_BLE.shape[2])

    @property
    def num_layers(self) -> int:
        """L; layers without any load in the whole recording (dense ones) are left out."""
        return int(self.load_BLE.shape[1])

    @property
    def num_steps(self) -> int:
        """Recorded steps or workloads."""
        return int(self.load_BLE.shape[0])

    def steps(self, rows: slice) -> LoadProfile:
        """Some of the recorded steps, in all layers of the recording.

        Raises
        ------
        NoTrafficError : none of them has any load.
        """
        idle = None if self.idle_BL is None else self.idle_BL[rows]  # the loads are a view
        return replace(self, load_BLE=self.load_BLE[rows], idle_BL=idle, part=True)

    def middle(self) -> int | None:
        """The step with which the later half of those that have traffic begins; None: fewer than two have any."""
        busy = np.flatnonzero(self.load_BLE.any(axis=(1, 2)))
        return int(busy[(busy.size + 1) // 2]) if busy.size > 1 else None


def _idle_last(experts_TLK: NDArray[np.int16], of_TLK: NDArray[Any]) -> NDArray[Any]:
    """``of_TLK`` with what belongs to picks of -1 moved behind the rest of its token's, in a new array."""
    out = np.empty_like(of_TLK)
    for rows in row_blocks(experts_TLK, 8):
        behind = np.argsort(experts_TLK[rows] == NO_EXPERT, axis=2, kind="stable")
        out[rows] = np.take_along_axis(of_TLK[rows], behind, axis=2)
    return out


def _idle(value: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    idle = np.asarray(value)
    idle = idle[None] if idle.ndim == 1 else idle
    if idle.dtype.kind not in "iuf" or idle.shape != shape:
        raise TraceError(f"picks that compute nothing {idle.dtype} {idle.shape} for loads of [steps, layers] {shape}")
    if not np.isfinite(idle).all() or idle.min() < 0 or idle.max() > MAX_LOAD:
        raise TraceError(f"picks that compute nothing must be finite and within 0..{MAX_LOAD:g}")
    return idle.astype(np.float64)
