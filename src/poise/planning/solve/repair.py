"""The placement on what is left after a loss: fewest reads of the checkpoint, then the least largest load.

Per layer, on mean loads, an expert's split evenly over its replicas:

Step 1  Experts without a holder (orphans), heaviest first: each is read once, into the slot after which the fullest
        device is least full. A slot is freed only of an expert that has another holder. As many reads as orphans: the
        fewest that there can be.
Step 2  Copies between devices that are left (:mod:`poise.planning.exchange`): from step 1's placement downwards, as
        many as the budget allows.
Step 3  Without a budget, and where step 2 ends more than ``near`` above the bound, also from scratch (LPT, descent,
        annealing); its devices are matched to those that are left so that most stays where it lies. It is taken where
        it is more than ``near`` better: its copies are many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from poise.cost.bound_compute import compute_bound
from poise.planning.exchange import FREE, SlotLayer, descend, make_layer, put, replaced, search, take
from poise.planning.losses import Loss, Losses, lost_together
from poise.planning.methods.lpt import pack_all
from poise.planning.placement import EMPTY, Placement
from poise.planning.solve.anneal import anneal_slots, slot_table
from poise.util.compiled import compiled
from poise.util.errors import InfeasibleError

NEAR = 0.01
"""Share of the bound above which more is tried, and for which step 3's copies are worth it."""
LEAST_KICKS, MOST_KICKS, KICKS_WORK, PROPOSALS = 40, 2000, 200_000, 100_000
"""Perturbations of a descent: fewer where slots times experts are many."""
ANY = 1 << 61


def repaired(
    before: Placement, lost: Sequence[int], load_LE: NDArray[np.float64], speed_D: NDArray[np.float64],
    *, copies: float | None = None,
) -> Loss:  # fmt: skip
    """What follows the loss of some devices; steps: module docstring.

    Parameters
    ----------
    before : the placement that runs; its devices keep their slots.
    lost : devices that are gone.
    load_LE : float64 [L, E], expected loads.
    speed_D : float64 [D], relative speeds of all devices.
    copies : most copies of step 2 for each read, over all layers together; None: as many as balance needs.

    Raises
    ------
    InfeasibleError : the slots that are left do not hold all experts.
    """
    stays_D = ~np.isin(np.arange(before.num_devices), list(lost))
    slots_D = np.bincount(before.slot_device_S, minlength=before.num_devices)
    check_room(slots_D, before.num_experts, lost)
    slots_D = slots_D[stays_D]
    full = bool((before.slot_expert_LS != EMPTY).all())
    held_LED, speed = (before.count_LED() > 0)[:, :, stays_D], np.asarray(speed_D, np.float64)[stays_D]
    first_LED, after_LED = held_LED.copy(), held_LED.copy()
    allowed, used = 0.0, 0
    for layer, held_ED in enumerate(held_LED):
        one = make_layer(held_ED, slots_D, load_LE[layer], speed)
        orphans = np.flatnonzero(~held_ED.any(axis=1))
        _seat(one, orphans[np.argsort(-one.load_E[orphans], kind="stable")])
        first_LED[layer] = one.held_ED
        if full:
            _fill(one)
        bound = level_bound(load_LE[layer], slots_D, speed)
        one.base_ED[:] = first_LED[layer]
        if copies is None:
            after_LED[layer] = _balanced(one, slots_D, bound)
        else:
            allowed += copies * len(orphans)
            used += int(descend(one, False, math.floor(allowed + 1e-9) - used, bound))
            after_LED[layer] = one.held_ED
    first = _in_slots(before, first_LED, stays_D, before.slot_expert_LS)
    after = _in_slots(before, after_LED, stays_D, first.slot_expert_LS)
    return Loss(tuple(sorted({int(d) for d in lost})), first, after)


def check_room(slots_D: NDArray[np.int64], num_experts: int, lost: Sequence[int]) -> None:
    """Raise InfeasibleError unless the slots that are left, of int [D] in all, hold all experts."""
    left_D = np.delete(slots_D, list(lost))
    room = int(np.minimum(left_D, num_experts).sum())
    if room < num_experts:
        need = -(-num_experts // len(left_D)) * len(slots_D) - num_experts if len(left_D) else 0
        raise InfeasibleError(
            f"{room} slots are left for {num_experts} experts when {len(slots_D) - len(left_D)} of {len(slots_D)} "
            "devices are lost",
            hint=f"--redundant {need} or more leaves room" if len(left_D) else "",
        )


def prepared(
    before: Placement, unit: str, node_D: NDArray[np.int32], load_LE: NDArray[np.float64],
    speed_D: NDArray[np.float64], *, copies: float | None = None,
) -> Losses:  # fmt: skip
    """:func:`repaired` for the loss of every device, or of every node."""
    losses = tuple(repaired(before, lost, load_LE, speed_D, copies=copies) for lost in lost_together(unit, node_D))
    return Losses(before, unit, losses)


def level_bound(load_E: NDArray[np.float64], slots_D: NDArray[np.int64], speed_D: NDArray[np.float64]) -> float:
    """Load over speed of the fullest device that no placement in these slots can beat under the even split.

    :func:`poise.cost.bound.compute_bound`, and: some device holds a replica of the expert with the largest load over
    replicas, however the slots are given to experts.
    """
    experts, devices = len(load_E), len(speed_D)
    room = int(np.minimum(slots_D, experts).sum())
    whole = float(compute_bound(np.asarray(load_E, np.float64)[None], slots_D, speed_D, spare=room - experts)[0])
    copies_E = np.ones(experts, np.int64)
    for _ in range(room - experts):
        each_E = np.where(copies_E < devices, load_E / copies_E, -1.0)
        top = int(each_E.argmax())
        if (load_E / copies_E).max() > each_E[top]:
            break  # the largest has a replica everywhere
        copies_E[top] += 1
    return max(whole, float((load_E / copies_E).max() / speed_D.max()))


@compiled(nogil=True)
def _seat(s, orphans):  # type: ignore[no-untyped-def]
    """Step 1: each into a slot of its own."""
    experts, devices = s.held_ED.shape
    for f in orphans:
        best, be, bd, rough = np.inf, -1, -1, 0.0
        for d in range(devices):
            for e in range(-1, experts):
                if (e < 0 and s.room_D[d] < 1) or (e >= 0 and (not s.held_ED[e, d] or s.copies_E[e] < 2)):
                    continue
                if e >= 0:
                    take(s, e, d)
                put(s, f, d)
                level, square = s.level_D.max(), (s.level_D * s.level_D).sum()
                take(s, f, d)
                if e >= 0:
                    put(s, e, d)
                if level < best * (1.0 - 1e-12) or (level <= best * (1.0 + 1e-12) and square < rough * (1.0 - 1e-12)):
                    best, be, bd, rough = level, e, d, square
        if be >= 0:
            take(s, be, bd)
        put(s, f, bd)


@compiled(nogil=True)
def _fill(s):  # type: ignore[no-untyped-def]
    """An empty slot, which a second copy on one device was, gets the expert that evens loads most."""
    experts, devices = s.held_ED.shape
    for d in range(devices):
        while s.room_D[d] > 0:
            best, bf = -np.inf, -1
            for f in range(experts):
                if not s.held_ED[f, d]:
                    gain = replaced(s, FREE, f, d, np.inf)
                    if gain > best or bf < 0:
                        best, bf = gain, f
            if bf < 0:
                return
            put(s, bf, d)


def _balanced(one: SlotLayer, slots_D: NDArray[np.int64], bound: float) -> NDArray[np.bool_]:
    """Steps 2 and 3 without a budget, bool [E, D]."""
    enough, base = bound * (1 + NEAR), one.base_ED.copy()
    kicks = int(np.clip(KICKS_WORK / (slots_D.sum() * len(base)), LEAST_KICKS, MOST_KICKS))
    descend(one, False, ANY, enough)
    mine, level = one.held_ED.copy(), float(one.level_D.max())
    if level <= enough:
        return mine
    for start in _starts(one, mine, slots_D):
        new = make_layer(start, slots_D, one.load_E, one.speed_D)
        search(new, False, enough, kicks, 0)
        if float(new.level_D.max()) < level / (1 + NEAR):
            mine, level = _matched(new.held_ED, base, slots_D, one.speed_D), float(new.level_D.max())
        if level <= enough:
            break
    return mine


def _starts(one: SlotLayer, mine: NDArray[np.bool_], slots_D: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """Step 3: what steps 1 and 2 made, LPT, and LPT annealed, as holdings bool [E, D]."""
    experts, devices = mine.shape
    room_D = np.minimum(slots_D, experts)
    packed = pack_all(one.load_E, room_D, one.speed_D) > 0
    filled = make_layer(packed, room_D, one.load_E, one.speed_D)
    if (one.room_D == 0).all():
        _fill(filled)
    slot_expert = slot_table(filled.held_ED, room_D)
    load = np.append(one.load_E, 0.0)[None]
    rate_D = one.speed_D.sum() / one.speed_D / max(float(load.sum()), 1e-300)
    device_S = np.repeat(np.arange(devices), room_D)
    if anneal_slots(load, np.ones(1), slot_expert, device_S, rate_D, PROPOSALS, 0, np.zeros(1, np.int64)) < np.inf:
        annealed = np.zeros_like(mine)
        used = slot_expert >= 0
        annealed[slot_expert[used], device_S[used]] = True
        return [mine, filled.held_ED, annealed]
    return [mine, filled.held_ED]


def _matched(
    new_ED: NDArray[np.bool_], old_ED: NDArray[np.bool_], slots_D: NDArray[np.int64], speed_D: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """The same on devices renumbered among equal ones, so that most experts lie where they lay."""
    same_DD = new_ED.T.astype(np.int64) @ old_ED.astype(np.int64)
    equal_DD = (slots_D[:, None] == slots_D) & (speed_D[:, None] == speed_D)
    new, old = linear_sum_assignment(np.where(equal_DD, same_DD, -(10**6)), maximize=True)
    out = np.zeros_like(new_ED)
    out[:, old] = new_ED[:, new]
    return out


def _in_slots(
    before: Placement, held_LED: NDArray[np.bool_], stays_D: NDArray[np.bool_], now_LS: NDArray[np.int32]
) -> Placement:
    """Holdings of the devices that are left, in the slots of before: what stays on a device keeps its slot."""
    table = np.full_like(now_LS, EMPTY)
    for number, device in enumerate(np.flatnonzero(stays_D)):
        mine = np.flatnonzero(before.slot_device_S == device)
        for layer in range(len(table)):
            want = set(np.flatnonzero(held_LED[layer, :, number]).tolist())
            for slot in mine:
                if int(now_LS[layer, slot]) in want:
                    table[layer, slot] = now_LS[layer, slot]
                    want.remove(int(now_LS[layer, slot]))
            free = [slot for slot in mine if table[layer, slot] == EMPTY]
            table[layer, free[: len(want)]] = sorted(want)
    return replace(before, slot_expert_LS=table, fitted=None)
