"""What has to move from the baseline to the best placement."""

from __future__ import annotations

from html import escape

import numpy as np

from poise.replay.compare import NOT_WORTH
from poise.replay.moving import Moving, moving
from poise.report import charts
from poise.report.view import Columns, View
from poise.util.words import percent

MOST_ROWS = 8


def section(view: View) -> str:
    """Arrivals layer by layer and device by device, bytes, seconds of the links, and after how many steps that pays."""
    comparison, base, fixed = view.comparison, view.base, view.fixed
    title = "What has to move"
    if fixed is base:
        return charts.section("moves", title, f"Nothing: no fixed placement beats {escape(base.name)}.", "")
    moves = moving(base.placement, fixed.placement, comparison.cluster.node_D)
    ways = f"{escape(base.name)} to {escape(fixed.name)}"
    if moves.fetched == 0:
        return charts.section("moves", title, f"From {ways}: no expert has to be fetched.", "")
    columns = Columns.of(comparison.cluster)
    return charts.section(
        "moves", title,
        f"From {ways}. Layers down, devices across: how many experts a device must fetch. {_price(view, moves)}",
        f'<div class="pair"><div class="stack">{_map(view, moves, columns)}{_links(view, moves)}</div>'
        f"{_layers(view, moves)}</div>",
    )  # fmt: skip


def _price(view: View, moves: Moving) -> str:
    comparison = view.comparison
    seconds = moves.seconds(comparison.cluster, comparison.model.expert_bytes)
    text = (
        f"All of it takes the links {charts.duration(seconds)} if they do nothing else; it can run in the background "
        "while the old placement serves."
    )
    if comparison.defaults:
        return f"{text} Whether that is earned back is not known: {escape('; '.join(comparison.defaults))}."
    share, low, _ = comparison.gain(view.fixed.name, view.base.name)
    if share < NOT_WORTH or low <= 0:
        return f"{text} But the gain on {escape(view.where(view.fixed))} is not worth it: {percent(share)} of a step."
    gain = share * float(view.replay(view.base).step_seconds_B.mean())
    text += (
        f" At {charts.duration(gain)} gained a step on {escape(view.where(view.fixed))} that is earned back after "
        f"{max(1, round(seconds / gain)):,} steps."
    )
    return text


def _map(view: View, moves: Moving, columns: Columns) -> str:
    arrive_LG = columns.sum(moves.arrive_LD)
    cells = charts.Grid(
        f"{moves.fetched:,} experts arrive, {moves.dropped:,} leave", view.layer_names, columns.names, ("arrive",),
        np.zeros(arrive_LG.shape, np.int64), arrive_LG / arrive_LG.max(), arrive_LG,
        f"layer {{r}}, {columns.word} {{c}}: {{v}} experts arrive", "layer", columns.word,
    )  # fmt: skip
    return charts.grid(cells, column_breaks=columns.breaks, digits=True)


def _links(view: View, moves: Moving) -> str:
    cluster, each = view.comparison.cluster, view.comparison.model.expert_bytes
    near, far = moves.by_link(cluster)
    rows = [["inside a node", f"{near:,}", charts.size(near * each)]]
    if cluster.num_nodes > 1:
        rows.append(["over the network", f"{far:,}", charts.size(far * each)])
    rows.append(["all", f"{moves.fetched:,}", charts.size(moves.fetched * each)])
    return charts.table("Every expert is fetched once over its link.", ["", "experts", "bytes"], rows)


def _layers(view: View, moves: Moving) -> str:
    each, most = view.comparison.model.expert_bytes, []
    for layer in moves.most(MOST_ROWS):
        arrive_D = moves.arrive_LD[layer]
        device = int(arrive_D.argmax())
        most.append([
            f"layer {view.layer_names[layer]}", f"{int(arrive_D.sum()):,}",
            charts.size(int(arrive_D.sum()) * each), f"{int(arrive_D[device])} on device {device}",
        ])  # fmt: skip
    return charts.table("Layers in which most arrives.", ["", "experts", "bytes", "most"], most)
