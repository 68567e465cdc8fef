"""At scale, on paper: DeepSeek-V3 and Kimi-K2 on 64 to 2048 devices, modelled; stragglers, break-even, planning time.

    python benchmarks/scale.py DATA [--only rows,tokens,drift,slots,dedup,planning] [--models deepseek-v3,kimi-k2]
        [--devices 64,128,256,512,1024,2048] [--layers N] [--steps N] [--planned 58] [--work 300,1800]

DATA holds deepseek-r1/*.json. Writes reports/DATE-scale.md and its plots; a part of it with a suffix of what was asked
for. ``planning`` plans all 58 layers, or ``--planned`` of them, by counted work.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import table, write
from scale_cases import DECODE, DRIFT, EFFORT, LAYERS, PREFILL, WARM_UP, Case, token_batch
from scale_report import CURVE_DEVICES, CURVE_TOKENS, Found, Series, draw, text
from scale_rows import MODELS, TUNED, best_static, eplb, fast_rows, over_eplb, static_rows

from poise.cost.traffic import DataFlow
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import solve
from poise.replay.serving import FastLoop, replay_steps
from poise.replay.static import replay
from poise.routing.batch import RoutingBatch
from poise.stepwise.registry import POLICIES


def main_table(data: Path, models: Sequence[str], sizes: Sequence[int], layers: int, steps: int) -> Found:
    """All rows of every model, phase and size; with the best static map's name."""
    out = {}
    for model in models:
        for phase in (PREFILL, DECODE):
            for devices in sizes:
                case = Case(model, devices, phase, layers=layers, steps=steps)
                batch = case.batch(data)
                static = static_rows(case, data, batch)
                best = best_static(static)
                rows = [row for row, _ in static.values()] + fast_rows(case, data, batch, static[best][1])
                out[model, phase.name, devices] = best, rows
    return out


def planned_table(data: Path, sizes: Sequence[int], works: Sequence[float], layers: int) -> str:
    """Plans of so many layers of DeepSeek-V3 in processor seconds of one core, and what they are worth."""
    lines: list[list[object]] = []
    for devices in sizes:
        case = Case(MODELS[0], devices, PREFILL, layers=layers, steps=2)
        problem = PlacementProblem(case.fitted(data), case.cluster, case.model, case.slots_D, "home")
        judged = case.batch(data).steps_from(WARM_UP)
        for name, work in (("lpt", 1.0), ("eplb-global", 1.0), *(("poise", work) for work in works)):
            solve(problem, method=name, work=1.0)  # compiles
            began, spent = time.perf_counter(), time.process_time()
            found = solve(problem, method=name, work=work)
            spent, wall = time.process_time() - spent, time.perf_counter() - began
            got = replay(judged, found.placement, case.cluster, case.model, traffic="home", split="even")
            lines.append([devices, layers, int(case.slots_D[0]), name, f"{work:g}" if name == "poise" else "", f"{spent:.1f}",
                          f"{wall:.0f}", f"{1e3 * found.objective:.3f}", f"{found.gap:.1%}",
                          f"{1e3 * float(got.step_seconds_B.mean()) / layers:.3f}", f"{got.imbalance:.2f}"])  # fmt: skip
            print(lines[-1], flush=True)
    return table(["devices", "layers", "slots a device", "method", "work", "processor s", "wall s", "fitted ms a layer", "gap",
                  "judged ms a layer", "max / mean"], lines)  # fmt: skip


def curve(data: Path) -> dict[int, Series]:
    """EPLB's time / policy time by tokens a device, on the decode loads."""
    out: dict[int, Series] = {}
    for devices in CURVE_DEVICES:
        for tokens in CURVE_TOKENS:
            case = Case(MODELS[0], devices, DECODE, tokens, layers=1, steps=3)
            batch, placement, base = over_eplb(case, data)
            for row in fast_rows(case, data, batch, placement):
                point = (tokens, float(base.step_seconds_B.mean()) / row.seconds)
                out.setdefault(devices, {}).setdefault(row.name[2:], []).append(point)
    return out


def drift_table(data: Path) -> str:
    """How much of the main table hangs on the assumed drift."""
    lines: list[list[object]] = []
    names = ("split", "ultra-ep", "moon-ep", "poise")
    for drift in (0.0, DRIFT, 0.6):
        for devices in (64, 512):
            case = Case(MODELS[0], devices, PREFILL, layers=1, steps=3, drift=drift)
            batch, placement, base = over_eplb(case, data)
            seconds = float(base.step_seconds_B.mean())
            rows = fast_rows(case, data, batch, placement, names)
            lines.append([devices, drift, f"{1e3 * seconds:.2f}", f"{base.imbalance:.2f}",
                          *(f"{seconds / row.seconds:.2f}" for row in rows)])  # fmt: skip
    return table(["devices", "drift", "static ms a layer", "max / mean", *names], lines)


def slots_table(data: Path) -> str:
    """More redundant slots in place of a fast loop."""
    lines: list[list[object]] = []
    for phase in (PREFILL, DECODE):
        for devices in (256, 512, 1024):
            line: list[object] = [phase.name, devices]
            for extra in (0, 1, 2):
                case = Case(MODELS[0], devices, phase, layers=2, steps=3, extra=extra)
                even, exact = (over_eplb(case, data, split)[2] for split in ("even", "exact"))
                line += [int(case.slots_D[0]), f"{1e3 * float(even.step_seconds_B.mean()) / 2:.2f}", f"{even.imbalance:.2f}",
                         f"{1e3 * float(exact.step_seconds_B.mean()) / 2:.2f}"]  # fmt: skip
            lines.append(line)
    return table(["phase", "devices", *["slots a device", "even ms", "max / mean", "exact ms"] * 3], lines)


FLOWS: tuple[DataFlow, ...] = ("home", "home_device_dedup", "home_node_dedup")


def dedup_table(data: Path) -> str:
    """Synthetic tokens: what deduplication does."""
    lines: list[list[object]] = []
    names = ("split", "ultra-ep", "poise")
    for devices in (64, 128, 256):
        case = Case(MODELS[0], devices, DECODE, layers=1, steps=2)
        ids, tokens = case.layer_ids(), devices * DECODE.tokens
        fit = token_batch(case.share(data, DECODE.fit[0]), tokens, 1, 0.0, ids)
        batch = token_batch(case.share(data, DECODE.judge), tokens, WARM_UP + 2, DRIFT, ids)
        fit = RoutingBatch(fit.load_BLE.copy(), np.ones(1), fit.top_k, ids)
        placement = eplb(case, fit)
        for flow in FLOWS:
            base = replay(batch.steps_from(WARM_UP), placement, case.cluster, case.model, traffic=flow, split="even")
            seconds = float(base.step_seconds_B.mean())
            dispatch = float(base.cost.dispatch_BL.mean())
            line: list[object] = [
                devices,
                flow,
                f"{1e3 * seconds:.3f}",
                f"{1e3 * dispatch:.3f}",
                f"{base.imbalance:.2f}",
            ]
            for name in names:
                setting = next((v for k, v in TUNED.items() if k[:3] == (name, "decode", 128) and k[4] == devices), {})
                loop = FastLoop(replace(POLICIES[name], **setting), 1)
                got = replay_steps(batch, placement, loop, case.cluster, case.model, traffic=flow, warm_up=WARM_UP,
                                   prior_LE=fit.load_LE())  # fmt: skip
                line.append(f"{seconds / float(got.step_seconds_B.mean()):.2f}")
            lines.append(line)
            print(line, flush=True)
    return table(["devices", "flow", "static ms a layer", "dispatch ms", "max / mean", *names], lines)


SECTIONS = ("rows", "tokens", "drift", "slots", "dedup", "planning")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--devices", default=",".join(map(str, EFFORT)))
    parser.add_argument("--layers", type=int, default=0, help="judged layers of rows; 0: by size")
    parser.add_argument("--steps", type=int, default=0, help="judged steps of rows; 0: by size")
    parser.add_argument("--planned", type=int, default=LAYERS, help="layers of planning")
    parser.add_argument("--work", default="300,1800")
    args = parser.parse_args()
    only, sizes = args.only.split(","), [int(word) for word in args.devices.split(",")]
    data, began, load = args.data, time.process_time(), os.getloadavg()[0]
    tables: dict[str, str] = {}
    found: Found = {}
    if "rows" in only:
        found = main_table(data, args.models.split(","), sizes, args.layers, args.steps)
    curves = curve(data) if "tokens" in only else {}
    for name, make in (("drift", drift_table), ("slots", slots_table), ("dedup", dedup_table)):
        if name in only:
            tables[name] = make(data)
    if "planning" in only:
        tables["planning"] = planned_table(data, sizes, [float(word) for word in args.work.split(",")], args.planned)
    said = f"{time.process_time() - began:.0f} processor seconds in all; load of the machine before and after {load:.1f} and {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."
    suffix = "" if set(only) == set(SECTIONS) else "-" + "-".join(name for name in SECTIONS if name in only)
    write("At scale, on paper", [*text(found, curves, tables, draw(found, curves)), said], suffix)


if __name__ == "__main__":
    main()
