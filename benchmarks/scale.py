"""At scale, on paper: DeepSeek-V3 and Kimi-K2 on 64 to 2048 devices, modelled; stragglers, break-even, planning time.

    python benchmarks/scale.py DATA

DATA holds deepseek-r1/*.json. Writes reports/DATE-scale.md and its plots.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import table, write
from scale_cases import DECODE, DRIFT, EFFORT, PREFILL, WARM_UP, Case, token_batch
from scale_report import CURVE_DEVICES, CURVE_TOKENS, Found, Series, draw, text
from scale_rows import MODELS, TUNED, best_static, eplb, fast_rows, over_eplb, static_rows

from poise.cost.traffic import DataFlow
from poise.replay.serving import FastLoop, replay_steps
from poise.replay.static import replay
from poise.routing.batch import RoutingBatch
from poise.stepwise.registry import POLICIES


def main_table(data: Path) -> Found:
    """All rows of every model, phase and size; with the best static map's name."""
    out = {}
    for model in MODELS:
        for phase in (PREFILL, DECODE):
            for devices in EFFORT:
                case = Case(model, devices, phase)
                batch = case.batch(data)
                static = static_rows(case, data, batch)
                best = best_static(static)
                rows = [row for row, _ in static.values()] + fast_rows(case, data, batch, static[best][1])
                out[model, phase.name, devices] = best, rows
    return out


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


def main() -> None:
    data, began = Path(sys.argv[1]), time.time()
    found, curves = main_table(data), curve(data)
    tables = {"drift": drift_table(data), "slots": slots_table(data), "dedup": dedup_table(data)}
    parts = text(found, curves, tables, draw(found, curves))
    write("At scale, on paper", [*parts, f"Run time {time.time() - began:.0f} s."])


if __name__ == "__main__":
    main()
