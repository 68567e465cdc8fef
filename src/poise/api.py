"""plan, compare and verdict in one call: what the command line does, from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from poise.control.payback import paid_back
from poise.cost.split import Split
from poise.cost.traffic import DataFlow
from poise.engines.flags import EplbSetting, eplb_flags
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import flow_of, ground, settle
from poise.planning.budget import Budget, Limit
from poise.planning.engine_rules import hold, parse_engine
from poise.planning.groups import Keep, groups_of
from poise.planning.homes import BAND, POLICIES
from poise.planning.methods.contiguous import deal
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, Progress, Risk, Solution
from poise.planning.problem import deal_slots as deal_slots
from poise.planning.provenance import Provenance
from poise.planning.solve.solve import METHODS
from poise.planning.solve.survive import COST
from poise.replay.compare import IN_SAMPLE, Comparison, Entry
from poise.replay.compare import compare as compare_entries
from poise.replay.elastic import carried_row, elastic_notes
from poise.replay.homes import HomeStudy, study_homes
from poise.replay.rows import (
    Traffics,
    fast_rows,
    free_name,
    groups_unseen,
    groups_unweighed,
    held_row,
    judged_steps,
    plan_and_fewer,
    planned_rows,
    provenance,
    silent_defaults,
    split_traffic,
    uneven_homes,
)
from poise.replay.serving import WARM_UP
from poise.replay.surviving import Survival
from poise.replay.trial import TrialSetting, judge_phase
from poise.replay.verdict import Verdict
from poise.replay.windows import (
    PHASES,
    check_unseen,
    check_windows,
    much,
    phase_traffic,
    recorded_phases,
    refuse_frequencies,
    some_of,
    split_in_time,
    verdict_notes,
    with_top_k,
)
from poise.routing.batch import Homes, RoutingBatch
from poise.routing.batching import Order, make_batch
from poise.routing.fingerprint import NO_TRAFFIC, fingerprint
from poise.routing.sources import TrafficSource
from poise.routing.sources import load as load
from poise.routing.trace import LoadProfile, Phase, RoutingTrace
from poise.util.errors import NoResultError, OptionError
from poise.util.wish import Wish
from poise.util.words import close_to

VERDICT_STEPS = 20
BOUND_SHARE = 0.15
"""Share of a plan's seconds, after the search, for a joint bound."""
PAYBACK_SHARE = 0.1
"""Share of its seconds for the way from what runs now, by the clock; with work that comes on top."""
READ, JUDGE = 0.3, 0.3
"""Shares of a verdict's budget: for its traffic, and of any budget that is for more than planning for judging."""
PREFILL_A_RANK, DECODE_A_RANK = 1024, 64
"""Tokens of a step on each rank where a verdict is asked for and none are said: on eight ranks 8,192 and 512."""
A_RANK = {"prefill": PREFILL_A_RANK, "decode": DECODE_A_RANK}
DEFAULT_ROWS = ("contiguous", "round-robin", "lpt", "eplb", "eplb-global", "moetuner", "moetuner-equal", "poise")


def _of_model(traffic: Traffics, model: ModelSpec | None) -> Traffics:
    """Traffic of a model that is named: recorded loads that do not say K have its, so that N tokens are N tokens."""
    return traffic if model is None else with_top_k(traffic, model.top_k)


def _machine(cluster: str | Path | Cluster) -> Cluster:
    return cluster if isinstance(cluster, Cluster) else Cluster.parse(cluster)


def _problem(
    batch: RoutingBatch, cluster: str | Path | Cluster, redundant: int, slots: Sequence[int] | None,
    model: str | ModelSpec | None, traffic: DataFlow | None, split: Split | None, engine: str,
    keep_groups: Keep | None = None, **more: Any,
) -> PlacementProblem:  # fmt: skip
    """What :func:`plan` and :func:`compare` are asked, with what was not said filled in; ``more``: other fields."""
    machine, rules = _machine(cluster), parse_engine(engine)
    sizes = ModelSpec.parse(model) if isinstance(model, str) else model
    sizes = sizes or ModelSpec.generic(batch.num_experts, batch.top_k, batch.layer_ids_L)
    slots_D = _slots(batch.num_experts, redundant, slots, machine.num_devices)
    machine = settle(machine, sizes, batch.mean_tokens(), engine=rules.kernels)
    flow = traffic or (cast(DataFlow, flow_of(machine)) if batch.has_tokens else "home")
    whole = groups_of(keep_groups, batch.num_experts, sizes.num_expert_groups, machine.node_D)
    return PlacementProblem(batch, machine, sizes, slots_D, flow, rules.choose_split(split), engine=rules, whole=whole,
                            **more)  # fmt: skip


def _slots(num_experts: int, redundant: int, slots: Sequence[int] | None, num_devices: int) -> NDArray[np.int64]:
    """Slots of each device, int64 [D], as they were asked for."""
    return deal_slots(num_experts, redundant, num_devices) if slots is None else np.asarray(slots, dtype=np.int64)


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
    found = _of_model(load(trace, executor), model)
    budget = Budget.of(time_limit_s, work, executor)
    with budget.held():
        batch = make_batch(found, tokens_per_step=tokens_per_step, order=order, seed=seed, homes=homes)
        seen = fingerprint(found)
    running = None if current is None else hold(_placement(current), parse_engine(engine))[0]
    problem = _problem(batch, cluster, redundant, slots, model, traffic, split, engine, keep_groups, pooled=pooled,
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
        many = fewer.placement.num_slots - batch.num_experts
        details["fewer_redundant"] = {"redundant": many, "objective": fewer.objective}
    kept = provenance(solution, problem, budget, seen, traffic=found.name, seed=seed, keep_groups=keep_groups)
    named = replace(solution.placement, fitted=kept)
    held_losses = None if solution.losses is None else replace(solution.losses, before=named)
    return replace(solution, placement=named, details=details, losses=held_losses)


def _placement(item: str | Path | Placement) -> Placement:
    return item if isinstance(item, Placement) else Placement.load(item)


def planning_verdict(
    trace: TrafficSource | Sequence[TrafficSource],
    cluster: str | Path | Cluster,
    *,
    method: str = "poise",
    current: str | Path | Placement | None = None,
    **options: Any,
) -> str | None:
    """What planning by ``method`` gains over what runs now (default: contiguous), fitted on one half of the traffic and
    judged on the other; None where the traffic cannot be halved, or the clock of a budget has run out. ``options`` as
    in :func:`compare`.

    A current placement for another number of devices cannot be replayed on the cluster: contiguous stands for it, and
    the sentence says so. What runs now stays as it is where the plan must keep routing groups whole.
    """
    whole = load(trace)
    if isinstance(whole, LoadProfile) and whole.num_steps < 2:
        return None
    if isinstance(whole, RoutingTrace) and len(whole.requests()) < 2:
        return None
    if method in METHODS and METHODS[method].pooled and options.get("engine", "any") == "any":
        options = {**options, "engine": "none"}
    limit, said = options.get("time_limit_s"), ""
    if isinstance(limit, Budget):
        if limit.over("verdict"):
            return None
        some = some_of(whole, READ * limit.seconds)
        said = "" if some is whole else f"This is of a part of the traffic, {much(some)} of {much(whole)}. "
        whole = some
    base: str | Placement = "contiguous" if current is None else replace(_placement(current), method="current")
    if isinstance(base, Placement) and base.num_devices != (devices := _machine(cluster).num_devices):
        said += f"What runs now spans {base.num_devices} ranks and the cluster has {devices}: it cannot be replayed, "
        said += "so contiguous stands for it. "
        base = "contiguous"
    if base == method:
        return said.strip() or None
    if base == "contiguous" and options.get("keep_groups") in ("nodes", "ids"):
        base = _contiguous(whole, cluster, options.get("redundant", 0), options.get("slots"))
    if isinstance(whole, RoutingTrace) and options.get("order", "interleaved") == "interleaved":
        options = {"steps": VERDICT_STEPS, **options}
    return said + compare(whole, cluster, placements=(base, method), **options).verdict()


def _contiguous(
    traffic: Traffics, cluster: str | Path | Cluster, redundant: int, slots: Sequence[int] | None
) -> Placement:  # fmt: skip
    """Contiguous blocks as engines start with them, groups whole or not."""
    slots_D = _slots(traffic.num_experts, redundant, slots, _machine(cluster).num_devices)
    count_LED = np.repeat(deal(traffic.num_experts, slots_D, in_turn=False)[None], traffic.num_layers, axis=0)
    made = Placement.from_counts(count_LED, slots_D=slots_D, layer_ids_L=traffic.layer_ids, method="contiguous")
    return replace(made, fitted=Provenance(NO_TRAFFIC))


def verdict(
    window: TrafficSource | Sequence[TrafficSource],
    later: TrafficSource | Sequence[TrafficSource] | None = None,
    *,
    cluster: str | Path | Cluster,
    model: str | ModelSpec,
    current: str | Path | Placement | None = None,
    redundant: int | None = None,
    phase: Phase | None = None,
    tokens_per_step: int | None = None,
    prefill_tokens: int | None = None,
    decode_tokens: int | None = None,
    engine: str = "any",
    split: Split | None = None,
    context: int = 4096,
    homes: Homes | None = None,
    time_limit_s: Limit = 60.0,
    work: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Verdict:
    """Whether an engine should balance its experts, with how many redundant slots and by which map.

    Parameters
    ----------
    window, later : traffic of two times, recorded with EPLB off; plans are made on each and judged on the other.
        Without ``later`` one is split in time (:func:`poise.replay.windows.split_in_time`).
    cluster, model : the machine and what it serves.
    current : the map that runs now; default contiguous blocks, what engines do with EPLB off.
    redundant : R; default: 0, 1, 2 and 4 slots a rank are tried, those that engine and memory can hold.
    phase : ``prefill`` or ``decode`` alone; default both.
    tokens_per_step : N of that phase, over all ranks; without ``phase``: ``prefill_tokens``, ``decode_tokens``.
        Default: recorded steps where a trace has them, else :data:`PREFILL_A_RANK` and :data:`DECODE_A_RANK` a rank.
    engine : who holds the maps, and whose measured kernels price them.
    split : how tokens of replicas are split; default: as the engine does, else ``even``.
    context : tokens that a decoded token attends to, or that a prompt has; for the rest of the step alone.
    time_limit_s, work : seconds or units of work for all plans together. A budget that was begun may be stopped: the
        advice is ``insufficient_evidence`` then.
    executor : as for :func:`plan`.

    Raises
    ------
    InputError : the input is wrong, or both windows are the same traffic. NoResultError : no method has a map.
    """
    if phase not in (None, *PHASES):
        raise OptionError(f"unknown phase {phase!r}", hint="prefill or decode")
    if tokens_per_step is not None and phase is None:
        raise OptionError(
            f"{tokens_per_step} tokens a step, but of prefill or of decode?",
            hint="--phase, or --prefill-tokens and --decode-tokens",
        )
    machine, rules = _machine(cluster), parse_engine(engine)
    sizes = ModelSpec.parse(model) if isinstance(model, str) else model
    parts = [with_top_k(load(item, executor), sizes.top_k) for item in (window, later) if item is not None]
    windows = split_in_time(parts[0]) if len(parts) == 1 else (parts[0], parts[1])
    check_windows(windows, sizes)
    seen = check_unseen(windows) if len(parts) == 2 else []
    asked = {"prefill": prefill_tokens, "decode": decode_tokens}
    if phase is not None and tokens_per_step is not None:
        if asked[phase] not in (None, tokens_per_step):
            raise OptionError(f"{tokens_per_step} and {asked[phase]} tokens a step of {phase}", hint="give one of them")
        asked[phase] = tokens_per_step
    if min((many for many in asked.values() if many is not None), default=1) < 1:
        raise OptionError(f"tokens of a step must be at least 1, got {asked['prefill']} and {asked['decode']}")
    phases = (recorded_phases(windows) or PHASES) if phase is None else (phase,)
    unsaid = [name for name in phases if asked[name] is None]
    recorded = all(isinstance(one, RoutingTrace) and one.step is not None for one in windows)
    if unsaid and not recorded:
        refuse_frequencies(windows)
        asked.update({name: A_RANK[name] * machine.num_devices for name in unsaid})
    placed = None if current is None else _placement(current)
    setting = TrialSetting(machine, sizes, rules, placed, redundant, context, seed, rules.choose_split(split))
    budget = Budget.of(time_limit_s, work, executor)
    judged = []
    for turn, name in enumerate(phases, 1):
        own = budget.part(1.0 / len(phases), until=turn / len(phases))
        rows = phase_traffic(windows, name, asked[name], homes, seed)
        judged.append(judge_phase(rows, setting, own, progress=progress))
    others = judged[::-1] if len(judged) == 2 else [None]
    found = [one.with_other(other, setting) for one, other in zip(judged, others, strict=True)]
    notes = seen + verdict_notes(windows, sizes, {} if recorded else {name: A_RANK[name] for name in unsaid})
    notes += [said] if (said := rules.caveat(setting.split)) else []
    if budget.cuts:
        notes.append(
            f"the clock cut the search ({', '.join(sorted(budget.cuts))}): --work gives the same maps each time"
        )
    out = Verdict(
        tuple(found), engine, repr(machine), sizes.name,
        "contiguous blocks, EPLB off" if placed is None else placed.method, context, (), tuple(notes),
    )  # fmt: skip
    if budget.stopped:
        return out.as_interrupted()
    if out.advice != "recommend_trial":
        return out
    best = out.leading.chosen
    spec = model if isinstance(model, str) else sizes.name
    want = EplbSetting(best.method == "eplb", best.redundant, machine.num_devices, sizes.num_experts, spec)
    return replace(out, flags=eplb_flags(engine, want))


def compare(
    trace: TrafficSource | Sequence[TrafficSource],
    cluster: str | Path | Cluster,
    *,
    fit: TrafficSource | Sequence[TrafficSource] | None = None,
    others: Mapping[str, TrafficSource] | None = None,
    placements: Sequence[str | Path | Placement] = DEFAULT_ROWS,
    redundant: int = 0,
    slots: Sequence[int] | None = None,
    model: str | ModelSpec | None = None,
    traffic: DataFlow | None = None,
    split: Split | None = None,
    engine: str = "any",
    keep_groups: Keep | None = None,
    tokens_per_step: int | None = None,
    order: Order = "interleaved",
    homes: Homes | None = None,
    time_limit_s: Limit = 10.0,
    work: float | None = None,
    seed: int = 0,
    fast: Sequence[str] = (),
    fast_over: str | None = None,
    step_slots: int = 2,
    predictor: str = "mean",
    steps: int | None = None,
    warm_up: int | None = None,
    progress: Callable[[str, float], None] | None = None,
    executor: Executor | None = None,
    wish: Wish | None = None,
) -> Comparison:
    """Judge placements on traffic, side by side.

    Parameters
    ----------
    trace : the traffic to judge on (and, without ``fit``, its first half of requests to fit on).
    fit : traffic that named methods are fitted on.
    others : more traffic to judge on, by name, e.g. another domain.
    placements : method names, placement files or Placements. The first row is the baseline. One for another number of
        devices is carried over (:mod:`poise.planning.methods.carry`): its row and a note say so.
    fast : step-wise policies (:data:`poise.stepwise.registry.POLICIES`), ``"name"`` or ``"name:key=value"``; each runs
        over the placement named ``fast_over`` (default: the last of ``placements``).
    step_slots : M, slots a device that policies have beyond the placement's.
    predictor : what policies know before the gate (:data:`poise.routing.predict.PREDICTORS`).
    steps : steps to judge in each part, drawn again from its requests if need be; default: as many as use about
        every token once.
    warm_up : steps before those that run but are not judged; default 5 with ``fast``, else none.

    time_limit_s, work : seconds or units of work for each method, as for :func:`plan`. A budget that was begun is for
        all together, judging included; work, executor and wish are its own then.
    executor : as for :func:`plan`.
    wish : that it be ended (:class:`poise.util.wish.Wish`): plans under way and to come are the best so far then, and
        fast loops that are not judged to their end are left out. A budget that was begun brings its own.

    Other parameters as in :func:`plan`. A method that has no placement for these shapes becomes a note.

    Raises
    ------
    InputError : the input is wrong, or a budget that was begun comes with a wish that is not its own.
    NoResultError : no method has a placement.
    """
    if isinstance(time_limit_s, Budget):
        if wish not in (None, time_limit_s.wish):
            raise OptionError("a budget that was begun has a wish of its own", hint="Budget(..., wish=wish)")
        wish = time_limit_s.wish
    model = ModelSpec.parse(model) if isinstance(model, str) else model
    whole = _of_model(load(trace, executor), model)
    given = None if fit is None else _of_model(load(fit, executor), model)
    more = {name: _of_model(load(source, executor), model) for name, source in (others or {}).items()}
    fitted, judged, notes = split_traffic(whole, given, more)
    parts = {IN_SAMPLE: fitted, **judged}
    skip = (WARM_UP if fast else 0) if warm_up is None else warm_up
    batches, prints, names = {}, {}, {}
    for name, part in parts.items():
        found = part()
        many = None if steps is None or (name == IN_SAMPLE and not fast) else steps + skip
        batches[name] = make_batch(found, tokens_per_step=tokens_per_step, order=order, seed=seed, steps=many,
                                   homes=homes, sample=not fast)  # fmt: skip
        prints[name], names[name] = fingerprint(found), found.name
        del found  # one part at a time
    batch = batches[IN_SAMPLE]
    problem = _problem(batch, cluster, redundant, slots, model, traffic, split, engine, keep_groups)
    entries: list[Entry] = []
    caveat = problem.engine.caveat(problem.split)
    said = [*notes, *([caveat] if caveat else []),
            *uneven_homes(batch, problem.num_devices), *groups_unseen(problem)]  # fmt: skip
    named = None if model is None else problem.model
    defaults = silent_defaults(whole, named, tokens_per_step, batch)
    for index, item in enumerate(placements):
        if progress:
            progress(f"{item if isinstance(item, str) else 'placement'}", index / len(placements))
        if isinstance(item, Placement) or (item not in METHODS and Path(item).suffix == ".npz"):
            name, file = item.method if isinstance(item, Placement) else Path(item).stem, _placement(item)
            if file.num_devices != problem.num_devices:
                entries.append(carried_row(name, file, problem, prints[IN_SAMPLE], entries, said))
            else:
                entries.append(held_row(free_name(name, entries), file, problem, said))
        elif item in METHODS:
            if isinstance(time_limit_s, Budget):
                own = time_limit_s.part(1 - JUDGE)
            else:
                own = Budget(time_limit_s, work=work, executor=executor, wish=wish)
            entries += planned_rows(str(item), problem, prints[IN_SAMPLE], own, seed, said, defaults,
                                    traffic=names[IN_SAMPLE], keep_groups=keep_groups)  # fmt: skip
        else:
            raise OptionError(f"{item!r} is neither a method nor a .npz file", hint=close_to(str(item), METHODS))
    if not entries:
        raise NoResultError("no method has a placement for these shapes: " + "; ".join(said))
    said += elastic_notes(entries, named)
    if keep_groups == "pays":
        said += groups_unweighed([item for item in placements if isinstance(item, str) and item in METHODS])
    entries += fast_rows(entries, fast, fast_over, step_slots, predictor, batch, model is not None, said, problem.whole)
    if isinstance(time_limit_s, Budget) and not fast:
        share = JUDGE * time_limit_s.seconds / len(batches)
        batches = {name: judged_steps(problem, part, len(entries), share) for name, part in batches.items()}
    said += [f"{name}: {part.sampled} are priced" for name, part in batches.items() if part.sampled]
    return compare_entries(
        batches, entries, pricing=problem.pricing, slots_D=problem.slots_D, notes=said, warm_up=skip, prints=prints,
        defaults=defaults, engine=problem.engine, wish=wish,
    )  # fmt: skip


def homes(
    trace: TrafficSource | Sequence[TrafficSource],
    cluster: str | Path | Cluster,
    *,
    redundant: int = 0,
    slots: Sequence[int] | None = None,
    model: str | ModelSpec | None = None,
    traffic: DataFlow | None = None,
    split: Split | None = None,
    engine: str = "any",
    tokens_per_step: int | None = None,
    policy: str | None = None,
    band: float = BAND,
    time_limit_s: Limit = 60.0,
    work: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> HomeStudy:
    """Whether it pays to choose which rank serves which request, planned on half of the requests, judged on the others.

    Parameters
    ----------
    policy : one of :data:`poise.planning.homes.POLICIES`; default: the better one on the fitted requests.
    band : a rank takes requests while it has less than so much more than the mean tokens of all.
    time_limit_s, work : seconds or units of work for all placements together.

    Other parameters as in :func:`plan`.

    Raises
    ------
    InputError : the input is wrong, or has no requests. NoResultError : no placement was found.
    """
    found = load(trace)
    if not isinstance(found, RoutingTrace):
        raise OptionError(
            f"homes are chosen for requests, and {found.name} has loads only", hint="give a routing trace"
        )
    if policy is not None and policy not in POLICIES:
        raise OptionError(f"unknown policy {policy!r}", hint=close_to(policy, POLICIES))
    if not 0 <= band < np.inf:
        raise OptionError(f"the band must be at least 0 and finite, got {band}")
    model = ModelSpec.parse(model) if isinstance(model, str) else model

    def batched(part: RoutingTrace) -> RoutingBatch:
        return make_batch(part, tokens_per_step=tokens_per_step, seed=seed)

    def problem_of(batch: RoutingBatch) -> PlacementProblem:
        return _problem(batch, cluster, redundant, slots, model, traffic, split, engine)

    fit, held_out = found.split_requests()
    budget = Budget.of(time_limit_s, work)
    out = study_homes(
        fit, held_out, batched, problem_of, budget, policy=policy, band=band, seed=seed, progress=progress
    )
    return replace(out, defaults=silent_defaults(found, model, tokens_per_step, batched(held_out)))
