"""A placement of which fewer experts are lost with a device, or a node, for a stated share of the modelled seconds.

An expert is *alone* where all its holders lie in one unit (device or node): that unit's loss orphans it.

Step 1  Per layer, again and again the exchange that makes fewer experts alone and raises the sum of squared levels
        least: a replica of an expert that stays in two units becomes one of an expert that is alone elsewhere; where a
        unit has several devices, also two experts change places. A quarter, half, three quarters and all of it are
        options.
Step 2  Each option also with exchanges that lower the fullest device, where none makes an expert alone
        (:mod:`poise.planning.exchange`).
Step 3  All options are priced on the problem's own traffic. From the plan as it was, layer by layer the option that
        saves most experts a second, while the sum of all layers stays within the share. Under ``stay`` layers depend on
        each other: there all take the same option.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.cost.entries import picked_layers
from poise.planning.exchange import descend, endangered, make_layer, put, replaced, swapped, take
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.util.compiled import compiled

PARTS = (0.25, 0.5, 0.75, 1.0)
COST = 0.02
ANY = 1 << 61


@dataclass(frozen=True, slots=True, eq=False)
class Hardened:
    """What was made of a plan.

    Parameters
    ----------
    placement : the new one.
    alone_before, alone : experts whose holders lie in one unit, over all layers; so many orphans have all losses
        together.
    fewest : no placement with these slots has fewer: an expert that is not alone takes a slot more.
    cost : share of modelled seconds that was given up.
    """

    placement: Placement
    alone_before: int
    alone: int
    fewest: int
    cost: float


def alone_LE(placement: Placement, unit_D: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Experts all whose holders lie in one unit, bool [L, E]."""
    count_LED = placement.count_LED() > 0
    units = np.stack([count_LED[:, :, unit_D == unit].any(axis=2) for unit in np.unique(unit_D)])
    out: NDArray[np.bool_] = units.sum(axis=0) < 2
    return out


def hardened(
    problem: PlacementProblem, placement: Placement, unit_D: NDArray[np.int64], *, most_cost: float = COST
) -> Hardened:  # fmt: skip
    """The placement with fewer experts alone; steps: module docstring. ``unit_D`` int64 [D]: what is lost together."""
    batch, load_LE = problem.batch, problem.batch.load_LE()
    options = [placement.count_LED()] + [
        np.empty_like(placement.count_LED()) for _ in range(2 * len(PARTS))
    ]  # in the order of PARTS, without step 2 and with it
    for layer, load_E in enumerate(load_LE):
        for option, held_ED in enumerate(_options(options[0][layer] > 0, load_E, problem, unit_D), start=1):
            options[option][layer] = held_ED
    seconds_OL = np.stack([problem.seconds_L(counts) for counts in options])
    made = [problem.placed(counts, placement.method) for counts in options]
    alone_OL = np.stack([alone_LE(one, unit_D).sum(axis=1) for one in made])
    if problem.traffic == "stay":
        seconds_OL, alone_OL = seconds_OL.sum(axis=1, keepdims=True), alone_OL.sum(axis=1, keepdims=True)
    chosen = np.broadcast_to(_choose(seconds_OL, alone_OL, most_cost), (batch.num_layers,))
    rows = np.arange(seconds_OL.shape[1])
    picked = chosen[: len(rows)]
    before, after = float(seconds_OL[0].sum()), float(seconds_OL[picked, rows].sum())
    held = picked_layers([one.entries() for one in made], chosen)
    new = problem.placed(held, placement.method) if chosen.any() else placement
    used = int(np.minimum(problem.slots_D, batch.num_experts).sum())
    return Hardened(new, int(alone_OL[0].sum()), int(alone_OL[picked, rows].sum()),
                    batch.num_layers * max(0, 2 * batch.num_experts - used),
                    after / before - 1 if before > 0 else 0.0)  # fmt: skip


def _options(
    held_ED: NDArray[np.bool_], load_E: NDArray[np.float64], problem: PlacementProblem, unit_D: NDArray[np.int64]
) -> list[NDArray[np.bool_]]:
    """Steps 1 and 2 of one layer, bool [E, D] each."""
    slots_D = np.minimum(problem.slots_D, len(load_E))
    speed_D, plain, even = problem.cluster.speed_D, [], []
    whole = make_layer(held_ED, slots_D, load_E, speed_D, unit_D)
    top, total = float(whole.level_D.max()), int(_save(whole, ANY))
    for part in PARTS:
        one = make_layer(held_ED, slots_D, load_E, speed_D, unit_D)
        _save(one, round(part * total))
        plain.append(one.held_ED.copy())
        descend(one, True, ANY, top)
        even.append(one.held_ED)
    return plain + even


@compiled(nogil=True)
def _save(s, most):  # type: ignore[no-untyped-def]
    """Step 1: exchanges until ``most`` experts fewer are alone, or none helps; how many fewer are."""
    experts, devices = s.held_ED.shape
    swaps = s.cover_EU.shape[1] < devices
    saved = 0
    while saved < most:
        best, be, ba, bf, bc, fewer = -np.inf, -1, -1, -1, -1, 0
        for a in range(devices):
            for e in range(-1, experts):
                if (e < 0 and s.room_D[a] < 1) or (e >= 0 and not s.held_ED[e, a]):
                    continue
                for f in range(experts):
                    if s.held_ED[f, a]:
                        continue
                    if e < 0 or s.copies_E[e] > 1:
                        more = endangered(s, e, s.unit_D[a], -1, f, -1, s.unit_D[a])
                        if more < 0:
                            gain = replaced(s, e, f, a, np.inf)
                            if gain > best:
                                best, be, ba, bf, bc, fewer = gain, e, a, f, -1, -more
                    if not swaps or e < 0:
                        continue
                    for c in range(devices):
                        if s.unit_D[c] == s.unit_D[a] or not s.held_ED[f, c] or s.held_ED[e, c]:
                            continue
                        more = endangered(s, e, s.unit_D[a], s.unit_D[c], f, s.unit_D[c], s.unit_D[a])
                        if more < 0:
                            gain = swapped(s, e, a, f, c, np.inf)
                            if gain > best:
                                best, be, ba, bf, bc, fewer = gain, e, a, f, c, -more
        if fewer == 0:
            return saved
        if be >= 0:
            take(s, be, ba)
        if bc >= 0:
            take(s, bf, bc)
            put(s, be, bc)
        put(s, bf, ba)
        saved += fewer
    return saved


def _choose(seconds_OL: NDArray[np.float64], alone_OL: NDArray[np.int64], most_cost: float) -> NDArray[np.int64]:
    """Step 3: option of each layer, int64 [L]; option 0 is the plan as it was."""
    total = float(seconds_OL[0].sum())
    left, least = most_cost * total, max(1e-9 * total, 1e-300)  # what gains counts as free
    chosen = np.zeros(seconds_OL.shape[1], np.int64)
    rows = np.arange(len(chosen))
    while True:
        more_OL = seconds_OL - seconds_OL[chosen, rows]
        saved_OL = alone_OL[chosen, rows] - alone_OL
        able_OL = (saved_OL > 0) & (more_OL <= left)
        if not able_OL.any():
            return chosen
        rate_OL = np.where(able_OL, saved_OL / np.maximum(more_OL, least), -np.inf)
        option, layer = (int(x) for x in np.unravel_index(int(rate_OL.argmax()), rate_OL.shape))
        left -= float(more_OL[option, layer])
        chosen[layer] = option
