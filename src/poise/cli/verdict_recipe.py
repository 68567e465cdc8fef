"""``poise verdict --recipe``: what a public recipe sets of experts, what that takes, and what it leaves to a map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poise import api
from poise.cli import options as o
from poise.engines.recipes.launches import read_launches
from poise.engines.recipes.settings import ExpertSettings, expert_settings
from poise.engines.slots import trivial_placement
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.placement import Placement
from poise.replay.verdict import MS, PhaseVerdict, Verdict
from poise.replay.windows import PHASES
from poise.routing.batch import Homes
from poise.routing.trace import Phase
from poise.util.errors import OptionError
from poise.util.wish import Wish
from poise.util.words import percent


@dataclass(frozen=True, slots=True)
class RecipeQuestion:
    """What is asked beside the recipe; names as in :func:`poise.api.verdict`. ``tokens`` : N by phase."""

    windows: Sequence[str]
    cluster: str | None
    model: str | None
    engine: str
    current: Path | None
    phase: Phase | None
    context: int
    homes: Homes | None
    time_limit_s: float
    work: float | None
    seed: int
    tokens: Mapping[Phase, int | None]
    executor: Executor | None = None
    wish: Wish | None = None


def say_recipe(path: Path, asked: RecipeQuestion, report: Any, *, json: bool) -> None:
    """Print what the recipe sets, and where recordings are given what that leaves."""
    every = [expert_settings(launch) for launch in read_launches(path)]
    mine = [one for one in every if asked.phase is None or one.role in ("", asked.phase)]
    if not mine:
        raise OptionError(f"the recipe has {len(every)} instances, none of {asked.phase}")
    if asked.windows:
        for one in mine:  # before minutes are spent on the first
            _check_cluster(one, asked.cluster or one.cluster, alone=len(mine) == 1)
    out = [_answer(one, asked, report) for one in mine]
    if json:
        o.print_json("verdict", {"recipe": out})
        return
    for line in (line for answer in out for line in answer["lines"]):
        o.out.print(line)


def _check_cluster(settings: ExpertSettings, spec: str, *, alone: bool) -> None:
    if settings.ranks == 1:
        return
    if not spec:
        raise OptionError("the recipe does not say on what it runs",
                          hint=f"--cluster, of {settings.ranks or 'its'} devices")  # fmt: skip
    devices = Cluster.parse(spec).num_devices
    if settings.ranks not in (None, devices):
        raise OptionError(
            f"the {settings.role or 'recipe'} spreads experts over {settings.ranks} ranks, the cluster has {devices} "
            "devices",
            hint="" if alone else "--phase names one of its instances",
        )


def _answer(settings: ExpertSettings, asked: RecipeQuestion, report: Any) -> dict[str, Any]:
    lines = [f"{settings.sentence()}."]
    lines += [f"note: {note}" for note in settings.notes]
    if settings.unknown:
        lines.append(f"not read: --{', --'.join(settings.unknown)}")
    named = asked.model or settings.preset
    model = ModelSpec.parse(named) if named else None
    spec = asked.cluster or settings.cluster
    ranks = settings.ranks or (Cluster.parse(spec).num_devices if spec else None)
    if settings.ranks != 1:
        lines += _priced(settings, asked.model)
    many = None if model is None or ranks is None else settings.redundant_of(model.num_experts, ranks)
    slot_bytes = None
    if model is not None and ranks is not None and many and settings.stages is not None:
        slot_bytes = many / ranks * model.num_moe_layers * model.expert_bytes / settings.stages
        cache = model.kv_bytes_per_token_layer * model.num_hidden_layers / settings.stages
        lines.append(
            f"Its {many} redundant slots a layer take {slot_bytes / 2**30:.2f} GiB a rank"
            + (f", {slot_bytes / cache:,.0f} tokens of key/value cache." if cache > 0 else ".")
        )
    verdicts: list[Verdict] = []
    if ranks == 1:
        pass
    elif not asked.windows or ranks is None:
        lines.append("What that leaves in time is a matter of traffic: name a recording, or two.")
    else:
        if model is None:
            raise OptionError(
                f"the recipe's model {settings.model[:60]!r} is no preset", hint="--model says what it is"
            )
        if settings.own is None or (settings.redundant is None and settings.slots is None and not settings.map_file):
            raise OptionError(
                "what the recipe sets of experts is unknown: " + ", ".join((*settings.doubtful, *settings.notes)),
                hint="put values in the place of its variables",
            )
        verdicts = _judged(settings, asked, model, spec, ranks, many, report)
        lines += [line for found in verdicts for one in found.phases for line in _left(settings, one)]
        if any(found.interrupted for found in verdicts):
            lines.append("Interrupted: these are the best maps so far, and another run may end elsewhere.")
    return {
        **asdict(settings), "redundant": many if many is not None else settings.redundant, "preset": settings.preset,
        "priced_as": named,
        "slot_bytes_per_rank": slot_bytes, "lines": lines, "verdicts": [one.to_json() for one in verdicts],
    }  # fmt: skip


def _priced(settings: ExpertSettings, model: str | None) -> list[str]:
    """What its model is taken for."""
    if model or settings.preset:
        return [f"Its model {settings.model[:80]} is taken for {model or f'the preset {settings.preset}'}."]
    if not settings.model:
        return []
    weights = f" with weights of {settings.precision[:40]}" if settings.precision else ""
    return [f"Its model {settings.model[:80]}{weights} is no preset: --model says what it is."]


def _judged(
    settings: ExpertSettings, asked: RecipeQuestion, model: ModelSpec, spec: str, ranks: int, many: int | None,
    report: Callable[[str, float], None] | None,
) -> list[Verdict]:  # fmt: skip
    current: Path | Placement | None = asked.current
    if current is None and settings.map_file:
        raise OptionError(f"the recipe loads the map {settings.map_file[:80]!r}", hint="--current says what is in it")
    traffic = [api.load(name, asked.executor) for name in asked.windows]
    if current is None and many and not settings.own:  # slot p holds expert p mod E, as SGLang starts
        current = trivial_placement(model.num_experts, model.num_experts + many, ranks, traffic[0].layer_ids)
    engine = settings.engine if asked.engine == "any" else asked.engine
    phases = [one for one in PHASES if settings.role in ("", one) and asked.phase in (None, one)]
    return [
        api.verdict(
            *traffic, cluster=spec, model=model, current=current, redundant=many if settings.own else None, phase=phase,
            tokens_per_step=asked.tokens[phase], engine=engine, context=asked.context, homes=asked.homes,
            time_limit_s=Budget(asked.time_limit_s, work=asked.work, executor=asked.executor, wish=asked.wish),
            seed=asked.seed, progress=report, executor=asked.executor,
        )
        for phase in phases
    ]  # fmt: skip


def _left(settings: ExpertSettings, one: PhaseVerdict) -> list[str]:
    """What a phase leaves to a map."""
    head = f"{one.phase}, {one.tokens:,.0f} tokens a step of {MS * one.step_s:.3f} ms"
    saved = {tried.method: one.layers * tried.mean_s for tried in one.tried if tried.redundant == one.chosen.redundant}
    if settings.own and "eplb" in saved:
        best = max(saved.values())
        return [
            f"{head}: its own EPLB saves {MS * saved['eplb']:.3f} ms ({percent(one.share(saved['eplb']))}) once it has "
            f"rearranged, the best map with as many slots {MS * best:.3f} ms: it leaves "
            f"{MS * (best - saved['eplb']):.3f} ms, {percent(one.share(best - saved['eplb']))} of the step."
        ]
    return [
        f"{head}: these settings leave {MS * one.saved_s:.3f} ms, {percent(one.share(one.saved_s))} of the step, to "
        f"{one.chosen.method} with {one.chosen.redundant} redundant slots: {one.advice}, {one.reason}."
    ]
