"""poise verdict: should this engine balance its experts at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poise import api
from poise.cli import options as o
from poise.cli.ending import best_so_far
from poise.cli.pricing import EngineName
from poise.cli.verdict_recipe import RecipeQuestion, say_recipe
from poise.cost.split import SPLITS
from poise.planning.budget import Budget
from poise.replay.verdict import COLUMNS, PhaseVerdict, Verdict
from poise.replay.windows import PHASES
from poise.report import write_verdict
from poise.routing.batch import HOMES
from poise.routing.trace import Phase
from poise.util.errors import OptionError
from poise.util.executors import executor_of

if TYPE_CHECKING:
    from rich.table import Table


def verdict(
    windows: Annotated[
        list[str] | None,
        typer.Argument(
            help="One or two recordings made with EPLB off, the earlier first; one is split in time. Routing traces or "
            "load profiles. With --recipe none is needed.",
            show_default=False,
        ),
    ] = None,
    cluster: o.MaybeCluster = None,
    model: Annotated[str | None, o.flag("model", f"{o.MODEL_TEXT} With --recipe default: what that says.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Public recipe (YAML of srt-slurm or InferenceX, options of TensorRT-LLM, a script that starts "
            "SGLang, vLLM or TensorRT-LLM): what its expert settings are, and what they leave on these recordings."
        ),
    ] = None,
    current: Annotated[
        Path | None, typer.Option(help="Placement that runs now. Default: contiguous, which is EPLB off.")
    ] = None,
    redundant: Annotated[
        int | None,
        o.flag(
            "redundant", "Redundant slots a layer, in all. Default: 0, 1, 2 and 4 a rank are tried, those that fit."
        ),
    ] = None,
    phase: Annotated[str | None, typer.Option(help="prefill or decode alone. Default: both.")] = None,
    tokens_per_step: Annotated[
        int | None,
        o.flag("tokens_per_step", "N of --phase, tokens of one forward pass over all ranks."),
    ] = None,
    prefill_tokens: Annotated[
        int | None,
        typer.Option(help=f"N of prefill. Default: as recorded, else {api.PREFILL_A_RANK} a rank."),
    ] = None,
    decode_tokens: Annotated[
        int | None,
        typer.Option(help=f"N of decode. Default: as recorded, else {api.DECODE_A_RANK} a rank."),
    ] = None,
    engine: EngineName = "any",
    split: o.SplitRule = None,
    context: Annotated[
        int,
        typer.Option(min=1, help="Tokens that a decoded token attends to, or of a prompt: for the rest of the step."),
    ] = 4096,
    homes: o.HomesRule = None,
    time_limit: Annotated[float, o.flag("time_limit", "Seconds for all plans together.")] = 60.0,
    work: o.Work = None,
    seed: o.Seed = 0,
    executor: o.Executor = "serial",
    output: Annotated[
        Path | None,
        o.flag("output", "Write the map there, planned on the later window: the one whose figures stand on top."),
    ] = None,
    html: Annotated[Path | None, o.flag("html", "Write the verdict as a page to this file.")] = None,
    json: o.Json = False,
) -> None:
    """Say whether turning EPLB on is worth it: recommend_trial, not_recommended_now or insufficient_evidence.

    Plans are made on each window and judged on the other: milliseconds of a layer and a step, their interval, the worst
    case within the errors of the constants, memory, and what the rearrangement costs.

    Example: poise verdict monday.json tuesday.json --cluster 2x8:h200 --model deepseek-v3 --engine sglang
    """
    with o.errors():
        if output is not None:
            o.writable(output, ".npz")
        if html is not None:
            o.writable(html)
        given = windows or []
        if len(given) > 2:
            raise OptionError(f"a verdict takes one or two windows, got {len(given)}", hint="poise convert joins files")
        if recipe is not None:
            if output is not None or html is not None or redundant is not None or split is not None:
                raise OptionError("--recipe says what a recipe leaves, and writes no map and no page",
                                  hint="the verdict without --recipe does")  # fmt: skip
            tokens: dict[Phase, int | None] = {
                "prefill": prefill_tokens or tokens_per_step, "decode": decode_tokens or tokens_per_step,
            }  # fmt: skip
            with executor_of(executor) as workers, o.progress() as report, best_so_far(o.talk.print) as wish:
                asked = RecipeQuestion(given, cluster, model, engine, current, o.one_of("phase", phase, PHASES),
                                       context, o.one_of("homes", homes, HOMES), time_limit, work, seed, tokens,
                                       workers, wish)  # fmt: skip
                say_recipe(recipe, asked, report, json=json)
            return
        if not given or cluster is None or model is None:
            missing = [name for name, value in (("a recording", given), ("--cluster", cluster), ("--model", model))
                       if not value]  # fmt: skip
            raise OptionError(f"a verdict needs {' and '.join(missing)}", hint="or --recipe FILE")
        with executor_of(executor) as workers, o.progress() as report:
            traffic = [api.load(one, workers) for one in given]  # control-C ends that, and no limit counts it
            with best_so_far(o.talk.print) as wish:
                budget = Budget(time_limit, work=work, executor=workers, wish=wish)
                found = api.verdict(
                    *traffic, cluster=cluster, model=model, current=current, redundant=redundant,
                    phase=o.one_of("phase", phase, PHASES), tokens_per_step=tokens_per_step,
                    prefill_tokens=prefill_tokens, decode_tokens=decode_tokens, engine=engine,
                    split=o.one_of("split", split, SPLITS), context=context, homes=o.one_of("homes", homes, HOMES),
                    seed=seed, progress=report, time_limit_s=budget, executor=workers,
                )  # fmt: skip
        if output is not None:
            found.leading.placement.save(output)
        if html is not None:
            write_verdict(found, html, command=o.command_line())
        if json:
            o.print_json("verdict", found.to_json())
        else:
            _show(found)
        for path in (output, html):
            if path is not None:
                o.talk.print(f"wrote {path}")


def _show(found: Verdict) -> None:
    o.out.print(found.sentence())
    for one in found.phases:
        o.out.print(_table(one))
        for line in one.lines():
            o.out.print(line)
        o.out.print(f"Constants: {one.ground}.")
        o.say_notes(one.notes)
    o.out.print(found.basis())
    o.say_notes(found.notes)
    for line in found.flags:
        o.out.print(f"set: {line}")


def _table(one: PhaseVerdict) -> Table:
    table = o.table(one.title(), COLUMNS, left=COLUMNS[:1])
    for tried, cells in zip(one.tried, one.cells(), strict=True):
        table.add_row(*cells, style="bold" if tried is one.chosen else None)
    return table
