"""Time of every step, and imbalance on each part of the traffic."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from poise.report import charts
from poise.report.view import View

ROW = 24.0
MOST_DOTS = 200


def section(view: View) -> str:
    """Two charts with a row a placement."""
    comparison = view.comparison
    samples = [(entry.name, (1e3 * view.replay(entry).step_seconds_B).tolist()) for entry in comparison.entries]
    samples.append(("bound", (1e3 * comparison.bounds_B[view.judged]).tolist()))
    parts = list(comparison.batches)
    means = [(e.name, [comparison.replays[e.name, part].imbalance for part in parts]) for e in comparison.entries]
    colours = charts.legend([(f"part{order % 4} dot", part) for order, part in enumerate(parts)])
    steps = charts.section(
        "time", "Time of every step",
        f"Each dot is a step of {escape(view.where(view.best))}, the bar the mean. Left is faster; nothing can be "
        "left of the bound.",
        charts.panel("", steps_chart(samples)),
    )  # fmt: skip
    shift = charts.section(
        "shift", "Does it hold on traffic it never saw?",
        "A method that only looks good in-sample moves to the right. " + colours,
        charts.panel("", shift_chart(parts, means)),
    )  # fmt: skip
    return steps + shift


def steps_chart(samples: Sequence[tuple[str, Sequence[float]]]) -> str:
    """One row a placement: every step a dot, the mean a bar. Values are milliseconds."""
    axis = "modelled ms a step, all MoE layers"
    return dots_chart(samples, axis, "ms", "Modelled milliseconds of each step, by placement")


def dots_chart(samples: Sequence[tuple[str, Sequence[float]]], axis: str, unit: str, title: str) -> str:
    """One row a name: every value a dot, the mean a bar; ``axis`` is what the values are, in ``unit``."""
    low = min(min(values) for _, values in samples)
    high = max(max(values) for _, values in samples)
    pad = max((high - low) * 0.05, high * 1e-3)
    low, high = max(0.0, low - pad), high + pad
    left, up = charts.margin([name for name, _ in samples]), 8.0
    scale = (charts.FULL - left - 14) / (high - low)
    bottom = up + ROW * len(samples)
    body = [
        charts.rule(left + (x - low) * scale, up, bottom)
        + charts.text(left + (x - low) * scale, bottom + 15, f"{x:g}", "small", "middle")
        for x in charts.ticks(low, high, 8)
    ]
    for index, (name, values) in enumerate(samples):
        y = up + ROW * (index + 0.5)
        kind = "mark ref" if name == "bound" else "mark"
        body.append(charts.text(left - 10, y + 4, charts.shorten(name), "", "end"))
        shown = np.sort(values)[:: max(1, len(values) // MOST_DOTS)]
        body += [f'<circle class="{kind}" cx="{left + (v - low) * scale:.1f}" cy="{y:.1f}" r="4"/>' for v in shown]
        mean = left + (float(np.mean(values)) - low) * scale
        body.append(
            f'<line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 9:.1f}" y2="{y + 9:.1f}">'
            f"<title>{escape(name)}: mean {np.mean(values):.3f} {unit}</title></line>"
        )
    body.append(charts.text(charts.FULL - 14, bottom + 32, axis, "small", "end"))
    return charts.svg(charts.FULL, bottom + 38, title, "".join(body))


def shift_chart(parts: Sequence[str], entries: Sequence[tuple[str, Sequence[float]]]) -> str:
    """One row a placement: imbalance on each part of the traffic, from in-sample outwards."""
    high = max(max(value for _, values in entries for value in values), 1.0 + 1e-3)
    left, up = charts.margin([name for name, _ in entries]), 8.0
    scale = (charts.FULL - left - 24) / (high - 1.0)
    bottom = up + ROW * len(entries)
    body = [
        charts.rule(left + (x - 1) * scale, up, bottom)
        + charts.text(left + (x - 1) * scale, bottom + 15, f"{x:g}", "small", "middle")
        for x in charts.ticks(1.0, high, 8)
    ]
    for index, (name, values) in enumerate(entries):
        y = up + ROW * (index + 0.5)
        body.append(charts.text(left - 10, y + 4, charts.shorten(name), "", "end"))
        spots = [left + (value - 1) * scale for value in values]
        body.append(f'<line class="link" x1="{min(spots):.1f}" x2="{max(spots):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for order, (x, part, value) in enumerate(zip(spots, parts, values, strict=True)):
            title = f"<title>{escape(name)}, {escape(part)}: {value:.3f}</title>"
            body.append(f'<circle class="part{order % 4}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>')
    body.append(charts.text(charts.FULL - 14, bottom + 32, "imbalance, max / mean tokens (1 is even)", "small", "end"))
    return charts.svg(charts.FULL, bottom + 38, "Imbalance on each part of the traffic", "".join(body))
