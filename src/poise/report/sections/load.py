"""Load of every device, layer by layer."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

from poise.report import charts
from poise.report.view import Columns, View


def section(view: View) -> str:
    """Layers down, devices across; colour is load relative to the layer's mean."""
    columns = Columns.of(view.comparison.cluster)
    entries = [view.base] if view.best is view.base else [view.base, view.best]
    tables = [view.replay(entry).relative_load_LD() for entry in entries]
    top = max(float(table.max()) for table in tables)
    maps = "".join(
        _map(entry.name, table, columns, view.layer_names, top) for entry, table in zip(entries, tables, strict=True)
    )
    lead = (
        f"Tokens relative to the layer's mean on {escape(view.where(view.best))}, all steps together; layers down, "
        "devices across. "
        + ("A column shows its fullest device. " if columns.many else "")
        + charts.legend((("cold", "idle"), ("even", "even"), ("hot", "overloaded")))
    )
    return charts.section("load", "Load of every device", lead, f'<div class="pair">{maps}</div>')


def _map(name: str, relative_LD: NDArray[np.float64], columns: Columns, layers: list[str], top: float) -> str:
    worst = float(relative_LD.max(axis=1).mean())
    value_LG = columns.max(relative_LD)
    hot = value_LG >= 1
    strength = np.where(hot, (value_LG - 1) / max(top - 1, 1e-9), 1 - value_LG)
    cells = charts.Grid(
        f"{name}: fullest device {worst:.2f} × mean", layers, columns.names,
        ("cold", "hot"), hot.astype(np.int64), strength, value_LG,
        f"layer {{r}}, {columns.word} {{c}}: {{v}} × mean", "layer", columns.word,
    )  # fmt: skip
    return charts.grid(cells, column_breaks=columns.breaks)
