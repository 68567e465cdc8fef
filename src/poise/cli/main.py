"""The ``poise`` command: one file a verb, imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from poise.cli.ending import signals_end
from poise.cli.stdout import Unwritable, writing
from poise.util.words import printable
from poise.version import VERSION

VERBS = {
    "demo": "Compare placements on the trace that ships with poise.",
    "inspect": "Say what recorded traffic holds and how skewed it is.",
    "plan": "Plan an expert placement and write it to a file.",
    "compare": "Judge placements side by side, with the bound.",
    "verdict": "Say whether turning EPLB on is worth it.",
    "bench": "Run any method on frozen cases, compare results.",
    "breakeven": "Say from which batch size step-wise balancing pays.",
    "homes": "Say whether it pays to choose the rank of each request.",
    "diff": "Say what moves between two placements.",
    "export": "Write a placement in an engine's format.",
    "convert": "Turn an engine's dump into a trace or loads.",
    "record": "Record which experts a model chooses on your text.",
    "verify": "Say from a dump whether an engine took the map.",
    "watch": "Watch traffic, and plan anew when it pays.",
    "calibrate": "Measure links and experts, and write a cluster file.",
    "machines": "List presets, measured kernels and all-to-alls.",
}
"""Verbs, each the function of that name in the module of that name; the list of all does not import them."""
HELP = {"help_option_names": ["-h", "--help"]}
USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
"""Of click or of typer's own copy of it, by typer's version."""


class Verbs(TyperGroup):
    """The list of verbs; one that is called is imported then."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        self.commands = {name: TyperCommand(name, help=text) for name, text in VERBS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The verb itself for its entry in the list."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, command(found.name) if found is not None and found.name else found, rest

    def make_context(self, *words: Any, **more: Any) -> Any:
        """As typer does, of words that a terminal may act on."""
        with _harmless(), _said():
            return super().make_context(*words, **more)

    def invoke(self, ctx: Any) -> Any:
        """See :meth:`make_context`: here the words of a verb are read."""
        with _harmless():
            return super().invoke(ctx)


@contextmanager
def _harmless() -> Iterator[None]:
    """What is wrong with the words of a command line is told without what a terminal would act on."""
    try:
        yield
    except USAGE as error:
        error.message = printable(error.message)
        raise


class Verb(TyperCommand):
    """A verb, whose words are read, and its help printed, where its context is made."""

    def make_context(self, *words: Any, **more: Any) -> Any:
        """As typer does, on a stdout that may be full."""
        with _said():
            return super().make_context(*words, **more)


@contextmanager
def _said() -> Iterator[None]:
    """Help and version end in a line where stdout takes nothing."""
    try:
        with writing():
            yield
    except Unwritable as error:
        if told := error.told():
            typer.echo(f"error: {told}", err=True)
        raise typer.Exit(1) from None


def command(name: str) -> Any:
    """A verb, imported, with its options."""
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    one.command(name, cls=Verb, context_settings=HELP)(getattr(import_module(f"poise.cli.{name}"), name))
    return typer.main.get_command(one)


app = typer.Typer(
    name="poise", cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings=HELP,
)  # fmt: skip


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


def main() -> None:
    """Entry point."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us: what is said goes nowhere, as of any command
            setattr(sys, name, open(os.devnull, "w"))
    with signals_end():
        app(prog_name="poise")
