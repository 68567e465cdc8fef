"""How far the fitted constants of kernels and all-to-alls are off, on rows of public tables that no fit saw.

python benchmarks/tables.py DIR [--keep FOLDER]     report and figures, dated; DIR is an aisimulate wheel or its tables
python benchmarks/tables.py --docs [FIGURES.json]   docs/accuracy.md from the newest (or that) file of figures
python benchmarks/tables.py DIR --docs              both
python benchmarks/tables.py DIR --machines          also writes src/poise/data/machines.json

``--keep`` is a folder where drawn loads are kept between runs. No row of the tables is written anywhere else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
from benchmarks import tables_evidence as evidence

from poise.lab.calibrate.tables.alltoall import read_links
from poise.lab.calibrate.tables.defaults import UNTUNED
from poise.lab.calibrate.tables.kernels import read_all_versions, read_kernels
from poise.lab.calibrate.tables.result import judged_kernel, machines, one_a_line
from poise.lab.calibrate.tables.source import TableSource

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "accuracy.md"
CONSTANTS = ROOT / "src" / "poise" / "data" / "machines.json"
NAME = "Kernels and all-to-alls: constants against measurements"
FAILS = 0.25
"""Held-out error from which on a kernel is listed among those where the model fails."""
WANTED = {
    "shapes_unseen_ranks": ("one rank, constants of a model shape: unseen numbers of ranks, MAPE", 0.13, "at most"),
    "shapes_power_law": ("the same, power-law loads by constants of balanced ones, MAPE", 0.13, "at most"),
    "kernels_unseen_shapes": ("one rank, constants of a kernel: unseen shapes, MAPE", 0.18, "at most"),
    "eplb_mape": ("without over with EPLB, MAPE of the ratio", 0.10, "at most"),
    "eplb_sign": ("the same, sign right where the ratio differs by 3 %", 0.89, "at least"),
    "slots_sign": ("256 over 288 slots, sign right", 0.97, "at least"),
    "ll_h100": ("DeepEP low latency, one node h100, worse direction, MAPE", 0.14, "at most"),
    "ll_h200": ("DeepEP low latency, one node h200, worse direction, MAPE", 0.14, "at most"),
    "normal_h100": ("DeepEP normal, one node h100, worse direction, MAPE", 0.11, "at most"),
    "normal_h200": ("DeepEP normal, one node h200, worse direction, MAPE", 0.11, "at most"),
}
"""What the constants are meant to reach, and whether they do."""


def percent(value: float | None, sign: bool = False, digits: int = 1) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{100 * value:+.{digits}f} %" if sign else f"{100 * value:.{digits}f} %"


def compute(path: Path, keep: Path | None, write_machines: bool) -> dict[str, Any]:
    source, today = TableSource(path), datetime.date.today().isoformat()
    drawn = keep / "loads.pickle" if keep else None
    known = pickle.loads(drawn.read_bytes()) if drawn and drawn.exists() else {}
    found = [judged_kernel(rows, known) for rows in read_kernels(source)]
    links = read_links(source)
    if write_machines:
        CONSTANTS.write_text(one_a_line(machines(source, found, links, today)), encoding="utf-8")
    kernels, shapes = evidence.kernel_figures(found), evidence.shape_figures(found)
    figures = {
        "date": today, "source": source.version, "sha256": source.sha256, "commit": common.COMMIT,
        "rows": sum(len(one.rows.seconds_R) for one in found), **kernels, "shapes": shapes,
        "medians": evidence.medians(kernels["kernels"], shapes), "wide": evidence.wide_figures(source, known),
        "links": evidence.link_figures(links), "versions": evidence.version_figures(read_all_versions(source)),
    }  # fmt: skip
    if drawn:
        drawn.write_bytes(pickle.dumps(known))
    return figures


def reached(figures: dict[str, Any]) -> dict[str, float]:
    """The figures of :data:`WANTED`."""

    def worse(library: str, gpu: str) -> float:
        return max(
            row["model"]
            for row in figures["links"]
            if (row["library"], row["gpu"], row["reach"]) == (library, gpu, "node")
        )

    wide = figures["wide"]
    return {
        **figures["medians"], "eplb_mape": wide["eplb"]["all"]["model_mape"],
        "eplb_sign": wide["eplb"]["all"]["model_sign"], "slots_sign": wide["slots"]["all"]["model_sign"],
        **{f"ll_{gpu}": worse("deepep-ll", gpu) for gpu in ("h100", "h200")},
        **{f"normal_{gpu}": worse("deepep-normal", gpu) for gpu in ("h100", "h200")},
    }  # fmt: skip


def wanted_table(figures: dict[str, Any]) -> str:
    values, rows = reached(figures), []
    for key, (text, limit, word) in WANTED.items():
        good = values[key] <= limit if word == "at most" else values[key] >= limit
        rows.append([text, f"{word} {100 * limit:g} %", percent(values[key]), "yes" if good else "**no**"])
    return common.table(["on rows that no fit saw", "wanted", "is", "reached"], rows)


def band_table(figures: dict[str, Any]) -> str:
    bands = list(dict.fromkeys(row["tokens"] for row in figures["bands"]))
    by = {(row["gpu"], row["engine"], row["tokens"]): row for row in figures["bands"]}
    rows = []
    for gpu, engine in dict.fromkeys(key[:2] for key in by):
        cells = [by.get((gpu, engine, band)) for band in bands]
        rows.append([gpu, engine, *(
            "-" if one is None
            else f"{percent(one['model'], digits=0)} ({percent(one['model_bias'], True, 0)}); {percent(one['datasheet_bias'], True, 0)}"
            for one in cells
        )])  # fmt: skip
    return common.table(["gpu", "engine", *bands], rows)


def kernel_table(figures: dict[str, Any], *, failing: bool) -> str:
    rows = [
        [row["gpu"], row["engine"], row["type"], f"`{row['kernel']}`", row["version"], f"{row['rows']:,}", row["shapes"],
         percent(row["unseen_shapes"]), percent(row["bias"], True), percent(row["power_law"]), percent(row["datasheet"], digits=0)]
        for row in figures["kernels"]
        if not failing or row["unseen_shapes"] > FAILS
    ]  # fmt: skip
    head = [
        "gpu",
        "engine",
        "type",
        "kernel",
        "version",
        "rows",
        "shapes",
        "unseen shapes",
        "bias",
        "power law",
        "datasheet",
    ]
    return common.table(head, rows)


def shape_table(figures: dict[str, Any]) -> str:
    def middle(rows: list[dict[str, Any]], key: str) -> float | None:
        values = sorted(row[key] for row in rows if row[key] is not None)
        return None if not values else (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2

    rows = []
    for gpu, engine in sorted({(row["gpu"], row["engine"]) for row in figures["shapes"]}):
        here = [row for row in figures["shapes"] if (row["gpu"], row["engine"]) == (gpu, engine)]
        rows.append([gpu, engine, len(here), percent(middle(here, "unseen_ranks")), percent(middle(here, "power_law"))])
    return common.table(["gpu", "engine", "fits", "unseen numbers of ranks", "power law"], rows)


def wide_table(pairs: dict[str, Any]) -> str:
    def cells(one: dict[str, float]) -> list[object]:
        out: list[object] = [f"{one['pairs']:,.0f}", f"{one['measured']:.2f}", percent(one["loses"], digits=0)]
        for name in ("model", "datasheet", "tokens"):
            out.append(
                f"{one[f'{name}_mean']:.2f}; {percent(one[f'{name}_mape'])}; {percent(one[f'{name}_sign'], digits=0)}"
            )
        return out

    rows = [["all", *cells(pairs["all"])]]
    rows += [[gpu, *cells(one)] for gpu, one in pairs["by_gpu"].items()]
    rows += [[f"{name} tokens an expert", *cells(one)] for name, one in pairs["by_tokens"].items()]
    return common.table(["", "pairs", "measured", "it loses", "model", "datasheet", "tokens alone"], rows)


def link_table(figures: dict[str, Any]) -> str:
    rows = [
        [row["gpu"], row["library"], row["reach"], row["way"] if row["library"] != "nccl" else "all-to-all", row["version"],
         row["rows"], percent(row["model"]), percent(row["bias"], True), percent(row["many_experts"]), percent(row["preset"])]
        for row in figures["links"]
    ]  # fmt: skip
    head = [
        "gpu",
        "library",
        "reach",
        "",
        "version",
        "rows",
        "held out",
        "bias",
        "128 experts or more",
        "datasheet port + 10 us",
    ]
    return common.table(head, rows)


def version_table(figures: dict[str, Any], least: float) -> str:
    rows = [
        [row["gpu"], row["engine"], row["type"], f"`{row['kernel']}`", f"{row['from']} to {row['to']}", f"{row['rows']:,}",
         f"{row['median']:.2f}", percent(row["apart"], digits=0)]
        for row in figures["versions"] if row["apart"] >= least
    ]  # fmt: skip
    return common.table(["gpu", "engine", "type", "kernel", "releases", "rows", "new / old, median", "apart"], rows)


def untuned_text(figures: dict[str, Any]) -> str:
    names = [
        f"{row['gpu']} {row['engine']} {row['type']} (`{row['kernel']}`, {row['read_factor']:.1f} times)"
        for row in figures["kernels"]
        if row["read_factor"] > UNTUNED
    ]
    return (
        f"Untuned, listed and never a default: weights read in over {UNTUNED:g} times the ideal time. "
        + "; ".join(names)
        + "."
    )


def version_text(figures: dict[str, Any]) -> str:
    """Which releases the constants are of."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in figures["kernels"]:
        found.setdefault((row["gpu"], row["engine"]), set()).add(row["version"])
    return common.table(
        ["gpu", "engine", "releases"],
        [[gpu, engine, ", ".join(sorted(all_))] for (gpu, engine), all_ in sorted(found.items())],
    )


def report(figures: dict[str, Any]) -> list[str]:
    return [
        f"Tables: {figures['source']}, sha256 {figures['sha256']}. {figures['rows']:,} rows of {len(figures['kernels'])} "
        f"kernels with experts whole on a rank, {len(figures['shapes'])} model shapes of kernels, {figures['wide']['rows']:,} "
        f"wide-EP rows. All figures are of rows that the constants in question were not fitted to.",
        wanted_table(figures),
        "## Kernels\n\nUnseen shapes: two folds of shapes. Power law: constants of balanced rows.\n\n"
        + kernel_table(figures, failing=False),
        untuned_text(figures),
        "## By tokens of an active expert\n\nModel on unseen shapes: MAPE (bias); bias of the datasheet's roofline.\n\n"
        + band_table(figures),
        "## Constants of one model shape (medians)\n\n" + shape_table(figures),
        "## Without over with EPLB\n\nGeometric mean of the ratio; MAPE; sign right where it differs by 3 %.\n\n"
        + wide_table(figures["wide"]["eplb"]),
        "## 256 over 288 slots, both with EPLB\n\n" + wide_table(figures["wide"]["slots"]),
        "## All-to-alls\n\nOne shape (or one size, or one number of ranks or nodes) left out at a time.\n\n" + link_table(figures),
        "## Releases\n\nThe same kernel on the same balanced load in two releases.\n\n" + version_table(figures, 0.0),
    ]  # fmt: skip


def page(figures: dict[str, Any], name: str) -> str:
    medians, wide = figures["medians"], figures["wide"]
    eplb, slots = wide["eplb"]["all"], wide["slots"]["all"]
    slowest = max(
        row["slowest"] for row in figures["links"]
        if (row["gpu"], row["library"], row["reach"], row["way"]) == ("h100", "deepep-ll", "node", "dispatch")
    )  # fmt: skip
    misses = sum(row["unseen_shapes"] > FAILS for row in figures["kernels"])
    return f"""# How far poise's constants are off

Written by `python benchmarks/tables.py --docs` from [{name}](../benchmarks/reports/{name}); the full report:
[{Path(name).stem}.md](../benchmarks/reports/{Path(name).stem}.md). Do not edit.

Constants of kernels and all-to-alls were fitted by us to {figures["source"]}, sha256 `{figures["sha256"]}`: {figures["rows"]:,}
rows of {len(figures["kernels"])} kernels on real GPUs. They ship as `src/poise/data/machines.json`; rows of the tables do not.
Every figure below is of rows that the constants in question were **not** fitted to.

## Lanes
| claim | lane |
|---|---|
| seconds of a kernel, of a dispatch, of a combine on a100, h100, h200, b200, gb200 | measured elsewhere (the tables), one rank alone on one GPU or one exchange alone; the fit is ours |
| what EPLB gains, what a redundant slot costs, in kernel time | measured elsewhere, on loads that EPLB knew (an oracle) |
| a step of a fast loop, of serving, of training on nodes | emulated here on two CPU cores ([results](results.md), [emulation](emulation.md)); no GPU |
| milliseconds of a whole step, shares of a step, break-even | modelled: the constants below in poise's cost model, attention and network by datasheet |
| GPUs without a row here, several nodes over a network | modelled: datasheet, derated |

## What is reached
{wanted_table(figures)}

## Kernels
    seconds of a rank = start + sum over experts of max(read * bytes / bandwidth, n * compute * flops / peak)
                        + activation * (S (2h + 3i) + 2 N h) * 2 bytes / bandwidth

n tokens of an expert, S pairs on the rank, N tokens given to the kernel, h and i the widths; four constants for each GPU, type,
engine and kernel. Unseen shapes {percent(medians["kernels_unseen_shapes"])}, power-law loads by constants of balanced ones
{percent(medians["kernels_power_law"])} (medians of kernels). The datasheet's roofline is {percent(medians["kernels_datasheet"], digits=0)} off, bias
{percent(medians["kernels_datasheet_bias"], True, 0)}: too fast, since it knows no start and no activations. Refitted to one model's shape
(`poise calibrate --from-tables DIR --model M`): {percent(medians["shapes_unseen_ranks"])} on unseen numbers of ranks,
{percent(medians["shapes_power_law"])} on power-law loads.

By tokens of an active expert, unseen shapes: MAPE (bias); after the semicolon the bias of the datasheet.

{band_table(figures)}

Constants of one model shape, medians:

{shape_table(figures)}

## Does the model know what EPLB gains?
{wide["rows"]:,} rows of TensorRT-LLM {wide["version"]} ({", ".join(f"{gpu} {kind}" for gpu, kind in wide["types"].items())}). Seconds without EPLB over seconds with
it: geometric mean; error of the ratio; sign right where it differs by 3 %. Constants are of rows *without* EPLB of other
shapes. EPLB knew the loads, so measured gains are the most it could have. Rows were drawn by a rule that piles left-over pairs on one rank
where there is less than a token an expert: gains there are mostly that.

{wide_table(wide["eplb"])}

With EPLB, 256 over 288 slots (below 1 the redundant slots lose, in kernel time; they lose in {percent(slots["loses"], digits=0)} of pairs):

{wide_table(wide["slots"])}

Token counts alone, which is what balancing usually minimises, see a gain of {eplb["tokens_mean"]:.2f} where {eplb["measured"]:.2f} was measured.

## All-to-alls
    start + peer * other ranks [+ start across nodes] + max(bytes of a port inside the node / rate, of the network port / rate)

Rows of one shape (NCCL: one size; domain: one number of ranks; nodes: one number of nodes) left out at a time. DeepEP normal with 24 SMs.

{link_table(figures)}

Low-latency exchanges with 8 or 16 experts take up to {slowest:.0f} times as long as their bytes say (h100, dispatch); they are in *held out* and not in
the column beside it. Rows of several nodes are the same for h100 and h200 but for the label: doubtful. DeepEP
normal across nodes is left out: its rows contradict each other (8 nodes, notify times above transmit times).
A start covers what the collector timed, which is not the same in all tables: an engine's own launches come on top.

## Where it fails
{misses} of {len(figures["kernels"])} kernels are more than {100 * FAILS:g} % off on unseen shapes:

{kernel_table(figures, failing=True)}

{untuned_text(figures)}

- Rank 0 alone was timed, in a loop that does not flush the L2 cache, on constant weights: optimistic where weights fit.
- Kernels were given all tokens of all ranks (SGLang from 0.5.14 on, random loads: those of rank 0), so N is larger than under DeepEP, which
  brings a rank its own; the form separates it.
- Loads of random rows are not in the tables: they are drawn anew by the collector's rule, and a prediction is the mean of draws.
- Not fitted: experts without a gate, tensor-parallel experts, builds of a commit, GPUs whose peaks poise does not know.
- Compute factors below 1 are no claim of a kernel beyond its peak: the activation term has a token's seconds where reading and arithmetic
  do not overlap.

## Releases
Constants are of these:

{version_text(figures)}

The same kernel on the same balanced load in two releases; listed where they are 10 % apart or more. Fit again for another release.

{version_table(figures, 0.10)}
"""


def newest() -> Path:
    found = sorted(common.REPORTS.glob("*-tables.json"))
    if not found:
        raise SystemExit("no figures yet: python benchmarks/tables.py DIR")
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="?", type=Path, help="wheel or folder of tables; with --docs also a file of figures"
    )
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--machines", action="store_true")
    given = parser.parse_args()
    path = given.tables
    if path is None or path.suffix == ".json":
        path = path or newest()
    else:
        figures = _rounded(compute(path, given.keep, given.machines))
        path = common.REPORTS / f"{figures['date']}-tables.json"
        path.write_text(one_a_line(figures), encoding="utf-8")
        sys.argv = [sys.argv[0], "TABLES", *(f"--{name}" for name in ("docs", "machines") if getattr(given, name))]
        common.write(NAME, report(figures))
    if given.docs:
        PAGE.write_text(page(json.loads(path.read_text("utf-8")), path.name), encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
