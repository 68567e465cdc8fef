"""poise compare: placements side by side on traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from poise import api
from poise.cli import options as o
from poise.cli.ending import best_so_far
from poise.cli.pricing import StepOptions
from poise.machine.cluster import Cluster
from poise.planning.engine_rules import parse_engine
from poise.replay.compare import Comparison
from poise.replay.trial import TrialSetting
from poise.replay.what_if import WhatIf, judged_batches
from poise.replay.what_if import what_if as price_grid
from poise.report import write_report
from poise.util.errors import NoResultError, OptionError
from poise.util.executors import executor_of
from poise.util.wish import Wish


@dataclass(frozen=True, slots=True)
class FastOptions:
    """Step-wise policies, and the steps that they are judged on."""

    fast: Annotated[
        list[str] | None,
        typer.Option("--fast", help="Step-wise policy over the last placement, NAME or NAME:key=value; repeat."),
    ] = None
    fast_over: Annotated[str | None, typer.Option(help="The row that --fast runs over. Default: the last.")] = None
    step_slots: Annotated[int, typer.Option(help="M, slots a device for step replicas.")] = 2
    predictor: Annotated[str, typer.Option(help="Loads before the gate: mean, exponential or requests.")] = "mean"
    steps: Annotated[int | None, typer.Option(help="Steps to judge, requests drawn again if need be.")] = None
    warm_up: Annotated[int | None, typer.Option(help="Steps before those, not judged. Default: 5 with --fast.")] = None


@o.grouped
def compare(
    *,
    traces: o.Traces,
    cluster: o.ClusterSpec,
    placement: Annotated[
        list[str] | None,
        o.flag("placement", "Method name or placement file; repeat. Default: all methods that fit."),
    ] = None,
    fit: Annotated[list[str] | None, typer.Option("--fit", help="Traffic that methods are fitted on; repeat.")] = None,
    judge: Annotated[
        list[str] | None, typer.Option("--judge", help="More traffic to judge on, NAME=FILE; repeat.")
    ] = None,
    redundant: o.Redundant = 0,
    priced: StepOptions,
    loops: FastOptions,
    time_limit: o.TimeLimit = 10.0,
    work: o.Work = None,
    seed: o.Seed = 0,
    executor: o.Executor = "serial",
    html: Annotated[Path | None, o.flag("html", "Write the report with pictures to this file.")] = None,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="In the report: other slots, batches and machines; methods plan anew.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Judge placements on traffic they were not fitted on, in one table with the bound.

    Without --fit, methods are fitted on the first half of the requests and judged on the second.

    Example: poise compare trace.npz --cluster 2x8:h100 --redundant 16 --html report.html
    """
    with o.errors():
        if html is not None:
            o.writable(html)
        elif what_if:
            raise OptionError("--what-if is a panel of the report", hint="--html report.html")
        others: dict[str, str] = {}
        for item in judge or []:
            name, equals, path = item.partition("=")
            if not (name and equals and path):
                raise OptionError(f"--judge takes NAME=FILE, got {item!r}")
            others[name] = path
        with executor_of(executor) as workers, o.progress() as report, best_so_far(o.talk.print) as wish:
            result = api.compare(
                list(traces), cluster, fit=list(fit) if fit else None, others=dict(others),
                placements=tuple(placement or api.DEFAULT_ROWS), redundant=redundant, time_limit_s=time_limit,
                work=work, seed=seed, progress=report, executor=workers, wish=wish, **priced.checked(),
                **{**asdict(loops), "fast": tuple(loops.fast or ())},
            )  # fmt: skip
            grid = None
            if what_if:
                grid = _grid(result, list(traces), cluster, fit=bool(fit), priced=priced, seed=seed,
                             time_limit_s=time_limit, work=work, executor=workers, progress=report,
                             wish=wish)  # fmt: skip
        show(result, html, json, grid)


def _grid(
    found: Comparison, traces: list[str], cluster: str, *, fit: bool, priced: StepOptions, seed: int, wish: Wish,
    **more: Any,
) -> WhatIf | None:  # fmt: skip
    """The panel; None where control-C came before it was priced."""
    setting = TrialSetting(Cluster.parse(cluster), found.model, parse_engine(found.engine), split=found.split)
    options = priced.checked()
    batch_of = judged_batches(
        found, traces, fit=fit, named=options["model"] is not None, order=options["order"], homes=options["homes"],
        seed=seed,
    )  # fmt: skip
    return unless_stopped(lambda: price_grid(found, setting, batch_of, wish=wish, **more), wish)


def unless_stopped(make: Callable[[], WhatIf], wish: Wish) -> WhatIf | None:
    """What is made; None, and a word, where somebody wished that it be ended."""
    try:
        if not wish.came:
            return make()
    except NoResultError:
        if not wish.came:
            raise
    o.talk.print("the panel 'what if' is left out: interrupted")
    return None


def show(result: Comparison, html: Path | None, json: bool, grid: WhatIf | None = None) -> None:
    """Print a comparison and write its report."""
    if html is not None:
        write_report(result, html, command=o.command_line(), what=grid)
    if json:
        o.print_json("compare", result.to_json())
    else:
        result.table(o.out)
    if html is not None:
        o.talk.print(f"wrote {html}")
