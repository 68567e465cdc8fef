"""A page that compares results files: standings, a dot a case, and every number."""

from __future__ import annotations

from html import escape

from poise.bench.results import ROW_HEADS, STANDING_HEADS, ComparedResults
from poise.report import charts
from poise.report.page import page_of
from poise.report.sections.times import dots_chart
from poise.report.view import Made
from poise.util.words import percent


def render_compared(found: ComparedResults, made: Made) -> str:
    """The page as a string."""
    title = f"poise bench: {', '.join(found.names)}"
    sections = "\n".join((_standings(found), _dots(found), *_changes(found), _cases(found), _files(found)))
    return page_of(title, found.sentence(), "Best of all", _cards(found), sections, made)


def _cards(found: ComparedResults) -> str:
    return charts.cards(
        (one.name, f"{one.lost} of {one.cases} lost", f"lead {percent(one.lead)}, worst {percent(one.worst)}")
        for one in found.standings()[:4]
    )


def _standings(found: ComparedResults) -> str:
    table = charts.table("Fewest lost first.", STANDING_HEADS, [one.cells() for one in found.standings()])
    lead = (
        "Every method of every file against the best of all others in each case, which nobody can know beforehand: "
        "lost are cases in which that is more than 0.5 % faster."
    )
    return charts.section("standings", "Who loses least", lead, table)


def _dots(found: ComparedResults) -> str:
    over: dict[str, list[float]] = {}
    for case in found.cases:
        for name, row in found.rows(case).items():
            if row.bound_seconds > 0:
                over.setdefault(name, []).append(row.seconds / row.bound_seconds)
    samples = list(over.items())
    axis = "modelled time over what no placement can beat (1 is the bound)"
    body = dots_chart(samples, axis, "times the bound", "Time over the bound, by method") if samples else ""
    lead = "Each dot is a case, the bar the mean. Left is faster; nothing can be left of 1."
    return charts.section("over", "How far from the bound", lead, charts.panel("", body))


def _changes(found: ComparedResults) -> list[str]:
    rows = [[f"{file}: {method}", percent(mean), percent(least)] for file, method, mean, least in found.changes()]
    if not rows:
        return []
    lead = f"Methods that {escape(found.names[0])} has, too: share of the step that the other file saves over it."
    table = charts.table("Mean and least over cases.", ("method", "saved, mean", "least"), rows)
    return [charts.section("changes", "What changed", lead, table)]


def _cases(found: ComparedResults) -> str:
    tables = [
        charts.table(case, ROW_HEADS, [[name, *row.cells()[1:]] for name, row in found.rows(case).items()])
        for case in found.cases
    ]
    lead = "Modelled milliseconds of the recorded MoE layers of a step, on traffic that the method was not given."
    return charts.section("cases", "Every case", lead, "".join(tables))


def _files(found: ComparedResults) -> str:
    lines = list(found.notes)
    for name, one in zip(found.names, found.results, strict=True):
        versions = ", ".join(f"{key} {value}" for key, value in one.versions.items())
        host = ", ".join(f"{key} {value}" for key, value in one.host.items())
        lines.append(f"{name}: {one.made}, {one.work:g} units of work a plan, {versions}; {host}. {one.command}")
        lines += [f"{name} skipped {case.name}: {case.reason}" for case in one.skipped]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section id="files"><h2>Files</h2><ul>{items}</ul></section>'
