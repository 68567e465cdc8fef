"""Every number of the comparison, in tables that sort."""

from __future__ import annotations

from html import escape
from typing import Any

from poise.replay.compare import IN_SAMPLE
from poise.report import charts
from poise.report.view import View

COLUMNS = (
    ("imbalance", "imbalance", "max / mean tokens over devices, mean over steps and layers"),
    ("imbalance_p99", "p99", "99th percentile of the same"),
    ("cross_device_share", "off device", "token-expert pairs computed on another device than the token's"),
    ("cross_node_share", "off node", "the same for nodes"),
    ("mean", "step ms", "modelled milliseconds of all MoE layers of one step, mean"),
    ("p99", "p99 ms", "99th percentile over steps"),
    ("efficiency", "efficiency", "least possible time / time, with this row's memory"),
    ("speedup", "speedup", "time of the first row / time"),
)


def section(view: View) -> str:
    """One table a part of the traffic."""
    tables = "\n".join(_table(view, part) for part in view.comparison.batches)
    return charts.section("numbers", "Every number", "Select a column's name to sort by it.", tables)


def _cell(row: dict[str, Any], key: str) -> tuple[str, str]:
    """Sort value and text."""
    value = row["step_seconds"][key] * 1e3 if key in ("mean", "p99") else row[key]
    if value is None:
        return "", ""
    return f"{value:.9g}", f"{value:.1%}" if key.endswith("share") else f"{value:.3f}"


def _table(view: View, part: str) -> str:
    comparison = view.comparison
    rows = [row for row in comparison.rows() if row["part"] == part]
    title = comparison.title(part)
    best = min(row["step_seconds"]["mean"] for row in rows[:-1])
    head = '<th scope="col"><button type="button">placement</button></th>' + "".join(
        f'<th scope="col" title="{escape(title)}"><button type="button">{escape(text)}</button></th>'
        for _, text, title in COLUMNS
    )
    body = []
    for row in rows:
        kind = "bound" if row["name"] == "bound" else "best" if row["step_seconds"]["mean"] == best else ""
        cells = "".join(
            f'<td data-value="{value}">{text}</td>' for value, text in (_cell(row, key) for key, _, _ in COLUMNS)
        )
        name = row["name"] if row["judged_on"] == title else f"{row['name']} ({row['judged_on']})"
        body.append(f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{cells}</tr>')
    caption = f"{title}: {comparison.batches[part].order}"
    note = " Methods were fitted on this traffic." if part == IN_SAMPLE else ""
    return (
        f'<div class="panel sideways"><table class="sorts"><caption>{escape(caption)}.{note}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
