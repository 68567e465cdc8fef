"""Placements side by side in one call, and in a sentence what planning gains over what runs now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from poise.api.asked import machine_of, of_model, placement_of, problem_of, slots_of
from poise.cost.split import Split
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget, Limit
from poise.planning.groups import Keep
from poise.planning.methods.contiguous import deal
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.provenance import Provenance
from poise.planning.solve.solve import METHODS
from poise.replay.compare import IN_SAMPLE, Comparison, Entry
from poise.replay.compare import compare as compare_entries
from poise.replay.elastic import carried_row, elastic_notes
from poise.replay.rows import (
    Traffics,
    fast_rows,
    free_name,
    groups_unseen,
    groups_unweighed,
    held_row,
    judged_steps,
    planned_rows,
    silent_defaults,
    split_traffic,
    uneven_homes,
)
from poise.replay.serving import WARM_UP
from poise.replay.windows import much, some_of
from poise.routing.batch import Homes
from poise.routing.batching import Order, make_batch
from poise.routing.fingerprint import NO_TRAFFIC, Fingerprint, fingerprint
from poise.routing.sources import TrafficSource, load
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import NoResultError, OptionError
from poise.util.wish import Wish
from poise.util.words import close_to

VERDICT_STEPS = 20
READ, JUDGE = 0.3, 0.3
"""Shares of a verdict's budget: for its traffic, and of any budget that is for more than planning for judging."""
DEFAULT_ROWS = ("contiguous", "round-robin", "lpt", "eplb", "eplb-global", "moetuner", "moetuner-equal", "poise")


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
    whole = of_model(load(trace, executor), model)
    given = None if fit is None else of_model(load(fit, executor), model)
    more = {name: of_model(load(source, executor), model) for name, source in (others or {}).items()}
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
    problem = problem_of(batch, cluster, redundant, slots, model, traffic, split, engine, keep_groups)
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
            entries.append(_given_row(item, problem, prints[IN_SAMPLE], entries, said))
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


def _given_row(
    item: str | Path | Placement, problem: PlacementProblem, fitted: Fingerprint, entries: Sequence[Entry],
    said: list[str],
) -> Entry:  # fmt: skip
    """The row of a placement that was given, as it is or carried over to the cluster."""
    name, file = item.method if isinstance(item, Placement) else Path(item).stem, placement_of(item)
    if file.num_devices != problem.num_devices:
        return carried_row(name, file, problem, fitted, entries, said)
    return held_row(free_name(name, entries), file, problem, said)


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
    if isinstance(whole, LoadProfile) and whole.middle() is None:
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
    base: str | Placement = "contiguous" if current is None else replace(placement_of(current), method="current")
    if isinstance(base, Placement) and base.num_devices != (devices := machine_of(cluster).num_devices):
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
    slots_D = slots_of(traffic.num_experts, redundant, slots, machine_of(cluster).num_devices)
    count_LED = np.repeat(deal(traffic.num_experts, slots_D, in_turn=False)[None], traffic.num_layers, axis=0)
    made = Placement.from_counts(count_LED, slots_D=slots_D, layer_ids_L=traffic.layer_ids, method="contiguous")
    return replace(made, fitted=Provenance(NO_TRAFFIC))
