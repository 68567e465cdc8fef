"""poise calibrate --from-tables: constants of GPUs from public tables of measured kernels."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.cli import options as o
from poise.lab.calibrate.tables.alltoall import read_links
from poise.lab.calibrate.tables.kernels import read_kernels
from poise.lab.calibrate.tables.ranks import KnownLoads
from poise.lab.calibrate.tables.result import (
    JudgedKernel,
    ModelKernel,
    judged_kernel,
    kernel_of_model,
    links_to_dict,
    machines,
    one_a_line,
)
from poise.lab.calibrate.tables.source import TableSource
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.presets import DEVICES, PEAKS
from poise.util.errors import NoResultError, OptionError
from poise.util.files import write_whole
from poise.util.yamlfile import dump_yaml


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the options ask for; ``None`` is the default."""

    model: str | None
    cluster: str | None
    gpu: str | None
    engine: str
    type: str | None
    library: str | None


def calibrate_from_tables(folder: Path, output: Path, wanted: Wanted, *, as_json: bool) -> None:
    """Write ``machines.json``, or with a model the cluster file of its shape."""
    with o.errors():
        suffixes = (".yaml", ".yml") if wanted.model else (".json",)
        if output.suffix not in suffixes:
            what = (
                "a cluster file, which planners read"
                if wanted.model
                else "constants of all kernels, since no --model is named"
            )
            raise OptionError(f"{output} does not end in {suffixes[0]}: it becomes {what}")
        o.writable(output)
        source = TableSource(folder)
        if wanted.model:
            text, shown = _for_model(source, wanted)
        else:
            text, shown = _for_all(source, as_json)
        write_whole(output, text, OptionError)
        if as_json:
            o.print_json("calibrate-tables", shown)
        o.talk.print(f"wrote {output}")


def _for_all(source: TableSource, as_json: bool) -> tuple[str, dict[str, Any]]:
    known: KnownLoads = {}
    found = [judged_kernel(rows, known) for rows in read_kernels(source)]
    data = machines(source, found, read_links(source), datetime.date.today().isoformat())
    if not as_json:
        _show(found, data)
    return one_a_line(data), data


def _show(found: list[JudgedKernel], data: dict[str, Any]) -> None:
    heads = ("gpu", "engine", "type", "kernel", "version",
             "rows", "start us", "read", "compute", "activation", "unseen shapes", "power law")  # fmt: skip
    table = o.table(f"{data['source']}: held-out error of each kernel", heads, left=heads[:5])
    for one, row in zip(found, data["kernels"], strict=True):
        fit, power = one.fit, row["power_law_error"]
        table.add_row(
            row["gpu"], row["engine"], row["type"] + " *" * row["default"], row["kernel"], row["version"],
            f"{row['rows']:,}", f"{1e6 * fit.start_s:.0f}", f"{fit.read_factor:.2f}", f"{fit.compute_factor:.2f}",
            f"{fit.activation_factor:.1f}", f"{one.error:.0%}", "-" if power is None else f"{power:.0%}",
        )  # fmt: skip
    o.out.print(table)
    o.out.print("* what the engine takes by default")


def _for_model(source: TableSource, wanted: Wanted) -> tuple[str, dict[str, Any]]:
    assert wanted.model is not None
    spec = ModelSpec.parse(wanted.model)
    base = Cluster.parse(wanted.cluster) if wanted.cluster else None
    preset = base.name if base is not None and base.name in DEVICES else wanted.gpu
    gpu = wanted.gpu or (preset.split("-")[0] if preset else None)
    if gpu not in PEAKS:
        raise OptionError(
            f"no GPU {gpu!r} is in the tables" if gpu else "which GPU? --cluster names none",
            hint=f"--gpu: one of {', '.join(PEAKS)}",
        )
    one = kernel_of_model(read_kernels(source), spec, gpu, wanted.engine, wanted.type, {})
    counts = base.devices_per_node_N.tolist() if base is not None else [4 if gpu == "gb200" else 8]
    data: dict[str, Any] = {
        "name": f"{gpu} {wanted.engine}.{one.type} {spec.name}"[:80], "devices_per_node": counts,
        "preset": preset or gpu, "kernel": one.to_dict(),
    }  # fmt: skip
    if wanted.library:
        data["links"] = _links(source, gpu, wanted.library, many=len(counts) > 1)
    head = [
        f"poise calibrate --from-tables, {datetime.date.today().isoformat()}: {source.version}, sha256 {source.sha256}",
        f"experts of {spec.name}, as measured alone on one GPU by {one.kernel} of {one.engine} {one.version}, "
        f"{one.rows} rows, {one.error:.1%} off on numbers of ranks that were not fitted",
    ]
    if not wanted.library:
        head.append("links: the datasheet's ports")
    _tell(one)
    return "".join(f"# {line}\n" for line in head) + dump_yaml(data), data


def _links(source: TableSource, gpu: str, library: str, *, many: bool) -> dict[str, Any]:
    found = [rows for rows in read_links(source) if rows.gpu == gpu]
    here = {rows.reach: rows for rows in found if rows.library == library}
    rows = here.get("nodes") if many and "nodes" in here else here.get("node", here.get("domain"))
    if rows is None:
        names = sorted({one.library for one in found})
        raise NoResultError(
            f"the tables have no all-to-all {library} on {gpu}",
            hint=f"--library: {', '.join(names) or 'none on this GPU'}",
        )
    if rows.doubtful:
        o.talk.print(f"note: rows of {library} on several nodes of {gpu} are of doubtful origin (docs/accuracy.md)")
    return links_to_dict(rows)


def _tell(one: ModelKernel) -> None:
    fit = one.fit
    o.talk.print(
        f"{one.kernel} ({one.engine} {one.version}, {one.type}) on {one.gpu}: start {1e6 * fit.start_s:.1f} us, "
        f"reads weights at {1 / fit.read_factor:.0%} of the bandwidth; "
        f"{one.error:.1%} off on numbers of ranks that were not fitted"
    )
