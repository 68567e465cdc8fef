"""``poise machines``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from poise.cli import options as o
from poise.machine.constants import gpu_of, tables
from poise.machine.presets import DEVICES
from poise.util.errors import OptionError
from poise.util.words import close_to


def machines(
    preset: Annotated[str | None, typer.Argument(help="Of this preset alone.")] = None, json: o.Json = False
) -> None:
    """List what is known of machines: presets, measured expert kernels and all-to-alls, with their errors and versions.

    A cluster names them as in 2x8:h200+vllm.fp8_block+deepep-ll; 2x8:h200 takes those that suit model and batch, and
    2x8:h200+datasheet the peaks of the datasheet.
    """
    with o.errors():
        if preset is not None and preset not in DEVICES:
            raise OptionError(f"unknown preset {preset!r}", hint=close_to(preset, DEVICES))
        found, gpu = tables(), None if preset is None else gpu_of(preset)
        kernels = [row for row in found.kernels if gpu in (None, row["gpu"])]
        links = [row for row in found.links if gpu in (None, row["gpu"])]
        presets = {name: rates for name, rates in DEVICES.items() if preset in (None, name)}
        if json:
            o.print_json("machines", {
                "source": found.source, "fitted": found.fitted, "presets": presets, "kernels": kernels, "links": links,
            })  # fmt: skip
            return
        _show_presets(presets)
        if not kernels and not links:
            o.out.print(f"Nothing was measured on {preset}: its datasheet is derated by what others reach of theirs.")
            return
        _show_kernels(kernels)
        _show_links(links)
        o.out.print(f"Fitted on {found.fitted} to {found.source}. How well, and where not: docs/accuracy.md.")


def _show_presets(presets: dict[str, dict[str, float]]) -> None:
    heads = ("preset", "TFLOP/s, 16 bit", "memory GB", "GB/s", "GB/s in the node", "GB/s network")
    table = o.table("presets, by datasheet", heads, left=heads[:1])
    for name, r in presets.items():
        rates = (r["flops_per_s"] / 1e12, r["memory_bytes"] / 1e9, r["memory_bytes_per_s"] / 1e9,
                 r["intra_bytes_per_s"] / 1e9, r["inter_bytes_per_s"] / 1e9)  # fmt: skip
        table.add_row(name, *(f"{rate:g}" for rate in rates))
    o.out.print(table)


def _show_kernels(rows: list[Any]) -> None:
    heads = ("name", "kernel", "version", "rows", "start us", "read", "compute", "activations", "error")
    table = o.table(
        "expert kernels: seconds over the ideal of each term, held-out error over shapes", heads, left=heads[:3]
    )
    for r in sorted(rows, key=lambda r: (r["gpu"], r["engine"], r["type"], not r["default"])):
        factors = (f"{r[f'{name}_factor']:.2f}" for name in ("read", "compute", "activation"))
        name = f"{r['gpu']}+{r['engine']}.{r['type']}" if r["default"] else "  (not its default)"
        table.add_row(name, r["kernel"], r["version"], f"{r['rows']}", f"{1e6 * r['start_s']:.0f}", *factors,
                      "?" if r["error"] is None else f"{r['error']:.0%}")  # fmt: skip
    o.out.print(table)


def _show_links(rows: list[Any]) -> None:
    way = ("GB/s", "network GB/s", "error")
    heads = ("name", "reach", "version", "dispatch us", *way, "combine us", *way)
    table = o.table("all-to-alls", heads, left=heads[:3])
    for r in rows:
        cells: list[str] = []
        for way in (r["dispatch"], r["combine"]):
            start = f"{1e6 * way['start_s']:.0f}" + (f" + {1e6 * way['peer_s']:.2f} a peer" if way["peer_s"] else "")
            far = way["inter_bytes_per_s"]
            cells += [start, f"{way['intra_bytes_per_s'] / 1e9:.0f}", "" if far is None else f"{far / 1e9:.0f}",
                      "?" if way["error"] is None else f"{way['error']:.0%}"]  # fmt: skip
        doubt = ", of doubtful origin" if r["doubtful"] else ""
        table.add_row(f"{r['gpu']}+{r['library']}", r["reach"] + doubt, r["version"], *cells)
    o.out.print(table)
