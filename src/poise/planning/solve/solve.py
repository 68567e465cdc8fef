"""solve: one problem, one method -> a Solution, priced by independent code and with a bound per term."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.bound import BoundTerms, bound_terms
from poise.cost.bound_compute import compute_bound, filled_work
from poise.cost.compute import expert_times
from poise.planning.budget import Budget, Limit
from poise.planning.methods import (
    carry,
    coactivation,
    contiguous,
    eplb,
    exflow,
    flash_lb,
    grace_moe,
    lpt,
    moetuner,
    round_robin,
    swift_balance,
)
from poise.planning.placement import Placement
from poise.planning.problem import Method, MethodResult, PlacementProblem, Progress, Solution, Term
from poise.planning.solve import exact, fill, search, small, stay
from poise.planning.solve.checked import checked_method
from poise.planning.solve.complete import as_held
from poise.planning.solve.effort import bound_seconds, price_seconds, some_steps, start_seconds
from poise.planning.solve.joint import ClosedBounds, has_joint_bound, joint_bound
from poise.planning.solve.pays import where_it_pays
from poise.util.errors import NoResultError
from poise.util.executors import Given, Serial, begun, hears, taken
from poise.util.registry import Registry

RISK_ROUNDS = 3
STARTS_SHARE, SEARCH_SHARE, SLACK, SEARCH_UNTIL, PRICE_SHARE = 0.4, 0.6, 0.32, 0.95, 0.1
"""Shares of a budget: at most for starts; search; what may be used before it is shortened; its end; the last price."""
AT_ONCE = ("round-robin", "lpt", "eplb", "eplb-global")
"""Starts that are made though the clock is over, as where a plan before took its time: they take a moment, and no plan
is to be worse than what an engine has without one."""
LISTEN_S = 0.1
"""How often one that waits for a start elsewhere asks whether the plan is to end."""
AFFINITY_SIZE = 4096
"""Layers * experts * devices up to which plans for ``stay`` traffic are starts under any other too."""


def _plan_poise(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """Search from the placements of all other methods; see :mod:`poise.planning.solve.search`.

    Under a risk other than the mean, scenarios are weighed anew between rounds, those that do worst more: the dual of
    the risk's envelope. The best plan of all rounds under :meth:`PlacementProblem.risk_seconds` counts.
    """
    budget = Budget.of(time_limit_s)
    if problem.whole is not None and not problem.whole.must:
        return where_it_pays(problem, partial(_plan_once, seed=seed, progress=progress), budget)
    return _plan_once(problem, budget, seed=seed, progress=progress)


def _plan_once(
    problem: PlacementProblem, budget: Budget, *, seed: int, progress: Progress | None
) -> MethodResult:  # fmt: skip
    """One plan, groups whole or not as the problem says."""
    if problem.risk == "mean":
        return _search_once(problem, budget=budget, seed=seed, progress=progress)
    best: tuple[float, MethodResult] | None = None
    weighed = problem
    for turn in range(RISK_ROUNDS):
        if best is not None and budget.over("risk rounds"):
            break
        part = budget.part(1 / RISK_ROUNDS, until=(turn + 1) / RISK_ROUNDS)
        found = _search_once(weighed, budget=part, seed=seed, progress=progress)
        seconds_B = _step_seconds(problem, found.placement)
        value = problem.risk_seconds(seconds_B)
        if best is None or value < best[0]:
            best = (value, found)
        heavier = weighed.batch.weight_B * np.exp(4.0 * (seconds_B / seconds_B.mean() - 1.0))
        weighed = replace(weighed, batch=replace(problem.batch, weight_B=heavier / heavier.sum()))
    assert best is not None
    return MethodResult(best[1].placement, {**best[1].details, "risk": problem.risk, "risk_seconds": best[0]})


def _step_seconds(problem: PlacementProblem, placement: Placement) -> NDArray[np.float64]:
    """Seconds of one layer in each scenario, float64 [B]."""
    out: NDArray[np.float64] = problem.pricing.cost(problem.batch, placement.entries()).seconds_BL.mean(axis=1)
    return out


def _search_once(problem: PlacementProblem, *, budget: Budget, seed: int, progress: Progress | None) -> MethodResult:
    starts = carry.starts(problem)
    left_out: list[str] = []
    early = budget.part(STARTS_SHARE)
    small = problem.batch.num_layers * problem.batch.num_experts * problem.num_devices <= AFFINITY_SIZE
    names = [name for name in STARTS + (STAY_STARTS if problem.traffic == "stay" or small else ())
             if problem.pooled or not METHODS[name].pooled]  # fmt: skip
    needs = {name: start_seconds(problem, name, early.part(0.5).seconds) for name in names}
    under_way = _Starts(problem, early, seed)
    spent = 0.0
    for at, name in enumerate(names):
        if not under_way.made(name):
            late = early.over("starts") and (early.stopped or name not in AT_ONCE)
            if starts and (spent + needs[name] > early.seconds or late):
                left_out.append(name)
                continue
            under_way.begin(names[at:], needs, early.seconds - spent)
        placement = under_way.take(name)
        if placement is None:
            continue
        spent += needs[name]
        starts.append(placement)
    under_way.give_up()
    found = search.search(problem, starts, time_limit_s=budget.part(SEARCH_SHARE, until=SEARCH_UNTIL), seed=seed,
                          progress=progress, behind_s=spent - SLACK * budget.seconds)  # fmt: skip
    return replace(found, details={**found.details, "starts_left_out": left_out}) if left_out else found


class _Starts:
    """Starts on their way on the budget's executor: those that will be wanted if none fails, so that which are taken
    does not depend on the executor.
    """

    def __init__(self, problem: PlacementProblem, early: Budget, seed: int) -> None:
        self._problem, self._early, self._seed = problem, early, seed
        self._executor = early.executor or Serial()
        self._futures: dict[str, Future[Given]] = {}

    def begin(self, names: Sequence[str], needs: Mapping[str, float], seconds: float) -> None:
        """Those of ``names`` that fit into nominal seconds, the first one anyway; one at a time without an executor."""
        for name in names if self._early.spread else names[:1]:
            seconds -= needs[name]
            if seconds < 0 and name != names[0]:
                return
            if name not in self._futures:
                own = self._early.part(0.5, until=1.0)
                self._futures[name] = begun(self._executor, _start, self._problem, name, own, self._seed)

    def made(self, name: str) -> bool:
        """Whether a start is there and not taken yet: then it costs nothing more, whatever the clock says."""
        return name in self._futures and self._futures[name].done()

    def take(self, name: str) -> Placement | None:
        """The placement of a start, or None where its method found none."""
        future = self._futures.pop(name)
        while not wait((future,), timeout=LISTEN_S).done:
            if self._early.stopped and not hears(self._executor):
                future.cancel()  # made here it ends at once
                future = begun(Serial(), _start, self._problem, name, self._early.part(0.5, until=1.0), self._seed)
        placement, cuts = taken(future)
        self._early.cuts.update(cuts)
        found: Placement | None = placement
        return found

    def give_up(self) -> None:
        """What nobody wants any more."""
        for future in self._futures.values():
            future.cancel()


def _start(problem: PlacementProblem, name: str, budget: Budget, seed: int) -> tuple[Placement | None, frozenset[str]]:
    """A method's placement, and what the clock cut; in any process."""
    try:
        placement = METHODS[name].plan(problem, time_limit_s=budget, seed=seed).placement
        problem.check(placement)
    except NoResultError:
        return None, frozenset(budget.cuts)
    return placement, frozenset(budget.cuts)


OWN: dict[str, Method] = {
    "contiguous": Method(contiguous.plan, "blocks of experts in order: what engines do by default", fitted=False),
    "round-robin": Method(round_robin.plan, "experts dealt in turn", fitted=False),
    "lpt": Method(lpt.plan, "heaviest first onto the least loaded device"),
    "eplb": Method(eplb.plan, "DeepSeek EPLB, hierarchical where it divides"),
    "eplb-global": Method(eplb.plan_global, "DeepSeek EPLB, nodes ignored"),
    "moetuner": Method(moetuner.plan, "MoETuner's two ILPs as published: unequal layers, equal in all", pooled=True),
    "moetuner-equal": Method(moetuner.plan_equal, "MoETuner's two ILPs with equal layers"),
    "exflow": Method(exflow.plan, "ExFlow: most tokens stay on their device from layer to layer; no load term"),
    "grace-moe": Method(grace_moe.plan, "GRACE-MoE: co-activation groups, replicas for the heaviest group"),
    "coactivation": Method(coactivation.plan, "swaps by co-activation after EPLB"),
    "swift-balance": Method(swift_balance.plan, "vllm-ascend's SwiftBalance: bounded swaps from the current placement"),
    "flash-lb": Method(flash_lb.plan, "vllm-ascend's FlashLB: mean and covariance of loads, tree search over replicas"),
    "exact": Method(exact.plan, "proven joint optimum under linear stay traffic, small layers only"),
    "exact-balance": Method(small.plan, "proven least maximum under the even split, small layers only"),
    "surplus-fill": Method(fill.plan, "replicas where the exact split lacks room: balance within 0.2 % of its bound"),
    "poise-stay": Method(stay.plan, "for stay traffic: hottest experts everywhere, the rest by affinity"),
    "poise": Method(_plan_poise, "joint search on the full cost"),
}
METHODS = Registry("method", "poise.methods", OWN, checked_method)
"""poise's own static methods, and those that other packages offer by entry points (docs/extend.md)."""
STARTS = (
    "exact-balance", "contiguous", "round-robin", "lpt", "eplb", "eplb-global", "flash-lb", "swift-balance",
    "grace-moe", "coactivation", "exact", "moetuner-equal", "moetuner",
)  # fmt: skip
STAY_STARTS = ("exflow", "poise-stay")


def solve(
    problem: PlacementProblem,
    *,
    method: str = "poise",
    time_limit_s: Limit = 20.0,
    work: float | None = None,
    joint: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Solution:
    """Plan a placement and price it, for all methods alike as it will be held: routing groups that a method tears where
    they must lie whole are gathered, and slots that it leaves empty filled (:mod:`poise.planning.solve.complete`).

    Parameters
    ----------
    problem : traffic, machine, model and memory.
    method : a key of :data:`METHODS`. ``moetuner`` is solved with ``pooled`` slots, as it was published.
    time_limit_s : seconds for the plan and its price, or a part of a :class:`poise.planning.budget.Budget`. Compiling
        is not counted. Stages that the clock cuts are in ``details["cut_by_clock"]``: another run may end elsewhere.
    work : units of work instead (:mod:`poise.planning.budget`): no clock, the same plan on every machine.
    joint : share of the seconds for a joint bound (:mod:`poise.planning.solve.joint`) after the search, where there can
        be one; of work it comes on top, so that the plan is the same without.
    seed : the same seed gives the same placement.
    progress : called with a stage and the share of it done.

    Raises
    ------
    OptionError : unknown method, or a time limit or work that is not above 0.
    PluginError : another package's method is not what it should be, or failed.
    InfeasibleError, NoResultError : the method proved that there is no placement, or found none; or it counts slots
        over all layers together, and groups must lie whole.
    """
    chosen = METHODS.ask(method)
    if chosen.pooled and problem.whole is not None:
        raise NoResultError(f"{method} counts slots over all layers together, groups are kept whole layer by layer")
    budget = Budget.of(time_limit_s, work)
    if chosen.pooled and not problem.pooled:
        problem = replace(problem, pooled=True)
    began, before = time.monotonic(), set(budget.cuts)
    joint = joint if has_joint_bound(problem) else 0.0
    search = budget if budget.work is not None or not joint else budget.part(1 - joint)
    result = chosen.plan(problem, time_limit_s=search, seed=seed, progress=progress)
    problem.check(result.placement)
    made = result.placement
    some = some_steps(problem, PRICE_SHARE * budget.seconds, 2 * price_seconds(problem))
    result = replace(result, placement=as_held(some, result.placement))
    problem.engine.check(result.placement, problem.slots_D)
    problem.check_groups(result.placement)
    if problem.whole is not None:
        result = replace(result, details={**result.details, "groups": _groups(problem, made, result)})
    seconds = time.monotonic() - began
    needed = price_seconds(problem) + bound_seconds(problem)
    most = budget.afford(min(needed, PRICE_SHARE * budget.seconds), "price")
    left = budget.part(joint, until=1.0) if joint else None
    found = evaluate(problem, result, method=method, seconds=seconds, most_seconds=most, joint=left)
    cut = sorted(budget.cuts - before)
    return replace(found, details={**found.details, "cut_by_clock": cut}) if cut else found


def _groups(problem: PlacementProblem, made: Placement, result: MethodResult) -> dict[str, Any]:
    """In how many layers every routing group lies whole, and how many slots of what was ``made`` gave way for it
    (``gathered``), beside what the method says of them.
    """
    whole, count_LED = problem.whole, result.placement.count_LED()
    assert whole is not None
    kept = int((~whole.torn_LG(count_LED).any(axis=1)).sum())
    left = int(((made.count_LED() > 0) & (count_LED == 0)).sum())  # filling takes none away
    return {"where": whole.where, "must": whole.must, "groups": whole.num_groups, "places": whole.num_places,
            "whole_layers": kept, "layers": result.placement.num_layers, "gathered": left,
            **result.details.get("groups", {})}  # fmt: skip


def without_redundant(problem: PlacementProblem) -> PlacementProblem | None:
    """The same problem with the fewest slots that hold every expert; None where it has no more or may leave some empty.

    An engine fills every slot it has, and in memory-bound decode a replica costs more than it saves: then this problem
    has the better plan.
    """
    fewest = -(-problem.batch.num_experts // problem.num_devices)
    if problem.engine.empty_slots or problem.slots_D.min() <= fewest:
        return None
    slots_D = np.full(problem.num_devices, fewest)
    whole = problem.whole
    if whole is not None and whole.must and not whole.fits(slots_D, filled=True):
        return None
    return replace(problem, slots_D=slots_D)


def evaluate(
    problem: PlacementProblem, result: MethodResult, *, method: str, seconds: float = 0.0,
    most_seconds: float = np.inf, joint: Budget | None = None,
) -> Solution:  # fmt: skip
    """Price a placement on the problem's own traffic with :func:`poise.cost.step.batch_cost`, and bound each term.

    Where that would take more than ``most_seconds`` nominal seconds, both are of evenly spaced steps alone, and
    ``details["priced_on"]`` says so. A budget for a ``joint`` bound tightens that of all terms together, as
    ``details["bound"]`` says.
    """
    whole, details = problem, result.details
    problem = some_steps(problem, most_seconds, price_seconds(problem) + bound_seconds(problem))
    if problem is not whole:
        details = {**details, "priced_on": problem.batch.sampled}
    batch = problem.batch
    cost = problem.pricing.cost(batch, result.placement.entries())
    bound, compute_L = _bounds(problem)
    weight = batch.weight_B
    terms = {
        "compute": Term(float(weight @ cost.compute_BL.mean(axis=1)), float(compute_L.mean())),
        "dispatch": Term(float(weight @ cost.dispatch_BL.mean(axis=1)), float(weight @ bound.dispatch_BL.mean(axis=1))),
        "combine": Term(float(weight @ cost.combine_BL.mean(axis=1)), float(weight @ bound.combine_BL.mean(axis=1))),
        "kv": Term(float(weight @ cost.kv_BL.mean(axis=1)), float(weight @ bound.kv_BL.mean(axis=1))),
    }  # fmt: skip
    imbalance, together = cost.imbalance_BL(), 0.0
    if joint is not None and has_joint_bound(problem):
        tighter = joint_bound(problem, ClosedBounds(compute_L, bound), joint)
        together = float(tighter.seconds_L.mean())
        details = {**details, "bound": tighter.said} if tighter.said else details
    return Solution(result.placement, method, terms, float(np.nanmean(imbalance)), seconds, details, together)


def lower_bound(problem: PlacementProblem, budget: Budget) -> float:
    """Seconds a layer and step that no placement can beat, of as many steps as a tenth of the budget allows."""
    problem = some_steps(problem, PRICE_SHARE * budget.seconds, bound_seconds(problem))
    bound, compute_L = _bounds(problem)
    rest_BL = bound.dispatch_BL + bound.combine_BL + bound.kv_BL
    return float(compute_L.mean() + (problem.batch.weight_B @ rest_BL).mean())


def _bounds(problem: PlacementProblem) -> tuple[BoundTerms, NDArray[np.float64]]:
    """Bounds per term, and of compute for one static plan, float64 [L]."""
    batch = problem.batch
    slots_D, speed_D, spare = problem.layer_slots_D, problem.cluster.speed_D, problem.spare_slots
    bound = bound_terms(batch, problem.cluster, problem.model, traffic=problem.traffic, slots_D=slots_D, spare=spare,
                        blind=problem.split != "near")  # fmt: skip
    # One static plan serves all scenarios, so the mean work of an expert bounds it too.
    static_L = compute_bound(problem.work_LE(), slots_D, speed_D, spare=spare)
    if problem.split == "even" and not problem.engine.empty_slots and spare > 0:
        static_L = np.maximum(static_L, _filled_L(problem) / speed_D.sum())
    start_L = batch.weight_B @ (batch.tokens_BL() > 0) * expert_times(problem.cluster, problem.model).start_s
    return bound, np.maximum(batch.weight_B @ bound.compute_BL, static_L + start_L)


def _filled_L(problem: PlacementProblem) -> NDArray[np.float64]:
    """:func:`poise.cost.bound_compute.filled_work` of each layer, float64 [L]."""
    batch, spare = problem.batch, int(problem.layer_slots_D.sum()) - problem.batch.num_experts
    return np.array([filled_work(batch.load_BLE[:, layer], batch.weight_B, problem.cluster, problem.model, spare=spare)
                     for layer in range(batch.num_layers)])  # fmt: skip
