"""A plan in one call."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

from poise.api.asked import of_model, placement_of, problem_of
from poise.control.payback import paid_back
from poise.cost.split import Split
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import ground
from poise.planning.budget import Budget, Limit
from poise.planning.engine_rules import hold, parse_engine
from poise.planning.groups import Keep
from poise.planning.placement import Placement
from poise.planning.problem import Progress, Risk, Solution
from poise.planning.solve.solve import METHODS
from poise.planning.solve.survive import COST
from poise.replay.rows import groups_unseen, plan_and_fewer, provenance, silent_defaults, uneven_homes
from poise.replay.surviving import Survival
from poise.routing.batch import Homes
from poise.routing.batching import Order, make_batch
from poise.routing.fingerprint import fingerprint
from poise.routing.sources import TrafficSource, load
from poise.routing.trace import LoadProfile
from poise.util.errors import OptionError

BOUND_SHARE = 0.15
"""Share of a plan's seconds, after the search, for a joint bound."""
PAYBACK_SHARE = 0.1
"""Share of its seconds for the way from what runs now, by the clock; with work that comes on top."""


def plan(
    trace: TrafficSource | Sequence[TrafficSource],
    cluster: str | Path | Cluster,
    *,
    redundant: int = 0,
    slots: Sequence[int] | None = None,
    method: str = "poise",
    model: str | ModelSpec | None = None,
    traffic: DataFlow | None = None,
    split: Split | None = None,
    engine: str = "any",
    keep_groups: Keep | None = None,
    tokens_per_step: int | None = None,
    order: Order = "interleaved",
    homes: Homes | None = None,
    pooled: bool = False,
    current: str | Path | Placement | None = None,
    migration_steps: float = 1000.0,
    risk: Risk = "mean",
    survive: str | None = None,
    survive_cost: float = COST,
    survive_copies: float | None = None,
    time_limit_s: Limit = 20.0,
    work: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Solution:
    """Plan an expert placement.

    Parameters
    ----------
    trace : file(s) or object(s): routing traces, or load profiles.
    cluster : ``"2x8:h100"``, a YAML file or a Cluster.
    redundant : R, redundant slots in all, dealt as evenly as possible; ``slots`` [D] gives them a device instead.
    method : a key of :data:`poise.planning.solve.solve.METHODS`; other packages can add some (docs/extend.md).
    model : preset, config.json or ModelSpec; without it a generic one, whose ratios hold but whose seconds do not.
    traffic : data flow; default ``home_node_dedup``, for loads only ``home``.
    split : how tokens of replicas are split; default: as the engine does, else ``even``.
    engine : what the plan must be held by (:data:`poise.planning.engine_rules.ENGINES`): by default every slot is
        filled, as no released engine knows an empty one; ``none`` lets the method leave slots empty.
    keep_groups : the model's routing groups (:mod:`poise.planning.groups`): ``nodes``, each whole on one node; ``ids``,
        whole in blocks of new expert ids, as always for an engine that takes those; ``pays``, whole on nodes in the
        layers where that is faster, which ``poise`` alone weighs. The plan is made so, and a method that tears groups
        has them gathered.
    tokens_per_step, order, homes, seed : how the trace is batched (:func:`poise.routing.batching.make_batch`).
    pooled : count slots over all layers together.
    current, migration_steps : the placement that runs now; fetches from it are written off over so many steps. It may
        be for another number of devices: device d of it is device d of the cluster (else
        :meth:`poise.planning.elastic.RankMap.number` first).
    risk : ``mean``, ``worst`` or ``cvar`` over steps (for load profiles: over the recorded workloads).
    survive : ``device`` or ``node``: after the loss of any one of them the fewest experts are to be without a holder.
        The plan of the method is changed for it (:mod:`poise.planning.solve.survive`), and ``losses`` of the solution
        has the placements on the rest (:mod:`poise.planning.solve.repair`).
    survive_cost : share of the modelled seconds that may be given up for it.
    survive_copies : most experts copied between the devices that are left, for each one read anew; None: as many as
        balance needs.
    time_limit_s, work : seconds from when the traffic is read, or units of work, for the plan, its price and bounds and
        a second plan without redundant slots (:func:`poise.planning.solve.solve.solve`); what ``survive`` takes comes
        on top.
    executor : any executor of :mod:`concurrent.futures`: there shards of a folder are read and starts are made, while
        threads of this process anneal and descend; with ``work`` the plan is the same as without one.

    Raises
    ------
    InputError : the input is wrong. NoResultError : the method found no placement, or no slots are left for some
        experts when a device or node is lost.
    """
    if keep_groups == "pays" and method != "poise" and method in METHODS:
        raise OptionError(
            f"whether whole routing groups pay is weighed by poise alone, the method asked for is {method}",
            hint="--method poise; --keep-groups nodes gathers the groups of any method",
        )
    model = ModelSpec.parse(model) if isinstance(model, str) else model
    found = of_model(load(trace, executor), model)
    budget = Budget.of(time_limit_s, work, executor)
    with budget.held():
        batch = make_batch(found, tokens_per_step=tokens_per_step, order=order, seed=seed, homes=homes)
        seen = fingerprint(found)
    running = None if current is None else hold(placement_of(current), parse_engine(engine))[0]
    problem = problem_of(batch, cluster, redundant, slots, model, traffic, split, engine, keep_groups, pooled=pooled,
                       current=running, migration_steps=migration_steps, risk=risk)  # fmt: skip
    goal = None if survive is None else Survival(problem, survive, survive_cost, survive_copies)
    moves = running is not None and running.num_devices == problem.num_devices and not (pooled or problem.engine.ids)
    search = budget.part(1 - PAYBACK_SHARE) if moves and budget.work is None else budget
    solution, fewer = plan_and_fewer(problem, method, search, seed, progress, BOUND_SHARE)
    if goal is not None:
        with budget.held():  # it comes on top
            solution = goal.of(solution)
    details = {**solution.details, "cluster": repr(problem.cluster), "ground": ground(problem.cluster)}
    rest = budget.part(PAYBACK_SHARE, until=1.0)
    if running is not None and (way := paid_back(problem, running, solution.placement, rest, named=model is not None)):
        details["payback"] = way
    notes = [*(found.notes if isinstance(found, LoadProfile) else ()),
             *([f"planned and priced on {batch.sampled}"] if batch.sampled else []),
             *uneven_homes(batch, problem.num_devices), *groups_unseen(problem)]  # fmt: skip
    if notes:
        details["notes"] = notes
    if defaults := silent_defaults(found, None if model is None else problem.model, tokens_per_step, batch):
        details["defaults"] = defaults
    if budget.cuts:
        details["cut_by_clock"] = sorted(budget.cuts)
    if budget.stopped:
        details["interrupted"] = True
    if fewer is not None:
        details["fewer_redundant"] = {"redundant": fewer.placement.redundant, "objective": fewer.objective}
    kept = provenance(solution, problem, budget, seen, traffic=found.name, seed=seed, keep_groups=keep_groups)
    named = replace(solution.placement, fitted=kept)
    held_losses = None if solution.losses is None else replace(solution.losses, before=named)
    return replace(solution, placement=named, details=details, losses=held_losses)
