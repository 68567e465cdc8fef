"""What the benchmarks share: problems from files, a dated report."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from poise.api import deal_slots
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.problem import PlacementProblem
from poise.routing.batch import RoutingBatch

REPORTS = Path(__file__).parent / "reports"


def problem(
    batch: RoutingBatch,
    cluster: str,
    redundant: int,
    *,
    model: str | None = None,
    traffic: DataFlow | None = None,
    pooled: bool = False,
) -> PlacementProblem:
    """A placement problem with R redundant slots in all."""
    machine = Cluster.parse(cluster)
    sizes = ModelSpec.parse(model) if model else ModelSpec.generic(batch.num_experts, batch.top_k, batch.layer_ids_L)
    flow: DataFlow = traffic or ("home_node_dedup" if batch.has_tokens else "home")
    slots = deal_slots(batch.num_experts, redundant, machine.num_devices)
    return PlacementProblem(batch, machine, sizes, slots, flow, "even", pooled)


def table(head: list[str], rows: list[list[object]]) -> str:
    """A markdown table; numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---:" if i else "---" for i in range(len(head))) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def _commit() -> str:
    """The commit whose constants a run used."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPORTS, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


COMMIT = _commit()


def write(name: str, parts: list[str], suffix: str = "") -> None:
    """A report with date, command, machine and versions at its head; also printed."""
    date = datetime.date.today().isoformat()
    words = ["DATA" if Path(word).is_dir() else word for word in sys.argv[1:]]
    if "--keep" in words:  # where files were kept is not the report's business
        at = words.index("--keep")
        del words[at : at + 2]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    names = ("poise-moe", "numpy", "scipy", "highspy", "numba", *(["torch"] if "torch" in sys.modules else []))
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    data = ", DATA = the folder of routing data" if "DATA" in words else ""
    head = (
        f"# {name}\n\n{date}. `{command}`{data}. {os.cpu_count()} CPU cores "
        f"({platform.machine()}), commit {COMMIT}, Python {platform.python_version()}, {versions}. Wall clock, shared machine."
    )
    text = "\n\n".join([head, *parts]) + "\n"
    path = REPORTS / f"{date}-{Path(sys.argv[0]).stem}{suffix}.md"
    path.write_text(text, encoding="utf-8")
    print(text)


def line_chart(series: dict[str, list[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """A small SVG: lines over a logarithmic x axis."""
    colours = ("#8a94a6", "#c2410c", "#0f8a5f", "#1f6feb", "#7c3aed")
    xs = [np.log(x) for line in series.values() for x, _ in line]
    ys = [y for line in series.values() for _, y in line]
    low, high = min(ys) - 0.02, max(ys) + 0.02
    wide, tall, left, up = 560, 300, 56, 20

    def at(x: float, y: float) -> tuple[float, float]:
        return (left + (np.log(x) - min(xs)) / max(max(xs) - min(xs), 1e-9) * (wide - left - 120),
                up + (high - y) / (high - low) * (tall - up - 44))  # fmt: skip

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" font-family="sans-serif" font-size="12">',
           f'<rect width="{wide}" height="{tall}" fill="#fff"/>']  # fmt: skip
    for y in np.linspace(low, high, 5):
        px = at(np.exp(min(xs)), float(y))[1]
        out.append(f'<line x1="{left}" x2="{wide - 120}" y1="{px:.1f}" y2="{px:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{px + 4:.1f}" text-anchor="end">{y:.2f}</text>')
    for x in sorted({point[0] for line in series.values() for point in line}):
        out.append(f'<text x="{at(x, low)[0]:.1f}" y="{tall - 26}" text-anchor="middle">{x:g}</text>')
    for line, colour in zip(series.values(), colours, strict=False):
        points = [at(x, y) for x, y in line]
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
                   + " ".join(f"{x:.1f},{y:.1f}" for x, y in points) + '"/>')  # fmt: skip
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    for index, (name, colour) in enumerate(zip(series, colours, strict=False)):
        out.append(f'<text x="{wide - 112}" y="{up + 16 * index + 8}" fill="{colour}">{name}</text>')
    out.append(f'<text x="{(left + wide - 120) / 2}" y="{tall - 8}" text-anchor="middle">{x_label}</text>')
    out.append(f'<text x="{left}" y="12">{y_label}</text></svg>')
    return "\n".join(out)


def bar_chart(groups: dict[str, tuple[float, ...]], names: tuple[str, ...], label: str) -> str:
    """A small SVG: a group of horizontal bars a key, from 0."""
    colours = ("#1f6feb", "#c2c8d2", "#0f8a5f", "#c2410c")
    most = max(max(values) for values in groups.values())
    left, wide, bar, gap, up = 210, 560, 13, 12, 34
    tall = up + sum(len(values) * bar + gap for values in groups.values()) + 10
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" font-family="sans-serif" font-size="12">',
           f'<rect width="{wide}" height="{tall}" fill="#fff"/>']  # fmt: skip
    for index, name in enumerate(names):
        out.append(f'<rect x="{left + 110 * index}" y="8" width="10" height="10" fill="{colours[index]}"/>')
        out.append(f'<text x="{left + 110 * index + 15}" y="17">{name}</text>')
    out.append(f'<text x="8" y="17">{label}</text>')
    y = up
    for key, values in groups.items():
        out.append(f'<text x="{left - 8}" y="{y + len(values) * bar / 2 + 4:.1f}" text-anchor="end">{key}</text>')
        for index, value in enumerate(values):
            length = value / most * (wide - left - 60)
            out.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 2}" fill="{colours[index]}"/>')
            out.append(f'<text x="{left + length + 5:.1f}" y="{y + 10}" font-size="10">{value:.3g}</text>')
            y += bar
        y += gap
    return "\n".join([*out, "</svg>"])
