"""poise homes: which rank serves which request, and whether it pays to choose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poise import api
from poise.cli import options as o
from poise.cli.ending import best_so_far
from poise.cli.pricing import EngineName, PricingOptions
from poise.planning.budget import Budget
from poise.planning.homes import BAND, POLICIES
from poise.replay.homes import HomeRow, HomeStudy

TIME_LIMIT = "Seconds for all placements together. Compiling is not counted."


@o.grouped
def homes(
    *,
    traces: o.Traces,
    cluster: o.ClusterSpec,
    output: Annotated[Path | None, o.flag("output", "Home table to write (.npz), for a router.")] = None,
    placement_out: Annotated[
        Path | None, typer.Option("--placement-out", help="Placement to write (.npz), planned for these homes.")
    ] = None,
    redundant: o.Redundant = 0,
    priced: PricingOptions,
    engine: EngineName = "any",
    tokens_per_step: o.TokensPerStep = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="grouped (like requests together, as ELDR) or affine. Default: the better one on the fitted half."
        ),
    ] = None,
    band: Annotated[
        float, typer.Option(help="A rank takes requests up to so much beyond the mean tokens of all ranks.")
    ] = BAND,
    time_limit: Annotated[float, o.flag("time_limit", TIME_LIMIT)] = 60.0,
    work: o.Work = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Say whether it pays to choose which rank serves which request, and write a table by which a router does.

    Planned on one half of the requests, with the experts' placement, and judged on the other half.

    Example: poise homes trace.npz --cluster 2x8:h200 --model llama-4-maverick -n 2048 -o homes.npz
    """
    with o.errors():
        for path in (output, placement_out):
            if path is not None:
                o.writable(path, ".npz")
        with o.progress() as report:
            traffic = api.load(list(traces))  # control-C ends that, and no limit counts it
            with best_so_far(o.talk.print) as wish:
                study = api.homes(
                    traffic, cluster, redundant=redundant, engine=engine, tokens_per_step=tokens_per_step,
                    policy=o.one_of("policy", policy, POLICIES), band=band, seed=seed, progress=report,
                    time_limit_s=Budget(time_limit, work=work, wish=wish), **priced.checked(),
                )  # fmt: skip
        if output is not None:
            study.table.save(output)
        if placement_out is not None:
            study.placement.save(placement_out)
        if json:
            o.print_json("homes", study.to_json())
        else:
            _show(study)
        for path in (output, placement_out):
            if path is not None:
                o.talk.print(f"wrote {path}")


def _show(study: HomeStudy) -> None:
    heads = ("homes", "step ms", "all to all ms", "off device", "off node", "active experts", "imbalance",
             "on its rank", "fullest")  # fmt: skip
    table = o.table(f"requests never seen: {study.order.split(', homes')[0]}", heads, left=("homes",))
    table.columns[0].no_wrap = True
    best = min(row.step_s for row in study.rows)
    for row in study.rows:
        table.add_row(*_cells(row), style="bold" if row.step_s == best else None)
    o.out.print(table)
    o.out.print(
        "re-planned: experts are placed for these homes, else for equal ones; step ms: modelled, all recorded MoE "
        "layers of a forward pass; off device, off node: shares of (token, expert) pairs; active experts: of a rank, "
        "step and layer; imbalance: max / mean tokens over ranks; on its rank: tokens that run where their request was "
        "sent, the others find no room, as every rank has as many in a step; fullest: tokens of the fullest rank over "
        "the mean before they are evened out"
    )
    o.out.print(f"Constants: {study.constants}.")
    o.say_notes(study.notes)
    o.out.print(study.sentence())


def _cells(row: HomeRow) -> list[str]:
    return [
        row.name, f"{1e3 * row.step_s:.3f}", f"{1e3 * row.exchange_s:.3f}", f"{row.off_device:.1%}",
        f"{row.off_node:.1%}", f"{row.active:.2f}", f"{row.imbalance:.3f}",
        "" if row.kept is None else f"{row.kept:.1%}", f"{row.fullest:.2f}",
    ]  # fmt: skip
