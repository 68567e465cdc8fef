"""What a notebook shows of a result: plain tables, in the notebook's own style. Every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from poise.util.words import harmless


def table_html(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table: the first column is names, the others are figures."""
    head = "".join(f"<th>{_text(one)}</th>" for one in heads)
    body = "".join(
        f"<tr><th>{_text(row[0])}</th>{''.join(f'<td>{_text(one)}</td>' for one in row[1:])}</tr>" for row in rows
    )
    return (
        f'<table><caption style="text-align:left">{_text(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def lines_html(lines: Iterable[str]) -> str:
    """A paragraph each."""
    return "".join(f"<p>{_text(line)}</p>" for line in lines)


def _text(text: str) -> str:
    return escape(harmless(text))
