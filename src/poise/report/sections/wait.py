"""Why a layer waits: the devices of one layer at their tokens, before and after, on one clock."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

from poise.report import charts
from poise.report.view import View

DOTS, MOST_ROWS = 40, 16
"""Dots of the fullest row; devices that are drawn."""
LEFT, RIGHT, TOP, ROW = 44.0, 12.0, 8.0, 20.0


def section(view: View) -> str:
    """A dot is a share of the layer's tokens; all devices work off theirs at one speed, and the layer ends with the
    last. It can be read without motion too: on paper, and by readers who asked for less of it.
    """
    layer, shown, pictures = drawings(view)
    devices = view.comparison.cluster.num_devices
    panels = "".join(
        charts.panel(f"{name}: {fullest:.2f} × mean", charts.svg(charts.HALF, high, _said(name, fullest, layer), body))
        for name, fullest, body, high in pictures
    )
    lead = (
        f"Layer {escape(layer)}, the middling one by {escape(view.base.name)}'s imbalance, on "
        f"{escape(view.where(view.fixed))}: tokens that each device has to work through, all steps together. The layer "
        "is as slow as its fullest device; the others wait. "
        + (f"{shown} of {devices} devices. " if shown < devices else "")
        + charts.legend((("experts", "tokens"), ("idle", "waiting")))
    )
    return charts.section("wait", "Why a layer waits", lead, f'<div class="pair">{panels}</div>')


def drawings(view: View) -> tuple[str, int, list[tuple[str, float, str, float]]]:
    """The layer, how many devices are drawn, and for each map its name, its fullest over the mean device, the inside of
    a drawing, and its height.
    """
    entries = view.pictured
    tables = [view.replay(entry).relative_load_LD() for entry in entries]
    layer = _middling(tables[0])
    rows = [table[layer] for table in tables]
    top, shown = max(float(row.max()) for row in rows), _shown(rows)
    made = [
        (entry.name, float(row.max()), *_picture(row, shown, top)) for entry, row in zip(entries, rows, strict=True)
    ]
    return view.layer_names[layer], len(shown), made


def _said(name: str, fullest: float, layer: str) -> str:
    return f"{name}: the fullest device of layer {layer} has {fullest:.2f} times the mean"


def _middling(relative_LD: NDArray[np.float64]) -> int:
    """The layer with the median of the layers' imbalances."""
    order = np.argsort(relative_LD.max(axis=1), kind="stable")
    return int(order[len(order) // 2])


def _shown(rows: list[NDArray[np.float64]]) -> list[int]:
    """Devices that are drawn, in their own order: all, or as many from the fullest to the emptiest of the first map,
    and the fullest of each map.
    """
    devices = len(rows[0])
    if devices <= MOST_ROWS:
        return list(range(devices))
    spread = np.linspace(0, devices - 1, MOST_ROWS - len(rows)).round().astype(int)
    chosen = {*np.argsort(rows[0], kind="stable")[spread].tolist(), *(int(row.argmax()) for row in rows)}
    return sorted(chosen)


def _picture(row_D: NDArray[np.float64], shown: list[int], top: float) -> tuple[str, float]:
    wide = charts.HALF - LEFT - RIGHT
    cell = wide / DOTS
    scale = wide / top
    high = TOP + ROW * len(shown)
    end = LEFT + scale * float(row_D.max())
    dots, idle, names = [], [], []
    for place, device in enumerate(shown):
        y, long = TOP + ROW * place, scale * float(row_D[device])
        starts = cell * np.arange(int(np.ceil(long / cell - 1e-9)))  # the last dot ends with the row
        dots += [(LEFT + at + 1, y + 5, max(0.0, min(cell, long - at) - 2), ROW - 10) for at in starts]
        idle.append((LEFT + long, y + 8, end - LEFT - long, ROW - 16))
        names.append(charts.text(LEFT - 8, y + 14, str(device), "small", "end"))
    body = (
        charts.boxes("idle", idle)
        + charts.boxes("experts", dots)
        + f'<rect class="swept" x="{LEFT}" y="{TOP}" width="{wide:.1f}" height="{high - TOP:.1f}"/>'
        + charts.rule(end, TOP, high, "mean")
        + "".join(names)
        + charts.text(LEFT, high + 18, "device", "small", "end")
        + charts.text(end, high + 18, f"ends at {row_D.max():.2f} x mean", "small", "end")
    )
    return body, high + 26
