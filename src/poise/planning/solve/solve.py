"""solve: one problem, one method -> a Solution, priced by independent code and with a bound per term."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from poise.cost.bound import bound_terms, compute_bound
from poise.cost.compute import expert_seconds
from poise.cost.step import batch_cost
from poise.errors import NoResultError, OptionError
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
from poise.planning.problem import MethodResult, PlacementProblem, Progress, Solution, Term
from poise.planning.solve import exact, fill, search, small, stay
from poise.planning.solve.complete import complete

RISK_ROUNDS = 3
AFFINITY_SIZE = 4096
"""Layers * experts * devices up to which plans for ``stay`` traffic are starts under any other too."""


@dataclass(frozen=True, slots=True)
class Method:
    """A static method: what plans, one line on it, whether its memory is counted over all layers together, and whether
    it looks at traffic.
    """

    plan: Callable[..., MethodResult]
    summary: str
    pooled: bool = False
    fitted: bool = True


def _plan_poise(
    problem: PlacementProblem, *, time_limit_s: float, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """Search from the placements of all other methods; see :mod:`poise.planning.solve.search`.

    Under a risk other than the mean, scenarios are weighed anew between rounds, those that do worst more: the dual of
    the risk's envelope. The best plan of all rounds under :meth:`PlacementProblem.risk_seconds` counts.
    """
    if problem.risk == "mean":
        return _search_once(problem, time_limit_s=time_limit_s, seed=seed, progress=progress)
    best: tuple[float, MethodResult] | None = None
    weighed = problem
    for _ in range(RISK_ROUNDS):
        found = _search_once(weighed, time_limit_s=time_limit_s / RISK_ROUNDS, seed=seed, progress=progress)
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
    cost = batch_cost(problem.batch, placement.count_LED(), problem.cluster, problem.model, traffic=problem.traffic,
                      split=problem.split)  # fmt: skip
    out: NDArray[np.float64] = cost.seconds_BL.mean(axis=1)
    return out


def _search_once(
    problem: PlacementProblem, *, time_limit_s: float, seed: int, progress: Progress | None
) -> MethodResult:
    starts: list[Placement] = []
    end = time.monotonic() + 0.4 * time_limit_s
    small = problem.batch.num_layers * problem.batch.num_experts * problem.num_devices <= AFFINITY_SIZE
    for name in STARTS + (STAY_STARTS if problem.traffic == "stay" or small else ()):
        if METHODS[name].pooled and not problem.pooled:
            continue
        try:
            left = max(0.2, end - time.monotonic())
            result = METHODS[name].plan(problem, time_limit_s=left, seed=seed)
            problem.check(result.placement)
        except NoResultError:
            continue
        starts.append(result.placement)
    starts += carry.starts(problem)
    return search.search(problem, starts, time_limit_s=0.6 * time_limit_s, seed=seed, progress=progress)


METHODS: dict[str, Method] = {
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
STARTS = (
    "exact-balance", "contiguous", "round-robin", "lpt", "eplb", "eplb-global", "flash-lb", "swift-balance",
    "grace-moe", "coactivation", "exact", "moetuner-equal", "moetuner",
)  # fmt: skip
STAY_STARTS = ("exflow", "poise-stay")


def solve(
    problem: PlacementProblem,
    *,
    method: str = "poise",
    time_limit_s: float = 20.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Solution:
    """Plan a placement and price it, for all methods alike as the problem's engine will hold it: slots that a method
    leaves empty are filled first (:mod:`poise.planning.solve.complete`).

    Parameters
    ----------
    problem : traffic, machine, model and memory.
    method : a key of :data:`METHODS`. ``moetuner`` is solved with ``pooled`` slots, as it was published.
    time_limit_s : for methods that can use it.
    seed : the same seed gives the same placement.
    progress : called with a stage and the share of it done.

    Raises
    ------
    OptionError : unknown method, or a time limit that is not above 0.
    InfeasibleError, NoResultError : the method proved that there is no placement, or found none.
    """
    if method not in METHODS:
        raise OptionError(f"unknown method {method!r}", hint=f"one of {', '.join(METHODS)}")
    if not (np.isfinite(time_limit_s) and time_limit_s > 0):
        raise OptionError(f"the time limit must be above 0 s, got {time_limit_s}")
    chosen = METHODS[method]
    if chosen.pooled and not problem.pooled:
        problem = replace(problem, pooled=True)
    began = time.monotonic()
    result = chosen.plan(problem, time_limit_s=time_limit_s, seed=seed, progress=progress)
    problem.check(result.placement)
    if not problem.engine.empty_slots:
        result = replace(result, placement=complete(problem, result.placement))
        problem.engine.check(result.placement, problem.slots_D)
    seconds = time.monotonic() - began
    return evaluate(problem, result, method=method, seconds=seconds)


def without_redundant(problem: PlacementProblem) -> PlacementProblem | None:
    """The same problem with the fewest slots that hold every expert; None where it has no more or may leave some empty.

    An engine fills every slot it has, and in memory-bound decode a replica costs more than it saves: then this problem
    has the better plan.
    """
    fewest = -(-problem.batch.num_experts // problem.num_devices)
    if problem.engine.empty_slots or problem.slots_D.min() <= fewest:
        return None
    return replace(problem, slots_D=np.full(problem.num_devices, fewest))


def evaluate(problem: PlacementProblem, result: MethodResult, *, method: str, seconds: float = 0.0) -> Solution:
    """Price a placement on the problem's own traffic with :func:`poise.cost.step.batch_cost`, and bound each term."""
    batch = problem.batch
    cost = batch_cost(batch, result.placement.count_LED(), problem.cluster, problem.model, traffic=problem.traffic,
                      split=problem.split)  # fmt: skip
    bound = bound_terms(batch, problem.cluster, problem.model, traffic=problem.traffic, slots_D=problem.layer_slots_D,
                        spare=problem.spare_slots)  # fmt: skip
    # One static plan serves all scenarios, so the mean work of an expert bounds it too.
    work_LE = np.einsum("b,ble->le", batch.weight_B, expert_seconds(batch.load_BLE, problem.cluster, problem.model))
    static_L = compute_bound(work_LE, problem.layer_slots_D, problem.cluster.speed_D, spare=problem.spare_slots)
    weight = batch.weight_B
    terms = {
        "compute": Term(float(weight @ cost.compute_BL.mean(axis=1)),
                        float(np.maximum(weight @ bound.compute_BL, static_L).mean())),
        "dispatch": Term(float(weight @ cost.dispatch_BL.mean(axis=1)), float(weight @ bound.dispatch_BL.mean(axis=1))),
        "combine": Term(float(weight @ cost.combine_BL.mean(axis=1)), float(weight @ bound.combine_BL.mean(axis=1))),
        "kv": Term(float(weight @ cost.kv_BL.mean(axis=1)), float(weight @ bound.kv_BL.mean(axis=1))),
    }  # fmt: skip
    imbalance = cost.imbalance_BL()
    return Solution(result.placement, method, terms, float(np.nanmean(imbalance)), seconds, result.details)
