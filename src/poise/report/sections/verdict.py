"""The verdict of a phase: maps that were tried, what the chosen one gains and costs, what it rests on."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from poise.replay.verdict import COLUMNS, MS, PhaseVerdict, Verdict
from poise.report import charts
from poise.util.words import percent


def section(one: PhaseVerdict) -> str:
    """A table of the maps, and a sentence a figure."""
    said = _items([*one.lines(), f"Constants: {one.ground}.", *one.notes])
    body = charts.table(one.title(), COLUMNS, one.cells()) + said
    return charts.section(one.phase, one.phase.capitalize(), f"{escape(one.advice)}: {escape(one.reason)}.", body)


def basis(found: Verdict) -> str:
    """What all phases share: the flags to set, and what was assumed."""
    flags = "".join(f"<pre><code>{escape(line)}</code></pre>" for line in found.flags)
    lead = "Flags for a trial, and what was assumed." if flags else "What was assumed."
    return charts.section("basis", "What it rests on", lead, flags + _items([found.basis(), *found.notes]))


def cards(one: PhaseVerdict) -> str:
    """The figures on top of the page."""
    low, high = (MS * end for end in one.interval_s)
    pays = "never" if one.pay_back_steps is None else f"{one.pay_back_steps:,} steps"
    cache = "unknown" if one.price.cache_tokens is None else f"{one.price.cache_tokens:,} tokens"
    return charts.cards(
        (
            ("saved a step", f"{MS * one.saved_s:.3f} ms", f"{low:.3f} to {high:.3f} ms"),
            ("of the whole step", percent(one.share(one.saved_s)), f"{MS * one.step_s:.3f} ms"),
            ("at worst", f"{MS * one.layers * one.worst_s:.3f} ms", "within the errors of the constants"),
            ("paid back after", pays, f"{one.price.moved_bytes / 2**30:.2f} GiB to move"),
            ("cache lost a rank", cache, f"{one.chosen.redundant} redundant slots"),
        )
    )


def _items(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
