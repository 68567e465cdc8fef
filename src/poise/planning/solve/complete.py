"""What a method plans as it will be held: routing groups whole where they must be, and the slots that it leaves empty
filled, knowing the traffic.

Step 1  An expert that lies twice on a device keeps one slot there.
Step 2  Every slot that is free then gets an expert that its device lacks, of the groups of its place where these
        are whole, in two ways: *relief*, the expert with most
        load a replica, which takes tokens off full devices, and *cheap*, the expert with least load, which draws the
        fewest tokens and weight reads.
Step 3  Of the two, layer by layer, the one that the independent evaluator finds faster; under ``stay``, where layers
        depend on each other, the faster whole.

A device never holds more slots than there are experts (in its place), so step 2 always finds one it lacks, up to
full replication.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.cost.entries import HeldEntries, LayerEntries
from poise.planning.groups import gathered
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.util.compiled import compiled


def as_held(problem: PlacementProblem, placement: Placement) -> Placement:
    """The placement with groups whole where they must be (:func:`poise.planning.groups.gathered`), and with slots
    filled unless the engine may leave some empty; itself where it is so.
    """
    whole = problem.whole
    if whole is not None and whole.must:
        before = placement.count_LED()
        after = gathered(before, whole, problem.layer_slots_D, load_LE=problem.batch.load_LE(),
                         filled=not problem.engine.empty_slots)  # fmt: skip
        if ((before > 0) != (after > 0)).any():
            placement = problem.placed(after, placement.method)
    return placement if problem.engine.empty_slots else complete(problem, placement)


def complete(problem: PlacementProblem, placement: Placement) -> Placement:
    """The placement with all slots of the problem filled and no expert twice on a device; itself where it is so.

    Slots are those of the problem, counted by layer; a device with more slots than experts keeps the rest empty.
    """
    held, room_D = placement.entries(), problem.layer_slots_D
    if (held.used_LD(different=True) == room_D).all() and not placement.has_duplicates:
        return placement
    load_LE = problem.batch.load_LE()
    ways = [_filled(held, room_D, load_LE, relief, problem.place_D) for relief in (True, False)]
    if problem.traffic == "stay":
        chosen = min(ways, key=lambda way: problem.seconds_L(way).sum())
    else:
        chosen = problem.fastest_layers(ways)
    return problem.placed(chosen, placement.method)


def _filled(
    held: HeldEntries, room_D: NDArray[np.int64], load_LE: NDArray[np.float64], relief: bool,
    place_D: NDArray[np.int64],
) -> HeldEntries:  # fmt: skip
    """Step 2: free slots of the device with least load come first."""
    out = []
    for layer, load_E in zip(held.layers(), load_LE, strict=True):
        held_ED = layer.held_ED()
        fill_layer(held_ED, room_D - held_ED.sum(axis=0), load_E, relief, place_D)
        out.append(LayerEntries.of_counts(held_ED))
    return HeldEntries.of_layers(out)


@compiled
def fill_layer(
    held_ED: NDArray[np.bool_], free_D: NDArray[np.int64], load_E: NDArray[np.float64], relief: bool,
    place_D: NDArray[np.int64],
) -> None:  # fmt: skip
    """One layer, in place. Loads are summed anew where they change, so that equal ones stay equal."""
    experts, devices = held_ED.shape
    copies_E, place_E = np.zeros(experts, np.int64), np.zeros(experts, np.int64)
    used_D, most = np.zeros(devices, np.int64), 1
    for e in range(experts):
        copies_E[e] = held_ED[e].sum()
        place_E[e] = place_D[np.argmax(held_ED[e])]
        for d in range(devices):
            if held_ED[e, d]:
                used_D[d] += 1
    for d in range(devices):
        most = max(most, used_D[d] + free_D[d])
    on_DK = np.empty((devices, most), np.int64)  # experts of each device, ascending
    used_D[:] = 0
    for e in range(experts):
        for d in range(devices):
            if held_ED[e, d]:
                on_DK[d, used_D[d]] = e
                used_D[d] += 1
    each_E = load_E / copies_E
    load_D, changed_D = np.zeros(devices), np.ones(devices, np.bool_)
    while True:
        to = -1
        for d in range(devices):
            if changed_D[d]:
                load_D[d] = 0.0
                for k in range(used_D[d]):
                    load_D[d] += each_E[on_DK[d, k]]
            if free_D[d] > 0 and (to < 0 or load_D[d] < load_D[to]):
                to = d
        if to < 0:
            return
        best = -1
        for e in range(experts):
            if held_ED[e, to] or place_E[e] != place_D[to]:
                continue
            if best < 0 or (each_E[e] > each_E[best] if relief else each_E[e] < each_E[best]):
                best = e
        held_ED[best, to] = True
        k = used_D[to]
        while k > 0 and on_DK[to, k - 1] > best:
            on_DK[to, k] = on_DK[to, k - 1]
            k -= 1
        on_DK[to, k] = best
        used_D[to] += 1
        copies_E[best] += 1
        each_E[best] = load_E[best] / copies_E[best]
        free_D[to] -= 1
        for d in range(devices):
            changed_D[d] = held_ED[best, d]
