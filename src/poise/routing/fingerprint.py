"""Fingerprint of traffic: enough to tell later whether a placement was fitted on what it is judged on.

A trace is known by its *units*, numbers that depend on the experts of some tokens in order, and on nothing else (not on
request numbers, homes, file or batching). They are of two kinds:

    parts     the prefill and the decoded part of each request; not those that many requests share
    windows   :data:`WINDOW` consecutive tokens of a request; not those that come twice, as in a system prompt. They
              know requests that were cut, or whose phases or bounds are not recorded

Where requests are too short for windows, those over consecutive requests are taken. Of each kind the least numbers are
kept, a fair sample (bottom-k sketch). Loads are known by each recorded step, and all together, up to a factor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.routing.profile import load_LE
from poise.routing.trace import LoadProfile, RoutingTrace, row_blocks

SKETCH = 8192
CHOICES = 32
"""Fewest expert choices of a unit: with fewer, different requests may well look the same."""
WINDOW = 8
LEAST = 8
"""Fewest sampled units that say anything about the rest; parts that more than a LEAST-th of the requests have in common
are no units."""
FITTED = 0.02
"""Share of judged traffic from which on a plan counts as fitted on it."""

_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Fingerprint:
    """What :func:`fingerprint` keeps. Both arrays ascend, each number once, read-only.

    Parameters
    ----------
    units : uint64 [<= SKETCH], sample of the units of a trace, parts even and windows odd; empty for loads.
    loads : uint64 [n], the sum of all loads, and of recorded loads each step.
    """

    units: NDArray[np.uint64]
    loads: NDArray[np.uint64]

    def __post_init__(self) -> None:
        for array in (self.units, self.loads):
            array.flags.writeable = False

    @property
    def is_empty(self) -> bool:
        """No traffic was looked at."""
        return not (self.units.size or self.loads.size)

    def share_of(self, judged: Fingerprint) -> float | None:
        """Share of ``judged`` traffic that is in this one, 0 to 1; None where it cannot be told."""
        if self.is_empty:
            return 0.0
        if self.units.size and judged.units.size:
            shares = [_share(*pair) for pair in zip(_kinds(self.units), _kinds(judged.units), strict=True)]
            return max((share for share in shares if share is not None), default=None)
        known = np.isin(judged.loads, self.loads)
        if self.units.size or judged.units.size:  # a trace and loads: what one sums up to the other may hold
            return 1.0 if known.any() else None
        return float(known.mean())

    def joined(self, other: Fingerprint) -> Fingerprint:
        """Of both traffics together."""
        units = np.union1d(self.units, other.units)
        return Fingerprint(_least(units), np.union1d(self.loads, other.loads))


NO_TRAFFIC = Fingerprint(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
"""Of plans that look at no traffic: none is fitted on."""


def fingerprint(traffic: RoutingTrace | LoadProfile) -> Fingerprint:
    """The fingerprint of a trace or of recorded loads."""
    if isinstance(traffic, LoadProfile):
        steps = [_of_load(load) for load in traffic.load_BLE]
        total_LE = traffic.load_BLE.sum(axis=0, dtype=np.float64)
        return Fingerprint(np.zeros(0, np.uint64), _unique([*steps, _of_load(total_LE)]))
    total = load_LE(traffic.experts, traffic.num_experts)
    return Fingerprint(_least(_units(traffic)), _unique([_of_load(total)]))


def _kinds(units: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Parts and windows."""
    odd = (units & np.uint64(1)).astype(bool)
    return units[~odd], units[odd]


def _least(units: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The least of each kind, ascending; of two samples together these are the least of all."""
    return np.unique(np.concatenate([kind[: SKETCH // 2] for kind in _kinds(np.unique(units))]))


def _share(fitted: NDArray[np.uint64], judged: NDArray[np.uint64]) -> float | None:
    """Share of judged units of one kind that are among the fitted; None where too few are left to tell."""
    sample = judged if fitted.size < SKETCH // 2 else judged[judged <= fitted[-1]]
    known = np.isin(sample, fitted)
    return float(known.mean()) if sample.size >= LEAST or known.any() else None


def _unique(values: list[int]) -> NDArray[np.uint64]:
    return np.unique(np.array(values, np.uint64))


def _of_load(load_LE: NDArray[Any]) -> int:
    """One number of loads [L, E] that does not depend on their scale."""
    load_LE = load_LE.astype(np.float64)
    share = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-300)
    data = np.round(share, 9).astype("<f8").tobytes() + str(load_LE.shape).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's finaliser: every bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _units(trace: RoutingTrace) -> NDArray[np.uint64]:
    """Numbers of all units, uint64 [n]."""
    tokens, choices = trace.num_tokens, trace.num_layers * trace.top_k
    token_T = _of_tokens(trace)
    order = np.lexsort((np.arange(tokens), trace.is_decode, trace.request))
    key = np.stack([trace.request[order], trace.is_decode[order].astype(np.int32)])
    parts, size = _parts(token_T[order], (key[:, 1:] != key[:, :-1]).any(axis=0))
    shared = max(1, len(trace.requests()) // LEAST)
    told = _rare(parts[size * choices >= CHOICES], shared)
    width = min(tokens, max(WINDOW, -(-CHOICES // choices)))
    at = np.argsort(trace.request, kind="stable")
    request_T = trace.request[at]
    whole, size = _parts(token_T[at], request_T[1:] != request_T[:-1])
    first = np.zeros(len(whole), bool)
    first[np.unique(whole, return_index=True)[1]] = True  # of requests that are the same one counts
    windows, inside = _windows(token_T[at], width), request_T[width - 1 :] == request_T[: tokens - width + 1]
    windows = windows[inside & np.repeat(first, size)[: len(windows)]]
    short = np.isin(trace.request, request_T[np.cumsum(size) - 1][size < width])
    if short.any():
        width = min(width, int(short.sum()))
        windows = np.concatenate([windows, _windows(token_T[short], width)])
    return np.concatenate([told & ~np.uint64(1), _rare(windows, 1) | np.uint64(1)])


def _of_tokens(trace: RoutingTrace) -> NDArray[np.uint64]:
    """One number a token, uint64 [T], that does not depend on the order of its picks."""
    layers, experts = trace.num_layers, trace.num_experts
    salt_LE = _mixed(np.arange(1, layers * (experts + 1) + 1, dtype=np.uint64) * _STEP).reshape(layers, experts + 1)
    token_T = np.zeros(trace.num_tokens, np.uint64)
    for rows in row_blocks(trace.experts, 16):
        here_T, experts_TLK = token_T[rows], trace.experts[rows]
        for layer in range(layers):
            here_T += salt_LE[layer, experts_TLK[:, layer]].sum(axis=1, dtype=np.uint64)
    return _mixed(token_T)


def _parts(token_T: NDArray[np.uint64], new_T: NDArray[np.bool_]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Numbers and sizes of runs of tokens; ``new_T`` [T - 1]: a run begins with the next token."""
    first = np.flatnonzero(np.append(True, new_T))
    size = np.diff(np.append(first, len(token_T)))
    place_T = np.arange(len(token_T)) - np.repeat(first, size)
    units = np.add.reduceat(_mixed(token_T + place_T.astype(np.uint64) * _STEP), first)
    return _mixed(units + size.astype(np.uint64)), size


def _windows(token_T: NDArray[np.uint64], width: int) -> NDArray[np.uint64]:
    """One number for ``width`` tokens from each token on, uint64 [T - width + 1]."""
    out = np.zeros(len(token_T) - width + 1, np.uint64)
    for i in range(width):
        out += _mixed(token_T[i : len(out) + i] + np.uint64(i * int(_STEP) % 2**64))
    return _mixed(out)


def _rare(units: NDArray[np.uint64], most: int) -> NDArray[np.uint64]:
    """The units that come at most so often, each once; all where none is left."""
    found, count = np.unique(units, return_counts=True)
    kept: NDArray[np.uint64] = found[count <= most]
    return kept if kept.size else found
