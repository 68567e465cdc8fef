"""poise plan: one placement."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from poise import api
from poise.cli import options as o
from poise.cost.split import SPLITS
from poise.cost.traffic import TRAFFIC_MODELS
from poise.evaluate.rows import fewer_words
from poise.observe.batching import ORDERS
from poise.planning.placement import Placement
from poise.planning.problem import RISKS, Solution
from poise.words import percent


def plan(
    traces: o.Traces,
    cluster: o.ClusterSpec,
    output: Annotated[Path, typer.Option("--output", "-o", help="Placement file to write (.npz).")],
    redundant: o.Redundant = 0,
    method: Annotated[str, typer.Option(help="poise, or a method of 'poise compare'.")] = "poise",
    model: o.Model = None,
    traffic: o.TrafficModel = None,
    split: o.SplitRule = None,
    engine: o.EngineName = "any",
    tokens_per_step: o.TokensPerStep = None,
    order: o.StepOrder = "interleaved",
    pooled: Annotated[bool, typer.Option("--pooled", help="Count slots over all layers together (MoETuner).")] = False,
    current: Annotated[
        Path | None, typer.Option("--current", help="The placement that runs now; moves from it are priced.")
    ] = None,
    migration_steps: Annotated[float, typer.Option(help="Steps over which those moves are written off.")] = 1000.0,
    risk: Annotated[str, typer.Option(help="mean, worst or cvar over steps or recorded workloads.")] = "mean",
    verdict: Annotated[
        bool, typer.Option(help="Say what is gained over what runs now, on traffic left out of a second fit.")
    ] = True,
    time_limit: o.TimeLimit = 20.0,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Plan an expert placement from recorded traffic and write it to a file.

    Example: poise plan trace.npz --cluster 2x8:h100 --redundant 16 --model deepseek-v3 -o placement.npz
    """
    with o.errors():
        o.writable(output)
        with o.progress() as report:
            solution = api.plan(
                list(traces), cluster, redundant=redundant, method=method, model=model,
                traffic=o.one_of("traffic model", traffic, TRAFFIC_MODELS), split=o.one_of("split", split, SPLITS),
                tokens_per_step=tokens_per_step, order=o.one_of("order", order, ORDERS), pooled=pooled,
                current=current, migration_steps=migration_steps, risk=o.one_of("risk", risk, RISKS),
                time_limit_s=time_limit, seed=seed, engine=engine, progress=report,
            )  # fmt: skip
            said = None
            if verdict and not pooled:
                said = api.verdict(
                    list(traces), cluster, method=method, current=current, redundant=redundant, model=model,
                    traffic=traffic, split=split, engine=engine, tokens_per_step=tokens_per_step, order=order,
                    time_limit_s=time_limit / 2, seed=seed, progress=report,
                )  # fmt: skip
        _with_command(solution.placement).save(output)
        if json:
            o.print_json({**_json(solution), "verdict": said})
        else:
            _show(solution)
            if said:
                o.out.print(f"Over what runs now, fitted on one half of the traffic and judged on the other. {said}")
        o.talk.print(f"wrote {output}")


def _with_command(placement: Placement) -> Placement:
    """The placement, its file told what made it."""
    assert placement.fitted is not None
    about = {**placement.fitted.about, "command": shlex.join(["poise", *sys.argv[1:]])}
    return replace(placement, fitted=replace(placement.fitted, about=about))


def _json(solution: Solution) -> dict[str, object]:
    return {
        "method": solution.method,
        "objective": solution.objective,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "seconds": solution.seconds,
        "imbalance": solution.imbalance,
        "terms": {name: {"seconds": t.seconds, "lower_bound": t.lower_bound} for name, t in solution.terms.items()},
        "details": solution.details,
    }


def _show(solution: Solution) -> None:
    table = Table(title=f"{solution.method}: modelled seconds of one MoE layer and step", title_justify="left")
    table.add_column("term")
    for head in ("us", "lower bound us", "gap"):
        table.add_column(head, justify="right")
    for name, term in solution.terms.items():
        if term.seconds > 0:
            gap = 1 - term.lower_bound / term.seconds
            table.add_row(name, f"{1e6 * term.seconds:.2f}", f"{1e6 * term.lower_bound:.2f}", percent(gap))
    table.add_row(
        "all",
        f"{1e6 * solution.objective:.2f}",
        f"{1e6 * solution.lower_bound:.2f}",
        percent(solution.gap),
        style="bold",
    )
    o.out.print(table)
    o.out.print(
        f"imbalance {solution.imbalance:.3f} (max / mean tokens, in-sample), planned in {solution.seconds:.2f} s"
    )
    fewer = solution.details.get("fewer_redundant")
    if fewer is not None:
        o.out.print(fewer_words(fewer["redundant"], 1 - fewer["objective"] / solution.objective))
    o.out.print(repr(solution.placement))
