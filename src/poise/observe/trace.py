"""RoutingTrace: which experts each token chose, in every MoE layer. LoadProfile: how many tokens each expert got."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.errors import OptionError, TraceError

MAX_EXPERTS = 32_767
MAX_LAYERS = 4_096
MAX_TOKENS = 2**31 - 1
MAX_ENTRIES = 2**32
MAX_LOAD_ENTRIES = 2**29
MAX_LOAD = 1e18
MAX_NAME = 256
Phase = Literal["prefill", "decode"]
_ROWS = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """Routing of T tokens through L MoE layers, K experts each. Arrays are read-only.

    Parameters
    ----------
    experts : int16 [T, L, K], logical expert ids, heaviest first where the recorder knew ([T, L] is read as K = 1).
        With ``weights`` they are put in that order.
    num_experts : E.
    request : int32 [T], request a token belongs to; rows of one request keep their order. Default: one request each.
    is_decode : bool [T], token was generated (else prefill). Default: all prefill.
    step : int32 [T] or None, forward pass of the token, if the recorder knew it.
    home : int32 [T] or None, home rank, if the recorder knew it.
    weights : float32 [T, L, K] or None, router weights.
    layer_ids : int32 [L], index of each MoE layer among the model's decoder layers. Default 0..L-1.
    domain : int16 [T] or None, index into domain_names.
    domain_names : names of the domains.
    name : file or generator it came from.

    Raises
    ------
    TraceError : shapes disagree, values out of range or not finite, ids not integers, an expert twice in a token.
    """

    experts: NDArray[np.int16]
    num_experts: int
    request: NDArray[np.int32] | None = None
    is_decode: NDArray[np.bool_] | None = None
    step: NDArray[np.int32] | None = None
    home: NDArray[np.int32] | None = None
    weights: NDArray[np.float32] | None = None
    layer_ids: NDArray[np.int32] | None = None
    domain: NDArray[np.int16] | None = None
    domain_names: tuple[str, ...] = ()
    name: str = field(default="trace")
    # shape: T, L, K = experts.shape

    def __post_init__(self) -> None:
        num_experts = _count(self.num_experts, "num_experts", MAX_EXPERTS)
        experts = np.asarray(self.experts)
        experts = experts[:, :, None] if experts.ndim == 2 else experts
        if experts.ndim != 3 or 0 in experts.shape:
            raise TraceError(
                f"experts must be [tokens, layers] or [tokens, layers, top_k] and not empty, got {list(experts.shape)}"
            )
        tokens, layers, top_k = experts.shape
        if tokens > MAX_TOKENS or layers > MAX_LAYERS or experts.size > MAX_ENTRIES:
            raise TraceError(f"experts {list(experts.shape)} is beyond {MAX_LAYERS} layers or {MAX_ENTRIES} entries")
        if top_k > num_experts:
            raise TraceError(f"top-{top_k} routing needs {top_k} experts, num_experts is {num_experts}")
        experts = freeze_ints(experts, "expert ids", np.int16, high=num_experts - 1)
        weights = None if self.weights is None else _weights(np.asarray(self.weights), experts.shape)
        if weights is not None and (np.diff(weights, axis=2) > 0).any():
            by_weight = np.argsort(-weights, axis=2, kind="stable")
            experts = _frozen(np.take_along_axis(experts, by_weight, axis=2), np.int16)
            weights = _frozen(np.take_along_axis(weights, by_weight, axis=2), np.float32)
        check_distinct(experts)
        request = np.arange(tokens) if self.request is None else self.request
        decode = np.zeros(tokens, bool) if self.is_decode is None else self.is_decode
        names = tuple(self.domain_names)
        if (self.domain is None) != (not names):
            raise TraceError(f"{len(names)} domain names {'without' if names else 'for'} domain numbers of the tokens")
        if len(set(names)) != len(names) or any(not isinstance(n, str) or not 0 < len(n) <= MAX_NAME for n in names):
            raise TraceError(f"domain names must be different texts of 1 to {MAX_NAME} letters, got {names[:8]}")
        values: dict[str, Any] = {
            "num_experts": num_experts,
            "experts": experts,
            "weights": weights,
            "request": freeze_ints(_sized(request, "request", tokens), "request", np.int32),
            "is_decode": freeze_ints(_sized(decode, "is_decode", tokens), "is_decode", np.bool_, high=1),
            "layer_ids": layer_ids_of(self.layer_ids, layers),
            "domain_names": names,
        }
        for attr in ("step", "home"):
            if (given := getattr(self, attr)) is not None:
                values[attr] = freeze_ints(_sized(given, attr, tokens), attr, np.int32)
        if self.domain is not None:
            domain = _sized(self.domain, "domain", tokens)
            values["domain"] = freeze_ints(domain, "domain", np.int16, high=len(names) - 1)
        for attr, value in values.items():
            object.__setattr__(self, attr, value)

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

    @property
    def request_T(self) -> NDArray[np.int32]:
        """Request of each token, int32 [T]."""
        assert self.request is not None
        return self.request

    @property
    def is_decode_T(self) -> NDArray[np.bool_]:
        """Token was generated, bool [T]."""
        assert self.is_decode is not None
        return self.is_decode

    @property
    def layer_ids_L(self) -> NDArray[np.int32]:
        """Index of each MoE layer among the model's decoder layers, int32 [L]."""
        assert self.layer_ids is not None
        return self.layer_ids

    def requests(self) -> NDArray[np.int32]:
        """Request ids in order of first appearance."""
        ids, first = np.unique(self.request_T, return_index=True)
        return ids[np.argsort(first)]

    def take(self, rows: NDArray[Any], *, name: str | None = None) -> RoutingTrace:
        """The trace of some rows: a bool mask or indices, [T]."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        per_token = ("request", "is_decode", "step", "home", "weights", "domain")
        kept = {a: None if getattr(self, a) is None else getattr(self, a)[rows] for a in per_token}
        return RoutingTrace(
            self.experts[rows], self.num_experts, layer_ids=self.layer_ids, domain_names=self.domain_names,
            name=self.name if name is None else name, **kept,
        )  # fmt: skip

    def select(
        self, *, domains: str | Iterable[str] | None = None, phase: Phase | None = None,
        requests: Iterable[int] | None = None,
    ) -> RoutingTrace:  # fmt: skip
        """The tokens of some domains (names), of one phase, of some requests (ids).

        Raises
        ------
        TraceError : an unknown domain or request, or no token is left.
        OptionError : an unknown phase.
        """
        keep = np.ones(self.num_tokens, bool)
        if domains is not None:
            wanted = [domains] if isinstance(domains, str) else list(domains)
            for domain in wanted:
                if domain not in self.domain_names:
                    known = ", ".join(self.domain_names) or "none"
                    raise TraceError(f"{self.name} has no domain {domain!r}", hint=f"its domains: {known}")
            keep &= np.isin(self.domain, [self.domain_names.index(d) for d in wanted])
        if phase is not None:
            if phase not in ("prefill", "decode"):
                raise OptionError(f"unknown phase {phase!r}", hint="prefill or decode")
            keep &= self.is_decode_T == (phase == "decode")
        if requests is not None:
            ids = np.unique(np.fromiter(requests, np.int64))
            unknown = np.setdiff1d(ids, self.request_T)
            if unknown.size:
                raise TraceError(f"{self.name} has no request {unknown[0]} ({unknown.size} such in all)")
            keep &= np.isin(self.request_T, ids)
        if not keep.any():
            raise TraceError(
                f"none of the {self.num_tokens} tokens of {self.name} is in this selection",
                hint=f"it has {int(self.is_decode_T.sum())} decode tokens and {len(self.domain_names)} domains",
            )
        return self.take(keep)

    def split_requests(self, share: float = 0.5) -> tuple[RoutingTrace, RoutingTrace]:
        """Data split (fit, judge): the first ``share`` of the requests in order of first appearance, and the rest.

        Raises
        ------
        OptionError : share is not between 0 and 1.
        TraceError : there are fewer than two requests.
        """
        if not 0 < share < 1:
            raise OptionError(f"share must lie between 0 and 1, got {share!r}")
        ids = self.requests()
        if ids.size < 2:
            raise TraceError(f"{self.name} has {ids.size} request, a split needs 2", hint="give a second trace instead")
        first = min(max(round(share * ids.size), 1), ids.size - 1)
        in_first = np.isin(self.request_T, ids[:first])
        return self.take(in_first), self.take(~in_first)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed ``.npz`` (format: docs/formats.md), whole or not at all.

        Raises
        ------
        TraceError : the name does not end in .npz, or the file cannot be written.
        """
        small = np.uint8 if self.num_experts <= 256 else np.int16
        arrays: dict[str, NDArray[Any]] = {
            "experts": self.experts.astype(small), "num_experts": np.array(self.num_experts),
            "request": self.request_T, "is_decode": self.is_decode_T, "layer_ids": self.layer_ids_L,
        }  # fmt: skip
        optional = {a: getattr(self, a) for a in ("step", "home", "weights", "domain")}
        arrays |= {attr: value for attr, value in optional.items() if value is not None}
        if self.domain_names:
            arrays["domain_names"] = np.array(self.domain_names)
        save_npz(path, arrays)

    def __repr__(self) -> str:
        parts = [f"{self.num_tokens} tokens", f"{len(self.requests())} requests", f"{self.num_layers} layers",
                 f"{self.num_experts} experts", f"top-{self.top_k}",
                 f"{np.count_nonzero(self.is_decode_T) / self.num_tokens:.0%} decode"]  # fmt: skip
        if self.step is not None:
            parts.append(f"{np.unique(self.step).size} steps")
        if self.domain_names:
            shown = ", ".join(self.domain_names[:6]) + (", ..." if len(self.domain_names) > 6 else "")
            parts.append(f"domains {shown}")
        return f"RoutingTrace({self.name}: {', '.join(parts)})"


@dataclass(frozen=True, slots=True, eq=False)
class LoadProfile:
    """Loads without tokens: how many tokens each expert got, per recorded step. Layers without any load are dropped.

    Parameters
    ----------
    load_BLE : float64 [B, L, E], tokens of each expert in each of B recorded steps ([L, E] is read as B = 1).
    layer_ids : int32 [L], index of each layer among the model's decoder layers. Default 0..L-1, before dropping.
    top_k : K if known, else 1 (a token then counts K times in load_BLE).
    affinity : (layer id, layer id) -> float64 [E, E] pair counts between two recorded layers, where the file has them.
    name : file it came from.

    Raises
    ------
    TraceError : wrong shapes, loads negative or not finite, or no load at all.
    """

    load_BLE: NDArray[np.float64]
    layer_ids: NDArray[np.int32] | None = None
    top_k: int = 1
    affinity: Mapping[tuple[int, int], NDArray[np.float64]] = field(default_factory=dict)
    name: str = field(default="profile")

    def __post_init__(self) -> None:
        load = np.asarray(self.load_BLE)
        load = load[None] if load.ndim == 2 else load
        if load.ndim != 3 or 0 in load.shape:
            raise TraceError(
                f"loads must be [layers, experts] or [steps, layers, experts] and not empty, got {list(load.shape)}"
            )
        if load.shape[1] > MAX_LAYERS or load.shape[2] > MAX_EXPERTS or load.size > MAX_LOAD_ENTRIES:
            raise TraceError(
                f"loads {list(load.shape)} are beyond {MAX_LAYERS} layers, {MAX_EXPERTS} experts or "
                f"{MAX_LOAD_ENTRIES} entries"
            )
        load = _amounts(load, "loads")
        ids = layer_ids_of(self.layer_ids, load.shape[1])
        busy = load.any(axis=(0, 2))
        if not busy.any():
            raise TraceError(f"all {load.size} loads are 0", hint="record while requests run")
        top_k = _count(self.top_k, "top_k", load.shape[2])
        affinity = {}
        for pair, count in self.affinity.items():
            pair_count = np.asarray(count)
            if pair_count.shape != (load.shape[2],) * 2 or not set(pair) <= set(ids.tolist()):
                raise TraceError(
                    f"pair counts of layers {pair} have shape {list(pair_count.shape)}, the profile has "
                    f"{load.shape[2]} experts and layers {ids.tolist()[:12]}"
                )
            affinity[pair] = _frozen(_amounts(pair_count, f"pair counts of layers {pair}"), np.float64)
        for attr, value in {
            "load_BLE": _frozen(load[:, busy], np.float64), "layer_ids": _frozen(ids[busy], np.int32),
            "top_k": top_k, "affinity": affinity,
        }.items():  # fmt: skip
            object.__setattr__(self, attr, value)

    @property
    def num_steps(self) -> int:
        """B."""
        return int(self.load_BLE.shape[0])

    @property
    def num_layers(self) -> int:
        """L, layers with load."""
        return int(self.load_BLE.shape[1])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load_BLE.shape[2])

    @property
    def layer_ids_L(self) -> NDArray[np.int32]:
        """Index of each layer among the model's decoder layers, int32 [L]."""
        assert self.layer_ids is not None
        return self.layer_ids

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed ``.npz``: ``counts``, ``layers``, ``top_k`` and, where known, ``cross``, ``layer_pairs``.

        Raises
        ------
        TraceError : the name does not end in .npz, or the file cannot be written.
        """
        arrays = {"counts": self.load_BLE, "layers": self.layer_ids_L, "top_k": np.array(self.top_k)}
        if self.affinity:
            arrays["cross"] = np.stack(list(self.affinity.values()))
            arrays["layer_pairs"] = np.array(list(self.affinity))
        save_npz(path, arrays)

    def __repr__(self) -> str:
        pairs = f", pair counts of {len(self.affinity)} layer pairs" if self.affinity else ""
        return (
            f"LoadProfile({self.name}: {self.num_steps} steps, {self.num_layers} layers, {self.num_experts} experts, "
            f"{self.load_BLE.sum():.4g} counts{pairs})"
        )


def save_npz(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to a new file and put it in place when it is complete."""
    target = Path(path)
    if target.suffix != ".npz":
        raise TraceError(f"{target} must end in .npz")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
        part.replace(target)
    except OSError as err:
        raise TraceError(f"cannot write {target}: {err}") from err
    finally:
        part.unlink(missing_ok=True)


def check_distinct(experts: NDArray[np.int16]) -> None:
    """Raise TraceError if a token chose an expert twice in a layer; experts [T, L, K], in blocks of rows."""
    if experts.shape[2] == 1:
        return
    for start in range(0, len(experts), _ROWS):
        ordered = np.sort(experts[start : start + _ROWS], axis=2)
        twice = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
        if twice.size:
            token, layer, k = (int(x) for x in twice[0])
            raise TraceError(
                f"token {start + token} has expert {ordered[token, layer, k]} twice among its {experts.shape[2]} "
                f"in layer {layer}",
                hint="a top-k router chooses different experts; padding must be left out",
            )


def layer_ids_of(given: NDArray[Any] | None, layers: int) -> NDArray[np.int32]:
    """Checked layer ids: int32 [L], ascending without repeats. Default 0..L-1."""
    ids = freeze_ints(np.arange(layers) if given is None else np.asarray(given), "layer_ids", np.int32)
    if ids.shape != (layers,):
        raise TraceError(f"{ids.size} layer ids for {layers} layers")
    if (np.diff(ids) <= 0).any():
        raise TraceError(f"layer ids must ascend without repeats, got {ids.tolist()[:12]}")
    return ids


def freeze_ints(values: NDArray[Any], what: str, dtype: type[np.generic], *, high: int | None = None) -> NDArray[Any]:
    """Whole numbers in 0..high (default: what int32 holds) as a read-only array that the caller cannot write to."""
    if values.dtype.kind not in ("iub" if dtype is np.bool_ else "iu"):
        raise TraceError(f"{what} must be integers, got {values.dtype}", hint=f"convert {what} to integers first")
    high = 2**31 - 1 if high is None else high
    low_seen, high_seen = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low_seen < 0 or high_seen > high:
        raise TraceError(f"{what} must lie in 0..{high}, got {low_seen}..{high_seen}")
    return _frozen(values, dtype)


def _frozen(values: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    out = np.ascontiguousarray(values, dtype=dtype)
    if out.flags.writeable and np.may_share_memory(out, values):
        out = out.copy()
    out.flags.writeable = False
    return out


def _sized(values: Any, what: str, tokens: int) -> NDArray[Any]:
    arr = np.asarray(values)
    if arr.shape != (tokens,):
        raise TraceError(f"{what} has shape {list(arr.shape)}, experts has {tokens} tokens")
    return arr


def _count(value: Any, what: str, high: int) -> int:
    arr = np.asarray(value)
    if arr.ndim or arr.dtype.kind not in "iu" or not 1 <= int(arr) <= high:
        raise TraceError(f"{what} must be one whole number in 1..{high}, got {str(value)[:80]}")
    return int(arr)


def _amounts(values: NDArray[Any], what: str) -> NDArray[np.float64]:
    if values.dtype.kind not in "iuf":
        raise TraceError(f"{what} must be numbers, got {values.dtype}")
    out = values.astype(np.float64)
    if not np.isfinite(out).all():
        raise TraceError(f"{what} must be finite, {int((~np.isfinite(out)).sum())} of {out.size} are not")
    if out.min() < 0 or out.max() > MAX_LOAD:
        raise TraceError(f"{what} must lie in 0..{MAX_LOAD:g}, got {out.min():g}..{out.max():g}")
    return out


def _weights(weights: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    weights = weights[:, :, None] if weights.ndim == 2 and shape[2] == 1 else weights
    if weights.shape != shape:
        raise TraceError(f"weights have shape {list(weights.shape)}, experts {list(shape)}")
    if weights.dtype.kind != "f" or not np.isfinite(weights).all() or weights.min() < 0 or weights.max() > 1e30:
        raise TraceError(f"router weights must be finite floats of at least 0, got {weights.dtype} up to "
                         f"{weights.max()}")  # fmt: skip
    return _frozen(weights, np.float32)
