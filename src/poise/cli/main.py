"""The ``poise`` command: one file a verb."""

from __future__ import annotations

from typing import Annotated

import typer

from poise.cli import (
    breakeven,
    calibrate,
    compare,
    convert,
    demo,
    diff,
    export,
    homes,
    inspect,
    machines,
    plan,
    record,
    verdict,
    verify,
    watch,
)
from poise.cli.ending import signals_end
from poise.cli.options import compiling
from poise.version import VERSION

app = typer.Typer(
    name="poise", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"poise {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keep every GPU of a Mixture-of-Experts model equally busy.

    Start with 'poise demo'. Then, with your own files: inspect TRACE, compare TRACE --cluster 2x8, plan, export.
    Exit codes: 0 fine, 1 no result, 2 usage or bad input, 128 + N ended by signal N.
    """


for verb in (
    demo.demo,
    inspect.inspect,
    plan.plan,
    compare.compare,
    verdict.verdict,
    breakeven.breakeven,
    homes.homes,
    diff.diff,
    export.export,
    convert.convert,
    record.record,
    verify.verify,
    watch.watch,
    calibrate.calibrate,
    machines.machines,
):
    app.command()(verb)


def main() -> None:
    """Entry point."""
    with signals_end(), compiling():
        app()
