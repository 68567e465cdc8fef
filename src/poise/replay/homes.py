"""What it gains to choose which rank serves which request, on requests that the plan has not seen.

Tokens stay even in every row, as attention data parallelism keeps them: what has no room on the rank of its request
runs elsewhere, and how much that is is told. Recorded homes alone are priced as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.perturb import GainRange, gain_range
from poise.cost.pricing import Pricing
from poise.cost.step import layer_works
from poise.machine.settle import ground
from poise.planning.budget import Budget
from poise.planning.homes import HomeTable
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, Progress
from poise.planning.solve.solve import solve
from poise.planning.solve.with_homes import PLANS, plan_homes
from poise.replay.compare import NOT_WORTH, saved_share
from poise.routing.batch import RoutingBatch
from poise.routing.trace import RoutingTrace
from poise.util.errors import OptionError
from poise.util.words import percent

EQUAL, GIVEN = "equal", "given"
Batched = Callable[[RoutingTrace], RoutingBatch]


@dataclass(frozen=True, slots=True)
class HomeRow:
    """A way to choose homes, judged.

    Parameters
    ----------
    homes : ``equal`` (no request has a rank of its own), ``given`` (as recorded), or a policy.
    replanned : the placement is planned for these homes, else for equal ones.
    step_s, exchange_s : mean seconds of a step, of all recorded MoE layers, and what of it are all-to-alls.
    fitted_step_s : the same on the fitted requests.
    off_device, off_node : shares of pairs computed on another device, another node than their token's home.
    active : experts with tokens on a rank, mean over ranks, steps and layers; one that gets n < 1 tokens in the mean
        counts n.
    imbalance : max / mean tokens over devices.
    kept : share of tokens at home on the rank that their request was given; None where none was.
    fullest : tokens of the fullest home rank over the mean, before they are evened out.
    """

    homes: str
    replanned: bool
    step_s: float
    exchange_s: float
    fitted_step_s: float
    off_device: float
    off_node: float
    active: float
    imbalance: float
    kept: float | None
    fullest: float

    @property
    def name(self) -> str:
        """Of its row in tables."""
        return self.homes + (", re-planned" if self.replanned else "")


@dataclass(frozen=True, slots=True, eq=False)
class HomeStudy:
    """What homes gain.

    Parameters
    ----------
    rows : the first has equal homes.
    policy : the one that was asked for, or that is best on the fitted requests; its re-planned row is judged.
    table, placement : of that row.
    equal : the placement for equal homes.
    share, low, high : of a step that it saves on requests never seen, and a 95 % interval over steps.
    within : the same while every constant of the machine is off by its error.
    order, constants : how steps were made, and what prices them, in words.
    defaults : what was not said and decides the seconds: then no gain in time is claimed.
    notes : what a reader must know.
    interrupted : somebody ended the search: plans are the best so far, and no verdict follows.
    """

    rows: tuple[HomeRow, ...]
    policy: str
    table: HomeTable
    placement: Placement
    equal: Placement
    share: float
    low: float
    high: float
    within: GainRange
    order: str
    constants: str
    defaults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def judged(self) -> HomeRow:
        """The row that the sentence is of."""
        return next(row for row in self.rows if row.homes == self.policy and row.replanned)

    @property
    def worth_it(self) -> bool:
        """It saves a hundredth of a step, in nearly all draws of the steps, and something whatever the constants."""
        return (
            not (self.defaults or self.interrupted)
            and self.share >= NOT_WORTH
            and self.low > 0
            and self.within.least_share > 0
        )

    def sentence(self) -> str:
        """What planned homes save, or that they are not worth it."""
        equal = self.rows[0]
        tail = (
            f"pairs off device {percent(self.judged.off_device)}, equal homes {percent(equal.off_device)}; active "
            f"experts a rank and step {self.judged.active:.2f}, {equal.active:.2f}."
        )
        if self.interrupted:
            return (
                f"No verdict: interrupted, these are the best plans so far, and another run may end elsewhere; {tail}"
            )
        if self.defaults:
            return f"No verdict on time: {'; '.join(self.defaults)}. By tokens alone: {tail}"
        text = (
            f"planned homes ({self.policy}) save {percent(self.share)} of the step on requests never seen (95 % "
            f"interval {percent(self.low)} to {percent(self.high)}; {percent(self.within.least_share)} at the least "
            "while constants are off by their errors)"
        )
        return f"{text[0].upper() + text[1:] if self.worth_it else 'Not worth it: ' + text}; {tail}"

    def to_json(self) -> dict[str, Any]:
        """Everything that is printed."""
        return {
            "rows": [{"name": row.name, **asdict(row)} for row in self.rows],
            "policy": self.policy, "worth_it": self.worth_it, "saved_share": self.share,
            "interval": [self.low, self.high], "least_share": self.within.least_share,
            "most_share": self.within.most_share, "sentence": self.sentence(), "order": self.order,
            "constants": self.constants, "defaults": list(self.defaults), "notes": list(self.notes),
            "interrupted": self.interrupted,
        }  # fmt: skip


def study_homes(
    fit: RoutingTrace, held_out: RoutingTrace, batched: Batched, problem_of: Callable[[RoutingBatch], PlacementProblem],
    budget: Budget, *, policy: str | None = None, band: float, seed: int = 0, progress: Progress | None = None,
) -> HomeStudy:  # fmt: skip
    """Plan homes and placements on the requests of ``fit``, and judge them on others.

    Parameters
    ----------
    batched : makes steps of a trace; recorded homes are kept.
    problem_of : the placement problem of a batch.
    policy : default: the better one on the fitted requests.
    budget : for all placements together.
    band : see :data:`poise.planning.homes.BAND`.

    Raises
    ------
    OptionError : recorded homes do not fit the cluster; others as :func:`poise.planning.solve.with_homes.plan_homes`.
    NoResultError : no placement was found.
    """
    seen, later = (replace(trace, home=None) for trace in (fit, held_out))
    equal = batched(seen), batched(later)
    problem = problem_of(equal[0])
    recorded = _recorded(fit, held_out, batched, problem.num_devices)
    share = PLANS / (PLANS + 1) if recorded else 1.0
    plans = plan_homes(problem, seen, batched, budget.part(share), band=band, seed=seed, progress=progress)
    rows = [_row(EQUAL, False, equal, plans.equal, problem.pricing, None)]
    if recorded:
        rows.append(_row(GIVEN, False, recorded, plans.equal, problem.pricing, None))
        asked = replace(problem, batch=recorded[0], current=plans.equal, migration_steps=0.0)
        own = solve(asked, time_limit_s=budget.part(1 - share, until=1.0), seed=seed).placement
        rows.append(_row(GIVEN, True, recorded, own, problem.pricing, None))
    homed = {}
    for name in plans.best:
        for replanned, plan in ((False, plans.alone[name]), (True, plans.best[name])):
            wished = batched(plan.table.home(later))
            homed[name] = wished.evened(problem.num_devices)
            rows.append(_row(name, replanned, (plan.batch, homed[name]), plan.placement, problem.pricing, wished))
    chosen = policy or min(plans.best, key=lambda name: plans.best[name].seconds)
    best, pricing = plans.best[chosen], problem.pricing
    seconds = [
        pricing.cost(batch, placement.count_LED()).seconds_BL.sum(axis=1)
        for batch, placement in ((homed[chosen], best.placement), (equal[1], plans.equal))
    ]
    within = gain_range(equal[1], plans.equal.count_LED(), best.placement.count_LED(), pricing, after=homed[chosen])
    return HomeStudy(
        tuple(rows), chosen, best.table, best.placement, plans.equal, *saved_share(*seconds), within, equal[1].order,
        ground(problem.cluster), interrupted=budget.stopped,
        notes=(*(f"{batch.sampled} are priced" for batch in equal if batch.sampled), *budget.cut_words("plans")),
    )  # fmt: skip


def _recorded(
    fit: RoutingTrace, held_out: RoutingTrace, batched: Batched, devices: int
) -> tuple[RoutingBatch, RoutingBatch] | None:
    """Steps with recorded homes; None where none are."""
    if fit.home is None or held_out.home is None:
        return None
    most = max(int(fit.home.max()), int(held_out.home.max()))
    if most >= devices:
        raise OptionError(
            f"recorded home ranks reach {most}, the cluster has {devices} devices",
            hint="name the cluster that the traffic was recorded on",
        )
    return batched(fit), batched(held_out)


def _row(
    homes: str, replanned: bool, batches: tuple[RoutingBatch, RoutingBatch], placement: Placement, pricing: Pricing,
    wished: RoutingBatch | None,
) -> HomeRow:  # fmt: skip
    """A placement on fitted and judged steps; ``wished``: the judged ones before tokens are evened out."""
    count_LED, judged = placement.count_LED(), batches[1]
    fitted, cost = (pricing.cost(batch, count_LED) for batch in batches)
    devices, weight_B = pricing.cluster.num_devices, judged.weight_B
    kept = None if wished is None else float((wished.home_of_tokens(devices) == judged.home_of_tokens(devices)).mean())
    pairs = float(cost.pairs_BL.sum())
    return HomeRow(
        homes, replanned, float(weight_B @ cost.seconds_BL.sum(axis=1)),
        float(weight_B @ (cost.dispatch_BL + cost.combine_BL).sum(axis=1)),
        float(batches[0].weight_B @ fitted.seconds_BL.sum(axis=1)), float(cost.cross_device_BL.sum()) / pairs,
        float(cost.cross_node_BL.sum()) / pairs, active_experts(judged, count_LED, pricing),
        float(np.nanmean(cost.imbalance_BL())), kept, (wished or judged).fullest_home(devices),
    )  # fmt: skip


def active_experts(batch: RoutingBatch, count_LED: NDArray[Any], pricing: Pricing) -> float:
    """Experts with tokens on a rank, mean over ranks, steps and layers; one that gets n < 1 tokens counts n."""
    total = 0.0
    for (steps, _), work in layer_works(
        batch, count_LED, pricing.cluster, traffic=pricing.traffic, split=pricing.split
    ):
        total += float(batch.weight_B[steps] @ np.minimum(work.tokens_BH, 1.0).sum(axis=1))
    return total / (batch.num_layers * pricing.cluster.num_devices)
