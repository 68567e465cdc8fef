"""poise breakeven: from which batch size step-wise balancing pays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poise import api
from poise.cli import options as o
from poise.cost.traffic import DATA_FLOWS
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.replay.breakeven import SIZES, BreakEven
from poise.replay.breakeven import breakeven as run
from poise.routing.trace import RoutingTrace
from poise.util.errors import OptionError


def breakeven(
    cluster: o.ClusterSpec,
    model: o.NamedModel,
    traces: Annotated[list[str] | None, typer.Argument(help="Routing traces; without them synthetic loads.")] = None,
    placement: Annotated[Path | None, typer.Option(help="Placement below the fast loop. Default: contiguous.")] = None,
    sizes: Annotated[str, typer.Option(help="Tokens a step, ascending.")] = ",".join(map(str, SIZES)),
    step_slots: Annotated[str, typer.Option(help="Step slots a device to try.")] = "0,1,2,4",
    skew: Annotated[float, typer.Option(help="Spread of synthetic log-normal loads.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Judged steps a size.")] = 12,
    traffic: Annotated[str, typer.Option(help="Traffic model; loads know only home.")] = "home",
    window_us: Annotated[float | None, typer.Option(help="Measured time before the gate, us a layer.")] = None,
    control_us: Annotated[float | None, typer.Option(help="Measured exchange and planning time, us a layer.")] = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Print, for a cluster and a model, from which batch size step-wise balancing pays and how many slots it wants.

    Example: poise breakeven --cluster 8x8:h100 --model deepseek-v3
    """
    with o.errors():
        trace = api.load(list(traces)) if traces else None
        if trace is not None and not isinstance(trace, RoutingTrace):
            raise OptionError("breakeven draws steps from routing traces, got a load profile", hint="give no trace")
        result = run(
            Cluster.parse(cluster), ModelSpec.parse(model), trace=trace,
            placement=Placement.load(placement) if placement else None, sizes=_numbers("sizes", sizes),
            slots=_numbers("step slots", step_slots), skew=skew, steps=steps,
            traffic=o.one_of("traffic model", traffic, DATA_FLOWS), seed=seed,
            window_s=None if window_us is None else 1e-6 * window_us,
            control_s=None if control_us is None else 1e-6 * control_us,
        )  # fmt: skip
        if json:
            o.print_json("breakeven", result.to_json())
        else:
            _show(result, trace is not None)


def _numbers(what: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"{what} must be whole numbers with commas, got {text!r}") from None


def _show(result: BreakEven, from_trace: bool) -> None:
    heads = ("tokens a step", f"static, us of {result.layers} MoE layers", "balance at any cost",
             *(f"poise, {m} slots" for m in result.slots), "efficiency")  # fmt: skip
    table = o.table(f"speedup over the static placement; {result.traffic_words}", heads)
    for row in result.rows:
        table.add_row(
            str(row.tokens), f"{1e6 * row.static_seconds:.1f}", f"{row.always_speedup:.3f}",
            *(f"{value:.3f}" for value in row.speedups), f"{row.efficiency:.3f}",
        )  # fmt: skip
    o.out.print(table)
    which = "recorded" if from_trace else "sampled"
    o.out.print(
        f"static: modelled time of the {result.layers} {which} MoE layers of a forward pass under contiguous blocks or "
        "--placement; the columns behind it say how many times faster; efficiency: bound / best of the row"
    )
    o.out.print(result.verdict())
