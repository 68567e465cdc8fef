"""Which constants a cluster is priced by: those of public kernel tables where they exist, else datasheets, derated.

``poise/data/machines.json`` holds fits to those tables, with source, version and held-out error; it is written by
``poise calibrate --from-tables`` (:mod:`poise.lab.calibrate.tables`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import median
from typing import Any

from poise.machine.kernel import UNKNOWN_ERROR, AllToAllLinks, ExchangeWay, ExpertKernel, same_type
from poise.machine.presets import DEVICES, PEAKS
from poise.util.errors import ClusterError
from poise.util.jsonfile import parse_json
from poise.util.words import close_to

ENGINES = ("vllm", "sglang", "trtllm")
"""In this order where none is named."""
TYPES = ("bf16", "fp8_block", "fp8", "mxfp4", "mxfp4_mxfp8", "nvfp4", "int4")
"""In this order where several have the model's bytes a weight."""
GPU_OF = {"a100-100g": "a100", "h100-100g": "h100", "h200-800g": "h200"}
"""Presets that differ from a measured GPU in their network alone."""
FLOW_OF = {
    "deepep-ll": "home", "deepep-normal": "home_node_dedup", "nccl": "home", "one-sided": "home_device_dedup",
    "two-sided": "home_device_dedup",
}  # fmt: skip
"""What a library sends (:class:`poise.machine.kernel.AllToAllLinks`). Its rates were fitted so."""
DATASHEET = "datasheet"
"""What ``preset+datasheet`` asks for: peaks of the datasheet, whatever was measured."""
FOUR_BIT, EIGHT_BIT = 0.75, 1.5
"""Bytes of a weight below which arithmetic runs in a type of so many bits; scales of blocks are in them."""
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Tables:
    """What ``machines.json`` holds, as it stands there."""

    source: str
    fitted: str
    kernels: tuple[Mapping[str, Any], ...]
    links: tuple[Mapping[str, Any], ...]


@cache
def tables() -> Tables:
    """The constants that ship with poise."""
    data = parse_json(files("poise").joinpath("data/machines.json").read_bytes(), ClusterError)
    if data["schema"] != SCHEMA:
        raise ClusterError(f"machines.json has schema {data['schema']}, this version reads {SCHEMA}")
    return Tables(data["source"], data["fitted"], tuple(data["kernels"]), tuple(data["links"]))


def gpu_of(preset: str) -> str:
    """The GPU of a preset, as tables name it."""
    return GPU_OF.get(preset, preset)


def peak_of(gpu: str, weight_bytes: float) -> float:
    """Dense FLOP/s of a GPU in the type of weights that large; of the next larger type where it has no such peak."""
    peaks = PEAKS.get(gpu, {})
    order = ("4bit", "8bit", "16bit")
    wanted = order[0 if weight_bytes < FOUR_BIT else 1 if weight_bytes < EIGHT_BIT else 2 :]
    return next((peaks[kind] for kind in wanted if kind in peaks), DEVICES[gpu]["flops_per_s"])


def kernel_row(gpu: str, engine: str, type_: str) -> Mapping[str, Any] | None:
    """The row of the kernel that an engine takes by default."""
    for row in tables().kernels:
        if row["default"] and (row["gpu"], row["engine"], row["type"]) == (gpu, engine, type_):
            return row
    return None


def kernel_of(preset: str, engine: str, type_: str) -> ExpertKernel:
    """The measured kernel of ``preset+engine.type``.

    Raises
    ------
    ClusterError : none was measured; the hint lists those that were on this GPU.
    """
    gpu = gpu_of(preset)
    row = kernel_row(gpu, engine, type_)
    if row is None:
        known = sorted({f"{r['engine']}.{r['type']}" for r in tables().kernels if r["gpu"] == gpu and r["default"]})
        raise ClusterError(
            f"no kernel {engine}.{type_} was measured on {preset}",
            hint=f"measured there: {', '.join(known)}" if known else f"nothing was: {preset}+{DATASHEET}",
        )
    return _kernel(row, f"{preset}+{engine}.{type_}", gpu)


def _kernel(row: Mapping[str, Any], name: str, gpu: str) -> ExpertKernel:
    return ExpertKernel(
        name, row["type"], row["weight_bytes"], row["start_s"], row["read_factor"], row["compute_factor"],
        row["activation_factor"], peak_of(gpu, row["weight_bytes"]), DEVICES[gpu]["memory_bytes_per_s"],
        UNKNOWN_ERROR if row["error"] is None else row["error"],
    )  # fmt: skip


def derated_kernel(preset: str, weight_bytes: float) -> ExpertKernel:
    """The datasheet with the median factors and start of the measured kernels that engines take by default."""
    rows = [row for row in tables().kernels if row["default"]]
    same = [row for row in rows if same_type(row["weight_bytes"], weight_bytes)] or rows
    start, read, compute, activation = (
        median(row[key] for row in same) for key in ("start_s", "read_factor", "compute_factor", "activation_factor")
    )
    gpu = gpu_of(preset)
    return ExpertKernel(
        f"{preset}+derated", "datasheet", weight_bytes, start, read, compute, activation, peak_of(gpu, weight_bytes),
        DEVICES[gpu]["memory_bytes_per_s"], UNKNOWN_ERROR,
    )  # fmt: skip


def choose_kernel(preset: str, weight_bytes: float, engine: str | None = None) -> ExpertKernel:
    """The measured kernel that an engine (default: the first of :data:`ENGINES` that has one) takes for weights of that
    many bytes, or the derated datasheet.
    """
    gpu = gpu_of(preset)
    for name in ENGINES if engine is None else (engine,):
        rows = [row for kind in TYPES if (row := kernel_row(gpu, name, kind)) is not None]
        fitting = [row for row in rows if same_type(row["weight_bytes"], weight_bytes)]
        if fitting:  # nvfp4, mxfp4 and int4 lie within a tenth of each other: the nearest
            nearest = min(fitting, key=lambda row: abs(row["weight_bytes"] / weight_bytes - 1.0))
            return _kernel(nearest, f"{preset}+{name}.{nearest['type']}", gpu)
    return derated_kernel(preset, weight_bytes)


def libraries(gpu: str) -> list[str]:
    """Libraries whose all-to-alls were measured on a GPU."""
    return sorted({row["library"] for row in tables().links if row["gpu"] == gpu})


def links_of(preset: str, library: str, *, many_nodes: bool) -> AllToAllLinks:
    """The measured all-to-alls of ``preset+library``, on one node or several.

    Raises
    ------
    ClusterError : the library is in no table.
    """
    gpu = gpu_of(preset)
    rows = {row["reach"]: row for row in tables().links if (row["gpu"], row["library"]) == (gpu, library)}
    row = rows.get("nodes") if many_nodes and "nodes" in rows else rows.get("node", rows.get("domain"))
    if row is None:
        known = sorted({row["library"] for row in tables().links})
        if library not in known:
            raise ClusterError(f"unknown library {library!r}", hint=close_to(library, known))
        return _derated_links(preset, library)
    port = DEVICES[preset]["inter_bytes_per_s"] / DEVICES[gpu]["inter_bytes_per_s"]
    ways = [_way(row[way], port) for way in ("dispatch", "combine")]
    doubt = bool(row["doubtful"])
    name = f"{library}{' (rows of doubtful origin)' * doubt}"
    return AllToAllLinks(name, ways[0], ways[1], doubt, FLOW_OF[library])


def _way(row: Mapping[str, Any], port: float) -> ExchangeWay:
    inter = row["inter_bytes_per_s"]
    return ExchangeWay(
        row["start_s"], row["intra_bytes_per_s"], None if inter is None else inter * port, row["peer_s"],
        None if inter is None else row["nodes_start_s"], UNKNOWN_ERROR if row["error"] is None else row["error"],
    )  # fmt: skip


def _derated_links(preset: str, library: str) -> AllToAllLinks:
    """A port of the datasheet at the median share that the library reaches of it on the GPUs that were measured."""
    rows = [row for row in tables().links if row["library"] == library and row["reach"] != "nodes"]
    port = DEVICES[preset]["intra_bytes_per_s"]
    ways = []
    for way in ("dispatch", "combine"):
        share = median(row[way]["intra_bytes_per_s"] / DEVICES[row["gpu"]]["intra_bytes_per_s"] for row in rows)
        ways.append(ExchangeWay(median(row[way]["start_s"] for row in rows), port * share, error=UNKNOWN_ERROR))
    return AllToAllLinks(f"{library}, derated", ways[0], ways[1], flow=FLOW_OF[library])


def plain_link(preset: str) -> ExchangeWay | None:
    """NCCL inside a node, by which weights and counts travel, where it was measured."""
    for row in tables().links:
        if (row["gpu"], row["library"], row["reach"]) == (gpu_of(preset), "nccl", "node"):
            return _way(row["dispatch"], 1.0)
    return None
