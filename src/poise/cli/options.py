"""What the verbs share: options, streams, errors -> exit codes, progress."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from poise.cli.ending import Ended
from poise.planning.engine_rules import ENGINES
from poise.planning.problem import Progress as Report
from poise.util.compiled import COMPILATION
from poise.util.errors import InputError, OptionError, PoiseError
from poise.util.files import check_output
from poise.util.words import printable


class _Console(Console):
    """Texts are texts, in lines as in cells: no markup, no emoji names, and nothing that a terminal acts on.

    A line feed in a text is none of ours: it is in a name, and shown as an escape.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich makes it, of the text as it can be printed."""
        return super().render_str(printable(text), **options)


out = _Console(soft_wrap=True, width=None if sys.stdout.isatty() else 110)
talk = _Console(stderr=True)

TIME_LIMIT = (
    "Seconds a method may take for its plan, the price of it, and a second plan without redundant slots. On top come "
    "judging, and once compiling."
)

Traces = Annotated[
    list[str],
    typer.Argument(
        help="Routing traces (.npz) or load profiles (.json, .npz). FILE#domain=a,half=first keeps a part.",
        show_default=False,
    ),
]
ClusterSpec = Annotated[
    str, typer.Option("--cluster", "-c", help="NxD, NxD:preset as in 2x8:h100, NxD:preset@tp2, or a .yaml file.")
]
Redundant = Annotated[int, typer.Option("--redundant", "-r", help="Redundant slots a layer, in all.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Model preset or a Hugging Face config.json.")]
TrafficModel = Annotated[
    str | None,
    typer.Option(
        "--traffic", help="home, home_device_dedup, home_node_dedup or stay. Default: home_node_dedup; loads: home."
    ),
]
SplitRule = Annotated[
    str | None, typer.Option("--split", help="Token split over replicas: even or exact. Default: the engine's.")
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        help=f"Who holds the plan: {', '.join(ENGINES)}. Engines fill every slot, and so does a plan, but with none.",
    ),
]
TokensPerStep = Annotated[int | None, typer.Option("--tokens-per-step", "-n", help="N, tokens of one forward pass.")]
StepOrder = Annotated[str, typer.Option("--order", help="interleaved requests, or file order.")]
TimeLimit = Annotated[float, typer.Option("--time-limit", help=TIME_LIMIT)]
Work = Annotated[
    float | None,
    typer.Option(
        "--work",
        help="Million elementary updates of search, about 1/30 s each, instead of --time-limit: no clock, and with a "
        "seed the same plan on every machine.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same plan.")]
Ranks = Annotated[
    str | None,
    typer.Option(
        "--ranks",
        help="What files of several ranks are, if they do not show it: sum (parts of the same passes) or steps.",
    ),
]
AllowMissingRanks = Annotated[
    bool,
    typer.Option(
        "--allow-missing-ranks", help="Take what is there for all traffic where a rank's records are missing."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@contextmanager
def errors() -> Iterator[None]:
    """Turn poise's errors into a message on stderr and exit code 2 (input) or 1 (no result), signals into 128 + N."""
    try:
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
    except BrokenPipeError:
        raise typer.Exit(1) from None


@contextmanager
def compiling() -> Iterator[None]:
    """Say on stderr that functions are compiled, and at the end how many and in what time."""
    COMPILATION.on_first = lambda: talk.print("compiling, which is done once ...")
    try:
        yield
    finally:
        if COMPILATION.count:
            talk.print(f"compiled {COMPILATION.count} functions in {COMPILATION.seconds:.0f} s, once")


@contextmanager
def progress() -> Iterator[Report]:
    """A progress bar on stderr, gone when done; silent where stderr is no terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk, transient=True, disable=not talk.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda stage, share: bar.update(task, description=stage, completed=share)


def print_json(value: Any) -> None:
    """JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def one_of(name: str, value: str | None, allowed: tuple[str, ...]) -> Any:
    """The value, if it is None or allowed."""
    if value is not None and value not in allowed:
        raise OptionError(f"unknown {name} {value!r}", hint=f"one of {', '.join(allowed)}")
    return value


def writable(path: Path) -> Path:
    """The path, if a file can be written there; checked before long work."""
    check_output(path, OptionError)
    return path
