"""The ``poise`` planner: starts from every method, then swaps, moves and replica moves on the full cost.

Step 1  Starts: the placements of all other methods, one annealed for balance in every scenario
        (:mod:`poise.planning.solve.anneal`), under the split ``near`` two with nodes before devices
        (:mod:`poise.planning.solve.node_first`, :mod:`poise.planning.solve.near_anneal`), where routing groups must lie
        whole one with groups before devices (:mod:`poise.planning.solve.group_first`; others are gathered), and, where
        traffic is linear, affinity assignments. Under the home data flows layers do not depend on each other, so the
        best start of each layer is taken; under ``stay`` the best whole one. With replicas, the best start without them
        goes beside it through step 2.
Step 2  Descent, layer by layer, first improvement: swap two experts of two devices; move one to a free slot; replace a
        redundant replica by another expert; where the engine may have empty slots, drop one or add one. Devices that
        decide a maximum come first. No move takes an expert out of the place of its group.
Step 3  Perturbation: a few random swaps in the layer with the largest gap to its bound, or two groups that change
        places, descent again, and back if that did not help, until the work budget is spent.
Step 4  Of the result and all starts that are at least as good as every other method's placement under
        :func:`poise.cost.step.batch_cost`, the independent evaluator, the best; or, where that is 3 % better, the one
        that costs least when the expected loads shift at random. The plan is never worse than a rival's on the fitted
        traffic.

Where enough requests are known (not for ``stay``, and for no other risk than the mean), steps 1 to 3 look at steps
drawn anew from them, and step 4 chooses by others (:mod:`poise.planning.solve.scenarios`): a plan must hold for
requests that it does not know.

The budget is counted in elementary updates, and traffic that would take too much of it is searched on evenly spaced
steps (:mod:`poise.planning.solve.effort`), so the result depends on limit and seed alone, unless the clock cuts it.
Under the exact split the search works on the even one, and step 4 chooses by the exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_times
from poise.cost.entries import HeldEntries, LayerEntries, picked_layers
from poise.cost.step import batch_cost
from poise.planning.budget import UPDATES_PER_SECOND, Budget, Limit
from poise.planning.methods.lpt import pack
from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.planning.solve.affinity import affinity_start
from poise.planning.solve.anneal import PROPOSALS, annealed
from poise.planning.solve.complete import as_held
from poise.planning.solve.descent import descents
from poise.planning.solve.effort import price_seconds, some_steps, state_seconds
from poise.planning.solve.fill import filled
from poise.planning.solve.group_first import group_first
from poise.planning.solve.near_anneal import BALANCE, near_starts, proposals_within
from poise.planning.solve.records import Data, State
from poise.planning.solve.scenarios import DRAWN, JUDGED, MOST_DRAWN, can_be_drawn, drawn_steps
from poise.planning.solve.state import STAY, TIE_BREAK, held_by, make_data, make_state
from poise.routing.batch import RoutingBatch

PROPOSALS_PER_SECOND = 8e6
SHIFT, SHIFTS = 0.15, 8
"""Log-normal spread of the loads that step 4 tries, and how many draws."""
WORTH = 0.03
"""Share of the shifted cost for which step 4 gives up some of the fitted one."""
MAX_ROWS = 3_000_000
OVERHEAD, LEAST_SEARCH, UNTIL = 0.5, 0.2, 0.95
"""Shares of the seconds: most for prices and data, where there are steps to leave out; least for steps 2 and 3; when
the clock ends those.
"""
OPTIONS = 6
"""Placements that are priced beside the starts."""


def _best_layers(problem: PlacementProblem, options: list[Placement], seconds_OL: NDArray[np.float64]) -> Placement:
    """Each layer from the option that is fastest there under the problem's own split; layers do not depend on others.

    The search itself works on the even split, so under the exact one this is where its layers meet those of rivals.
    """
    return problem.placed(_layers_of(options, seconds_OL), "best-layers")


def _layers_of(options: list[Placement], score_OL: NDArray[np.float64]) -> HeldEntries:
    """Each layer from the option with the least score there."""
    picks, own_L = np.unique(score_OL.argmin(axis=0), return_inverse=True)
    return picked_layers([options[pick].entries() for pick in picks], own_L)


def _shift_seconds(problem: PlacementProblem, placements: list[Placement], seed: int) -> list[float]:
    """What shifted loads cost on top: each expert's load times a log-normal factor, the same for all placements."""
    batch = problem.batch
    load_LE = batch.load_LE()
    rng = np.random.default_rng(seed)
    draws = load_LE * np.exp(SHIFT * rng.standard_normal((SHIFTS, *load_LE.shape)))
    draws *= load_LE.sum(axis=1)[None, :, None] / np.maximum(draws.sum(axis=2, keepdims=True), 1e-300)
    both = np.concatenate([load_LE[None], draws])
    loads = RoutingBatch(both, np.full(len(both), 1 / len(both)), batch.top_k, batch.layer_ids_L.copy())
    out = []
    for placement in placements:
        cost = batch_cost(loads, placement.entries(), problem.cluster, problem.model, traffic="home",
                          split=problem.split).seconds_BL.mean(axis=1)  # fmt: skip
        out.append(float(cost[1:].mean() - cost[0]))
    return out


def _choose(
    whole: PlacementProblem, given: PlacementProblem | None, problem: PlacementProblem, options: list[Placement],
    seconds: list[float], starts: int, seed: int,
) -> int:  # fmt: skip
    """Step 4: number of the option that is taken; ``seconds`` are theirs on the steps that were searched, ``given`` has
    those that were given, where others were drawn.

    The first option is the search's, the next ``starts`` are other methods'.
    """
    if given is not None:  # what was given decides who is as good as others, steps that nobody has seen who is best
        own = [float(_price(given, o).seconds_L.mean()) + given.migration_seconds(o) for o in options]
        others = replace(whole, batch=drawn_steps(whole.batch, JUDGED, seed + 1))
        near = whole.split == "near"  # balance counts as in its starts
        prices = [price.score_L if near else price.seconds_L for price in (_price(others, o) for o in options)]
        score = [float(p.mean()) + others.migration_seconds(o) for p, o in zip(prices, options, strict=True)]
        limit = min(own[1 : 1 + starts])
        return min((i for i, value in enumerate(own) if value <= limit * (1 + 1e-9)), key=score.__getitem__)
    limit = min(seconds[1 : 1 + starts])
    fit = [i for i, value in enumerate(seconds) if value <= limit * (1 + 1e-9)]
    shifted = _shift_seconds(problem, [options[i] for i in fit], seed)
    total = {i: seconds[i] + more for i, more in zip(fit, shifted, strict=True)}
    best, robust = min(fit, key=seconds.__getitem__), min(total, key=total.__getitem__)
    return robust if total[robust] < (1 - WORTH) * total[best] else best


def plain_start(problem: PlacementProblem) -> Placement:
    """LPT without replicas; redundant slots stay empty."""
    batch = problem.batch
    slots = np.minimum(problem.slots_D, batch.num_experts)
    ones = np.ones(batch.num_experts, np.int64)
    held = HeldEntries.of_layers(
        LayerEntries.of_counts(pack(load, ones, slots, problem.cluster.speed_D)) for load in batch.load_LE()
    )
    return problem.placed(held, "lpt-plain")


def _best_start(
    data: Data, problem: PlacementProblem, starts: list[Placement], scores_SL: NDArray[np.float64]
) -> State:
    """Step 1: the state of the best start, or of the best of each layer, by their ``scores_SL`` [starts, L]."""
    best = starts[int(np.argmin(scores_SL.sum(axis=1)))].entries()
    if not (problem.pooled or (data.flow == STAY and data.has_tokens)):
        best = _layers_of(starts, scores_SL)
    return make_state(data, problem, best)


@dataclass(frozen=True, slots=True)
class _Price:
    """A placement under the independent evaluator, float64 [L] each: seconds, and what the search counts of them."""

    seconds_L: NDArray[np.float64]
    score_L: NDArray[np.float64]


def _price(problem: PlacementProblem, placement: Placement) -> _Price:
    batch, cluster, held = problem.batch, problem.cluster, placement.entries()
    cost = problem.pricing.cost(batch, held)
    seconds_L: NDArray[np.float64] = batch.weight_B @ cost.seconds_BL
    if problem.split == "exact":  # the search works on the even split
        cost = problem.pricing.cost(batch, held, split="even")
    most_BL = (cost.tokens_BLD / cluster.speed_D).max(axis=2)
    times = expert_times(cluster, problem.model)
    per_token = times.compute_s + times.activation_s
    weight = BALANCE if problem.split == "near" else TIE_BREAK
    return _Price(seconds_L, batch.weight_B @ (cost.seconds_BL + weight * per_token * most_BL))


class _Pool:
    """Starts as they will be held, and what each costs on the steps that are searched.

    Attributes
    ----------
    problem : with these steps.
    placements, prices : of the starts.
    plain : whether a start came without replicas.
    """

    def __init__(self, problem: PlacementProblem) -> None:
        self.problem = problem
        self.placements: list[Placement] = []
        self.prices: list[_Price] = []
        self.plain: list[bool] = []

    def add(self, start: Placement) -> None:
        """One more."""
        self.plain.append(int(start.replicas_LE().max()) == 1)
        self.placements.append(as_held(self.problem, start))
        self.prices.append(_price(self.problem, self.placements[-1]))

    def on(self, problem: PlacementProblem) -> None:
        """All priced anew, on other steps."""
        if problem is not self.problem:
            self.problem, self.prices = problem, [_price(problem, one) for one in self.placements]


def _priced(
    problem: PlacementProblem, starts: list[Placement], own: Iterator[Callable[[], Iterable[Placement]]],
    budget: Budget, overhead: float,
) -> _Pool:  # fmt: skip
    """All starts that others have made, though the clock is over, as a plan is never worse than any of them; of its own
    those that there is time to make. Once somebody has stopped it, on as few steps as the grace allows; ``overhead``
    nominal seconds are what prices and data take on those of ``problem``.
    """
    pool = _Pool(problem)

    def hurry() -> None:
        if budget.stopped and pool.problem is problem:
            pool.on(some_steps(problem, budget.afford(overhead, "steps"), overhead))

    for start in starts:
        hurry()
        pool.add(start)
    for make in own:
        if pool.placements and budget.over("starts"):  # asked before it is made: what is made is priced
            break
        for start in make():
            pool.add(start)
    hurry()
    return pool


def _own_starts(
    whole: PlacementProblem, problem: PlacementProblem, proposals: int, near: int, budget: Budget, seed: int
) -> Iterator[Callable[[], Iterable[Placement]]]:
    """Step 1: starts beside those of other methods, not made yet; ``problem`` has some of the steps of the ``whole``.
    Each must be made before the next is asked for.
    """
    yield lambda: [plain_start(whole)]
    if whole.traffic == "stay":
        yield partial(affinity_start, problem)
    place_LE = None
    if whole.whole is not None and whole.whole.must:
        grouped: list[Placement] = []

        def by_group() -> list[Placement]:
            grouped.append(group_first(whole, seed=seed))
            return grouped

        yield by_group
        place_LE = whole.whole.place_LE(grouped[0].count_LED())
    if problem.num_devices > 1 and not problem.pooled:
        yield lambda: [annealed(whole, proposals=proposals, seed=seed, budget=budget, place_LE=place_LE)]
        if problem.split == "exact" and problem.spare_slots > 0:
            yield lambda: [filled(whole, seed=seed)]
        if problem.split == "near" and problem.cluster.num_nodes > 1:
            yield partial(near_starts, whole, problem, proposals=near, seed=seed, budget=budget)


def search(
    problem: PlacementProblem,
    starts: list[Placement],
    *,
    time_limit_s: Limit,
    seed: int,
    progress: Progress | None = None,
    behind_s: float = 0.0,
) -> MethodResult:
    """Improve the best of ``starts`` (feasible placements, at least one) within a budget.

    ``behind_s`` are nominal seconds that the starts took more than theirs, negative where they left some.
    """
    budget, whole = Budget.of(time_limit_s), problem
    drawn = whole.traffic != "stay" and whole.risk == "mean" and can_be_drawn(whole.batch)
    if drawn:
        steps = min(max(whole.batch.num_steps, DRAWN), MOST_DRAWN)
        problem = replace(whole, batch=drawn_steps(whole.batch, steps, seed))
    each = price_seconds(problem) * (1 + (problem.split == "exact"))
    overhead = (len(starts) + OPTIONS) * each + state_seconds(problem)
    most = min(overhead, OVERHEAD * budget.seconds + max(0.0, -behind_s))
    many = problem.batch.num_steps
    problem = some_steps(problem, budget.afford(most, "steps"), overhead)
    given = some_steps(whole, budget.seconds, overhead) if drawn else None
    proposals = min(PROPOSALS, int(0.3 * budget.seconds * PROPOSALS_PER_SECOND / problem.batch.num_layers))
    near, near_s = proposals_within(problem, 0.5 * budget.seconds * (problem.split == "near"))
    own_starts = _own_starts(whole, problem, proposals, near, budget.part(0.3, until=0.8), seed)
    priced = _priced(problem, starts, own_starts, budget, overhead * problem.batch.num_steps / many)
    problem, pool, prices = priced.problem, priced.placements, priced.prices
    data = make_data(problem, MAX_ROWS)
    score_OL = np.stack([price.score_L for price in prices])
    states = [_best_start(data, problem, pool, score_OL)]
    if (states[0].copies_LE > 1).any() and any(priced.plain):
        # Replicas cost weight reads, and descent seldom drops all of them, or, where the engine wants slots filled,
        # replaces all: descend from none, or from those that filling adds, as well.
        bare = np.flatnonzero(priced.plain)
        states.append(_best_start(data, problem, [pool[i] for i in bare], score_OL[bare]))
    overhead *= problem.batch.num_steps / max(problem.batch.num_steps, whole.batch.num_steps)
    late = behind_s + overhead + near_s + proposals * problem.batch.num_layers / PROPOSALS_PER_SECOND
    updates = UPDATES_PER_SECOND * max(LEAST_SEARCH * budget.seconds, budget.seconds - max(0.0, late))
    with budget.part(1.0, until=UNTIL).stops(data.stop):
        state, kicks, helped = descents(data, problem, states, updates, seed, progress, budget.spread)
    if data.stop[0] and state.work[0] < updates:
        budget.cuts.add("search")
    found = problem.placed(held_by(state), "poise")
    options, prices = [found, *pool], [_price(problem, found), *prices]
    if not (problem.pooled or problem.traffic == "stay"):
        options.append(_best_layers(problem, options, np.stack([price.seconds_L for price in prices])))
        prices.append(_price(problem, options[-1]))
    seconds = [float(p.seconds_L.mean()) + problem.migration_seconds(o) for o, p in zip(options, prices, strict=True)]
    best = _choose(whole, given, problem, options, seconds, len(starts), seed)
    chosen = options[best]
    details = {
        "updates": int(state.work[0]),
        "kicks": kicks,
        "kicks_that_helped": helped,
        "chosen": "search" if best == 0 else chosen.method,
        "starts": {o.method: value for o, value in zip(pool, seconds[1:], strict=False)},
    }
    if problem.batch.sampled:
        details["searched_on"] = problem.batch.sampled
    return MethodResult(Placement(chosen.slot_expert_LS, chosen.slot_device_S, chosen.num_experts, chosen.num_devices,
                                  chosen.layer_ids_L, "poise"), details)  # fmt: skip
