"""Charts of reports as SVG files of their own, drawn and coloured as the page of ``poise compare --html``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from poise.report import charts

COLOURS = ("part0", "part2", "part3", "part1", "combine")
"""Of the style sheet, in the order of series."""
LEFT, RIGHT, UP, HIGH = 56.0, 120.0, 24.0, 240.0


def save(path: Path, drawing: str) -> None:
    """A drawing with the page's style in it."""
    style = (files("poise.report") / "page.css").read_text(encoding="utf-8")
    head, body = drawing.split(">", 1)
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
    path.write_text(f"{head}><style>{style}svg{{background:var(--panel)}}</style>{body}\n", encoding="utf-8")


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, *, log: bool = True
) -> str:
    """Lines over an x axis: logarithmic, with the points' values on it, or from the first to the last."""
    points = np.array([point for line in series.values() for point in line])
    (first, low), (last, high) = points.min(axis=0), points.max(axis=0)
    low, high = low - 0.02, high + 0.02
    bottom, end = UP + HIGH, charts.FULL - RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        along = np.log(x / first) / max(np.log(last / first), 1e-9) if log else (x - first) / max(last - first, 1e-9)
        return LEFT + along * (end - LEFT), bottom - (y - low) / (high - low) * HIGH

    body = [charts.text(LEFT, 14, y_label), charts.text((LEFT + end) / 2, bottom + 34, x_label, "", "middle")]
    for value in charts.ticks(low, high):
        y = place(first, value)[1]
        body.append(f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(charts.text(LEFT - 6, y + 4, f"{value:.2f}" if high - low < 10 else f"{value:.0f}", "small", "end"))
    marked = sorted(set(points[:, 0])) if log else charts.ticks(first, last)
    body += [charts.text(place(x, low)[0], bottom + 16, f"{x:g}", "small", "middle") for x in marked]
    for row, ((name, line), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        spots = [place(x, y) for x, y in line]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        body.append(f'<path fill="none" stroke-width="2" style="stroke:var(--{colour})" d="M{path}"/>')
        if log:
            body += [f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in spots]
        body.append(charts.boxes(colour, [(end + 12, UP + 18 * row, 11, 11)]))
        body.append(charts.text(end + 28, UP + 10 + 18 * row, name, "small"))
    return charts.svg(charts.FULL, bottom + 42, f"{y_label}, by {x_label}", "".join(body))


def bar_chart(groups: Mapping[str, Sequence[float]], names: Sequence[str], label: str) -> str:
    """A group of horizontal bars a key, from 0."""
    left, bar, gap, up = charts.margin(list(groups)), 13.0, 12.0, 34.0
    scale = (charts.HALF * 1.5 - left - 60) / max(max(values) for values in groups.values())
    body, y = [charts.text(8, 17, label)], up
    for index, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        body.append(charts.boxes(colour, [(left + 110 * index, 7, 11, 11)]))
        body.append(charts.text(left + 110 * index + 16, 17, name, "small"))
    for key, values in groups.items():
        body.append(charts.text(left - 8, y + len(values) * bar / 2 + 4, charts.shorten(key), "", "end"))
        for value, colour in zip(values, COLOURS, strict=False):
            body.append(charts.boxes(colour, [(left, y, value * scale, bar - 2)]))
            body.append(charts.text(left + value * scale + 5, y + 10, f"{value:.3g}", "digit"))
            y += bar
        y += gap
    return charts.svg(charts.HALF * 1.5, y, label, "".join(body))
