"""What poise watch is asked, and what it works with then."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from poise.cli import options as o
from poise.cli.pricing import PricingOptions
from poise.control.controller import ControlSettings
from poise.engines import sglang as sglang_file
from poise.engines.dump import ReadOptions
from poise.engines.readers import read_dump
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.planning.solve.solve import METHODS
from poise.util.errors import OptionError, TraceError
from poise.watch.effect import WINDOW_S, MapEffects, MetricsUrl, ScrapeFolder
from poise.watch.service import Output, Setup
from poise.watch.sglang_recorder import SGLangRecorder
from poise.watch.sources import DumpFolder, Source, Tail

FILE_INTERVAL_S, ENGINE_INTERVAL_S = 1.0, 10.0


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """When to plan anew, and how."""

    window: Annotated[int, typer.Option(help="Steps of a window; four windows make a reference.")] = 16
    every: Annotated[int, typer.Option(help="Steps between looks.")] = 8
    max_moves: Annotated[int | None, typer.Option(help="Most experts fetched at a time. Default: no limit.")] = None
    false_alarm_rate: Annotated[float, typer.Option(help="Odds that a look at unchanged traffic alarms.")] = 0.01
    horizon: Annotated[float, typer.Option(help="Steps that a new placement is expected to serve.")] = 10_000
    restart_seconds: Annotated[
        float | None,
        typer.Option(
            help="Seconds without serving that a restart costs, where only that brings a map in. Default: unknown."
        ),
    ] = None
    method: Annotated[str, typer.Option(help="Method that plans, as in 'poise plan'.")] = "poise"

    def settings(self, *, time_limit: float, seed: int, follow: bool, at_start: bool) -> ControlSettings:
        """The controller's settings; OptionError where the options do not go together."""
        if self.restart_seconds is not None and not at_start:
            raise OptionError(
                "--restart-seconds prices a restart, and without --export or --sglang none is needed",
                hint="--export ENGINE:FILE writes the map that the engine takes when it starts",
            )
        if METHODS.ask(self.method).pooled:
            raise OptionError(f"{self.method} counts slots over all layers together; moves need them layer by layer")
        return ControlSettings(
            window=self.window, every=self.every, false_alarm_rate=self.false_alarm_rate, max_moves=self.max_moves,
            horizon_steps=self.horizon, method=self.method, time_limit_s=time_limit, seed=seed, background=follow,
            at_start=at_start, restart_seconds=self.restart_seconds,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Files that are kept up to date."""

    output: Annotated[Path | None, o.flag("output", "Placement file to keep up to date.")] = None
    export: Annotated[
        list[str] | None,
        typer.Option(help="ENGINE:FILE to keep up to date too, as 'poise export --to ENGINE' writes it. Repeatable."),
    ] = None
    num_hidden_layers: Annotated[
        int | None, typer.Option(help="Decoder layers, for --export; --model and SGLang's dumps know it too.")
    ] = None

    def outputs(self) -> list[Output]:
        """The files; OptionError for one that cannot be written."""
        own = [] if self.output is None else [Output("npz", o.writable(self.output, ".npz"))]
        return own + [_output(spec) for spec in self.export or []]


@dataclass(frozen=True, slots=True)
class PageOptions:
    """Where the page is served, and under which names."""

    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT (or PORT, this machine only) for the page and /metrics.")
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="With --listen: a name under which it is asked, beside localhost and addresses. Repeatable."),
    ] = None

    def check(self) -> None:
        """OptionError for names of no page."""
        if self.allow_host and self.listen is None:
            raise OptionError("--allow-host is of the page, and without --listen there is none")


@dataclass(frozen=True, slots=True)
class RecorderOptions:
    """The engine that is recorded, and its dumps."""

    sglang: Annotated[str | None, typer.Option(help="Address of an SGLang engine to record, in place of TRACE.")] = None
    dump_dir: Annotated[
        Path | None, typer.Option(help="With --sglang: its SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR, readable here.")
    ] = None
    api_key: Annotated[str | None, typer.Option(envvar="SGLANG_API_KEY", help="With --sglang: its --api-key.")] = None
    admin_api_key: Annotated[
        str | None, typer.Option(envvar="SGLANG_ADMIN_API_KEY", help="With --sglang: its --admin-api-key.")
    ] = None
    steps_per_dump: Annotated[
        int, typer.Option(help="Steps of a dump that are watched, evenly spaced; the drift test needs few.")
    ] = 16
    delete_dumps: Annotated[bool, typer.Option("--delete-dumps", help="Remove a dump once it was read.")] = False

    def source(
        self, trace: str | None, setup: Setup, tokens_per_step: int | None, *, follow: bool, redundant: bool
    ) -> Source:
        """What is watched: the engine, or what ``trace`` names.

        Raises
        ------
        OptionError, TraceError : it is named twice or not at all, or is not there.
        """
        folder = self.dump_dir or (Path(trace) if trace is not None and Path(trace).is_dir() else None)
        dumps = None if folder is None else DumpFolder(
            folder, tokens_per_step=tokens_per_step, most_steps=self.steps_per_dump, delete=self.delete_dumps,
            read=partial(read_dump, options=ReadOptions(model=setup.model, allow_running=True)),
        )  # fmt: skip
        if self.sglang is not None:
            if trace is not None or dumps is None or not follow or redundant:
                raise OptionError(
                    "--sglang needs --dump-dir, and goes with neither a trace, --once nor --redundant",
                    hint="the engine says how many redundant slots it has",
                )
            return SGLangRecorder(
                self.sglang, dumps, num_devices=setup.cluster.num_devices, api_key=self.api_key,
                admin_api_key=self.admin_api_key,
            )  # fmt: skip
        if trace is None or self.dump_dir is not None:
            raise OptionError("name what to watch: a trace, a folder of dumps, or --sglang with --dump-dir")
        if dumps is not None:
            return dumps
        if not Path(trace.partition("#")[0]).exists():
            raise TraceError(f"no such file: {trace.partition('#')[0]}")
        return Tail(trace, tokens_per_step)


@dataclass(frozen=True, slots=True)
class EffectOptions:
    """The engine's own metrics, by which maps are judged once they run."""

    metrics: Annotated[
        str | None,
        typer.Option(
            help="Address of the engine's own /metrics (vLLM, SGLang), or a folder of saved ones (SECONDS.prom): says "
            "whether a map helped, and goes back to the one before it where it hurt."
        ),
    ] = None
    metrics_window: Annotated[
        float, typer.Option(help="With --metrics: seconds of a window; some tens of windows a map tell.")
    ] = WINDOW_S

    def effects(self, *, follow: bool) -> MapEffects | None:
        """What judges maps; OptionError for an address or folder that is none, or a watch that ends at once."""
        if self.metrics is None:
            if self.metrics_window != WINDOW_S:
                raise OptionError("--metrics-window is of --metrics, which is not there")
            return None
        address = "://" in self.metrics
        source = MetricsUrl(self.metrics) if address else ScrapeFolder(Path(self.metrics), since_s=time.time())
        effects = MapEffects(source, window_s=self.metrics_window)
        if not follow:
            raise OptionError(
                "--metrics judges a map by windows that come while the engine serves, and --once waits for none",
                hint="--follow, with a trace that grows, a folder of dumps or --sglang",
            )
        return effects


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """Options of ``poise watch``, in the order of its help."""

    cluster: o.ClusterSpec
    trace: Annotated[
        str | None,
        typer.Argument(help="Routing trace or load profile that may grow, or a folder that dumps come into."),
    ] = None
    placement: Annotated[
        Path | None, o.flag("placement", "Placement in use: .npz, or SGLang's .json. Default: contiguous.")
    ] = None
    redundant: Annotated[
        int | None, o.flag("redundant", "Redundant slots a layer, without --placement. Default: 0.")
    ] = None
    priced: PricingOptions
    tokens_per_step: o.TokensPerStep = None
    control: ControlOptions
    follow: Annotated[bool, typer.Option("--follow/--once", help="Wait for more, or end at the file's end.")] = True
    interval: Annotated[
        float | None, typer.Option(help="Seconds between looks at the source. Default: 1; with --sglang 10.")
    ] = None
    written: OutputOptions
    shown: PageOptions
    recorded: RecorderOptions
    heard: EffectOptions
    time_limit: o.TimeLimit = 10.0
    seed: o.Seed = 0
    json: Annotated[bool, o.flag("json", "Print one JSON object a line.")] = False

    @property
    def interval_s(self) -> float:
        """Seconds between looks."""
        if self.interval is not None:
            return self.interval
        return FILE_INTERVAL_S if self.recorded.sglang is None else ENGINE_INTERVAL_S

    @property
    def at_start(self) -> bool:
        """Whether only a restart of the engine brings a map in."""
        return bool(self.written.export) or self.recorded.sglang is not None

    def setup(self) -> Setup:
        """What the service works with; PoiseError where options do not go together or do not say what they should."""
        if not (np.isfinite(self.interval_s) and self.interval_s > 0):
            raise OptionError(f"the interval must be above 0 s, got {self.interval_s}")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise OptionError(f"tokens_per_step must be at least 1, got {self.tokens_per_step}")
        if self.placement is not None and self.redundant is not None:
            raise OptionError("--redundant is for a watch without --placement: that has slots of its own")
        settings = self.control.settings(time_limit=self.time_limit, seed=self.seed, follow=self.follow,
                                         at_start=self.at_start)  # fmt: skip
        self.shown.check()
        machine, said = Cluster.parse(self.cluster), self.priced.checked()
        sizes = None if self.priced.model is None else ModelSpec.parse(self.priced.model)
        use = None if self.placement is None else _placement(self.placement, machine.num_devices)
        return Setup(machine, settings, sizes, said["traffic"], said["split"] or "even", use, self.redundant or 0,
                     self.written.num_hidden_layers)  # fmt: skip

    def source(self, setup: Setup) -> Source:
        """What is watched; errors of :meth:`RecorderOptions.source`."""
        return self.recorded.source(self.trace, setup, self.tokens_per_step, follow=self.follow,
                                    redundant=self.redundant is not None)  # fmt: skip


def _output(spec: str) -> Output:
    target, colon, path = spec.partition(":")
    if not colon or not path:
        raise OptionError(f"--export {spec!r:.80} names no file", hint="ENGINE:FILE, as in sglang:map.json")
    return Output(target, o.writable(Path(path)))


def _placement(path: Path, num_devices: int) -> Placement:
    if path.suffix == ".json":
        return sglang_file.read(path, num_devices=num_devices)
    return Placement.load(path)
