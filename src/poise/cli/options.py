"""What the verbs share: options, one by one and in groups, and the streams of :mod:`poise.cli.terminal`.

An option of several verbs is written here once: as a type where its text is the same in all of them, by its names
(:func:`flag`) where its meaning differs, and in a group (a frozen dataclass of options, :func:`grouped`) where it
always comes with others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from poise.cli.terminal import command_line as command_line
from poise.cli.terminal import errors as errors
from poise.cli.terminal import out as out
from poise.cli.terminal import print_json as print_json
from poise.cli.terminal import progress as progress
from poise.cli.terminal import say_notes as say_notes
from poise.cli.terminal import table as table
from poise.cli.terminal import talk as talk
from poise.util.errors import OptionError
from poise.util.files import check_output
from poise.util.words import close_to

TIME_LIMIT = (
    "Seconds a method may take for its plan, the price of it, and a second plan without redundant slots. On top come "
    "judging, and once compiling."
)

FLAGS = {
    "cluster": ("--cluster", "-c"),
    "html": ("--html",),
    "json": ("--json",),
    "keep_groups": ("--keep-groups",),
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
MaybeCluster = Annotated[
    str | None,
    flag("cluster", "NxD, NxD:preset as in 2x8:h100, or a .yaml file. With --recipe default: what that says."),
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
        help="Where files of a folder are read and starts of plans made: serial, threads, processes (or :N of them), "
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


def one_of(name: str, value: str | None, allowed: tuple[str, ...]) -> Any:
    """The value, if it is None or allowed."""
    if value is not None and value not in allowed:
        raise OptionError(f"unknown {name} {value!r}", hint=close_to(value, allowed))
    return value


def writable(path: Path, *endings: str) -> Path:
    """The path, if a file can be written there and its name ends as its content does; checked before long work."""
    check_output(path, OptionError)
    if endings and path.suffix not in endings:
        raise OptionError(
            f"{str(path)[:200]!r} does not end in {' or '.join(endings)}: that is what is written there",
            hint=f"name it {path.stem}{endings[0]}; an engine's file is what 'poise export' makes of it",
        )
    return path
