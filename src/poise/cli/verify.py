"""poise verify: is the plan what runs, and does it balance as predicted?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poise.cli import options as o
from poise.engines import sglang
from poise.engines.readers import ReadOptions, read_dump
from poise.engines.verify import RUNS, Verification
from poise.engines.verify import verify as check
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.routing.ranks import READINGS
from poise.util.errors import NoResultError

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 12
"""Layers of the table on a terminal."""


def verify(
    placement: Annotated[Path, typer.Argument(help="Placement file of 'poise plan', as it was exported.")],
    dumps: Annotated[list[Path], typer.Argument(help="What the engine wrote while it ran (docs/engines.md).")],
    model: o.Model = None,
    traffic: Annotated[
        Path | None, typer.Option(help="What ran meanwhile, for a dump that reports a balance alone (a server log).")
    ] = None,
    recorded: Annotated[
        bool, typer.Option("--recorded", help="The map file was written by the running engine (vllm-ascend).")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="Relative; balances this near count as equal.")] = 0.05,
    ranks: o.Ranks = None,
    allow_missing_ranks: o.AllowMissingRanks = False,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Another placement that may run instead (.npz, SGLang's .json), an older plan. Repeatable."),
    ] = None,
    error_rate: Annotated[
        float,
        typer.Option(help="Of a balance: odds of 'live' while another map runs, of 'not-live' while the plan does."),
    ] = 0.01,
    balancer_off: Annotated[
        bool, typer.Option("--balancer-off", help="The engine's own load balancer made no maps: a log may not say.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Say from an engine's dump whether the map is live, in which layers not, and whether balance is as predicted.

    Exit codes: 0 the plan runs; 1 it does not, or that is undecided, or a file matches that may or may not run; 2 bad
    input.

    Example: poise verify placement.npz dumps/ --json
    """
    with o.errors():
        plan = Placement.load(placement)
        spec = None if model is None else ModelSpec.parse(model)
        options = ReadOptions(
            spec, ranks=o.one_of("reading of ranks", ranks, READINGS), allow_missing_ranks=allow_missing_ranks,
            allow_running=True,  # a map is checked against totals, too
        )  # fmt: skip
        dump = read_dump(dumps, options=options if traffic is None else replace(options, ranks=None))
        if traffic is not None:
            ran = read_dump(traffic, options=options)
            dump = replace(dump, trace=ran.trace, profile=ran.profile, recorded_layers=ran.recorded_layers,
                           notes=(*dump.notes, *ran.notes))  # fmt: skip
        found = check(
            plan, dump, tolerance=tolerance, recorded=True if recorded else None, error_rate=error_rate,
            against={str(path): _placement(path, plan) for path in against or []}, balancer_off=balancer_off,
        )  # fmt: skip
        if json:
            o.print_json("verify", _facts(found))
        else:
            _show(found)
        for note in (*dump.notes, *found.notes):
            o.talk.print(note)
        if not found.live:
            raise NoResultError(found.sentence())


def _placement(path: Path, plan: Placement) -> Placement:
    if path.suffix == ".json":
        return sglang.read(path, num_devices=plan.num_devices, num_experts=plan.num_experts)
    return Placement.load(path)


def _facts(found: Verification) -> dict[str, Any]:
    return {
        "verdict": found.verdict, "live": found.live, "recorded": found.recorded, "evidence": found.evidence,
        "as_predicted": found.as_predicted,
        "balance": {"measured": found.measured, "predicted": found.predicted, "without_plan": found.trivial},
        "sentence": found.sentence(), "error_rate": found.error_rate,
        "maps": [{"map": e.name, "balance": e.balance, "p_value": e.p_value, "explains": e.explains}
                 for e in found.explanations],
        "layers": [{"layer": f.layer_id, "state": f.state, "wrong": f.wrong, "imbalance_measured": f.measured,
                    "imbalance_predicted": f.predicted} for f in found.layers],
    }  # fmt: skip


def _show(found: Verification) -> None:
    """The verdict, the maps that were tried, and the layers that are worst first."""
    if found.live:
        o.out.print(found.sentence())
    if found.explanations:
        o.out.print(_maps(found))
    rows = sorted(found.layers, key=lambda f: (f.state in RUNS, f.state == "unseen", -(f.measured or 0.0)))
    heads = ("layer", "map", "wrong", "imbalance measured", "predicted")
    table = o.table(f"evidence: {found.evidence}", heads, left=("map",))
    for f in rows[:SHOWN]:
        table.add_row(str(f.layer_id), f.state, str(f.wrong),
                      *("" if value is None else f"{value:.3f}" for value in (f.measured, f.predicted)))  # fmt: skip
    o.out.print(table)
    o.out.print("wrong: slots, or experts whose slots do not add up; imbalance: max / mean tokens over devices")
    if len(rows) > SHOWN:
        o.out.print(f"{len(rows) - SHOWN} more layers: --json shows all")


def _maps(found: Verification) -> Table:
    heads = ("map", "balance, mean / max", "p value", "explains it")
    table = o.table(f"what each map would give; measured: {found.measured:.3f}", heads, left=("map",))
    for e in found.explanations:
        table.add_row(e.name, f"{e.balance:.3f}", f"{e.p_value:.2g}", "yes" if e.explains else "no")
    return table
