"""Placement and homes in turn: homes for a placement, then the placement for the traffic with these homes.

A placement that was planned for equal homes has the experts of like requests all over the machine, and homes for it
gain little, so the next placement stays as it is: a local optimum. So there are two starts, the placement for equal
homes and the one for homes by groups of like requests, which know nothing of any placement. The latter is searched from
one more start: every expert where the tokens at home near it choose it most (:func:`at_home`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from poise.planning.budget import Budget
from poise.planning.homes import BAND, POLICIES, HomeTable, affine, grouped, pair_seconds, signatures
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, Progress
from poise.planning.solve.complete import as_held
from poise.planning.solve.solve import solve
from poise.routing.batch import RoutingBatch
from poise.routing.trace import NO_EXPERT, RoutingTrace
from poise.util.errors import OptionError

ROUNDS = 2
"""Of homes and placement, from each start."""
PLANS = 4 + 2 * ROUNDS
"""Placements that are planned in all."""


class HomePlan(NamedTuple):
    """Homes and a placement for them.

    Parameters
    ----------
    table : the homes.
    batch : the fitted traffic with them, tokens evened out.
    placement : planned for it.
    seconds : of a step and layer of it.
    """

    table: HomeTable
    batch: RoutingBatch
    placement: Placement
    seconds: float


class HomePlans(NamedTuple):
    """What was planned.

    Parameters
    ----------
    equal : the best placement for equal homes.
    best : by policy, the plan with the least seconds on the fitted traffic.
    alone : by policy, homes with the placement for equal homes.
    """

    equal: Placement
    best: dict[str, HomePlan]
    alone: dict[str, HomePlan]


def plan_homes(
    problem: PlacementProblem, trace: RoutingTrace, batched: Callable[[RoutingTrace], RoutingBatch], budget: Budget, *,
    band: float = BAND, seed: int = 0, progress: Progress | None = None,
) -> HomePlans:  # fmt: skip
    """Homes of every policy of :data:`poise.planning.homes.POLICIES`, each with a placement.

    A placement that was found for other homes counts for equal ones and groups too, where it is better there: else
    homes would be praised for what is merely more search.

    Parameters
    ----------
    problem : its batch has equal homes.
    trace : the fitted traffic.
    batched : makes the steps of ``problem`` from a trace with its requests at home.
    budget : for all placements together.

    Raises
    ------
    OptionError : the band is no number of at least 0, or the plan has slots counted over all layers together.
    NoResultError : no placement was found.
    """
    if not 0 <= band < np.inf:
        raise OptionError(f"the band must be at least 0, got {band}")
    known = signatures(trace)
    every: list[Placement] = []

    def placed(batch: RoutingBatch, start: Placement | None) -> Placement:
        if progress:
            progress(f"placement {len(every) + 1} of {PLANS}", len(every) / PLANS)
        asked = replace(problem, batch=batch, current=start, migration_steps=0.0)
        own = budget.part(1 / PLANS, until=(len(every) + 1) / PLANS)
        every.append(solve(asked, time_limit_s=own, seed=seed).placement)
        return every[-1]

    def seconds(batch: RoutingBatch, placement: Placement) -> float:  # of all steps, which solve may have no time for
        cost = problem.pricing.cost(batch, placement.count_LED())
        return float(batch.weight_B @ cost.seconds_BL.mean(axis=1))

    def priced(table: HomeTable, placement: Placement) -> HomePlan:
        batch = batched(table.home(trace, known)).evened(problem.num_devices)
        return HomePlan(table, batch, placement, seconds(batch, placement))

    def moved(plan: HomePlan, placement: Placement) -> HomePlan:
        return plan._replace(placement=placement, seconds=seconds(plan.batch, placement))

    def planned(plan: HomePlan, start: Placement) -> HomePlan:  # never worse than its start: solve may see few steps
        held = as_held(replace(problem, batch=plan.batch), start)
        return min(moved(plan, held), moved(plan, placed(plan.batch, start)), key=lambda each: each.seconds)

    first = placed(problem.batch, problem.current)
    first = placed(problem.batch, first)
    groups = grouped(known, problem.batch.layer_ids_L, problem.num_devices, seed=seed, band=band)
    by_group = priced(groups, first)
    starts = first, at_home(replace(problem, batch=by_group.batch))
    near_group = min((planned(by_group, start) for start in starts), key=lambda plan: plan.seconds)
    tried = []
    for start in (first, near_group.placement):
        for _ in range(ROUNDS):
            tried.append(planned(priced(affine(start, problem.pricing, band), start), start))
            start = tried[-1].placement
    equal = min(every, key=lambda placement: seconds(problem.batch, placement))
    alone = priced(groups, equal), priced(affine(equal, problem.pricing, band), equal)
    best = (
        min((near_group, *(moved(by_group, placement) for placement in every)), key=lambda plan: plan.seconds),
        min((*tried, alone[1]), key=lambda plan: plan.seconds),
    )
    names = [plan.table.policy for plan in alone]
    assert sorted(names) == sorted(POLICIES)
    return HomePlans(equal, dict(zip(names, best, strict=True)), dict(zip(names, alone, strict=True)))


def at_home(problem: PlacementProblem) -> Placement:
    """Every expert once, on the device from whose neighbourhood its tokens come: the least seconds of ports in all, as
    an assignment of experts to slots. How even loads are is not looked at.
    """
    batch, devices = problem.batch, problem.num_devices
    assert batch.experts_TLK is not None
    home_T, cost_DD = batch.home_of_tokens(devices), pair_seconds(problem.pricing)
    each_D = np.minimum(problem.slots_D, -(-batch.num_experts // devices))
    if each_D.sum() < batch.num_experts:
        each_D = problem.slots_D
    slot_device = np.repeat(np.arange(devices), each_D)
    device_LE = np.empty((batch.num_layers, batch.num_experts), np.int64)
    for layer in range(batch.num_layers):
        ids_TK = batch.experts_TLK[:, layer]
        flat = (ids_TK.astype(np.int64) * devices + home_T[:, None])[ids_TK != NO_EXPERT]
        pairs_ED = np.bincount(flat, minlength=batch.num_experts * devices).reshape(-1, devices)
        expert, slot = linear_sum_assignment((pairs_ED @ cost_DD)[:, slot_device])
        device_LE[layer, expert] = slot_device[slot]
    return Placement.from_devices(device_LE, devices, layer_ids_L=batch.layer_ids_L, method="at home")
