"""UltraEP: replicas and token quotas solved together from exact loads (arXiv 2606.04101; code Dots-Infra/UltraEP, MIT).

After the gate; weights are pushed in full sight inside the NVLink domain (a node) and freed after the step. Each domain
for itself:

    Step 1  Load of each rank with every token at its owner. The threshold lies between ``target`` times the domain's
            mean and the largest load.
    Step 2  Oracle: can every rank be brought to a threshold? Ranks by load, fullest first, export their excess; their
            experts, fullest first, each to the rank with most room below the threshold that has a free slot and no
            copy, as much as need, room and expert allow (one token stays with the owner). An export below the floor is
            not made. No replica without a quota: every export is both.
    Step 3  Fast probe: the oracle at (1 + ``eps``) times the lower end, then twice more, each 1 % of the largest load
            higher; the floor here is the excess left over the ranks that could take it. The first that works is taken.
    Step 4  Else the oracle at the lower end with ``min_tokens`` as the floor, and if that fails a search with four
            probes a round up to the largest load. (The code first bisects for the least threshold under which all
            excess fits into all room: at the mean or above it always does, so the lower end it is.)

Chosen here. Holders of a static placement are all native: their tokens are first split exactly
(:func:`poise.stepwise.methods.split.exact_split`, the published start where no expert is replicated), and each
exports what it has. ``probe=False`` leaves step 3 out: then every replica gets at least ``min_tokens``, which the
published code does not promise (its fast probe has a floor of its own). ``cross_node=True`` makes the machine one
domain. Ceilings are taken in 64 bits, the code's in 32. Sources are matched own device first, then own node (the
code: own rank, then in proportion). Weights are priced without the published relay trees. Device speeds are not
looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.methods.split import even_quota, exact_split
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy
from poise.util.compiled import compiled
from poise.util.errors import OptionError

PROBES = 4
"""Thresholds that are tried a round in step 4."""


class OneDomain(NamedTuple):
    """A domain before its exports.

    Parameters
    ----------
    quota_ED : int64 [E, D], tokens of each expert on each of all devices; ``load_D`` int64 [D], their sums.
    order_DX : int64 [D, X], each device's experts, fullest first.
    held_ED : bool [E, D], holders.
    first, last : the domain's devices, ``last`` left out.
    slots : free ones of each device.
    """

    quota_ED: NDArray[np.int64]
    load_D: NDArray[np.int64]
    order_DX: NDArray[np.int64]
    held_ED: NDArray[np.bool_]
    first: int
    last: int
    slots: int


class Aims(NamedTuple):
    """Settings of :class:`UltraEp`; ``keep`` tokens stay with the owner."""

    target: float
    eps: float
    min_tokens: int
    probe: bool
    keep: int


class Exports(NamedTuple):
    """What leaves which rank.

    Parameters
    ----------
    made_X4 : int64 [X, 4]: expert, from, to, tokens.
    possible : whether every rank comes down to the threshold; else the exports are worth nothing.
    """

    made_X4: NDArray[np.int64]
    possible: bool


@compiled
def _best_target(
    domain: OneDomain, held_D: NDArray[np.bool_], room_D: NDArray[np.int64], slots_D: NDArray[np.int64], least: int,
    want: int,
) -> int:  # fmt: skip
    """The roomiest rank that can take at least ``least`` of ``want`` tokens, or -1."""
    best = -1
    for d in range(domain.first, domain.last):
        if held_D[d] or slots_D[d] == 0 or room_D[d] <= 0 or min(want, room_D[d]) < least:
            continue
        if best < 0 or room_D[d] > room_D[best]:
            best = d
    return best


@compiled
def export(domain: OneDomain, threshold: int, floor: int, keep: int) -> Exports:
    """Step 2; ``floor`` 0: the fast probe's, the excess left over the ranks that could take it."""
    load_D, first, last = domain.load_D, domain.first, domain.last
    devices = domain.held_ED.shape[1]
    made_X4 = np.zeros((domain.slots * devices, 4), np.int64)
    held = domain.held_ED.copy()
    room_D, slots_D = np.zeros(devices, np.int64), np.full(devices, domain.slots)
    for d in range(first, last):
        room_D[d] = max(0, threshold - load_D[d])
    count = 0
    for source in first + np.argsort(-load_D[first:last], kind="mergesort"):
        need = load_D[source] - threshold
        if need <= 0:
            break
        for e in domain.order_DX[source]:
            have = domain.quota_ED[e, source] - keep
            if need == 0 or have <= 0:
                break
            while need > 0 and have > 0:
                want, least = min(need, have), floor
                if floor == 0:
                    takers = 0
                    for d in range(first, last):
                        takers += not held[e, d] and slots_D[d] > 0 and room_D[d] > 0
                    if takers == 0:
                        break
                    least = -(-need // takers)
                to = _best_target(domain, held[e], room_D, slots_D, least, want)
                if to < 0:
                    break
                tokens = min(want, room_D[to])
                made_X4[count, 0], made_X4[count, 1], made_X4[count, 2], made_X4[count, 3] = e, source, to, tokens
                count += 1
                held[e, to] = True
                slots_D[to] -= 1
                room_D[to] -= tokens
                need -= tokens
                have -= tokens
        if need > 0:
            return Exports(made_X4[:count], False)
    return Exports(made_X4[:count], True)


@compiled
def solve_domain(domain: OneDomain, aims: Aims) -> tuple[int, Exports, bool]:
    """Steps 1, 3 and 4: the threshold, the exports, and whether the fast probe found them."""
    load_D, keep = domain.load_D[domain.first : domain.last], aims.keep
    total, most = load_D.sum(), load_D.max()
    low = int(np.ceil(total / load_D.size * aims.target - 1e-9))
    high = max(low, most)
    if aims.probe:
        threshold = int(np.ceil(low * (1.0 + aims.eps) - 1e-9))
        for _ in range(3):
            found = export(domain, threshold, 0, keep)
            if found.possible:
                return threshold, found, True
            threshold = min(high, threshold + max(1, -(-high // 100)))
    found = export(domain, low, aims.min_tokens, keep)
    if found.possible:
        return low, found, False
    low = min(low + 1, high)
    while low < high:
        span, base = high - low, low
        for i in range(min(PROBES, span)):
            threshold = base + i if span <= PROBES else base + span * (i + 1) // (PROBES + 1)
            if export(domain, threshold, aims.min_tokens, keep).possible:
                high = threshold
                break
            low = threshold + 1
    return low, export(domain, low, aims.min_tokens, keep), False


@dataclass(frozen=True, slots=True)
class UltraEp(StepPolicy):
    """See the module docstring.

    Parameters
    ----------
    min_tokens : least tokens of a replica (step 4).
    eps : what the fast probe may lose, as a share of the domain's mean.
    target : lower end of the search, as a multiple of the domain's mean; larger: fewer replicas.
    probe : whether to try step 3.
    cross_node : replicas may leave their node.
    empty_owner : the owner of an expert may be left without tokens.
    """

    name: ClassVar[str] = "ultra-ep"
    summary: ClassVar[str] = "exact loads: replicas and quotas together by a search on the largest load, inside a node"
    exact: ClassVar[bool] = True
    min_tokens: int = 1024
    eps: float = 0.01
    target: float = 1.0
    probe: bool = True
    cross_node: bool = False
    empty_owner: bool = False

    def __post_init__(self) -> None:
        if not (self.min_tokens >= 1 and 0 <= self.eps < np.inf and 1 <= self.target < np.inf):
            raise OptionError(
                f"ultra-ep needs min_tokens >= 1, eps >= 0 and target >= 1, got {self.min_tokens}, {self.eps} and"
                f" {self.target}"
            )

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """All steps."""
        static_ED = view.static_ED
        devices = static_ED.shape[1]
        if view.step_slots == 0 and not (static_ED.sum(axis=1) > 1).any():
            return StepPlan(static_ED, even_quota(load_SE.sum(axis=0), static_ED), passive=True)
        start_ED = exact_split(load_SE, static_ED, np.ones(devices))
        sizes = np.array([devices]) if self.cross_node else view.price.cluster.devices_per_node_N
        last = np.cumsum(sizes)
        quota_ED, thresholds, probed = start_ED.copy(), [], []
        order_DX = np.argsort(-start_ED, axis=0, kind="stable")[: static_ED.sum(axis=0).max()].T
        load_D, order_DX = start_ED.sum(axis=0), np.ascontiguousarray(order_DX)
        aims = Aims(self.target, self.eps, self.min_tokens, self.probe, 0 if self.empty_owner else 1)
        for a, b in zip(last - sizes, last, strict=True):
            domain = OneDomain(start_ED, load_D, order_DX, static_ED, int(a), int(b), view.step_slots)
            threshold, found, fast = solve_domain(domain, aims)
            for e, source, to, tokens in found.made_X4:
                quota_ED[e, source] -= tokens
                quota_ED[e, to] += tokens
            thresholds.append(int(threshold))
            probed.append(bool(fast))
        details = {"thresholds": thresholds, "probed": probed}
        return StepPlan(static_ED | (quota_ED > 0), quota_ED, details=details)
