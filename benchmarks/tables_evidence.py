"""Every figure that poise claims of its constants, computed from the tables: docs/accuracy.md is written from them.

All of them are of rows that the constants in question were not fitted to, but where the name says ``all_rows``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from benchmarks.tables_wide import Ratios, ratios, read_wide, together, wide_work
from numpy.typing import NDArray

from poise.lab.calibrate.tables.alltoall import AllToAllRows, LinkRows, held_out_exchange
from poise.lab.calibrate.tables.fit import DATASHEET
from poise.lab.calibrate.tables.judge import bias, folds, held_out_seconds, mape
from poise.lab.calibrate.tables.kernels import KernelRows, version_key
from poise.lab.calibrate.tables.ranks import KnownLoads
from poise.lab.calibrate.tables.result import JudgedKernel, power_law_error
from poise.lab.calibrate.tables.source import TableSource
from poise.machine.presets import DEVICES

BANDS = (2.0, 16.0, 128.0, 1024.0)
"""Tokens of an active expert between which rows are counted together."""
WIDE_BANDS = (1.0, 4.0, 16.0, 64.0)
"""Tokens an expert, all experts counted, between which pairs with and without EPLB are counted together."""
PRESET_START_S = 10e-6
"""What poise's datasheet presets charge an all-to-all inside a node."""
MANY_EXPERTS = 128
"""Low-latency exchanges are also judged from here on: with 8 or 16 experts they are far slower than their bytes say."""
MIN_COMMON = 150
"""Rows that two releases must have in common."""


def _bands(edges: tuple[float, ...], value: NDArray[np.float64]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    which = np.searchsorted(edges, value, side="left")
    names = [
        f"to {edges[0]:g}",
        *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)),
        f"over {edges[-1]:g}",
    ]
    for number, name in enumerate(names):
        yield name, which == number


def kernel_figures(found: Iterable[JudgedKernel]) -> dict[str, Any]:
    """Each kernel, and all rows by GPU, engine and tokens of an active expert: the model (unseen shapes) and the
    datasheet.
    """
    kernels, parts = [], []
    for one in found:
        held, sheet = held_out_seconds(one.work, folds(one.rows.shape_R4)), DATASHEET.seconds(one.work)
        measured = one.work.seconds_R
        kernels.append({
            "gpu": one.rows.gpu, "type": one.rows.type, "engine": one.rows.engine, "kernel": one.rows.kernel,
            "version": one.rows.version, "rows": len(measured), "shapes": len(np.unique(one.rows.shape_R4, axis=0)),
            "unseen_shapes": mape(held, measured), "bias": bias(held, measured), "power_law":
            _known(one.power_law_error), "all_rows": mape(one.fit.seconds(one.work), measured), "datasheet":
            mape(sheet, measured), "datasheet_bias": bias(sheet, measured), "read_factor": one.fit.read_factor,
        })  # fmt: skip
        each = one.work.loads.pairs_R / np.maximum(one.work.loads.active_R, 1.0)
        parts.append((one.rows.gpu, one.rows.engine, each, held / measured, sheet / measured))
    bands = []
    for gpu, engine in sorted({part[:2] for part in parts}):
        here = [part[2:] for part in parts if part[:2] == (gpu, engine)]
        each, held, sheet = (np.concatenate([part[i] for part in here]) for i in range(3))
        for name, index in _bands(BANDS, each):
            if index.any():
                one_band = np.ones(int(index.sum()))
                bands.append({
                    "gpu": gpu, "engine": engine, "tokens": name, "rows": int(index.sum()),
                    "model": mape(held[index], one_band), "model_bias": bias(held[index], one_band),
                    "datasheet": mape(sheet[index], one_band), "datasheet_bias": bias(sheet[index], one_band),
                })  # fmt: skip
    return {"kernels": kernels, "bands": bands}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def shape_figures(found: Iterable[JudgedKernel]) -> list[dict[str, Any]]:
    """Constants for each model shape of each kernel: errors on numbers of ranks not fitted, and on power-law loads."""
    out = []
    for one in found:
        shapes, which_R = np.unique(one.rows.shape_R4, axis=0, return_inverse=True)
        for number, shape in enumerate(shapes.tolist()):
            index = np.flatnonzero(which_R.reshape(-1) == number)
            rows, work = one.rows.take(index), one.work.take(index)
            several = len(np.unique(rows.ranks_R)) > 1
            unseen = mape(held_out_seconds(work, folds(rows.ranks_R)), work.seconds_R) if several else float("nan")
            out.append({
                "gpu": one.rows.gpu, "type": one.rows.type, "engine": one.rows.engine, "kernel": one.rows.kernel,
                "shape": shape, "rows": len(index), "unseen_ranks": _known(unseen),
                "power_law": _known(power_law_error(rows, work)),
            })  # fmt: skip
    return out


def _wide_table(pairs: Ratios) -> dict[str, Any]:
    return {
        "all": pairs.figures(),
        "by_gpu": {str(gpu): pairs.take(pairs.gpu_P == gpu).figures() for gpu in np.unique(pairs.gpu_P)},
        "by_tokens": {
            name: pairs.take(index).figures() for name, index in _bands(WIDE_BANDS, pairs.tokens_each_P) if index.any()
        },
    }


def wide_figures(source: TableSource, known: KnownLoads) -> dict[str, Any]:
    """With and without EPLB, and 256 against 288 slots; every pair by constants of other shapes without EPLB."""
    found = [(rows, *ratios(rows, wide_work(rows, known))) for rows in read_wide(source)]
    return {
        "version": ", ".join(sorted({rows.version for rows, _, _ in found})),
        "types": {rows.gpu: rows.type for rows, _, _ in found},
        "rows": sum(len(rows.seconds_R) for rows, _, _ in found),
        "eplb": _wide_table(together([pairs for _, pairs, _ in found])),
        "slots": _wide_table(together([pairs for _, _, pairs in found])),
    }


def link_figures(links: Iterable[LinkRows]) -> list[dict[str, Any]]:
    """Each direction of each library: held-out error, and that of the datasheet's port with a start of 10 us."""
    out = []
    for rows in links:
        for way, one in (("dispatch", rows.dispatch), ("combine", rows.combine)):
            if rows.library == "nccl" and way == "combine":
                continue  # the same rows
            held = held_out_exchange(one)
            preset = PRESET_START_S + one.intra_R / DEVICES[rows.gpu]["intra_bytes_per_s"]
            many = _many_experts(one)
            out.append({
                "gpu": rows.gpu, "library": rows.library, "reach": rows.reach, "way": way, "version": rows.version,
                "rows": len(one.seconds_R), "model": mape(held, one.seconds_R), "bias": bias(held, one.seconds_R),
                "slowest": float((one.seconds_R / held).max()),
                "many_experts": None if many is None or many.all() else mape(held[many], one.seconds_R[many]),
                "preset": None if rows.reach == "nodes" else mape(preset, one.seconds_R),
                "preset_bias": None if rows.reach == "nodes" else bias(preset, one.seconds_R),
            })  # fmt: skip
    return out


def _many_experts(rows: AllToAllRows) -> NDArray[np.bool_] | None:
    return None if rows.experts_R is None else rows.experts_R >= MANY_EXPERTS


def version_figures(found: Iterable[KernelRows]) -> list[dict[str, Any]]:
    """Same kernel, same balanced load, two releases that follow one another: how far the measurements are apart."""
    by: dict[tuple[str, ...], list[KernelRows]] = {}
    for rows in found:
        group = rows.take(rows.alpha_R == 0)  # rules for random loads changed between releases
        by.setdefault((group.gpu, group.engine, group.type, group.kernel), []).append(group)
    out = []
    for key, groups in sorted(by.items()):
        groups.sort(key=lambda group: version_key(group.version))
        for old, new in itertools.pairwise(groups):
            seconds = {(*row, tuple(shape)): s for row, shape, s in _keyed(old)}
            pairs = [(seconds[k], s) for row, shape, s in _keyed(new) if (k := (*row, tuple(shape))) in seconds]
            if len(pairs) >= MIN_COMMON:
                before, after = np.array(pairs).T
                out.append({
                    "gpu": key[0], "engine": key[1], "type": key[2], "kernel": key[3], "from": old.version, "to":
                    new.version, "rows": len(pairs), "median": float(np.median(after / before)), "apart": mape(before,
                    after),
                })  # fmt: skip
    return out


def _keyed(group: KernelRows) -> Iterator[tuple[tuple[int, int, float], list[int], float]]:
    for ranks, tokens, alpha, shape, seconds in zip(
        group.ranks_R.tolist(), group.tokens_R.tolist(), group.alpha_R.tolist(), group.shape_R4.tolist(),
        group.seconds_R.tolist(), strict=True,
    ):  # fmt: skip
        yield (ranks, tokens, alpha), shape, seconds


def medians(kernels: list[dict[str, Any]], shapes: list[dict[str, Any]]) -> dict[str, float]:
    """The middle of the groups: over kernels, and over model shapes of kernels."""

    def middle(rows: list[dict[str, Any]], key: str) -> float:
        return float(np.median([row[key] for row in rows if row[key] is not None]))

    return {
        "kernels_unseen_shapes": middle(kernels, "unseen_shapes"), "kernels_power_law": middle(kernels, "power_law"),
        "kernels_datasheet": middle(kernels, "datasheet"), "kernels_datasheet_bias": middle(kernels, "datasheet_bias"),
        "shapes_unseen_ranks": middle(shapes, "unseen_ranks"), "shapes_power_law": middle(shapes, "power_law"),
    }  # fmt: skip
