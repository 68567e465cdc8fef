"""poise bench: any method or policy on frozen cases, and results files side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poise.bench import run as bench_run
from poise.bench.cases import FrozenCase
from poise.bench.page import render_compared
from poise.bench.results import ROW_HEADS, STANDING_HEADS, BenchResults, CaseResult, ComparedResults, standings
from poise.cli import options as o
from poise.report.page import write_page
from poise.report.view import Made
from poise.util.errors import NoResultError, OptionError

if TYPE_CHECKING:
    from rich.table import Table

METHODS = ("contiguous", "eplb", "poise")


def bench(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Results files, for --compare.", show_default=False)
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the cases, their hashes and what they need.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Cases with this in their name, or a hash's beginning; repeat.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the files that do not ship with poise.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Static method; repeat. Default: {', '.join(METHODS)}.")
    ] = None,
    fast: Annotated[
        list[str] | None, typer.Option(help="Step-wise policy over a map, NAME or NAME:key=value; repeat.")
    ] = None,
    fast_over: Annotated[
        str | None, typer.Option(help="The method whose map --fast runs over. Default: the last.")
    ] = None,
    work: Annotated[
        float, typer.Option(help="Units of work for each plan (about 1/30 s each): no clock takes part.")
    ] = bench_run.WORK,
    output: Annotated[Path | None, o.flag("output", "Write the results there, anew after every case.")] = None,
    compare: Annotated[bool, typer.Option(help="Set results files side by side.")] = False,
    html: Annotated[Path | None, o.flag("html", "With --compare: write a page to this file.")] = None,
    json: o.Json = False,
) -> None:
    """Run methods and policies, poise's own and those of other packages, on frozen cases; compare results files.

    Every method is given one part of the traffic and judged on another. Cases whose files are not here are skipped, and
    the reason is said. Files of different cases are refused.

    Example: poise bench --only demo -o results.json, then: poise bench --compare results.json other.json
    """
    with o.errors():
        if output is not None:
            o.writable(output, ".json")
        if html is not None:
            o.writable(html)
        if compare:
            _refuse(
                {"--output": output, "--only": only, "--method": method, "--fast": fast, "--list": list_}, "--compare"
            )
            _compare(files or [], html, json)
            return
        _refuse({"results files": files, "--html": html}, "a run", hint="--compare sets results files side by side")
        cases = bench_run.chosen_cases(only or ())
        if list_:
            _list(cases, json)
            return
        found = None
        with o.progress() as report:
            for found in bench_run.run(
                cases, data, tuple(method or METHODS), tuple(fast or ()), over=fast_over, work=work,
                command=o.command_line(), progress=report,
            ):  # fmt: skip
                if output is not None:
                    found.save(output)
        assert found is not None
        _show(found, json)
        if output is not None:
            o.talk.print(f"wrote {output}")
        if not found.cases:
            reason = found.skipped[0].reason
            raise NoResultError(f"none of {len(found.skipped)} cases ran: {reason}")


def _refuse(given: dict[str, Any], where: str, hint: str = "") -> None:
    for name, value in given.items():
        if value:
            raise OptionError(f"{name} means nothing for {where}", hint=hint)


def _compare(files: list[Path], html: Path | None, json: bool) -> None:
    names: list[str] = []
    for path in files:
        names.append(path.stem if path.stem not in names else f"{path.stem} ({len(names) + 1})")
    found = ComparedResults.of([BenchResults.load(path) for path in files], names)
    if html is not None:
        write_page(render_compared(found, Made.now(o.command_line())), html)
    if json:
        o.print_json("bench", found.to_json())
    else:
        _show_compared(found)
    if html is not None:
        o.talk.print(f"wrote {html}")


def _list(cases: list[FrozenCase], json: bool) -> None:
    if json:
        o.print_json("bench", {
            "cases": [
                {"name": case.name, "hash": case.digest(), "needs": [list(file) for file in case.needs]}
                for case in cases
            ],
        })  # fmt: skip
        return
    heads = ("hash", "case", "needs")
    table = o.table(f"{len(cases)} frozen cases", heads, left=heads)
    for column in table.columns:
        column.overflow = "fold"
    for case in cases:
        files = ", ".join(name for name, _ in case.needs)
        table.add_row(case.digest()[:12], case.name, files or "nothing")
    o.out.print(table)


def _show(found: BenchResults, json: bool) -> None:
    if json:
        o.print_json("bench", found.to_json())
        return
    for case in found.cases:
        o.out.print(_case_table(case))
        o.say_notes(case.notes)
    for skipped in found.skipped:
        o.out.print(f"skipped: {skipped.name}: {skipped.reason}")
    if len(found.cases) > 1:
        o.out.print(_standings([{row.method: row.seconds for row in case.rows} for case in found.cases]))
    o.out.print(f"Times are modelled, on traffic that the method was not given; {found.work:g} units of work a plan.")


def _case_table(case: CaseResult) -> Table:
    table = o.table(f"{case.name} ({case.hash[:12]}), {case.steps} steps", ROW_HEADS, left=ROW_HEADS[:1])
    best = min((row.seconds for row in case.rows), default=0.0)
    for row in case.rows:
        table.add_row(*row.cells(), style="bold" if row.seconds == best else None)
    return table


def _standings(times: list[dict[str, float]]) -> Table:
    table = o.table("every method against the best of all others", STANDING_HEADS, left=STANDING_HEADS[:1])
    for one in standings(times):
        table.add_row(*one.cells())
    return table


def _show_compared(found: ComparedResults) -> None:
    times = [{name: row.seconds for name, row in found.rows(case).items()} for case in found.cases]
    o.out.print(_standings(times))
    for file, method, mean, least in found.changes():
        o.out.print(f"{file}: {method} saves {mean:.2%} over {found.names[0]}'s in the mean, {least:.2%} at least")
    o.say_notes(found.notes)
    o.out.print(found.sentence())
