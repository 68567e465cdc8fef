"""Drawing as inline SVG and the HTML around it. Colours come from the style sheet, so they follow light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

FULL, HALF = 960, 480
"""Widths of drawings that fill the page, and of those that stand in pairs, in pixels of their text."""
LEVELS = 12
"""Shades of a cell."""
MOST_LETTERS = 38
"""Of a name in a drawing."""


def svg(width: float, height: float, title: str, body: str) -> str:
    """A drawing."""
    size = "half" if width <= HALF else "full"
    return (
        f'<svg class="{size}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{body}</svg>"
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def rule(x: float, top: float, bottom: float, kind: str = "grid") -> str:
    """An upright line."""
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'


def boxes(kind: str, places: Iterable[tuple[float, float, float, float]]) -> str:
    """Rectangles (x, y, width, height) of one colour, as one path; those too thin to see are left out."""
    path = "".join(f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h{-w:.1f}z" for x, y, w, h in places if w >= 0.05 and h >= 0.05)
    return f'<path class="{kind}" d="{path}"></path>' if path else ""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values."""
    raw = max(high - low, 1e-12) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = np.ceil(low / step - 1e-9) * step
    return [float(x) + 0.0 for x in np.arange(first, high + step * 1e-6, step)]  # + 0.0: no minus zero


def margin(names: Sequence[str]) -> float:
    """Room for names at the left of a drawing."""
    return min(300.0, 24 + 7.2 * max(len(shorten(name)) for name in names))


def shorten(name: str) -> str:
    """A name that fits."""
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"


def legend(items: Sequence[tuple[str, str]]) -> str:
    """Colours and what they mean, (class, words) each."""
    return (
        '<span class="key">'
        + "".join(f'<span><i class="{kind}"></i>{escape(words)}</span> ' for kind, words in items)
        + "</span>"
    )


def panel(caption: str, body: str, kind: str = "", after: str = "") -> str:
    """A picture in its frame; it scrolls inside the frame where the screen is narrower than it can be read."""
    head = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="panel {kind}">{head}<div class="sideways">{body}</div>{after}</figure>'


def cards(rows: Iterable[tuple[str, str, str]]) -> str:
    """Figures on top of a page: what it is, the value, what to hold against it."""
    return "".join(
        f'<div class="card"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="was">{escape(was)}</div></div>'
        for label, value, was in rows
    )


def section(key: str, title: str, lead: str, body: str) -> str:
    """A section of the page; ``lead`` and ``body`` are HTML."""
    return f'<section id="{key}"><h2>{escape(title)}</h2><p>{lead}</p>{body}</section>'


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table; the first cell of a row names it."""
    first = "".join(f'<th scope="col">{escape(words)}</th>' for words in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    return (
        f'<div class="panel sideways"><table><caption>{escape(caption)}</caption><thead><tr>{first}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def as_script(value: Any, key: str = "") -> str:
    """Data for the page's script. No character of it can end the element or begin a comment in it."""
    data = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    name = f' id="{key}"' if key else ""
    return f'<script type="application/json"{name}>{data}</script>'


def size(count: float) -> str:
    """Bytes as one reads them."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 0.9995 * 10**power:
            return f"{_three(count / 10**power)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as one reads them."""
    if seconds >= 120:
        return f"{_three(seconds / 60)} min"
    for unit, power in (("s", 0), ("ms", 3)):
        if seconds * 10**power >= 0.9995:
            return f"{_three(seconds * 10**power)} {unit}"
    return f"{_three(seconds * 1e6)} µs"


def _three(value: float) -> str:
    """Three digits, trailing zeros too."""
    return f"{value:#.3g}".rstrip(".") if 0 < value < 999.5 else f"{value:,.0f}"


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Cells in rows and columns, coloured by kind and strength, that say their value when pointed at.

    Parameters
    ----------
    caption : above it.
    rows, columns : their names.
    kinds : classes of the style sheet.
    kind_RC : int [R, C], class of each cell.
    strength_RC : float64 [R, C], 0 (not coloured) to 1.
    value_RC : [R, C], what a cell says in place of ``{v}`` in ``said``; ``{r}`` and ``{c}`` are its row and column.
    said : the sentence.
    down, across : what a row and a column are.
    """

    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    kinds: tuple[str, ...]
    kind_RC: NDArray[np.int64]
    strength_RC: NDArray[np.float64]
    value_RC: NDArray[Any]
    said: str
    down: str
    across: str


def grid(
    cells: Grid, *, row_breaks: Sequence[int] = (), column_breaks: Sequence[int] = (), square: bool = False,
    digits: bool = False,
) -> str:  # fmt: skip
    """Draw cells; lines at breaks; ``digits`` writes values into cells where there is room."""
    count_R, count_C = cells.strength_RC.shape
    left = 12 + 6.5 * max(len(name) for name in (*cells.rows, f"{cells.down} \u2193"))
    up, right = 34.0, 4.0
    wide = min((HALF - left - right) / count_C, 52.0 if square else 64.0)
    high = wide if square else min(24.0, max(6.0, 330.0 / count_R))
    level_RC = np.ceil(np.clip(cells.strength_RC, 0, 1) * LEVELS - 1e-9).astype(int)
    inner = [f'<rect class="ground" width="{count_C}" height="{count_R}"/>']
    for index, kind in enumerate(cells.kinds):
        for level in range(1, LEVELS + 1):
            found = np.argwhere((cells.kind_RC == index) & (level_RC == level)).tolist()
            if found:
                path = "".join(f"M{c} {r}h1v1h-1z" for r, c in found)
                inner.append(f'<path class="{kind}" fill-opacity="{level / LEVELS:.2f}" d="{path}"/>')
    lines = [f"M0 {r}H{count_C}" for r in row_breaks] + [f"M{c} 0V{count_R}" for c in column_breaks]
    if lines:
        inner.append(f'<path class="edge" d="{"".join(lines)}"/>')
    inner.append('<rect class="cursor" width="1" height="1"/>')
    labels = [
        text(left - 6, up + (row + 0.5) * high + 4, cells.rows[row], "small", "end")
        for row in range(0, count_R, max(1, int(np.ceil(11 / high))))
    ]
    labels += [text(left - 6, up - 5, f"{cells.down} \u2193", "small", "end"),
               text(left, up - 21, f"{cells.across} \u2192", "small")]  # fmt: skip
    broad = 8 + 6.5 * max(len(name) for name in cells.columns)
    labels += [
        text(left + (column + 0.5) * wide, up - 5, cells.columns[column], "small", "middle")
        for column in range(0, count_C, max(1, int(np.ceil(broad / wide))))
    ]
    if digits and wide >= 17 and high >= 13:
        labels += [
            text(left + (c + 0.5) * wide, up + (r + 0.5) * high + 4, str(cells.value_RC[r, c]), "digit", "middle")
            for r, c in np.argwhere(cells.strength_RC > 0).tolist()
        ]
    body = (
        f'<g class="cells" transform="translate({left:.2f} {up:.2f}) scale({wide:.4f} {high:.4f})">{"".join(inner)}</g>'
        + "".join(labels)
    )
    data = {"rows": list(cells.rows), "columns": list(cells.columns), "said": cells.said,
            "values": [[float(f"{v:.4g}") for v in row] for row in cells.value_RC.tolist()]}  # fmt: skip
    after = f'<output class="needs-js">Point at a cell, or use the arrow keys.</output>{as_script(data)}'
    return panel(cells.caption, svg(HALF, up + count_R * high + 4, cells.caption, body), "picked matrix", after)
