"""plan and compare in one call: what the command line does, from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cluster import Cluster
from poise.cost.split import Split
from poise.cost.traffic import Traffic
from poise.errors import InfeasibleError, NoResultError, OptionError
from poise.evaluate.compare import IN_SAMPLE, Comparison, Entry
from poise.evaluate.compare import compare as compare_entries
from poise.evaluate.elastic import carried_entry, elastic_notes
from poise.evaluate.stepwise import WARM_UP, FastLoop
from poise.modelspec import ModelSpec
from poise.observe.batch import RoutingBatch
from poise.observe.batching import Order, make_batch
from poise.observe.files import join, read
from poise.observe.predict import PREDICTORS
from poise.observe.trace import LoadProfile, RoutingTrace
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, Progress, Risk, Solution
from poise.planning.solve.solve import METHODS, solve
from poise.policies.registry import parse_policy

Traffics = RoutingTrace | LoadProfile
Source = str | Path | Traffics
VERDICT_STEPS = 20
DEFAULT_ROWS = ("contiguous", "round-robin", "lpt", "eplb", "eplb-global", "moetuner", "moetuner-equal", "poise")


def load(source: Source | Sequence[Source]) -> Traffics:
    """A trace or profile from paths or objects; several are joined."""
    many = [source] if isinstance(source, str | Path | RoutingTrace | LoadProfile) else list(source)
    return join([read(item) if isinstance(item, str | Path) else item for item in many])


def deal_slots(num_experts: int, redundant: int, num_devices: int) -> NDArray[np.int64]:
    """E + R slots over D devices, as evenly as possible, int64 [D].

    Raises
    ------
    OptionError : R is negative, or there are more slots than experts on every device.
    """
    if redundant < 0:
        raise OptionError(f"redundant slots must be at least 0, got {redundant}")
    if num_experts + redundant > num_experts * num_devices:
        raise OptionError(
            f"{redundant} redundant slots: {num_devices} devices can use at most {num_experts * (num_devices - 1)}"
        )
    slots = np.full(num_devices, (num_experts + redundant) // num_devices, np.int64)
    slots[: (num_experts + redundant) % num_devices] += 1
    return slots


def _machine(cluster: str | Path | Cluster) -> Cluster:
    return cluster if isinstance(cluster, Cluster) else Cluster.parse(cluster)


def _settings(
    batch: RoutingBatch, cluster: str | Path | Cluster, model: str | ModelSpec | None, traffic: Traffic | None
) -> tuple[Cluster, ModelSpec, Traffic]:
    machine = _machine(cluster)
    sizes = ModelSpec.parse(model) if isinstance(model, str) else model
    sizes = sizes or ModelSpec.generic(batch.num_experts, batch.top_k, batch.layer_ids_L)
    return machine, sizes, traffic or ("home_node_dedup" if batch.has_tokens else "home")


def plan(
    trace: Source | Sequence[Source],
    cluster: str | Path | Cluster,
    *,
    redundant: int = 0,
    slots: Sequence[int] | None = None,
    method: str = "poise",
    model: str | ModelSpec | None = None,
    traffic: Traffic | None = None,
    split: Split = "even",
    tokens_per_step: int | None = None,
    order: Order = "interleaved",
    pooled: bool = False,
    current: str | Path | Placement | None = None,
    migration_steps: float = 1000.0,
    risk: Risk = "mean",
    time_limit_s: float = 20.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Solution:
    """Plan an expert placement.

    Parameters
    ----------
    trace : file(s) or object(s): routing traces, or load profiles.
    cluster : ``"2x8:h100"``, a YAML file or a Cluster.
    redundant : R, redundant slots in all, dealt as evenly as possible; ``slots`` [D] gives them a device instead.
    method : a key of :data:`poise.planning.solve.solve.METHODS`.
    model : preset, config.json or ModelSpec; without it a generic one, whose ratios hold but whose seconds do not.
    traffic : data flow; default ``home_node_dedup``, for loads only ``home``.
    split : how tokens of replicas are split.
    tokens_per_step, order, seed : how the trace is batched into steps (:func:`poise.observe.batching.make_batch`).
    pooled : count slots over all layers together.
    current, migration_steps : the placement that runs now; fetches from it are written off over so many steps. It may
        be for another number of devices: device d of it is device d of the cluster (else
        :meth:`poise.planning.elastic.Ranks.number` first).
    risk : ``mean``, ``worst`` or ``cvar`` over steps (for load profiles: over the recorded workloads).
    time_limit_s : for methods that can use it.

    Raises
    ------
    InputError : the input is wrong. NoResultError : the method found no placement.
    """
    batch = make_batch(load(trace), tokens_per_step=tokens_per_step, order=order, seed=seed)
    machine, sizes, flow = _settings(batch, cluster, model, traffic)
    slots_D = _slots(batch, machine, redundant, slots)
    running = None if current is None else _placement(current)
    problem = PlacementProblem(batch, machine, sizes, slots_D, flow, split, pooled, running, migration_steps, risk)
    return solve(problem, method=method, time_limit_s=time_limit_s, seed=seed, progress=progress)


def _placement(item: str | Path | Placement) -> Placement:
    return item if isinstance(item, Placement) else Placement.load(item)


def verdict(
    trace: Source | Sequence[Source],
    cluster: str | Path | Cluster,
    *,
    method: str = "poise",
    current: str | Path | Placement | None = None,
    **options: Any,
) -> str | None:
    """What planning by ``method`` gains over what runs now (default: contiguous), fitted on one half of the traffic and
    judged on the other; None where the traffic cannot be halved. ``options`` as in :func:`compare`.

    A current placement for another number of devices cannot be replayed on the cluster: contiguous stands for it, and
    the sentence says so.
    """
    whole = load(trace)
    if isinstance(whole, LoadProfile) and whole.num_steps < 2:
        return None
    if isinstance(whole, RoutingTrace) and len(whole.requests()) < 2:
        return None
    base: str | Placement = "contiguous" if current is None else replace(_placement(current), method="current")
    said = ""
    if isinstance(base, Placement) and base.num_devices != (devices := _machine(cluster).num_devices):
        said = f"What runs now spans {base.num_devices} ranks and the cluster has {devices}: it cannot be replayed, "
        said += "so contiguous stands for it. "
        base = "contiguous"
    if base == method:
        return said.strip() or None
    if isinstance(whole, RoutingTrace) and options.get("order", "interleaved") == "interleaved":
        options = {"steps": VERDICT_STEPS, **options}
    return said + compare(whole, cluster, placements=(base, method), **options).verdict()


def _slots(batch: RoutingBatch, machine: Cluster, redundant: int, slots: Sequence[int] | None) -> NDArray[np.int64]:
    if slots is None:
        return deal_slots(batch.num_experts, redundant, machine.num_devices)
    return np.asarray(slots, dtype=np.int64)


def split_traffic(
    trace: Traffics, fit: Traffics | None, others: Mapping[str, Traffics] | None = None
) -> tuple[Traffics, dict[str, Traffics], tuple[str, ...]]:
    """What methods are fitted on, what they are judged on by name, and notes for the reader."""
    judged: dict[str, Traffics] = {}
    notes: tuple[str, ...] = ()
    if fit is not None:
        judged["held-out"] = trace
    elif isinstance(trace, RoutingTrace):
        fit, judged["held-out"] = trace.split_requests()
        notes = ("fitted on the first half of the requests, held-out is the second half",)
    elif trace.num_steps > 1:
        half = (trace.num_steps + 1) // 2
        fit, judged["held-out"] = trace.steps(slice(0, half)), trace.steps(slice(half, None))
        notes = (f"fitted on the first {half} recorded loads, held-out are the other {trace.num_steps - half}",)
    else:
        fit, notes = trace, ("one recorded load: judged on what it was fitted on, which flatters every method",)
    return fit, {**judged, **(others or {})}, notes


def compare(
    trace: Source | Sequence[Source],
    cluster: str | Path | Cluster,
    *,
    fit: Source | Sequence[Source] | None = None,
    others: Mapping[str, Source] | None = None,
    placements: Sequence[str | Path | Placement] = DEFAULT_ROWS,
    redundant: int = 0,
    slots: Sequence[int] | None = None,
    model: str | ModelSpec | None = None,
    traffic: Traffic | None = None,
    split: Split = "even",
    tokens_per_step: int | None = None,
    order: Order = "interleaved",
    time_limit_s: float = 10.0,
    seed: int = 0,
    fast: Sequence[str] = (),
    fast_over: str | None = None,
    step_slots: int = 2,
    predictor: str = "mean",
    steps: int | None = None,
    warm_up: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Comparison:
    """Judge placements on traffic, side by side.

    Parameters
    ----------
    trace : the traffic to judge on (and, without ``fit``, its first half of requests to fit on).
    fit : traffic that named methods are fitted on.
    others : more traffic to judge on, by name, e.g. another domain.
    placements : method names, placement files or Placements. The first row is the baseline. One for another number of
        devices is carried over (:mod:`poise.planning.methods.carry`): its row and a note say so.
    fast : step-wise policies (:data:`poise.policies.registry.POLICIES`), ``"name"`` or ``"name:key=value"``; each runs
        over the placement named ``fast_over`` (default: the last of ``placements``).
    step_slots : M, slots a device that policies have beyond the placement's.
    predictor : what policies know before the gate (:data:`poise.observe.predict.PREDICTORS`).
    steps : steps to judge in each part, drawn again from its requests if need be; default: as many as use about
        every token once.
    warm_up : steps before those that run but are not judged; default 5 with ``fast``, else none.

    Other parameters as in :func:`plan`. A method that has no placement for these shapes becomes a note.
    """
    whole = load(trace)
    given = None if fit is None else load(fit)
    fitted, judged, notes = split_traffic(whole, given, {name: load(source) for name, source in (others or {}).items()})
    parts = {IN_SAMPLE: fitted, **judged}
    skip = (WARM_UP if fast else 0) if warm_up is None else warm_up
    batches = {
        name: make_batch(part, tokens_per_step=tokens_per_step, order=order, seed=seed,
                         steps=None if steps is None or (name == IN_SAMPLE and not fast) else steps + skip)
        for name, part in parts.items()
    }  # fmt: skip
    batch = batches[IN_SAMPLE]
    machine, sizes, flow = _settings(batch, cluster, model, traffic)
    slots_D = _slots(batch, machine, redundant, slots)
    problem = PlacementProblem(batch, machine, sizes, slots_D, flow, split)
    entries: list[Entry] = []
    said = list(notes)
    for index, item in enumerate(placements):
        if progress:
            progress(f"{item if isinstance(item, str) else 'placement'}", index / len(placements))
        if isinstance(item, Placement):
            entries.append(_row(item.method, item, problem, entries))
        elif item in METHODS:
            try:
                found = solve(problem, method=str(item), time_limit_s=time_limit_s, seed=seed)
            except (InfeasibleError, NoResultError) as error:
                said.append(f"{item} left out: {error.message}")
                continue
            pooled = METHODS[str(item)].pooled
            if pooled:
                said.append(
                    f"{item} counts its memory over all layers together; engines with fixed slots cannot run it"
                )
            entries.append(Entry(str(item), found.placement, pooled, found.seconds))
        elif Path(item).suffix == ".npz":
            entries.append(_row(Path(item).stem, Placement.load(item), problem, entries))
        else:
            raise OptionError(f"{item!r} is neither a method nor a .npz file", hint=f"methods: {', '.join(METHODS)}")
    if not entries:
        raise NoResultError("no method has a placement for these shapes: " + "; ".join(said))
    said += elastic_notes(entries, sizes if model is not None else None)
    entries += _fast_entries(entries, fast, fast_over, step_slots, predictor, batch, model is not None)
    return compare_entries(batches, entries, cluster=machine, model=sizes, traffic=flow, split=split, slots_D=slots_D,
                           notes=said, warm_up=skip)  # fmt: skip


def _fast_entries(
    entries: Sequence[Entry], fast: Sequence[str], over: str | None, step_slots: int, predictor: str,
    fitted: RoutingBatch, model_named: bool,
) -> list[Entry]:  # fmt: skip
    """A row for each step-wise policy over one of the placements."""
    if not fast:
        return []
    if predictor not in PREDICTORS:
        raise OptionError(f"unknown predictor {predictor!r}", hint=f"one of {', '.join(PREDICTORS)}")
    names = {entry.name: entry for entry in entries}
    if over is not None and over not in names:
        raise OptionError(f"--fast-over names {over!r}", hint=f"one of {', '.join(names)}")
    base = names[over] if over is not None else entries[-1]
    out: list[Entry] = []
    for spec in fast:
        loop = FastLoop(parse_policy(spec, model_named=model_named), step_slots, PREDICTORS[predictor])
        name = _free_name(f"{base.name} + {spec}", [*entries, *out])
        out.append(Entry(name, base.placement, fast=loop, prior_LE=fitted.load_LE()))
    return out


def _row(name: str, placement: Placement, problem: PlacementProblem, entries: Sequence[Entry]) -> Entry:
    entry = carried_entry(name, placement, problem)
    return replace(entry, name=_free_name(entry.name, entries))


def _free_name(name: str, entries: Sequence[Entry]) -> str:
    taken = {entry.name for entry in entries} | {"bound"}
    options: Any = (name if index == 1 else f"{name}-{index}" for index in range(1, 1000))
    return str(next(option for option in options if option not in taken))
