"""Traffic of every link, and which port is full."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

from poise.replay.compare import Entry
from poise.replay.links import Fullest, LinkBytes, Ports, link_bytes
from poise.report import charts
from poise.report.view import Columns, View

STRIP = 54.0
"""Height of bars that go one way."""
PORTS = (
    "<p>How long every port is busy with it: sending upwards, receiving downwards, the fullest framed. A layer waits "
    "for its fullest port, so what counts is the highest bar, not the sum. "
    + charts.legend((("dispatch", "dispatch"), ("combine", "combine")))
    + "</p>"
)
CLASSES = ("stays on its device", "inside a node", "between nodes")


def section(view: View) -> str:
    """Matrices of bytes a step, bars of every port, totals."""
    comparison = view.comparison
    links = [link_bytes(view.batch, entry.placement.count_LED(), comparison.pricing) for entry in view.pictured]
    columns = Columns.of(comparison.cluster)
    top = max(float(_off_device(link, columns).max()) for link in links)
    maps = "".join(_matrix(entry, link, columns, top) for entry, link in zip(view.pictured, links, strict=True))
    full = [max((each.fullest() for each in link.ports()), key=lambda one: one.seconds) for link in links]
    most = max(one.seconds for one in full)
    bars = "".join(
        _bars(entry, link.ports(), one, most) for entry, link, one in zip(view.pictured, links, full, strict=True)
    )
    return charts.section(
        "links", "Traffic of every link", _lead(view, columns),
        f'<div class="pair">{maps}</div>{PORTS}<div class="pair">{bars}</div>{_totals(view, links, full)}',
    )  # fmt: skip


def _lead(view: View, columns: Columns) -> str:
    traffic, cluster = view.comparison.traffic, view.comparison.cluster
    words = [
        f"Bytes that a step of {escape(view.where(view.fixed))} sends from each device (down) to each device (across), "
        "dispatch and combine of all layers.",
        charts.legend((("near", "inside a node"), ("far", "network"))),
    ]
    if traffic == "home_node_dedup" and cluster.num_nodes > 1:
        words.append("A token crosses the network once per node, to the device with its sender's index, and fans out.")
    if traffic == "stay":
        words.append("Keys and values, the same for every placement, are left out.")
    if not view.batch.has_tokens:
        words.append("Only loads are known: every device is taken to send equally much.")
    if columns.many:
        words.append("Neighbouring devices share a row and column.")
    return " ".join(words)


def _off_device(link: LinkBytes, columns: Columns) -> NDArray[np.float64]:
    """Bytes between columns, float64 [G, G]; what stays on a device is left out."""
    leaving = link.bytes_DD * ~np.eye(link.cluster.num_devices, dtype=bool)
    return columns.sum(columns.sum(leaving, axis=0), axis=1)


def _matrix(entry: Entry, link: LinkBytes, columns: Columns, top: float) -> str:
    bytes_GG = _off_device(link, columns)
    node_G = link.cluster.node_D[columns.first_G]
    far = node_G[:, None] != node_G[None, :]
    moved = float(bytes_GG.sum())
    cells = charts.Grid(
        f"{entry.name}: {charts.size(moved)} a step over links", columns.names, columns.names, ("near", "far"),
        far.astype(np.int64), bytes_GG / max(top, 1e-300), bytes_GG / 1e6,
        f"from {columns.word} {{r}} to {columns.word} {{c}}: {{v}} MB a step", "from", f"to {columns.word}",
    )  # fmt: skip
    return charts.grid(cells, row_breaks=columns.breaks, column_breaks=columns.breaks, square=True)


def _bars(entry: Entry, ports: tuple[Ports, ...], full: Fullest, top: float) -> str:
    """A strip a kind of port: up is out, down is in, dispatch next to the axis."""
    left, right = 40.0, 4.0
    scale = STRIP / max(top, 1e-300)
    body, y = [], 16.0
    for each in ports:
        many = each.out_2P.shape[1]
        wide = min((charts.HALF - left - right) / many, 64.0)
        gap = min(4.0, 0.2 * wide)
        axis = y + STRIP + 10
        words = f"{each.kind}: port of each {each.owner}; dashed: busy {charts.duration(top)} a step"
        body.append(charts.text(left, y, words, "small"))
        for kind, row in (("dispatch", 0), ("combine", 1)):
            spots = []
            for values_2P, sign in ((each.out_2P, -1), (each.in_2P, 1)):
                for port in range(many):
                    long, base = float(values_2P[row, port]) * scale, float(values_2P[:row, port].sum()) * scale
                    top_y = axis - base - long if sign < 0 else axis + base
                    spots.append((left + port * wide, top_y, wide - gap, long))
            body.append(charts.boxes(kind, spots))
        if each.kind == full.kind:
            long = full.seconds * scale
            x, top_y = left + full.port * wide, axis - long if full.way == "out" else axis
            body.append(
                f'<rect class="fullest" x="{x - 1:.1f}" y="{top_y - 1:.1f}" width="{wide - gap + 2:.1f}" '
                f'height="{long + 2:.1f}"><title>{escape(_say(full, each.owner))}</title></rect>'
            )
        body.append(f'<line class="axis" x1="{left}" x2="{left + many * wide:.1f}" y1="{axis:.1f}" y2="{axis:.1f}"/>')
        end = f'x1="{left}" x2="{left + many * wide:.1f}"'
        for side in (axis - STRIP, axis + STRIP):
            body.append(f'<line class="grid dashed" {end} y1="{side:.1f}" y2="{side:.1f}"/>')
        body.append(charts.text(left - 6, axis - 6, "out", "small", "end"))
        body.append(charts.text(left - 6, axis + 13, "in", "small", "end"))
        low = axis + STRIP + 14
        every = max(1, int(np.ceil((8 + 6.5 * len(str(many))) / wide)))
        body += [
            charts.text(left + port * wide + (wide - gap) / 2, low, str(port), "small", "middle")
            for port in range(0, many, every)
        ]
        y = low + 26
    owner = next(each.owner for each in ports if each.kind == full.kind)
    caption = f"{entry.name}: fullest is {_say(full, owner)}"
    return charts.panel(caption, charts.svg(charts.HALF, y - 16, caption, "".join(body)), "ports")


def _say(full: Fullest, owner: str) -> str:
    kind = "network" if full.kind == "network" else "fabric"
    return f"{owner} {full.port}, {kind} {full.way}, {charts.duration(full.seconds)} a step"


def _totals(view: View, links: list[LinkBytes], full: list[Fullest]) -> str:
    names = [charts.shorten(entry.name) for entry in view.pictured]
    rows = []
    shares = [np.array(link.by_class()) for link in links]
    for index, words in enumerate(CLASSES):
        if index == 2 and view.comparison.cluster.num_nodes == 1:
            continue
        cells = [f"{charts.size(each[index])} ({each[index] / max(each.sum(), 1e-300):.1%})" for each in shares]
        rows.append([words, *cells])
    rows.append(["fullest port is busy", *(charts.duration(one.seconds) for one in full)])
    costs = [view.replay(entry).cost for entry in view.pictured]
    waits = [float((cost.dispatch_BL + cost.combine_BL).sum(axis=1).mean()) for cost in costs]
    rows.append(["all-to-alls of a step, with start-up", *(charts.duration(seconds) for seconds in waits)])
    return charts.table("Bytes and time a step, mean over steps.", ["", *names], rows)
