"""Surplus fill: a start for the exact split, where a replica may take any part of an expert's tokens.

Step 1  Owners: LPT over as many slots a device as the experts need, with loads cut off at the mean of a device: what an
        expert has beyond that goes elsewhere in any case.
Step 2  While a device lies above the mean under the exact split: the expert that gives most on a fullest device gets a
        replica on the idlest device that has a free slot and lacks it.
Step 3  Slots left over get the experts with most load a replica.
        (Every second try instead fills, like an alias table, the idlest device to the mean at once with one expert of
        the fullest, and never touches it again: with E = D that is exact for any loads.)
Step 4  While the fullest device is above its lower bound: again, owners packed by loads that were shaken at random, at
        most :data:`TRIES` times; the best counts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.cost.split import exact_quota
from poise.planning.budget import Limit
from poise.planning.methods.lpt import pack
from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem, Progress, equal_sizes
from poise.util.errors import NoResultError

UNITS = 1e6
"""A layer's work is split in this many units."""


TRIES = 64


def fill_layer(
    work_E: NDArray[np.float64], slots_D: NDArray[np.int64], speed_D: NDArray[np.float64], seed: int = 0
) -> NDArray[np.int32]:
    """Holders of one layer, int32 [E, D] of 0 and 1."""
    rng = np.random.default_rng(seed)
    units_E = np.rint(work_E / max(float(work_E.sum()), 1e-300) * UNITS)
    bound = max(units_E.sum(), units_E.max()) / speed_D.sum()
    best, least = np.zeros(0, np.int32), np.inf
    for turn in range(TRIES):
        shaken_E = work_E * np.exp(0.3 * (turn > 1) * rng.standard_normal(len(work_E)))
        held = _fill_once(work_E, shaken_E, slots_D, speed_D, alias=turn % 2 == 1)
        most = float((exact_quota(units_E, held, speed_D).sum(axis=0) / speed_D).max())
        if most < least:
            best, least = held, most
        if least <= 1.001 * bound:
            break
    return best


def _fill_once(
    work_E: NDArray[np.float64],
    shaken_E: NDArray[np.float64],
    slots_D: NDArray[np.int64],
    speed_D: NDArray[np.float64],
    *,
    alias: bool,
) -> NDArray[np.int32]:
    """Steps 1 to 3."""
    experts, devices = len(work_E), len(slots_D)
    total = max(float(work_E.sum()), 1e-300)
    own_D, ones_E = equal_sizes(experts, slots_D), np.ones(experts, np.int64)
    held = pack(np.minimum(shaken_E, total / devices), ones_E, own_D, speed_D)
    units_E = np.rint(work_E / total * UNITS)
    if alias:
        _alias(units_E, held, slots_D, speed_D)
    free_D = slots_D - held.sum(axis=0)
    while free_D.any():
        quota = exact_quota(units_E, held, speed_D)
        load_D = quota.sum(axis=0) / speed_D
        if load_D.max() <= (1 + 1e-5) * units_E.sum() / speed_D.sum():
            break
        give_E = quota[:, load_D >= load_D.max() - 1].max(axis=1)
        for d in np.argsort(load_D + 1e18 * (free_D <= 0)):
            e = int(np.argmax(np.where(held[:, d] > 0, -1, give_E)))
            if free_D[d] > 0 and give_E[e] > 0 and not held[e, d]:
                held[e, d] = 1
                free_D[d] -= 1
                break
        else:
            break
    for d in np.repeat(np.arange(devices), free_D):
        each_E = np.where(held[:, d] > 0, -1.0, work_E / held.sum(axis=1))
        if each_E.max() >= 0:
            held[int(np.argmax(each_E)), d] = 1
    return held


def _alias(
    units_E: NDArray[np.float64], held: NDArray[np.int32], slots_D: NDArray[np.int64], speed_D: NDArray[np.float64]
) -> None:
    """Step 2 as an alias table is made (Walker 1974), in place."""
    left_ED = units_E[:, None] * held
    mean = units_E.sum() / speed_D.sum()
    open_D = held.sum(axis=0) < slots_D
    while open_D.any():
        load_D = left_ED.sum(axis=0) / speed_D
        to = int(np.argmin(np.where(open_D, load_D, np.inf)))
        top = int(np.argmax(load_D))
        need = (mean - load_D[to]) * speed_D[to]
        give_E = np.where(held[:, to] > 0, 0.0, left_ED[:, top])
        e = int(np.argmax(give_E))
        give = min(float(give_E[e]), float(need))
        if give <= 0 or load_D[top] <= mean * (1 + 1e-6):
            return
        held[e, to] = 1
        left_ED[e, to] += give
        left_ED[e, top] -= give
        open_D[to] = held[:, to].sum() < slots_D[to]


def filled(problem: PlacementProblem, *, seed: int = 0) -> Placement:
    """A placement for the expected loads; slots are counted by layer."""
    slots_D, speed_D = problem.layer_slots_D, problem.cluster.speed_D
    counts = [fill_layer(work, slots_D, speed_D, seed + layer) for layer, work in enumerate(problem.work_LE())]
    return problem.placed(np.stack(counts), "surplus-fill")


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """See the module docstring.

    Raises
    ------
    NoResultError : slots are counted over all layers together.
    """
    if problem.pooled:
        raise NoResultError("surplus-fill counts slots layer by layer")
    return MethodResult(filled(problem, seed=seed))
