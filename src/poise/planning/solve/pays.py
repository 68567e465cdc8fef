"""Routing groups whole where that pays: a plan without the rule, a plan under it, and in every layer the faster one.

Both are priced on the problem's own traffic as they will be held. Where layers depend on each other (``stay``), and
under another risk than the mean, one of the two is taken whole. So the plan is never slower there than the one without
the rule; how that one is found is not changed by asking for this: by work it has all of it and the second plan comes on
top, by the clock the second one has its :data:`SHARE`. Where groups cannot lie whole in these slots there is no second
plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from poise.cost.entries import picked_layers
from poise.planning.budget import Budget
from poise.planning.problem import MethodResult, PlacementProblem
from poise.planning.solve.complete import as_held
from poise.planning.solve.effort import price_seconds, some_steps

SHARE, PRICES = 0.4, 0.1
"""Of a clock's seconds: for the plan with groups whole, and at most for prices."""


def where_it_pays(
    problem: PlacementProblem, plan: Callable[[PlacementProblem, Budget], MethodResult], budget: Budget
) -> MethodResult:
    """The better of ``plan`` without the rule and under it, layer by layer where that can be."""
    whole = problem.whole
    assert whole is not None
    loose = replace(problem, whole=None)
    if not whole.fits(problem.layer_slots_D, filled=not problem.engine.empty_slots):
        return plan(loose, budget)
    strict, clock = replace(problem, whole=replace(whole, must=True)), budget.work is None
    found = [plan(loose, budget.part(1 - SHARE) if clock else budget)]
    if whole.num_places == 1 or (clock and budget.over("groups whole")):
        return found[0]
    found.append(plan(strict, budget.part(SHARE, until=1.0) if clock else budget))
    some = some_steps(problem, PRICES * budget.seconds, 3 * price_seconds(problem))
    options = [as_held(replace(some, whole=one.whole), result.placement)
               for one, result in zip((loose, strict), found, strict=True)]  # fmt: skip
    costs = [some.pricing.cost(some.batch, option.count_LED()).seconds_BL for option in options]
    if problem.traffic != "stay" and problem.risk == "mean":
        pays_L = some.batch.weight_B @ costs[1] < (1 - 1e-9) * (some.batch.weight_B @ costs[0])
        held = picked_layers([option.entries() for option in options], pays_L.astype(np.int64))
        options.append(problem.placed(held, "poise"))
        costs.append(np.where(pays_L, costs[1], costs[0]))
    value = [some.risk_seconds(cost.mean(axis=1)) + problem.migration_seconds(option)
             for cost, option in zip(costs, options, strict=True)]  # fmt: skip
    best = min(range(len(options)), key=value.__getitem__)
    details = {
        **found[best % 2].details,
        "groups": {"without_s": value[0], "whole_s": value[1], "taken_s": value[best]},
    }
    return MethodResult(options[best], details)
