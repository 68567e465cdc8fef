"""Surplus fill: replicas one by one, for ``poise`` in serving and for its balancing of tokens.

Step 1  The work of each expert (seconds, or tokens) is split exactly over its present holders.
Step 2  While a device lies above the mean, the expert that gives most on a fullest device gets a replica on the idlest
        device with a free slot, or in place of a step replica that brings less than half as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import expert_works
from poise.cost.quota import QuotaProblem, balance
from poise.stepwise.poise.workspace import UNITS, Desk, HeldLayer
from poise.stepwise.protocol import LayerView
from poise.util.compiled import compiled

ONLY_FABRIC = 0.1
"""Worth of a spare replica where another device of the node holds the expert: it saves fabric, not network."""


class StepSlots(NamedTuple):
    """Where replicas may go: bool [E, D], holders that stay; int64 [D], most experts of a device."""

    static_ED: NDArray[np.bool_]
    slots_D: NDArray[np.int64]


class NextReplica(NamedTuple):
    """An expert, its new device, and the expert that makes room there or -1; an expert of -1: none."""

    expert: int
    device: int
    dropped: int


@compiled
def next_replica(
    work_E: NDArray[np.float64], held_ED: NDArray[np.bool_], slots: StepSlots, layer: HeldLayer
) -> NextReplica:
    """The replica that takes most from a fullest device.

    Work (seconds of each expert, float64 [E]) is split exactly over the holders first; ``space.quota_H`` keeps that
    split in units. The receiver is the idlest device with a free slot, or with a step replica that brings less.
    """
    holders, machine, space = layer.holders, layer.machine, layer.space
    experts, devices = held_ED.shape
    total = 0.0
    for e in range(experts):
        total += work_E[e]
    scale = UNITS * experts / max(total, 1e-300)
    for e in range(experts):
        space.units_E[e] = np.int64(work_E[e] * scale + 0.5)
    problem = QuotaProblem(space.units_E, machine.speed_D, space.local_H[:0], space.base_D[:0], 0.0)
    balance(problem, holders, space.quota_H, space.scratch)
    load_D = space.scratch.load_D
    most, least, units = 0.0, 1e300, 0
    for d in range(devices):
        most = max(most, load_D[d] / machine.speed_D[d])
        units += load_D[d]
    mean = units / machine.speed_D.sum()
    if most <= 1.002 * mean:
        return NextReplica(-1, -1, -1)
    used = space.seconds_D
    give = space.have_E
    used[:] = 0.0
    give[:] = 0.0
    for h in range(holders.device_H.size):
        d, e = holders.device_H[h], holders.expert_H[h]
        used[d] += 1.0
        if load_D[d] / machine.speed_D[d] >= most * 0.9999:
            give[e] = max(give[e], float(space.quota_H[h]))
    tried = space.sum_D
    tried[:] = 0.0
    for _ in range(devices):
        to, least = -1, mean
        for d in range(devices):
            if tried[d] == 0.0 and load_D[d] / machine.speed_D[d] < least and slots.slots_D[d] > 0:
                to, least = d, load_D[d] / machine.speed_D[d]
        if to < 0:
            return NextReplica(-1, -1, -1)
        tried[to] = 1.0
        expert, amount = -1, 0.0
        for e in range(experts):
            if give[e] > amount and not held_ED[e, to]:
                expert, amount = e, give[e]
        if expert < 0:
            continue
        amount = min(amount, (mean - least) * machine.speed_D[to])
        if used[to] < slots.slots_D[to]:
            return NextReplica(expert, to, -1)
        out, value = -1, 0.5 * amount
        for x in range(holders.device_H.size):
            if holders.device_H[x] == to and not slots.static_ED[holders.expert_H[x], to]:
                many = holders.ptr_E[holders.expert_H[x] + 1] - holders.ptr_E[holders.expert_H[x]]
                if many > 1 and space.quota_H[x] < value:
                    out, value = holders.expert_H[x], float(space.quota_H[x])
        if out >= 0:
            return NextReplica(expert, to, out)
    return NextReplica(-1, -1, -1)


def surplus_fill(
    view: LayerView, held_ED: NDArray[np.bool_], work_E: NDArray[np.float64], desk: Desk
) -> list[NDArray[np.bool_]]:
    """Holders after each replica of steps 1 and 2, bool [E, D], those given first.

    ``work_E`` float64 [E], of any scale, is what the devices are to share evenly.
    """
    out = [held_ED.copy()]
    slots = StepSlots(view.static_ED, view.slots_D)
    for _ in range(2 * view.step_slots * len(slots.slots_D)):
        held_ED = out[-1].copy()
        expert, device, dropped = next_replica(work_E, held_ED, slots, desk.put(held_ED))
        if expert < 0:
            break
        held_ED[expert, device] = True
        if dropped >= 0:
            held_ED[dropped, device] = False
        out.append(held_ED)
    return out


def fill_free_slots(
    held_ED: NDArray[np.bool_],
    slots_D: NDArray[np.int64],
    worth: Callable[[NDArray[np.bool_], int], NDArray[np.float64]],
) -> list[NDArray[np.bool_]]:
    """Holders after each slot that is left is given to what is worth most there, bool [E, D], those given first.

    The device with most free slots is next. ``worth`` of holders and a device: float64 [E]. Once a device has nothing
    worth more than 0, no more slots are given.
    """
    out = [held_ED.copy()]
    free_D = slots_D - held_ED.sum(axis=0)
    for _ in range(int(free_D.sum())):
        held_ED, device = out[-1].copy(), int(np.argmax(free_D))
        worth_E = np.where(held_ED[:, device], -1.0, worth(held_ED, device))
        expert = int(np.argmax(worth_E))
        if worth_E[expert] <= 0:
            break
        held_ED[expert, device] = True
        free_D[device] -= 1
        out.append(held_ED)
    return out


def filled_by_work(view: LayerView, held_ED: NDArray[np.bool_], desk: Desk) -> list[NDArray[np.bool_]]:
    """Holders after each replica, bool [E, D], those given first: a surplus fill of work in seconds, then slots still
    free for the experts with most predicted tokens that would stay at home.
    """

    def tokens_that_stay(held_ED: NDArray[np.bool_], device: int) -> NDArray[np.float64]:
        node = held_ED[:, desk.machine.node_D == desk.machine.node_D[device]].any(axis=1)
        return np.where(node, ONLY_FABRIC, 1.0) * view.predicted_E

    plans = surplus_fill(view, held_ED, expert_works(view.predicted_E, desk.machine), desk)
    return [*plans[:-1], *fill_free_slots(plans[-1], view.slots_D, tokens_that_stay)]
