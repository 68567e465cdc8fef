"""poise watch: a placement that follows the traffic of a growing trace, a folder of dumps, or a serving engine."""

from __future__ import annotations

import json as jsonlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy as np
import typer

from poise.cli import options as o
from poise.control.controller import ControlSettings, Decision, Look
from poise.control.restart import Restart
from poise.engines import sglang as sglang_file
from poise.engines.dump import ReadOptions
from poise.engines.readers import read_dump
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.planning.solve.solve import METHODS
from poise.util.errors import OptionError, TraceError
from poise.util.words import percent
from poise.watch.board import Board
from poise.watch.metrics import Metrics
from poise.watch.page import Page, answers, listen_address
from poise.watch.service import Output, Planned, Seen, Service, ServiceEvent, Setup, Told, Trouble
from poise.watch.sglang_recorder import SGLangRecorder
from poise.watch.sources import DumpFolder, Polled, Source, Tail

FILE_INTERVAL_S, ENGINE_INTERVAL_S = 1.0, 10.0
GENERIC = "no model was named (--model), so sizes are generic: gains, and what is worth it, are not yours"
LEAVE_S = 4.5
"""Seconds after a signal at which the watch is gone, whatever holds it."""
STALE_S = 120.0
"""Seconds without a look, beside ten intervals, after which the watch calls itself ill."""


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
        own = [] if self.output is None else [Output("npz", o.writable(self.output))]
        return own + [_output(spec) for spec in self.export or []]


@dataclass(frozen=True, slots=True)
class PageOptions:
    """The page."""

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
            read=partial(read_dump, options=ReadOptions(model=setup.model)),
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


@o.grouped
def watch(
    *,
    cluster: o.ClusterSpec,
    trace: Annotated[
        str | None,
        typer.Argument(help="Routing trace or load profile that may grow, or a folder that dumps come into."),
    ] = None,
    placement: Annotated[
        Path | None, o.flag("placement", "Placement in use: .npz, or SGLang's .json. Default: contiguous.")
    ] = None,
    redundant: Annotated[
        int | None, o.flag("redundant", "Redundant slots a layer, without --placement. Default: 0.")
    ] = None,
    priced: o.PricingOptions,
    tokens_per_step: o.TokensPerStep = None,
    control: ControlOptions,
    follow: Annotated[bool, typer.Option("--follow/--once", help="Wait for more, or end at the file's end.")] = True,
    interval: Annotated[
        float | None, typer.Option(help="Seconds between looks at the source. Default: 1; with --sglang 10.")
    ] = None,
    written: OutputOptions,
    shown: PageOptions,
    recorded: RecorderOptions,
    time_limit: o.TimeLimit = 10.0,
    seed: o.Seed = 0,
    json: Annotated[bool, o.flag("json", "Print one JSON object a line.")] = False,
) -> None:
    """Watch traffic, and plan anew when it drifts and the gain is worth the moves.

    Moves are taken to be made at once; with --export or --sglang a new map serves from the engine's next start on, and
    what runs and what would run after a restart are told apart. Ends with --once at the file's end, else when
    interrupted.

    Example: poise watch trace.npz --cluster 2x8:h100 --redundant 16 --model deepseek-v3 --max-moves 64 -o now.npz

    Beside an engine: poise watch --sglang http://127.0.0.1:30000 --dump-dir /dumps --cluster 1x8:h100
    --model deepseek-v3 --export sglang:/maps/map.json --listen 9464
    """
    with o.errors():
        outputs, engine = written.outputs(), recorded.sglang
        if interval is None:
            interval = FILE_INTERVAL_S if engine is None else ENGINE_INTERVAL_S
        if not (np.isfinite(interval) and interval > 0):
            raise OptionError(f"the interval must be above 0 s, got {interval}")
        if tokens_per_step is not None and tokens_per_step < 1:
            raise OptionError(f"tokens_per_step must be at least 1, got {tokens_per_step}")
        if placement is not None and redundant is not None:
            raise OptionError("--redundant is for a watch without --placement: that has slots of its own")
        at_start = bool(written.export) or engine is not None
        settings = control.settings(time_limit=time_limit, seed=seed, follow=follow, at_start=at_start)
        shown.check()
        machine, said = Cluster.parse(cluster), priced.checked()
        sizes = None if priced.model is None else ModelSpec.parse(priced.model)
        use = None if placement is None else _placement(placement, machine.num_devices)
        setup = Setup(machine, settings, sizes, said["traffic"], said["split"] or "even", use, redundant or 0,
                      written.num_hidden_layers)  # fmt: skip
        source = recorded.source(trace, setup, tokens_per_step, follow=follow, redundant=redundant is not None)
        ending = _Ending()
        service = Service(source, setup, outputs, measured=shown.listen is not None, whole=ending.later)
        with ending, ExitStack() as stack:
            listeners: list[Board | Metrics] = []
            if shown.listen is not None:
                names = ", ".join(str(one.path) for one in outputs)
                about = {"source": engine or trace, "cluster": cluster, "model": priced.model or "generic model",
                         "method": control.method, "outputs": names or "writes nothing"}  # fmt: skip
                board, metrics = Board(about, window=control.window), Metrics()
                listeners = [board, metrics]
                answer = answers(board, metrics, stale_s=10 * interval + STALE_S)
                page = Page(listen_address(shown.listen), answer, hosts=shown.allow_host or ())
                page.start()
                stack.callback(page.close)
                _say_listening(page.url, json)
            if sizes is None:
                o.talk.print(GENERIC)
            teller = _Teller(written.output, at_start, json, generic=sizes is None)
            events = stack.enter_context(closing(service.run(once=not follow, interval_s=interval, wait=ending.wait)))
            for event in events:
                for listener in listeners:
                    listener.note(event)
                teller.say(event)
        if service.controller is None and not follow and isinstance(source, Tail):
            raise TraceError(f"{trace} holds {source.tokens} rows, less than a step of {source.tokens_per_step}")
        if service.controller is None and not follow:
            raise TraceError(f"{trace} holds no dump with traffic")
        o.talk.print(f"{0 if service.controller is None else service.controller.step} steps watched")
        ending.leave()


def _output(spec: str) -> Output:
    target, colon, path = spec.partition(":")
    if not colon or not path:
        raise OptionError(f"--export {spec!r:.80} names no file", hint="ENGINE:FILE, as in sglang:map.json")
    return Output(target, o.writable(Path(path)))


def _placement(path: Path, num_devices: int) -> Placement:
    if path.suffix == ".json":
        return sglang_file.read(path, num_devices=num_devices)
    return Placement.load(path)


class _Ending:
    """Supervisors end a sidecar with SIGTERM, a terminal that goes with SIGHUP: it leaves as with control-C, at once.

    The signal interrupts what is done at the moment, but a file that is being written; a second one changes nothing.
    What has not ended after LEAVE_S (a disk that hangs) is ended by the system, with SIGALRM.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.came = False
        self._held = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # only there signals can be taken
            for number in self.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self._before[number] = signal.signal(number, self._take)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """Take signals as before; an interrupt is the end of a watch, and no error."""
        if self.came:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        return kind is KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            return
        self.came = True
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LEAVE_S)
        if not self._held:
            raise KeyboardInterrupt

    @contextmanager
    def later(self) -> Iterator[None]:
        """What is done here is done to its end; the signal counts then."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self.came and not self._held:
                raise KeyboardInterrupt

    def wait(self, seconds: float) -> None:
        """Sleep; not at all after a signal that was lost (Python drops what is raised inside a destructor)."""
        if self.came:
            raise KeyboardInterrupt
        time.sleep(seconds)

    def leave(self) -> None:
        """After a signal: neither wait for a plan that is being made nor unload libraries, which takes seconds."""
        if self.came:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(0)


class _Teller:
    """Prints events; a problem that stays is told once."""

    def __init__(self, output: Path | None, at_start: bool, json: bool, *, generic: bool = False) -> None:
        self._output, self._at_start, self._json = output, at_start, json
        self._told: tuple[str, ...] = ()
        self._troubles: tuple[list[str], list[str]] = [], []  # of the look before and of this one
        self._no_plan = ""
        self._generic = generic

    def say(self, event: ServiceEvent) -> None:
        """Print an event."""
        if isinstance(event, Polled):
            for message in event.problems:
                if message not in self._told:
                    self._say_problem(message)
            self._told = event.problems
            self._troubles = self._troubles[1], []
            for message in event.notes:
                self._say_note(Told(message))
        elif isinstance(event, Trouble):
            known = (self._no_plan,) if event.failed_plan else (*self._troubles[0], *self._troubles[1])
            if event.message not in known:
                self._say_problem(event.message)
            if event.failed_plan:
                self._no_plan = event.message
            else:
                self._troubles[1].append(event.message)
        elif isinstance(event, Told):
            self._say_note(event)
        elif isinstance(event, Seen):
            _say_look(event.look, self._at_start, self._json)
        else:
            self._no_plan = ""
            _say_decision(event, self._output, self._json, " of generic sizes" if self._generic else "")

    def _say_problem(self, message: str) -> None:
        if self._json:
            _line({"event": "problem", "message": message})
        else:
            o.talk.print(message, soft_wrap=True)

    def _say_note(self, told: Told) -> None:
        if self._json:
            _line({"event": "note", "message": told.message, "files": [str(path) for path in told.written]})
        else:
            o.talk.print(told.message, soft_wrap=True)


def _say_listening(url: str, json: bool) -> None:
    if json:
        _line({"event": "listening", "url": url})
    o.talk.print(f"page at {url}, metrics at {url}metrics", soft_wrap=True)


def _say_look(look: Look, at_start: bool, json: bool) -> None:
    verdict = look.verdict
    p_value, layer = (None, None) if verdict is None else (verdict.p_value, verdict.worst_layer)
    alarm = verdict is not None and verdict.drifted
    if json:
        _line({"event": "look", "step": look.step, "imbalance": look.imbalance, "p_value": p_value, "alarm": alarm,
               "worst_layer": layer, "state": look.state, "imbalance_running": look.imbalance,
               "imbalance_after_restart": look.imbalance_after_restart, "restart": _restart(look.restart)})  # fmt: skip
        return
    drift = "learning" if look.learning and verdict is None else "no test" if p_value is None else f"p {p_value:.4f}"
    runs = f"{look.imbalance:.3f}"
    if at_start:
        runs += f" running, {look.imbalance_after_restart:.3f} after a restart"
    line = f"step {look.step:>6}  imbalance {runs}  {drift}{'  ALARM' if alarm else ''}"
    o.out.print(line)


def _say_decision(event: Planned, output: Path | None, json: bool, sizes: str) -> None:
    decision: Decision = event.decision
    moves, restart = decision.moves, decision.restart
    verdict = "not worth it" if not decision.accepted else "moving" if restart is None else "for the next start"
    if json:
        files = [str(path) for path in event.written]
        _line({"event": "plan", "step": decision.step, "reason": decision.reason, "accepted": decision.accepted,
               "predicted_gain": decision.predicted_gain, "gain_seconds": decision.gain_seconds,
               "cost_seconds": decision.cost_seconds, "moves": moves.fetched, "bytes": moves.moved_bytes,
               "rounds": len(moves.rounds), "left": decision.left, "verdict": verdict, "restart": _restart(restart),
               "file": str(output) if output in event.written else None, "files": files})  # fmt: skip
        return
    o.out.print(
        f"step {decision.step:>6}  plan ({decision.reason}): gain {percent(decision.predicted_gain)} of a step{sizes}, "
        f"{moves.fetched} moves, {moves.moved_bytes / 2**20:.1f} MiB, {len(moves.rounds)} rounds, "
        f"{1e3 * decision.cost_seconds:.2f} ms of links: {verdict}"
        + (f", {decision.left} moves left" if decision.accepted and decision.left else ""),
    )  # fmt: skip
    if restart is not None:
        o.out.print(f"{'':13}{restart.sentence()}")


def _restart(restart: Restart | None) -> dict[str, Any] | None:
    """What a restart would bring; None: nothing, or maps serve at once."""
    if restart is None:
        return None
    return {
        "imbalance_running": restart.imbalance_running, "imbalance_after_restart": restart.imbalance_after,
        "gain_seconds": restart.gain_seconds, "predicted_gain": restart.gain,
        "restart_seconds": restart.restart_seconds,
        "steps_to_win_back": restart.steps_to_win_back, "pays": restart.pays, "verdict": restart.sentence(),
    }  # fmt: skip


def _line(value: dict[str, Any]) -> None:
    sys.stdout.write(jsonlib.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()
