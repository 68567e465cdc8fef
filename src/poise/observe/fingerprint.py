"""Fingerprint of traffic: enough to tell later whether a placement was fitted on what it is judged on.

A trace is known by its *units*: the prefill and the decoded part of each request, each as one number that depends on
the experts of all its tokens in order, and on nothing else (not on request numbers, homes, file or batching). Parts of
requests that many share, such as a system prompt, are no units. Where requests are too short to be told apart, windows
of consecutive tokens are. Of the numbers the least :data:`SKETCH` are kept, a fair sample (bottom-k sketch).
Loads are known by each recorded step, and all together, up to a factor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.observe.profile import load_LE
from poise.observe.trace import LoadProfile, RoutingTrace

SKETCH = 8192
CHOICES = 32
"""Fewest expert choices of a unit: with fewer, different requests may well look the same."""
LEAST = 8
"""Fewest sampled units that say anything about the rest."""
FITTED = 0.02
"""Share of judged traffic from which on a plan counts as fitted on it."""

_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Fingerprint:
    """What :func:`fingerprint` keeps. Both arrays ascend, each number once, read-only.

    Parameters
    ----------
    units : uint64 [<= SKETCH], sample of the units of a trace; empty for loads.
    loads : uint64 [n], the sum of all loads, and of recorded loads each step.
    """

    units: NDArray[np.uint64]
    loads: NDArray[np.uint64]

    def __post_init__(self) -> None:
        for array in (self.units, self.loads):
            array.flags.writeable = False

    def share_of(self, judged: Fingerprint) -> float | None:
        """Share of ``judged`` traffic that is in this one, 0 to 1; None where it cannot be told."""
        if not (self.units.size or self.loads.size):
            return 0.0
        if self.units.size and judged.units.size:
            top = np.uint64(2**64 - 1) if self.units.size < SKETCH else self.units[-1]
            sample = judged.units[judged.units <= top]
            if sample.size < min(LEAST, judged.units.size):
                return None
            return float(np.isin(sample, self.units).mean())
        known = np.isin(judged.loads, self.loads)
        if self.units.size or judged.units.size:  # a trace and loads: what one sums up to the other may hold
            return 1.0 if known.any() else None
        return float(known.mean())

    def joined(self, other: Fingerprint) -> Fingerprint:
        """Of both traffics together."""
        units = np.union1d(self.units, other.units)[:SKETCH]  # the least of both are the least of all
        return Fingerprint(units, np.union1d(self.loads, other.loads))


NO_TRAFFIC = Fingerprint(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
"""Of plans that look at no traffic: none is fitted on."""


def fingerprint(traffic: RoutingTrace | LoadProfile) -> Fingerprint:
    """The fingerprint of a trace or of recorded loads."""
    if isinstance(traffic, LoadProfile):
        steps = [_of_load(load) for load in traffic.load_BLE]
        return Fingerprint(np.zeros(0, np.uint64), _unique([*steps, _of_load(traffic.load_BLE.sum(axis=0))]))
    total = load_LE(traffic.experts, traffic.num_experts)
    units = np.unique(_units(traffic))[:SKETCH]
    return Fingerprint(units, _unique([_of_load(total)]))


def _unique(values: list[int]) -> NDArray[np.uint64]:
    return np.unique(np.array(values, np.uint64))


def _of_load(load_LE: NDArray[Any]) -> int:
    """One number of loads [L, E] that does not depend on their scale."""
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
    assert trace.request is not None and trace.is_decode is not None
    layers, experts, tokens = trace.num_layers, trace.num_experts, trace.num_tokens
    salt_LE = _mixed(np.arange(1, layers * (experts + 1) + 1, dtype=np.uint64) * _STEP).reshape(layers, experts + 1)
    token_T = np.zeros(tokens, np.uint64)
    for layer in range(layers):
        token_T += salt_LE[layer, trace.experts[:, layer]].sum(axis=1, dtype=np.uint64)
    token_T = _mixed(token_T)
    order = np.lexsort((np.arange(tokens), trace.is_decode, trace.request))
    key = np.stack([trace.request[order], trace.is_decode[order].astype(np.int32)])
    first = np.flatnonzero(np.append(True, (key[:, 1:] != key[:, :-1]).any(axis=0)))
    size = np.diff(np.append(first, tokens))
    place_T = np.arange(tokens) - np.repeat(first, size)
    with np.errstate(over="ignore"):
        placed_T = _mixed(token_T[order] + place_T.astype(np.uint64) * _STEP)
        units = np.add.reduceat(placed_T, first)
        units = _mixed(units + size.astype(np.uint64))
        told = size * layers * trace.top_k >= CHOICES
        if told.any():
            return units[told]
        width = min(tokens, -(-CHOICES // (layers * trace.top_k)))
        windows = np.zeros(tokens - width + 1, np.uint64)
        for i in range(width):
            windows += _mixed(token_T[i : tokens - width + 1 + i] + np.uint64(i) * _STEP)
    return _mixed(windows)
