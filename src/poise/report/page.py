"""The page: verdict, cards, sections, footer. No network, no library; every name is escaped."""

from __future__ import annotations

import re
from html import escape
from importlib.resources import files
from pathlib import Path

from poise.replay.compare import Comparison
from poise.replay.verdict import Verdict
from poise.replay.what_if import WhatIf
from poise.report import charts
from poise.report.sections import facts, flow, links, load, moves, numbers, timeline, times, verdict, wait, what_if
from poise.report.view import Made, View
from poise.util.errors import PlacementError
from poise.util.files import write_whole
from poise.util.words import harmless

SECTIONS = (
    wait.section,
    load.section,
    times.section,
    links.section,
    flow.section,
    timeline.section,
    moves.section,
    numbers.section,
    facts.section,
)


def write_report(
    comparison: Comparison, path: str | Path, *, command: str | None = None, what: WhatIf | None = None
) -> None:
    """Write one self-contained HTML file; it appears whole or not at all.

    Parameters
    ----------
    command : command line that made it, for the footer.
    what : other settings, for the panel that shows them.

    Raises
    ------
    PlacementError : the file cannot be written.
    """
    write_page(render(comparison, Made.now(command), what), path)


def write_verdict(found: Verdict, path: str | Path, *, command: str | None = None) -> None:
    """The same of a verdict; parameters and errors of :func:`write_report`."""
    write_page(render_verdict(found, Made.now(command)), path)


def write_page(page: str, path: str | Path) -> None:
    """Write a page; it appears whole or not at all.

    Raises
    ------
    PlacementError : the file cannot be written.
    """
    write_whole(path, page, PlacementError)


def render(comparison: Comparison, made: Made, what: WhatIf | None = None) -> str:
    """The page as a string."""
    view = View.of(comparison)
    first, *others = (section(view) for section in SECTIONS)
    sections = "\n".join([first, *([] if what is None else [what_if.section(what)]), *others])
    title = f"poise: {view.best.name} and {view.base.name}, {comparison.model.name} on {comparison.cluster!r}"
    return page_of(
        title, comparison.verdict(), f"Best placement on {view.where(view.best)}", _cards(view), sections, made
    )


def render_verdict(found: Verdict, made: Made) -> str:
    """The page of a verdict as a string."""
    sections = "\n".join(verdict.section(one) for one in found.phases) + verdict.basis(found)
    title = f"poise verdict: {found.advice}, {found.model} on {found.cluster}"
    return page_of(
        title, found.sentence(), f"Figures of {found.leading.phase}", verdict.cards(found.leading), sections, made
    )


def page_of(title: str, said: str, judged: str, cards: str, sections: str, made: Made) -> str:
    """A page as a string.

    Parameters
    ----------
    title : of the browser's tab. said : a sentence on top, and more behind it.
    judged : what the cards are of. cards, sections : HTML.
    """
    folder, (head, end, more) = files("poise.report"), said.partition("). ")
    head += end.rstrip()
    parts = {
        "TITLE": escape(title),
        "STYLE": (folder / "page.css").read_text("utf-8"),
        "SCRIPT": (folder / "page.js").read_text("utf-8"),
        "VERDICT": escape(head),
        "MORE": f"<p>{escape(more)}</p>" if more else "",
        "JUDGED": escape(judged),
        "CARDS": cards,
        "NAVIGATION": _navigation(sections),
        "SECTIONS": sections,
        "FOOTER": _footer(made),
    }
    page = (folder / "page.html").read_text("utf-8")
    return harmless(re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page))


def _cards(view: View) -> str:
    base, first, now = view.base.name, view.replay(view.base), view.replay(view.best)
    cards = (
        (
            "MoE time a step",
            f"{1e3 * now.step_seconds_B.mean():.3f} ms",
            f"{base}: {1e3 * first.step_seconds_B.mean():.3f} ms",
        ),
        ("imbalance", f"{now.imbalance:.3f}", f"{base}: {first.imbalance:.3f}"),
        ("off node", f"{now.cross_node_share:.1%}", f"{base}: {first.cross_node_share:.1%}"),
        ("of the least possible time", f"{now.efficiency:.1%}", f"{base}: {first.efficiency:.1%}"),
    )
    return charts.cards(cards)


def _navigation(sections: str) -> str:
    """Links to the sections that are there."""
    found = re.findall(r'<section id="(\w+)"><h2>([^<]*)</h2>', sections)
    return "".join(f'<a href="#{key}">{title}</a>' for key, title in found)


def _footer(made: Made) -> str:
    command = f"<p><code>{escape(made.command)}</code></p>" if made.command else ""
    return f"{command}<p>Made {escape(made.date)} by {escape(made.versions)}. One file, no network.</p>"
