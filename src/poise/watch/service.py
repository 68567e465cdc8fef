"""The loop of ``poise watch``: asks a source, feeds the controller, writes what is accepted. Prints nothing.

:meth:`Service.run` yields what happened, in order; who listens prints it, counts it or draws it.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from poise import api
from poise.control.controller import Controller, ControlSettings, Decision, Look
from poise.control.steps import join_steps, steps_of
from poise.cost.split import Split
from poise.cost.traffic import DataFlow
from poise.engines.dump import SlotRecord
from poise.engines.exports import TARGETS, ExportOptions
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.engine_rules import ANY, ENGINES, hold
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import solve
from poise.routing.batch import RoutingBatch
from poise.util.errors import NoResultError, OptionError, PlacementError, PoiseError, TraceError, told
from poise.watch.effect import Effect, MapEffects, WayBack
from poise.watch.measure import Judged, bound_seconds, judge
from poise.watch.rows import rows_of, served, unlike
from poise.watch.sources import Arrival, Polled, Source

NEW_IDS = frozenset(name for name, rules in ENGINES.items() if rules.ids)
"""Engines for which a plan is new expert ids: exports that only some plans can have."""


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What is known before traffic comes.

    Parameters
    ----------
    cluster, settings : the machine, and how the controller behaves.
    model : sizes; None: a generic model.
    traffic, split : as in :class:`poise.planning.problem.PlacementProblem`; traffic None: by what is recorded.
    placement : what serves now; None: what the source knows, else contiguous.
    redundant : redundant slots a layer of a contiguous start.
    num_hidden_layers : decoder layers, for exports; None: the model's, else those of the first dump.
    """

    cluster: Cluster
    settings: ControlSettings
    model: ModelSpec | None = None
    traffic: DataFlow | None = None
    split: Split = "even"
    placement: Placement | None = None
    redundant: int = 0
    num_hidden_layers: int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A file to keep up to date: a name of :data:`poise.engines.exports.TARGETS`, and where."""

    target: str
    path: Path

    def __post_init__(self) -> None:
        files = [name for name, target in TARGETS.items() if not target.folder]
        if self.target not in files:
            raise OptionError(f"cannot keep a {self.target!r:.40} up to date", hint=f"one of {', '.join(files)}")


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A look of the controller; the rest is None unless the service measures.

    Parameters
    ----------
    look : what the controller saw.
    now, first : the placement that runs, and the one that the engine was started with, on the window.
    bound_seconds : what no placement can beat there.
    """

    look: Look
    now: Judged | None = None
    first: Judged | None = None
    bound_seconds: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A decision; ``before``, ``after`` and ``bound_seconds`` are None unless the service measures.

    Parameters
    ----------
    decision : what the controller decided.
    step : steps that had been watched when it came.
    written : files that were written.
    before, after : the placement that runs and the one decided on, on the latest window.
    """

    decision: Decision
    step: int
    written: tuple[Path, ...] = ()
    before: Judged | None = None
    after: Judged | None = None
    bound_seconds: float | None = None

    @property
    def gap(self) -> float | None:
        """Modelled seconds of the placement decided on over the bound, minus 1."""
        if self.after is None or not self.bound_seconds:
            return None
        return self.after.seconds / self.bound_seconds - 1


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that did not work and does not end the watch.

    Parameters
    ----------
    message : for people.
    bad_dump : a dump could not be used.
    failed_plan : no plan came of it; the next try comes later.
    """

    message: str
    bad_dump: bool = False
    failed_plan: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """Something to know that is no trouble.

    Parameters
    ----------
    message : for people.
    written : files that were written later than their plan.
    replaced : another placement serves than the one decided on.
    """

    message: str
    written: tuple[Path, ...] = ()
    replaced: bool = False


ServiceEvent = Polled | Seen | Planned | Trouble | Told | Effect


class Service:
    """A controller kept on a source's traffic.

    Parameters
    ----------
    source : where traffic comes from.
    setup : what is known before it comes.
    outputs : files to write whenever a plan is accepted.
    measured : judge placements on the window at every look and plan, for metrics and the page.
    whole : held while files are written: who ends the watch from outside waits for its end.
    effects : what the engine's own metrics say of each map; where one hurt, the watch goes back. None: not asked.

    Attributes
    ----------
    controller : None before the first traffic.
    """

    def __init__(
        self, source: Source, setup: Setup, outputs: Sequence[Output] = (), *, measured: bool = False,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext, effects: MapEffects | None = None,
    ) -> None:  # fmt: skip
        self._whole, self._effects = whole, effects
        self._back: WayBack | None = None
        self._said, self._began = False, False  # since the metrics were looked at: what runs, and that it began anew
        self.source, self.setup, self.outputs = source, setup, tuple(outputs)
        self.controller: Controller | None = None
        self._measured = measured
        self._window: deque[RoutingBatch] = deque(maxlen=setup.settings.window)
        self._unwritten: tuple[Output, ...] = ()
        self._recorded_layers: int | None = None
        self._problem: PlacementProblem
        self._first: Placement
        self._decided: Placement

    def run(
        self, *, once: bool, interval_s: float, wait: Callable[[float], None]
    ) -> Generator[ServiceEvent, None, None]:
        """Look, wait, and look again; ``once``: until there is no more at hand.

        Without ``once`` nothing that planning, judging, reading or writing raises ends it (memory that runs out among
        it): it is told as :class:`Trouble`, and tried again.

        Moves are taken to be made as soon as they are decided on; with ``at_start`` (:class:`ControlSettings`) when the
        engine is started anew, which the source has to tell.

        Raises
        ------
        PoiseError : what was asked for does not fit the traffic; with ``once`` also what else goes wrong.
        """
        try:
            while True:
                yield from self._write_again()
                try:
                    got = self.source.poll(last=once)
                except Exception as error:
                    if once or isinstance(error, PoiseError):
                        raise
                    got = Polled(up=False, problems=(f"the source could not be looked at: {told(error)}",))
                yield got
                if got.restarted:
                    yield from self._start_anew()
                for arrival in got.arrivals:
                    try:
                        yield from self._take(arrival, once)
                    except Exception as error:
                        if once or isinstance(error, PoiseError):
                            raise
                        yield Trouble(f"a dump was left out: {told(error)}", bad_dump=True)
                yield from self._carry_out(once)
                yield from self._hear(once)
                if got.more:
                    continue
                if once:
                    return
                wait(interval_s if got.wait_s is None else got.wait_s)
        finally:
            self.source.close()

    def _take(self, arrival: Arrival, once: bool) -> Iterator[ServiceEvent]:
        self._recorded_layers = self._recorded_layers or arrival.recorded_layers
        if self.controller is None:
            if arrival.steps is None:
                return
            self._begin(arrival.steps, arrival.slots)
        assert self.controller is not None
        wrong = "" if arrival.steps is None else unlike(arrival.steps, self._problem.batch)
        if wrong:
            yield Trouble(wrong, bad_dump=True)
            return
        if arrival.slots is not None:
            yield from self._serve(arrival.slots)
        for b in range(0 if arrival.steps is None else arrival.steps.num_steps):
            assert arrival.steps is not None
            one = steps_of(arrival.steps, slice(b, b + 1))
            self._window.append(one)
            try:
                looks = self.controller.observe(one)
            except Exception as error:
                if once:
                    raise
                yield Trouble(f"no plan: {told(error)}", failed_plan=True)
                continue
            for look in looks:
                yield from self._seen(look, once)
            yield from self._carry_out(once)

    def _begin(self, steps: RoutingBatch, slots: SlotRecord | None) -> None:
        s = self.setup
        sizes = s.model or ModelSpec.generic(steps.num_experts, steps.top_k, steps.layer_ids_L)
        sizes.matches(num_experts=steps.num_experts, layer_ids=steps.layer_ids_L)
        flow: DataFlow = s.traffic or ("home_node_dedup" if steps.has_tokens else "home")
        placement, devices = s.placement, s.cluster.num_devices
        if placement is None and slots is not None and slots.map_LS is not None:
            placement = served(slots, steps, devices)
        if placement is None:
            placement = self.source.first_placement(steps, devices)
        if placement is None:
            slots_D = api.deal_slots(steps.num_experts, s.redundant, devices)
            problem = PlacementProblem(steps, s.cluster, sizes, slots_D, flow, s.split)
            placement = solve(problem, method="contiguous").placement
        if placement.num_devices != devices:
            raise OptionError(f"the placement is for {placement.num_devices} devices, the cluster has {devices}")
        placement = hold(rows_of(placement, steps.layer_ids_L), ANY)[0]  # as the engine that serves it holds it
        slots_D = placement.slots_D
        rules = next((ENGINES[one.target] for one in self.outputs if one.target in NEW_IDS), ANY)
        self._problem = PlacementProblem(steps, s.cluster, sizes, slots_D, flow, s.split, current=placement,
                                         engine=rules)  # fmt: skip
        self._first = placement
        self.controller = Controller(self._problem, s.settings)
        for output in self.outputs:  # what cannot be written at all is said before anything is planned
            try:
                with self._whole(), tempfile.TemporaryDirectory(prefix=".poise-", dir=output.path.parent) as folder:
                    TARGETS[output.target].write(placement, Path(folder) / output.path.name, self._options())
            except OSError as error:
                raise PlacementError(f"cannot write {output.path}: {error.strerror}") from None

    def _serve(self, record: SlotRecord) -> Iterator[ServiceEvent]:
        """Go on from what the engine says it runs."""
        control = self.controller
        if control is None or record.map_LS is None or control.state != "idle":
            return
        try:
            runs = served(record, self._problem.batch, self._problem.num_devices)
            runs = rows_of(runs, self._problem.batch.layer_ids_L)
            self._problem.check(runs)
        except (PlacementError, OptionError, TraceError) as error:
            yield Trouble(f"the engine's map was left out: {error.message}")
            return
        self._first, self._said = runs, True
        changed = not runs.holds_like(control.running)
        newest = runs.holds_like(control.current)
        control.runs(runs)
        if not changed:
            return
        if newest:
            yield Told("the engine runs the newest map")
        elif control.running is control.current:
            yield Told("the engine runs another map than was decided on; the watch goes on from it", replaced=True)
        else:
            yield Told("the engine runs another map than before, and not the newest")

    def _start_anew(self) -> Iterator[ServiceEvent]:
        """Compare from now on with what the engine was started with this time."""
        if self.controller is None:
            return
        batch, slots = self._problem.batch, self.controller.current.num_slots
        try:
            runs = self.source.first_placement(batch, self._problem.num_devices)
            if runs is None:
                return
            runs = rows_of(runs, batch.layer_ids_L)
            self._problem.check(runs)
            if runs.num_slots != slots:
                raise PlacementError(f"it has {runs.num_slots} slots a layer, plans are for {slots}")
        except (PlacementError, OptionError) as error:
            yield Trouble(f"the engine was started anew, start the watch anew too: {error.message}")
            return
        self._first, self._began = runs, True
        if self.setup.settings.at_start:
            self.controller.runs(runs)
        other = not runs.holds_like(self.controller.current)
        yield Told(f"the engine was started anew{', not with the newest placement' if other else ''}")

    def _seen(self, look: Look, once: bool) -> Iterator[ServiceEvent]:
        assert self.controller is not None
        runs = self.controller.running
        judged, bound, trouble = self._judge(once, runs, self._first) if self._measured else (None, None, None)
        now, first = judged or (None, None)
        yield Seen(look, now, first, bound)
        if trouble is not None:
            yield trouble

    def _judge(self, once: bool, *placements: Placement) -> tuple[list[Judged] | None, float | None, Trouble | None]:
        """How placements do on the window, and the bound there."""
        try:
            window = join_steps(list(self._window))
            judged: dict[int, Judged] = {}
            for p in placements:
                judged[id(p)] = judged.get(id(p)) or judge(window, p, self._problem)
            return [judged[id(p)] for p in placements], bound_seconds(window, self._problem), None
        except Exception as error:
            if once:
                raise
            return None, None, Trouble(f"the window was not measured: {told(error)}")

    def _carry_out(self, once: bool) -> Iterator[ServiceEvent]:
        """Tell what was decided, and let accepted placements serve."""
        control = self.controller
        while control is not None:
            try:
                decision = control.collect()
            except Exception as error:
                if once:
                    raise
                yield Trouble(f"no plan: {told(error)}", failed_plan=True)
                continue
            if decision is None:
                return
            before = after = bound = trouble = None
            if self._measured:
                judged, bound, trouble = self._judge(once, control.running, decision.moves.result)
                before, after = judged or (None, None)
            files: tuple[Path, ...] = ()
            failures: list[PlacementError] = []
            if decision.accepted:
                self._back = self._back if decision.reason == "hurt" else None
                control.moved()
                self._decided = control.current
                files, failures = self._write(self.outputs)
            yield Planned(decision, control.step, files, before, after, bound)
            if trouble is not None:
                yield trouble
            if failures and once:
                raise failures[0]
            yield from _retried(failures)

    def _hear(self, once: bool) -> Iterator[ServiceEvent]:
        """What the engine's metrics say of the map that runs; where it hurt, the map before it is decided on."""
        follow, control = self._effects, self.controller
        if follow is None:
            return
        try:
            runs, said, began = None if control is None else control.running, self._said, self._began
            self._said = self._began = False
            effects, problems = follow.look(runs, told=said, started=began)
            yield from effects
            yield from (Trouble(message) for message in problems)
            back, follow.back, self._back = follow.back or self._back, None, None
            if control is None or back is None or not back.of(control.running):
                return
            try:
                decided = control.go_back(back.older, back.now_s, back.then_s)
            except NoResultError as error:
                yield Trouble(f"the map that hurt stays: {error.message}")
                return
            self._back = back
            if not decided:
                return
            before = control.current
            yield from self._carry_out(once)
            gone = control.current is before or control.current.holds_like(back.older)
            self._back = None if gone else replace(back, parts=(*back.parts, control.current))
        except Exception as error:
            if once:
                raise
            yield Trouble(f"the engine's metrics were not judged: {told(error)}")

    def _write(self, outputs: Sequence[Output]) -> tuple[tuple[Path, ...], list[PlacementError]]:
        """Write all that can be: a full disk under one file must not keep the engine's map back."""
        written, failures, unwritten = [], [], []
        for output in outputs:
            try:
                with self._whole():
                    TARGETS[output.target].write(self._decided, output.path, self._options())
                written.append(output.path)
            except Exception as error:
                if not isinstance(error, PlacementError):
                    error = PlacementError(f"cannot write {output.path}: {told(error)}")
                failures.append(error)
                unwritten.append(output)
        self._unwritten = tuple(unwritten)
        return tuple(written), failures

    def _write_again(self) -> Iterator[ServiceEvent]:
        if not self._unwritten:
            return
        written, failures = self._write(self._unwritten)
        if written:
            yield Told(f"written after all: {', '.join(str(path) for path in written)}", written)
        yield from _retried(failures)

    def _options(self) -> ExportOptions:
        layers = self.setup.num_hidden_layers
        if layers is None and self.setup.model is None:
            layers = self._recorded_layers
        return ExportOptions(self.setup.model, layers)


def _retried(failures: Sequence[PlacementError]) -> Iterator[Trouble]:
    for error in failures:
        yield Trouble(f"{error.message}; it is tried again")
