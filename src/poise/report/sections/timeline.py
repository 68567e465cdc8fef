"""One step, device by device: who waits for whom."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

from poise.replay.compare import Entry
from poise.report import charts
from poise.report.view import Columns, View
from poise.simulate.lanes import PARTS, StepLanes, step_lanes

MOST_LAYERS = 8
KINDS = ("keys", "dispatch", "experts", "combine")
"""Classes of the style sheet, for :data:`PARTS`."""


def section(view: View) -> str:
    """Lanes of the median step in the layers that are slowest under the baseline, and what all layers wait."""
    comparison, seconds_B = view.comparison, view.replay(view.base).step_seconds_B
    step = int(np.argsort(seconds_B, kind="stable")[len(seconds_B) // 2])
    lanes = [step_lanes(view.batch, step, entry.placement.count_LED(), comparison.pricing) for entry in view.pictured]
    slow_L = np.argsort(-lanes[0].span_LP.sum(axis=1), kind="stable")[:MOST_LAYERS]
    shown = sorted(int(layer) for layer in slow_L)
    end = max(float(each.span_LP[shown].sum()) for each in lanes)
    columns = Columns.of(comparison.cluster)
    pictures = "".join(
        _picture(view, entry, each, shown, columns, end) for entry, each in zip(view.pictured, lanes, strict=True)
    )
    used = [index for index in range(len(PARTS)) if any(each.busy_LDP[:, :, index].any() for each in lanes)]
    key = charts.legend([*((KINDS[index], PARTS[index]) for index in used), ("idle", "waiting")])
    waits = [float(each.waiting_P().sum()) for each in lanes]
    said = ", ".join(f"{escape(entry.name)} {share:.1%}" for entry, share in zip(view.pictured, waits, strict=True))
    layers = "all layers" if len(shown) == view.batch.num_layers else (
        f"the {len(shown)} layers that are slowest under {escape(view.base.name)}"
    )  # fmt: skip
    lead = (
        f"Step {step + 1} of {len(seconds_B)}, the median one under {escape(view.base.name)}, in {layers}; a row is a "
        f"device. In every part all wait for the slowest, as the step time is modelled. {key} "
        f"Share of device time spent waiting in the whole step: {said}."
        + (" Of devices that share a row, the one that works longest is shown." if columns.many else "")
    )
    return charts.section("timeline", "Who waits for whom", lead, pictures + _parts(view, lanes, used))


def _picture(
    view: View, entry: Entry, lanes: StepLanes, shown: list[int], columns: Columns, end: float
) -> str:  # fmt: skip
    left, right, up = 50.0, 14.0, 20.0
    scale = (charts.FULL - left - right) / max(end, 1e-300)
    device_G = _longest(lanes, columns)
    high = max(4.0, min(16.0, 260.0 / len(device_G)))
    bottom = up + high * len(device_G)
    start_LP = lanes.begin_LP(shown)
    total = float(lanes.span_LP[shown].sum())
    body = [charts.boxes("idle", [(left, up + row * high, total * scale, high - 1) for row in range(len(device_G))])]
    for index, kind in enumerate(KINDS):
        spots = [
            (left + start_LP[at, index] * scale, up + row * high, lanes.busy_LDP[layer, d, index] * scale, high - 1)
            for row, d in enumerate(device_G.tolist())
            for at, layer in enumerate(shown)
        ]
        body.append(charts.boxes(kind, spots))
    body.append(charts.text(left - 6, up - 7, columns.word, "small", "end"))
    last = -1e9
    for at, layer in enumerate(shown):
        x = left + start_LP[at, 0] * scale
        body.append(charts.rule(x, up - 4, bottom + 2, "edge"))
        words = f"layer {view.layer_names[layer]}"
        if x - last >= 8 + 6.5 * len(words):
            body.append(charts.text(x + 3, up - 7, words, "small"))
            last = x
    body.append(charts.rule(left + total * scale, up - 4, bottom + 2, "edge"))
    for row in range(0, len(device_G), max(1, int(np.ceil(11 / high)))):
        body.append(charts.text(left - 6, up + (row + 0.5) * high + 4, columns.names[row], "small", "end"))
    unit, factor = ("ms", 1e3) if end >= 2e-3 else ("µs", 1e6)
    for value in charts.ticks(0, end * factor, 8):
        x = left + value / factor * scale
        body.append(charts.text(x, bottom + 15, f"{value:g}", "small", "middle" if value else "start"))
    words = f"modelled {unit}, these layers one after the other"
    body.append(charts.text(charts.FULL - right, bottom + 30, words, "small", "end"))
    share = float(lanes.waiting_P().sum())
    caption = f"{entry.name}: {charts.duration(total)} for these layers; in the whole step devices wait {share:.1%}"
    return charts.panel(caption, charts.svg(charts.FULL, bottom + 36, caption, "".join(body)), "lanes")


def _longest(lanes: StepLanes, columns: Columns) -> NDArray[np.int64]:
    """Of each column the device that works longest, int64 [G]."""
    busy_D = lanes.busy_LDP.sum(axis=(0, 2))
    parts = np.split(busy_D, columns.first_G[1:])
    return columns.first_G + np.array([int(part.argmax()) for part in parts])


def _parts(view: View, lanes: list[StepLanes], used: list[int]) -> str:
    """What each part takes and how much of it is waiting, whole step."""
    rows = []
    for index in used:
        cells = []
        for each in lanes:
            cells += [charts.duration(float(each.span_LP[:, index].sum())), f"{each.waiting_P()[index]:.1%}"]
        rows.append([PARTS[index], *cells])
    total = []
    for each in lanes:
        total += [charts.duration(each.seconds), f"{each.waiting_P().sum():.1%}"]
    rows.append(["whole step", *total])
    names = [charts.shorten(entry.name) for entry in view.pictured]
    head = ["", *(words for name in names for words in (f"{name}: time", "waiting"))]
    return charts.table("The whole step, all layers: waiting is a share of the devices' time.", head, rows)
