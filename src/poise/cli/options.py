"""What the verbs share: options, one by one and in groups, streams, errors -> exit codes, progress.

An option of several verbs is written here once: as a type where its text is the same in all of them, by its names
(:func:`flag`) where its meaning differs, and in a group (a frozen dataclass of options, :func:`grouped`) where it
always comes with others.
"""

from __future__ import annotations

import inspect
import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from poise.cli.ending import Ended
from poise.cost.split import SPLITS
from poise.cost.traffic import DATA_FLOWS
from poise.planning.engine_rules import ENGINES
from poise.planning.groups import KEEP
from poise.planning.problem import Progress as Report
from poise.routing.batch import HOMES
from poise.routing.batching import ORDERS
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

FLAGS = {
    "cluster": ("--cluster", "-c"),
    "html": ("--html",),
    "json": ("--json",),
    "model": ("--model", "-m"),
    "output": ("--output", "-o"),
    "placement": ("--placement", "-p"),
    "rank_map": ("--rank-map",),
    "redundant": ("--redundant", "-r"),
    "time_limit": ("--time-limit",),
    "tokens_per_step": ("--tokens-per-step", "-n"),
}
"""Names of the options whose text differs by verb."""


def flag(name: str, text: str) -> Any:
    """An option of :data:`FLAGS` with the text of one verb."""
    return typer.Option(*FLAGS[name], help=text)


MODEL_TEXT = "Model preset or a Hugging Face config.json."
Traces = Annotated[
    list[str],
    typer.Argument(
        help="Routing traces (.npz) or load profiles (.json, .npz). FILE#domain=a,half=first keeps a part. "
        "Of a folder, the loads of its files.",
        show_default=False,
    ),
]
ClusterSpec = Annotated[
    str,
    flag(
        "cluster",
        "NxD, NxD:preset as in 2x8:h100, with measured constants as in 2x8:h200+vllm.fp8_block ('poise machines'), or "
        "a .yaml file.",
    ),
]
Redundant = Annotated[int, flag("redundant", "Redundant slots a layer, in all.")]
Model = Annotated[str | None, flag("model", MODEL_TEXT)]
NamedModel = Annotated[str, flag("model", MODEL_TEXT)]
TrafficModel = Annotated[
    str | None,
    typer.Option(
        "--traffic",
        help="home, home_device_dedup, home_node_dedup or stay. Default: what the library of the all-to-alls sends "
        "(a datasheet's: home_node_dedup); loads: home.",
    ),
]
SplitRule = Annotated[
    str | None, typer.Option("--split", help="Token split over replicas: even, near or exact. Default: the engine's.")
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        help=f"Who holds the plan: {', '.join(ENGINES)}. Engines fill every slot, and so does a plan, but with none.",
    ),
]
KeepGroups = Annotated[
    str | None,
    typer.Option(
        "--keep-groups",
        help="The model's routing groups: whole on nodes; whole in ids, blocks of new expert ids (always so for an "
        "engine that takes those); or pays: on nodes in the layers where the modelled time is less.",
    ),
]
TokensPerStep = Annotated[int | None, flag("tokens_per_step", "N, tokens of one forward pass.")]
HomesRule = Annotated[
    str | None,
    typer.Option(
        "--homes",
        help="Ranks on which tokens are at home: equal tokens a rank, as attention data parallelism keeps them, or "
        "by-request. Default: as recorded, else equal.",
    ),
]
StepOrder = Annotated[str, typer.Option("--order", help="interleaved requests, or file order.")]
TimeLimit = Annotated[float, flag("time_limit", TIME_LIMIT)]
Work = Annotated[
    float | None,
    typer.Option(
        "--work",
        help="Million elementary updates of search, about 1/30 s each, instead of --time-limit: no clock, and with a "
        "seed the same plan on every machine.",
    ),
]
Executor = Annotated[
    str,
    typer.Option(
        "--executor",
        help="Where files of a folder are read and starts of a plan made: serial, threads, processes (or :N of them), "
        "ray://local, dask://local or a cluster's address. The result is the same.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same plan.")]
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
Json = Annotated[bool, flag("json", "Print JSON on stdout.")]


@dataclass(frozen=True, slots=True)
class PricingOptions:
    """How a step is priced."""

    model: Model = None
    traffic: TrafficModel = None
    split: SplitRule = None

    def checked(self) -> dict[str, Any]:
        """The options as :mod:`poise.api` takes them; OptionError for an unknown word."""
        return {
            "model": self.model, "traffic": one_of("traffic model", self.traffic, DATA_FLOWS),
            "split": one_of("split", self.split, SPLITS),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepOptions(PricingOptions):
    """How a step is priced, who holds the plan, and how traffic is batched into steps."""

    engine: EngineName = "any"
    keep_groups: KeepGroups = None
    tokens_per_step: TokensPerStep = None
    order: StepOrder = "interleaved"
    homes: HomesRule = None

    def checked(self) -> dict[str, Any]:
        """See :meth:`PricingOptions.checked`."""
        return PricingOptions.checked(self) | {
            "engine": self.engine, "keep_groups": one_of("way to keep groups", self.keep_groups, KEEP),
            "tokens_per_step": self.tokens_per_step,
            "order": one_of("order", self.order, ORDERS), "homes": one_of("homes", self.homes, HOMES),
        }  # fmt: skip


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb for typer: a parameter that is a frozen dataclass of options becomes the options, at the same place.

    A field of it may be such a dataclass in turn.
    """
    hints = get_type_hints(verb, include_extras=True)
    spread: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        spread += _options(name, hints[name], parameter.default)

    @wraps(verb)
    def run(**given: Any) -> None:
        verb(**{name: _made(name, kind, given) for name, kind in hints.items() if name != "return"})

    run.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in spread}
    return run


def _options(name: str, kind: Any, default: Any) -> list[inspect.Parameter]:
    """A parameter, or those of the fields of a dataclass."""
    if not is_dataclass(kind):
        default = inspect.Parameter.empty if default is MISSING else default
        return [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)]
    types = get_type_hints(kind, include_extras=True)
    return [option for one in fields(kind) for option in _options(one.name, types[one.name], one.default)]


def _made(name: str, kind: Any, given: dict[str, Any]) -> Any:
    """The value of a parameter or field; what it takes is gone from ``given``."""
    if not is_dataclass(kind):
        return given.pop(name)
    types = get_type_hints(kind, include_extras=True)
    made: Callable[..., Any] = kind  # type: ignore[assignment]
    return made(**{one.name: _made(one.name, types[one.name], given) for one in fields(kind)})


@contextmanager
def errors() -> Iterator[None]:
    """Turn poise's errors into a message on stderr and exit code 2 (input) or 1 (no result), signals into 128 + N."""
    try:
        with _warnings_told():
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
