"""Carried over: a placement for other devices or slots becomes one for the problem's, with few fetches.

Per layer, LPT (:mod:`poise.planning.methods.lpt`) with a bias: replicas for the new number of slots, heaviest share
first, each to the device with the least load / speed, where a device that does not hold the expert yet counts ``bias``
of a device's mean load more; of equal loads every device's first comes first, then every second. Devices keep their
numbers; those that join hold nothing.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from poise.planning.methods.lpt import replicate
from poise.planning.placement import MAX_NAME, Placement
from poise.planning.problem import PlacementProblem
from poise.util.errors import OptionError

BIASES = (0.1, 1.0)
"""What a fetch counts, in mean loads of a device: balance within a few percent, and about as few fetches as can be."""


def fits(placement: Placement, problem: PlacementProblem) -> bool:
    """It is for the problem's devices, and none holds more experts than it has slots."""
    if placement.num_devices != problem.num_devices:
        return False
    return problem.pooled or bool((placement.entries().used_LD(different=True) <= problem.slots_D).all())


def starts(problem: PlacementProblem) -> list[Placement]:
    """What a search may start from: the placement in use or, where that does not fit, carried over; else nothing."""
    if problem.current is None:
        return []
    if fits(problem.current, problem):
        return [problem.current if not problem.current.has_duplicates else _once(problem.current)]
    both = [carried(problem.current, problem, bias=bias) for bias in BIASES]
    return [both[0], *(replace(each, method=f"{each.method[: MAX_NAME - 13]}, few fetches") for each in both[1:])]


def _once(placement: Placement) -> Placement:
    """Without second copies of an expert on one device."""
    return Placement.from_counts(
        np.minimum(placement.count_LED(), 1), slots_D=placement.slots_D, layer_ids_L=placement.layer_ids_L,
        method=placement.method,
    )  # fmt: skip


def carried(old: Placement, problem: PlacementProblem, *, bias: float = BIASES[0]) -> Placement:
    """An old placement on the problem's devices and slots; steps: module docstring.

    Raises
    ------
    OptionError : layers or experts differ from the problem's.
    """
    batch, devices = problem.batch, problem.num_devices
    if (old.num_layers, old.num_experts) != (batch.num_layers, batch.num_experts):
        raise OptionError(
            f"the placement {old.method!r} has [layers, experts] {[old.num_layers, old.num_experts]}, "
            f"the traffic {[batch.num_layers, batch.num_experts]}"
        )
    stay = min(old.num_devices, devices)
    have_LED = np.zeros((old.num_layers, old.num_experts, devices), np.bool_)
    have_LED[:, :, :stay] = old.count_LED()[:, :, :stay] > 0
    slots_D, speed_D = np.minimum(problem.slots_D, batch.num_experts), problem.cluster.speed_D
    counts = [_pack(have, load, slots_D, speed_D, bias) for have, load in zip(have_LED, batch.load_LE(), strict=True)]
    name = f", mapped to {devices} devices"
    return Placement.from_counts(np.stack(counts), slots_D=problem.slots_D, layer_ids_L=batch.layer_ids_L,
                                 method=old.method[: MAX_NAME - len(name)] + name)  # fmt: skip


def _pack(
    have_ED: NDArray[np.bool_], load_E: NDArray[np.float64], slots_D: NDArray[np.int64],
    speed_D: NDArray[np.float64], bias: float,
) -> NDArray[np.int32]:  # fmt: skip
    """Slots of each expert on each device, int32 [E, D] of 0 and 1, every expert at least once."""
    replicas_E = replicate(load_E, int(slots_D.sum()) - len(load_E), len(slots_D))
    each_E, price = load_E / replicas_E, bias * float(load_E.sum() / speed_D.sum())
    count = np.zeros(have_ED.shape, np.int32)
    free_D, load_D = slots_D.copy(), np.zeros(len(slots_D))
    turn_E = np.where(have_ED, have_ED.cumsum(axis=0), len(load_E)).min(axis=1)
    for e in np.lexsort((turn_E, -each_E)):
        for _ in range(int(replicas_E[e])):
            able_D = (free_D > 0) & (count[e] == 0)
            if not able_D.any():
                break  # never of a first copy: copies are as many as slots
            score_D = (load_D + each_E[e]) / speed_D + price * ~have_ED[e]
            d = np.argmin(np.where(able_D, score_D, np.inf))
            count[e, d] = 1
            free_D[d] -= 1
            load_D[d] += each_E[e]
    return count
