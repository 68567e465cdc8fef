"""poise calibrate: measure this machine and write the cluster file that planners read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from poise.cli import options as o
from poise.cli import tables
from poise.lab.calibrate.result import Calibration
from poise.lab.emulate.clock import ExpertCurve
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.util.errors import OptionError
from poise.util.extras import with_torch
from poise.util.files import write_whole

GENERIC = (2048, 1024, 3, 64)
"""Hidden, inner, matrices, experts when no model is named."""


def calibrate(
    output: Annotated[Path, o.flag("output", "Cluster file to write (.yaml).")],
    model: o.Model = None,
    hidden: Annotated[int | None, typer.Option(help="Width of a token, instead of the model's.")] = None,
    inner: Annotated[int | None, typer.Option(help="Inner width of an expert, instead of the model's.")] = None,
    matrices: Annotated[int | None, typer.Option(help="2 plain, 3 gated.")] = None,
    curve: Annotated[
        Path | None, typer.Option(help="CSV of the device clock (tokens, active_experts, seconds): measure the clock.")
    ] = None,
    dilation: Annotated[float, typer.Option(help="With --curve: how much slower the clock runs.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="About how long to measure.")] = 60.0,
    repeats: Annotated[int, typer.Option(help="Repeats of each row; their median counts.")] = 7,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rows, no very long exchanges, a quarter of the time.")
    ] = False,
    find_nic: Annotated[
        bool, typer.Option("--find-nic", help="Decide between one network port a device and one a node.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cluster: Annotated[
        str | None, o.flag("cluster", "A single process: shape and links, which it cannot measure.")
    ] = None,
    from_tables: Annotated[
        Path | None,
        typer.Option(
            "--from-tables",
            help="Measure nothing: fit public tables of GPU kernels, an aisimulate wheel or its folder of tables. With "
            "--model a cluster file for its shape, else constants of all kernels (.json).",
        ),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="With --from-tables: the GPU, e.g. h200. Default: that of --cluster.")
    ] = None,
    engine: Annotated[str, typer.Option(help="With --from-tables: vllm, sglang or trtllm.")] = "vllm",
    kind: Annotated[
        str | None,
        typer.Option("--type", help="With --from-tables: bf16, fp8, fp8_block, nvfp4, ... Default: by the model."),
    ] = None,
    library: Annotated[
        str | None, typer.Option(help="With --from-tables: all-to-all, e.g. deepep-ll. Default: ports of the cluster.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Measure links and experts on whatever runs under torchrun, and write a cluster file.

    Example: torchrun --nproc-per-node 4 -m poise.cli calibrate -o cluster.yaml
    """
    if from_tables is not None:
        tables.calibrate_from_tables(
            from_tables, output, tables.Wanted(model, cluster, gpu, engine, kind, library), as_json=json
        )
        return
    main = os.environ.get("RANK", "0") == "0"
    with o.errors():
        o.talk.quiet = not main  # every rank gets the same options: one complaint is enough
        ranks = with_torch("poise.lab.calibrate.ranks", "measuring")
        o.writable(output)
        if output.suffix not in (".yaml", ".yml"):
            raise OptionError(f"{output} is no cluster file", hint="planners read .yaml")
        spec = ModelSpec.parse(model) if model else None
        sizes = GENERIC if spec is None else (
            spec.expert_width, spec.expert_intermediate_size, spec.num_expert_matrices, spec.num_experts
        )  # fmt: skip
        plan = ranks.CalibrationPlan(
            hidden=hidden if hidden is not None else sizes[0], inner=inner if inner is not None else sizes[1],
            matrices=matrices if matrices is not None else sizes[2], num_experts=sizes[3], seconds=seconds,
            repeats=repeats, quick=quick, clock=ExpertCurve.from_csv(curve) if curve else None, dilation=dilation,
            find_nic=find_nic, device=device, base=Cluster.parse(cluster) if cluster else None,
        )  # fmt: skip
        o.talk.quiet = False
        result = ranks.calibrate(plan, say=lambda text: o.talk.print(text) if main else None)
        if result is None:
            return
        write_whole(output, result.to_yaml(), OptionError)
        if json:
            o.print_json("calibrate", result.to_json())
        else:
            _show(result)
        for note in result.notes:
            o.talk.print(f"note: {note}")
        o.talk.print(f"wrote {output}")


def _show(result: Calibration) -> None:
    cluster, links = result.cluster, result.links
    if links is not None:
        heads = ("pattern", "peers", "intra KB", "inter KB", "ms", "25 %", "75 %", "fit ms", "fit / measured")
        table = o.table("exchanges: median, and what the fit says", heads, left=("pattern",))
        for row, off in zip(result.link_rows, links.residual_R, strict=True):
            table.add_row(
                row.pattern, f"{row.peers:g}", f"{row.intra_bytes / 1e3:.1f}", f"{row.inter_bytes / 1e3:.1f}",
                f"{1e3 * row.seconds:.3f}", f"{1e3 * row.low_s:.3f}", f"{1e3 * row.high_s:.3f}",
                f"{1e3 * row.seconds * (1 + off):.3f}", f"{1 + off:.3f}",
            )  # fmt: skip
        o.out.print(table)
        o.out.print(
            f"intra {cluster.intra_bytes_per_s / 1e6:.4g} MB/s, inter {cluster.inter_bytes_per_s / 1e6:.4g} MB/s a "
            f"{'node' if cluster.nic_shared else 'device'}; start-up {1e6 * cluster.intra_latency_s:.4g} us, "
            f"+ {1e6 * cluster.inter_latency_s:.4g} us across nodes, + {1e6 * cluster.peer_latency_s:.4g} us a peer"
        )
        o.out.print(
            f"worst residual {links.worst:.1%} (of long exchanges {links.worst_long:.1%}), median {links.typical:.1%}"
        )
    table = o.table(
        f"experts: {result.machine.expert}, {result.machine.compute}",
        ("tokens each", "active", "us an expert", "fastest", "slowest", "fit / measured"),
    )
    for one, off in zip(result.compute_rows, result.compute.residual_R, strict=True):
        table.add_row(
            str(one.tokens // one.active), str(one.active), f"{1e6 * one.seconds / one.active:.2f}",
            f"{1e6 * one.low_s / one.active:.2f}", f"{1e6 * one.high_s / one.active:.2f}", f"{1 + off:.3f}",
        )  # fmt: skip
    o.out.print(table)
    o.out.print(
        f"up to {cluster.flops_per_s / 1e9:.4g} GFLOP/s, one token in {1e6 * _one_token(cluster):.4g} us; "
        f"worst residual {result.compute.worst:.1%}"
    )


def _one_token(cluster: Cluster) -> float:
    assert cluster.expert_curve is not None
    return cluster.expert_curve.per_expert
