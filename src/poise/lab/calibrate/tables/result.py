"""``machines.json`` and cluster files: fitted constants with the error on rows that were not fitted. No row is in
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.lab.calibrate.tables.alltoall import AllToAllFit, LinkRows, judged_exchange
from poise.lab.calibrate.tables.defaults import default_kernels
from poise.lab.calibrate.tables.fit import KernelFit, KernelWork, fit_kernel
from poise.lab.calibrate.tables.judge import folds, held_out_seconds, mape
from poise.lab.calibrate.tables.kernels import KernelRows, kernel_work
from poise.lab.calibrate.tables.ranks import KnownLoads
from poise.lab.calibrate.tables.source import TableSource
from poise.machine.constants import peak_of
from poise.machine.model import ModelSpec
from poise.machine.presets import DEVICES
from poise.util.errors import NoResultError

SCHEMA = 1
MIN_JUDGED = 20
"""Rows that a fit and its judgement each need."""


def _short(value: float | None, digits: int = 4) -> float | None:
    """A number of that many digits; None for what is not known."""
    return None if value is None or math.isnan(value) else float(f"{value:.{digits}g}")


@dataclass(frozen=True, slots=True, eq=False)
class JudgedKernel:
    """A kernel's rows and constants over all of its shapes.

    ``error`` is on shapes that were not fitted, ``power_law_error`` on power-law loads by constants of balanced ones:
    NaN without such rows.
    """

    rows: KernelRows
    work: KernelWork
    fit: KernelFit
    error: float
    power_law_error: float


def power_law_error(rows: KernelRows, work: KernelWork) -> float:
    """Error on power-law rows of constants fitted to balanced rows; NaN where there are too few of either."""
    balanced = rows.alpha_R == 0
    if min(balanced.sum(), (~balanced).sum()) < MIN_JUDGED:
        return float("nan")
    judged = work.take(~balanced)
    return mape(fit_kernel(work.take(balanced)).seconds(judged), judged.seconds_R)


def judged_kernel(rows: KernelRows, known: KnownLoads) -> JudgedKernel:
    """Fits a kernel to all rows, and judges fits to parts of them on the other parts."""
    work = kernel_work(rows, known)
    error = mape(held_out_seconds(work, folds(rows.shape_R4)), work.seconds_R)
    return JudgedKernel(rows, work, fit_kernel(work), error, power_law_error(rows, work))


def _constants(fit: KernelFit) -> dict[str, float | None]:
    names = ("start_s", "read_factor", "compute_factor", "activation_factor")
    return {name: _short(getattr(fit, name)) for name in names}


def kernel_entries(found: Iterable[JudgedKernel]) -> list[dict[str, Any]]:
    """Kernels as ``machines.json`` has them."""
    kernels = list(found)
    default = default_kernels((one.rows, one.fit) for one in kernels)
    return [
        {
            "gpu": one.rows.gpu, "type": one.rows.type, "engine": one.rows.engine, "kernel": one.rows.kernel,
            "version": one.rows.version, "default": one.rows.name in default, "rows": len(one.rows.seconds_R),
            "shapes": len(np.unique(one.rows.shape_R4, axis=0)), "weight_bytes": one.rows.weight_bytes,
            **_constants(one.fit), "error": _short(one.error, 3), "power_law_error": _short(one.power_law_error, 3),
        }
        for one in kernels
    ]  # fmt: skip


def _way(fit: AllToAllFit) -> dict[str, float | None]:
    names = ("start_s", "peer_s", "nodes_start_s", "intra_bytes_per_s", "inter_bytes_per_s")
    return {**{name: _short(getattr(fit, name)) for name in names}, "error": _short(fit.error, 3)}


def link_entry(rows: LinkRows) -> dict[str, Any]:
    """A library's exchanges as ``machines.json`` has them."""
    return {
        "gpu": rows.gpu, "library": rows.library, "reach": rows.reach, "version": rows.version,
        "rows": len(rows.dispatch.seconds_R), "doubtful": rows.doubtful,
        "dispatch": _way(judged_exchange(rows.dispatch)), "combine": _way(judged_exchange(rows.combine)),
    }  # fmt: skip


def machines(
    source: TableSource, kernels: Iterable[JudgedKernel], links: Iterable[LinkRows], fitted: str
) -> dict[str, Any]:
    """All of ``machines.json``; ``fitted`` is a date."""
    return {
        "schema": SCHEMA, "source": source.version, "sha256": source.sha256, "fitted": fitted,
        "kernels": kernel_entries(kernels), "links": [link_entry(rows) for rows in links],
    }  # fmt: skip


def one_a_line(data: dict[str, Any]) -> str:
    """JSON with each entry of a list in a line."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list):
            inner = ",\n".join(f"  {json.dumps(one, allow_nan=False)}" for one in value)
            lines.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


@dataclass(frozen=True, slots=True)
class ModelKernel:
    """Constants of a kernel refitted to the rows of one model's shape, and where they come from.

    ``error`` is on numbers of ranks that were not fitted.
    """

    rows: int
    gpu: str
    type: str
    engine: str
    kernel: str
    version: str
    weight_bytes: float
    fit: KernelFit
    error: float

    def to_dict(self) -> dict[str, Any]:
        """As ``kernel`` stands in a cluster file."""
        return {
            "name": f"{self.gpu}+{self.engine}.{self.type}", "type": self.type, "weight_bytes": self.weight_bytes,
            **_constants(self.fit), "flops_per_s": peak_of(self.gpu, self.weight_bytes),
            "memory_bytes_per_s": DEVICES[self.gpu]["memory_bytes_per_s"],
            **({} if math.isnan(self.error) else {"error": _short(self.error, 3)}),
        }  # fmt: skip


def kernel_of_model(
    groups: Iterable[KernelRows], spec: ModelSpec, gpu: str, engine: str, type_: str | None, known: KnownLoads
) -> ModelKernel:
    """The kernel with most rows of a model's shape on a GPU, refitted to them.

    ``type_`` None: the type whose bytes a weight are nearest to the model's.

    Raises
    ------
    NoResultError : the tables have too few rows of that shape; the hint says what they have.
    """
    shape = (spec.expert_width, spec.expert_intermediate_size, spec.num_experts, spec.top_k)
    here = [group for group in groups if (group.gpu, group.engine) == (gpu, engine)]
    parts = [group.take((group.shape_R4 == shape).all(axis=1)) for group in here]
    enough = [part for part in parts if len(part.seconds_R) >= 2 * MIN_JUDGED and type_ in (None, part.type)]
    if not enough:
        known_types = sorted({part.type for part in parts if len(part.seconds_R) >= 2 * MIN_JUDGED})
        said = (
            f"types with this shape: {', '.join(known_types)}"
            if known_types
            else "constants over all shapes: poise machines"
        )
        raise NoResultError(
            f"the tables have no {engine} kernel{f' of type {type_}' if type_ else ''} on {gpu} for experts "
            f"{shape[0]} x {shape[1]}, {shape[2]} of them, top-{shape[3]}",
            hint=said,
        )
    nearest = min(abs(math.log(part.weight_bytes / spec.weight_bytes)) for part in enough)
    rows = max(
        (part for part in enough if abs(math.log(part.weight_bytes / spec.weight_bytes)) == nearest),
        key=lambda part: len(part.seconds_R),
    )
    work = kernel_work(rows, known)
    error = mape(held_out_seconds(work, folds(rows.ranks_R)), work.seconds_R)
    return ModelKernel(
        len(rows.seconds_R), rows.gpu, rows.type, rows.engine, rows.kernel, rows.version, rows.weight_bytes,
        fit_kernel(work), error,
    )  # fmt: skip


def links_to_dict(rows: LinkRows) -> dict[str, Any]:
    """As ``links`` stands in a cluster file."""
    entry = link_entry(rows)
    ways = {
        way: {key: value for key, value in entry[way].items() if value is not None} for way in ("dispatch", "combine")
    }
    if rows.reach == "node":  # nothing is known of several nodes: the cluster's own start counts
        ways = {way: {key: value for key, value in one.items() if key != "nodes_start_s"} for way, one in ways.items()}
    return {"name": rows.library, **ways}
