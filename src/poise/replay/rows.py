"""The rows of a comparison: what is fitted and judged, methods planned, files as an engine holds them, fast loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.engine_rules import NONE, hold
from poise.planning.groups import Keep, WholeGroups
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, Progress, Solution
from poise.planning.provenance import Provenance
from poise.planning.solve.effort import bound_seconds, price_seconds, some_steps
from poise.planning.solve.solve import METHODS, lower_bound, solve, without_redundant
from poise.replay.compare import Entry, left_out
from poise.replay.serving import FastLoop
from poise.routing.batch import RoutingBatch
from poise.routing.fingerprint import NO_TRAFFIC, Fingerprint
from poise.routing.predict import PREDICTORS
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.stepwise.registry import parse_policy
from poise.util.errors import InfeasibleError, NoResultError, OptionError, PluginError
from poise.util.words import close_to, percent
from poise.version import VERSION

Traffics = RoutingTrace | LoadProfile
LazyTraffic = Callable[[], Traffics]
"""Traffic that is made when it is asked for: a half of a large trace takes memory that the other one needs."""
SECOND_PLAN = 0.2
"""Share of a budget for a plan without redundant slots."""
FEWER = 5e-3
"""Least gain of a plan without redundant slots that is worth a word."""


def split_traffic(
    trace: Traffics, fit: Traffics | None, others: Mapping[str, Traffics] | None = None
) -> tuple[LazyTraffic, dict[str, LazyTraffic], tuple[str, ...]]:
    """What methods are fitted on, what they are judged on by name, and notes for the reader."""
    judged: dict[str, LazyTraffic] = {}
    notes: tuple[str, ...] = ()
    if fit is not None:
        fitted, judged["held-out"] = _given(fit), _given(trace)
    elif isinstance(trace, RoutingTrace):
        first_T = trace.first_requests()
        fitted, judged["held-out"] = lambda: trace.rows(first_T), lambda: trace.rows(~first_T)
        notes = ("methods are fitted on the first half of the requests and judged on the second",)
    elif (half := trace.middle()) is not None:
        fitted, judged["held-out"] = lambda: trace.steps(slice(0, half)), lambda: trace.steps(slice(half, None))
        notes = (
            f"methods are fitted on the first {half} recorded loads and judged on the other {trace.num_steps - half}",
        )
    else:
        fitted = _given(trace)
        notes = ("one recorded load: judged on what it was fitted on, which flatters every method",)
    told = trace.notes if isinstance(trace, LoadProfile) else ()
    return fitted, judged | {name: _given(other) for name, other in (others or {}).items()}, (*told, *notes)


def _given(traffic: Traffics) -> LazyTraffic:
    return lambda: traffic


def silent_defaults(
    traffic: Traffics, model: ModelSpec | None, tokens_per_step: int | None, batch: RoutingBatch
) -> tuple[str, ...]:
    """What was not said, or not recorded, and decides the seconds; ``model``: None if none was named."""
    out = []
    if model is not None and batch.has_tokens and batch.top_k < model.top_k:
        out.append(
            f"the trace has {batch.top_k} experts a token, {model.name} {model.top_k}: the others' traffic is missing"
        )
    if model is None:
        out.append("no model was named (--model), so sizes are generic and seconds are not yours")
    if isinstance(traffic, LoadProfile) and tokens_per_step is None:
        mass = float(batch.load_BLE.sum(axis=2).max())
        out.append(f"loads of {mass:g} tokens a layer were taken for one step: --tokens-per-step says how large one is")
    return tuple(out)


def held_row(
    name: str, placement: Placement, problem: PlacementProblem, said: list[str]
) -> Entry:  # fmt: skip
    """The row of a placement that was given, as the engine holds it."""
    held, filled = hold(placement, problem.engine)
    slots = int(problem.slots_D.sum())
    if problem.whole is not None and problem.whole.must and held.num_experts == problem.batch.num_experts:
        torn = int(problem.whole.torn_LG(held.count_LED()).any(axis=1).sum())
        said += [f"{name} tears routing groups in {torn} of {held.num_layers} layers"] * bool(torn)
    if filled:
        said.append(f"{name}: {filled} empty slots were filled as 'poise export' fills them")
    if placement.num_slots != slots:
        said.append(f"{name} has {placement.num_slots} slots a layer, other rows {slots}")
    if placement.fitted is None:
        said.append(f"{name} does not say what it was fitted on: whether this traffic is held out for it is not known")
    return Entry(name, held, fitted=None if placement.fitted is None else placement.fitted.traffic)


def planned_rows(
    method: str, problem: PlacementProblem, fitted: Fingerprint, budget: Budget, seed: int, said: list[str],
    defaults: Sequence[str] = (), *, traffic: str, keep_groups: Keep | None,
) -> list[Entry]:  # fmt: skip
    """The row of a method, and one more where ``poise`` is faster without redundant slots, none where it has
    no plan, or is another package's and broken. ``traffic``, ``keep_groups``: as :func:`provenance`.
    """
    try:
        pooled = METHODS.ask(method).pooled
    except PluginError as error:
        said.append(left_out(method, error))
        return []
    if pooled and not problem.engine.empty_slots:
        said.append(
            f"{method} left out: it counts its memory over all layers together, which no engine with fixed slots can "
            "hold; --engine none shows it"
        )
        return []
    try:
        found, fewer = plan_and_fewer(problem, method, budget, seed)
    except (InfeasibleError, NoResultError, PluginError) as error:
        said.append(left_out(method, error))
        return []
    if budget.stopped:
        found, fewer = _told(found), None if fewer is None else _told(fewer)
    seen = fitted if METHODS[method].fitted else NO_TRAFFIC

    def map_of(plan: Solution) -> Placement:
        come = provenance(plan, problem, budget, fitted, traffic=traffic, seed=seed, keep_groups=keep_groups)
        return replace(plan.placement, fitted=come)

    out = [Entry(method, map_of(found), pooled, found.seconds, fitted=seen)]
    if fewer is not None:
        redundant = fewer.placement.redundant
        said.append(fewer_words(redundant, 1 - fewer.objective / found.objective, defaults))
        out.insert(0, Entry(f"{method}, {redundant} redundant", map_of(fewer), pooled, fewer.seconds, fitted=seen))
        said += [f"{out[0].name}: {text}" for text in shortened(fewer)]
    said += [f"{method}: {text}" for text in shortened(found)]
    if moved := found.details.get("groups", {}).get("gathered", 0):
        said.append(f"{method} is gathered: {moved} of its slots gave way so that routing groups lie whole")
    return out


def provenance(
    plan: Solution, problem: PlacementProblem, budget: Budget, fitted: Fingerprint, *, traffic: str, seed: int,
    keep_groups: Keep | None,
) -> Provenance:  # fmt: skip
    """What the file of a plan says of it.

    Parameters
    ----------
    plan, problem, budget, seed : the plan, what it was asked of, and what it was allowed.
    fitted, traffic : fingerprint and name of the traffic that it was made for.
    keep_groups : as it was asked for (:mod:`poise.planning.groups`).
    """
    kind = METHODS[plan.method]
    held = NONE if problem.pooled or kind.pooled else problem.engine  # no engine counts slots over all layers
    about = {"traffic": traffic, "version": VERSION, "seed": str(seed), "engine": held.name, "method": plan.method,
             "batch": problem.batch.order}  # fmt: skip
    if "cut_by_clock" in plan.details:
        about["cut_by_clock"] = ", ".join(plan.details["cut_by_clock"])
    if budget.stopped:
        about["interrupted"] = "yes"
    if problem.split != "even":
        about["split"] = problem.split
    if keep_groups is not None:
        about["keep_groups"] = keep_groups
    if budget.work is not None:
        about["work"] = f"{budget.work:g}"
    return Provenance(fitted if kind.fitted else NO_TRAFFIC, about)


def _told(plan: Solution) -> Solution:
    """A plan that knows that somebody cut it, and not the clock."""
    cut = "cut_by_clock" in plan.details
    return replace(plan, details={**plan.details, "interrupted": True}) if cut else plan


def plan_and_fewer(
    problem: PlacementProblem, method: str, budget: Budget, seed: int, progress: Progress | None = None,
    joint: float = 0.0,
) -> tuple[Solution, Solution | None]:  # fmt: skip
    """The plan of a method, with a share of its time for a ``joint`` bound (:func:`poise.planning.solve.solve.solve`),
    and that of ``poise`` without redundant slots, where those make the first one slower.

    Raises
    ------
    InfeasibleError, NoResultError : as :func:`poise.planning.solve.solve.solve`.
    """
    second = SECOND_PLAN if method == "poise" and without_redundant(problem) is not None else 0.0
    first = budget.part(1 - second)
    found = solve(problem, method=method, time_limit_s=first, joint=joint, seed=seed, progress=progress)
    return found, _fewer_slots(problem, found, budget.part(second, until=1.0), seed) if second else None


def _fewer_slots(problem: PlacementProblem, found: Solution, budget: Budget, seed: int) -> Solution | None:
    """The plan of ``poise`` without redundant slots, where those make the one that was found slower."""
    # The bound holds for fewer slots, too: a plan that is near it leaves nothing to gain.
    fewer = without_redundant(problem) if found.method == "poise" and found.gap > FEWER else None
    if fewer is None or lower_bound(fewer, budget) >= (1 - FEWER) * found.objective or budget.over("second plan"):
        return None
    other = solve(fewer, method="poise", time_limit_s=budget, seed=seed)
    return other if other.objective < (1 - FEWER) * found.objective else None


def judged_steps(problem: PlacementProblem, batch: RoutingBatch, rows: int, seconds: float) -> RoutingBatch:
    """As many steps of some traffic, spread evenly, as the rows of a comparison can be judged on in nominal seconds."""
    here = replace(problem, batch=batch)
    return some_steps(here, seconds, rows * price_seconds(here) + bound_seconds(here)).batch


def shortened(plan: Solution) -> list[str]:
    """What was left out of a plan for want of time, one sentence each."""
    details, out = plan.details, []
    if "priced_on" in details:
        out.append(
            f"searched on {details.get('searched_on', 'all steps')}, its price is that of {details['priced_on']}"
        )
    elif "searched_on" in details:
        out.append(f"searched on {details['searched_on']}, its price is that of all")
    if "else" in details.get("bound", ""):
        out.append(f"the bound is {details['bound']}: the time was short for more")
    if "starts_left_out" in details:
        out.append(f"starts left out as the limit is short for them: {', '.join(details['starts_left_out'])}")
    if details.get("interrupted"):
        out.append("interrupted: this is the best plan so far, another run may end elsewhere")
    elif "cut_by_clock" in details:
        out.append(
            f"the clock cut the search ({', '.join(details['cut_by_clock'])}): another run may end elsewhere; --work "
            "gives the same plan each time"
        )
    return out


def fewer_words(redundant: int, saves: float, defaults: Sequence[str] = ()) -> str:
    """Advice where fewer redundant slots make a faster plan, by a share of the fitted step; with ``defaults``
    (:func:`silent_defaults`) by no share.
    """
    better = f"are better: with {redundant} a step takes {percent(saves)} less on the fitted traffic"
    if defaults:
        better = f"may be better, {redundant} for instance, but {'; '.join(defaults)}"
    return (
        f"fewer redundant slots {better} (--redundant {redundant}; SGLang: "
        f"--ep-num-redundant-experts {redundant}, vLLM: num_redundant_experts {redundant})"
    )


def fast_rows(
    entries: Sequence[Entry], fast: Sequence[str], over: str | None, step_slots: int, predictor: str,
    fitted: RoutingBatch, model_named: bool, said: list[str], whole: WholeGroups | None = None,
) -> list[Entry]:  # fmt: skip
    """A row for each step-wise policy over one of the placements, none where another package's is broken. Policies know
    no ``whole`` routing groups: what must be so, and is not where they place experts, is said.
    """
    if not fast:
        return []
    if predictor not in PREDICTORS:
        raise OptionError(f"unknown predictor {predictor!r}", hint=close_to(predictor, PREDICTORS))
    names = {entry.name: entry for entry in entries}
    if over is not None and over not in names:
        raise OptionError(f"--fast-over names {over!r}", hint=close_to(over, names))
    base = names[over] if over is not None else entries[-1]
    out: list[Entry] = []
    for spec in fast:
        try:
            policy = parse_policy(spec, model_named=model_named)
        except PluginError as error:
            said.append(left_out(spec, error))
            continue
        loop = FastLoop(policy, step_slots, PREDICTORS[predictor])
        name = free_name(f"{base.name} + {spec}", [*entries, *out])
        out.append(Entry(name, base.placement, fast=loop, prior_LE=fitted.load_LE(), fitted=base.fitted))
        if whole is not None and whole.must:
            said.append(f"{name} keeps no routing groups whole: it places experts step by step, wherever they help")
    return out


def free_name(name: str, entries: Sequence[Entry]) -> str:
    """The name, with a number behind it where a row has it already."""
    taken = {entry.name for entry in entries} | {"bound"}
    options: Any = (name if index == 1 else f"{name}-{index}" for index in range(1, 1000))
    return str(next(option for option in options if option not in taken))


def groups_unseen(problem: PlacementProblem) -> list[str]:
    """What a price of loads does not say of routing groups that are kept whole on nodes, or that those that may be so
    do not fit; one sentence or none.
    """
    whole, model = problem.whole, problem.model
    if whole is not None and not whole.must:
        try:
            whole.room(problem.layer_slots_D, filled=not problem.engine.empty_slots)
        except OptionError as error:
            return [f"planned as without --keep-groups pays: {error.message}"]
    if whole is None or whole.where != "nodes" or whole.num_places == 1 or problem.batch.has_tokens:
        return []
    most = min(model.groups_per_token or model.top_k, whole.num_places)
    return [
        f"loads do not show which experts a token takes together: a copy is priced for each of its {model.top_k}, "
        f"wherever they lie, and with groups whole a token goes to at most {most} of {whole.num_places} nodes, which "
        "'pays' does not count: a trace shows it"
    ]


def groups_unweighed(methods: Sequence[str]) -> list[str]:
    """Methods that do not weigh where whole routing groups pay, one sentence or none."""
    rivals = [name for name in methods if name != "poise"]
    said = "planned as without --keep-groups pays: whether whole groups pay is weighed by poise alone"
    return [f"{', '.join(rivals)}: {said}"] * bool(rivals)


UNEVEN_HOMES = 1.1
"""Tokens of the fullest home rank over the mean from which its ports are worth a warning."""


def uneven_homes(batch: RoutingBatch, num_devices: int) -> list[str]:
    """What a reader must know where some rank is home to far more tokens than others, one sentence or none."""
    fullest = batch.fullest_home(num_devices)
    if fullest < UNEVEN_HOMES:
        return []
    return [
        f"the fullest home rank has {fullest:.2f} times the mean tokens of a step, whose all-to-alls wait for it: much "
        "of what one placement saves over another may be that (--homes equal deals tokens evenly)"
    ]
