"""Streams of a command: data on stdout, talk on stderr, errors as exit codes, progress."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from poise.cli.ending import Ended
from poise.cli.stdout import Unwritable, writing
from poise.util.compilation import COMPILATION
from poise.util.errors import InputError, PoiseError
from poise.util.words import printable

if TYPE_CHECKING:
    from rich.table import Table

Report = Callable[[str, float], None]
"""Told a stage and the share of it done."""
EVERY_S = 5.0
"""Where stderr is no terminal, how often a line says how far the work is."""
SCHEMAS = {
    "bench": 1, "breakeven": 1, "calibrate": 1, "calibrate-tables": 1, "compare": 1, "convert": 1, "diff": 1,
    "export": 1, "homes": 1, "inspect": 1, "machines": 1, "plan": 1, "record": 1, "verdict": 1, "verify": 1, "watch": 1,
}  # fmt: skip
"""Versions of what ``--json`` prints: one more where a key goes or means something else, none where one is new."""


class _Console(Console):
    """Texts are texts, in lines as in cells: no markup, no emoji names, and nothing that a terminal acts on.

    A line feed in a text is none of ours: it is in a name, and shown as an escape.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich makes it, of the text as it can be printed."""
        return super().render_str(printable(text), **options)

    def print(self, *texts: Any, **options: Any) -> None:
        """As rich does; what a stream did not take is not said once more before the next text."""
        try:
            super().print(*texts, **options)
        except BaseException:
            del self._buffer[:]
            raise


class _Out(_Console):
    """stdout, which may be full or read by nobody."""

    def print(self, *texts: Any, **options: Any) -> None:
        """As rich does.

        Raises
        ------
        Unwritable : the stream takes nothing.
        """
        with writing():
            super().print(*texts, **options)


out = _Out(soft_wrap=True, width=None if sys.stdout.isatty() else 110)
talk = _Console(stderr=True)


@contextmanager
def errors() -> Iterator[None]:
    """Turn poise's errors into a message on stderr and exit code 2 (input) or 1 (no result), signals into 128 + N."""
    try:
        with compiling(), _warnings_told():
            yield
    except PoiseError as error:
        talk.print(Text("error:", "bold red"), error.message)
        if error.hint:
            talk.print(f"hint: {error.hint}")
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from None
    except Ended as end:
        with suppress(OSError):  # the terminal may be what went away
            talk.print(f"ended by {signal.Signals(end.number).name}")
        raise typer.Exit(end.status) from None
    except MemoryError as error:  # numpy's says how much it wanted
        talk.print(Text("error:", "bold red"), f"out of memory: {error or 'no more is given'}")
        talk.print("hint: give a part of the traffic, or a machine with more memory")
        raise typer.Exit(1) from None
    except Unwritable as error:
        if told := error.told():
            talk.print(Text("error:", "bold red"), told)
        raise typer.Exit(1) from None


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Warnings of poise in one line on stderr, without the line of code that gave them."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if category is UserWarning:
                talk.print(f"warning: {message}")
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


@contextmanager
def compiling() -> Iterator[None]:
    """Say on stderr that functions are compiled, and at the end how many and in what time."""
    COMPILATION.on_first = lambda: talk.print("compiling, which is done once ...")
    count, seconds = COMPILATION.count, COMPILATION.seconds
    try:
        yield
    finally:
        if COMPILATION.count > count:
            took = COMPILATION.seconds - seconds
            made = COMPILATION.count - count
            talk.print(f"compiled {made} function{'s' if made > 1 else ''} in {took:.0f} s, once")


@contextmanager
def progress() -> Iterator[Report]:
    """How far the work is, on stderr: a bar that is gone when done; where that is no terminal, a line each 5 s."""
    if not talk.is_terminal:
        with _lines() as report:
            yield report
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # what no terminal needs is not loaded

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda stage, share: bar.update(task, description=stage, completed=share)


@contextmanager
def _lines() -> Iterator[Report]:
    """Lines from a thread of their own: stages that take long tell nothing meanwhile."""
    began, done, now = time.monotonic(), threading.Event(), ["working"]

    def say() -> None:
        while not done.wait(EVERY_S):
            what = f"compiling function {COMPILATION.count}" if COMPILATION.busy else now[0]
            talk.print(f"{what}, {time.monotonic() - began:.0f} s so far", soft_wrap=True)

    def report(stage: str, share: float) -> None:
        now[0] = f"{stage} {share:.0%}"

    teller = threading.Thread(target=say, name="poise-progress", daemon=True)
    teller.start()
    try:
        yield report
    finally:
        done.set()
        teller.join()


def command_line() -> str:
    """The command that runs, as it can be typed again."""
    return shlex.join(["poise", *sys.argv[1:]])


def table(title: str, heads: Iterable[str], left: Container[str] = ()) -> Table:
    """An empty table: columns of figures, but for those in ``left``, which hold words."""
    from rich.table import Table  # what --json needs not is not loaded

    made = Table(title=title, title_justify="left")
    for head in heads:
        made.add_column(head, justify="left" if head in left else "right")
    return made


def say_notes(notes: Iterable[str]) -> None:
    """Notes that belong to the data, on stdout."""
    for note in notes:
        out.print(f"note: {note}")


def print_json(kind: str, value: Mapping[str, Any], indent: int | None = 2) -> None:
    """JSON on stdout, which begins with the version of its form (:data:`SCHEMAS`).

    Raises
    ------
    Unwritable : the stream takes nothing.
    """
    text = json.dumps(named(kind, value), indent=indent, allow_nan=False) + "\n"
    with writing():
        sys.stdout.write(text)
        sys.stdout.flush()


def named(kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A value with its ``schema`` before it."""
    return {"schema": SCHEMAS[kind], **value}
