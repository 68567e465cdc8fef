"""Where watched traffic comes from: a file that grows, or a folder that an engine puts dumps into.

Every source answers :meth:`Source.poll` with what is new since the last look. What the caller got wrong is raised;
what may be better at the next look (an engine that is down, a dump that is half written or broken) is told in
:attr:`Polled.problems`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from poise import api
from poise.control.steps import steps_of
from poise.engines.dump import EngineDump, ReadOptions, SlotRecord
from poise.engines.readers import read_dump
from poise.planning.placement import Placement
from poise.routing.batch import RoutingBatch
from poise.routing.batching import default_tokens_per_step, make_batch
from poise.routing.counters import refuse_running
from poise.routing.said import COUNTED
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import ModelError, NoTrafficError, OptionError, PoiseError, TraceError, told

UNREADABLE_POLLS = 3
"""A file that is not readable and no longer changes is broken, not half written, after so many looks at it."""
FILES_A_LOOK = 16
"""Most files that one look reads: a backlog comes in parts, so that memory stays bounded."""
COMPARED = 4
"""Records, of one dump or several, in which counters that are never set back are looked for."""
READ = partial(read_dump, options=ReadOptions(allow_running=True))
"""What seems to be running totals is told once, of one dump as of several, and watched."""
LEAST_TOKENS = 64
"""Rows that a step has at least where N is not named: the first few rows of a file say little about its size."""


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """What one file brought.

    Parameters
    ----------
    steps : in order; None: no traffic is in it.
    slots : what the engine says its slots hold, None: nothing.
    recorded_layers : decoder layers of the record, dense ones included; None: unknown.
    """

    steps: RoutingBatch | None
    slots: SlotRecord | None = None
    recorded_layers: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Polled:
    """What one look at a source came to.

    Parameters
    ----------
    arrivals : new traffic, oldest first.
    up : the source answers.
    dumps, errors : files that were read, and that could not be.
    problems : what went wrong, for people.
    wait_s : seconds until the next look makes sense; None: the usual interval.
    more : files are left for the next look, which need not wait.
    notes : what the source settled by itself, for people.
    restarted : the engine was started anew since the last look; :meth:`Source.first_placement` is of that start.
    """

    arrivals: tuple[Arrival, ...] = ()
    up: bool = True
    dumps: int = 0
    errors: int = 0
    problems: tuple[str, ...] = ()
    wait_s: float | None = None
    more: bool = False
    notes: tuple[str, ...] = ()
    restarted: bool = False


class Source(Protocol):
    """Anything that can be asked for new traffic."""

    def poll(self, *, last: bool = False) -> Polled:
        """What is new; ``last``: nothing may wait for what comes later."""
        ...

    def first_placement(self, steps: RoutingBatch, num_devices: int) -> Placement | None:
        """The placement that the source knows to be in use, or None."""
        ...

    def close(self) -> None:
        """Leave the engine as it was found."""
        ...


class Tail:
    """The steps that a growing trace has gained: :meth:`steps` returns the new ones, or None where there are none.

    Steps are ``tokens_per_step`` consecutive rows, or the recorded ones; only whole ones are given out: the last rows
    wait for the rest of theirs, and the last recorded step for the one after it, unless the trace is said to be over.
    Without ``tokens_per_step`` it is settled once LEAST_TOKENS rows are there.
    """

    def __init__(self, source: str, tokens_per_step: int | None) -> None:
        self.source = source
        self.tokens_per_step = tokens_per_step
        self.given = 0
        self.tokens = 0
        self._seen: tuple[int, int] | None = None
        self._failed = 0
        self._notes: tuple[str, ...] = ()

    def poll(self, *, last: bool = False) -> Polled:
        """New whole steps. Raises as :meth:`steps`."""
        new = self.steps(over=last)
        notes, self._notes = self._notes, ()
        return Polled(() if new is None else (Arrival(new),), notes=notes)

    def first_placement(self, steps: RoutingBatch, num_devices: int) -> Placement | None:
        """A trace does not say."""
        return None

    def close(self) -> None:
        """Nothing to do."""

    def steps(self, *, over: bool) -> RoutingBatch | None:
        """New whole steps; a file that cannot be read is tried again, unless it is ``over`` or stays as it is.

        Raises
        ------
        InputError : the file cannot be read, or holds less than before.
        """
        stamp = self._stamp()
        if stamp is not None and stamp == self._seen and not self._failed:
            return None
        try:
            found = api.load(self.source)
        except TraceError:
            self._failed = self._failed + 1 if stamp == self._seen else 1
            self._seen = stamp
            if over or self._failed >= UNREADABLE_POLLS:
                raise
            return None
        self._seen, self._failed = stamp, 0
        return self._new(found, over)

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = Path(self.source.partition("#")[0]).stat()
        except (OSError, ValueError):
            return None
        return stat.st_size, stat.st_mtime_ns

    def _new(self, found: RoutingTrace | LoadProfile, over: bool) -> RoutingBatch | None:
        size = found.num_tokens if isinstance(found, RoutingTrace) else found.num_steps
        if size < self.tokens:
            raise TraceError(
                f"{self.source} holds {size} rows, {self.tokens} were read before", hint="watch a file that only grows"
            )
        self.tokens = size
        recorded = isinstance(found, LoadProfile) or (found.step is not None and self.tokens_per_step is None)
        if self.tokens_per_step is None and isinstance(found, RoutingTrace) and found.step is None:
            if size < LEAST_TOKENS and not over:
                return None
            self.tokens_per_step = default_tokens_per_step(size)
            self._notes = (_chosen(self.tokens_per_step, size),)
        batch = make_batch(found, tokens_per_step=self.tokens_per_step, order="file")
        if recorded:
            whole = batch.num_steps - (not over and isinstance(found, RoutingTrace))
        else:
            whole = size // (self.tokens_per_step or 1)
        if whole <= self.given:
            return None
        new = steps_of(batch, slice(self.given, whole))
        self.given = whole
        return new


class DumpFolder:
    """The dumps that come into a folder: each file once, oldest first; half-written ones are tried again.

    Lines of a file that grows are a whole file too, so one is read only when it is as it was at the look before.

    Parameters
    ----------
    folder : where they come; it may appear later.
    tokens_per_step : N that loads are scaled to, and consecutive tokens of a trace; default: steps as recorded.
    most_steps : steps of a dump that are watched, evenly spaced; None: all.
    delete : remove a file once it was read.
    read : what reads a file.
    """

    def __init__(
        self, folder: Path, *, tokens_per_step: int | None = None, most_steps: int | None = None,
        delete: bool = False, read: Callable[[Path], EngineDump] = READ,
    ) -> None:  # fmt: skip
        if most_steps is not None and most_steps < 1:
            raise OptionError(f"steps per dump must be at least 1, got {most_steps}")
        self.folder = folder
        self.tokens_per_step, self.most_steps = tokens_per_step, most_steps
        self._delete, self._read = delete, read
        self._any = False
        self._taken: dict[str, tuple[int, int] | None] = {}
        self._stamp: dict[str, tuple[int, int]] = {}
        self._notes: tuple[str, ...] = ()
        self._ready: list[tuple[tuple[int, int], str, Path]] = []
        self._failed: dict[str, tuple[tuple[int, int], int]] = {}
        self._last: tuple[NDArray[Any], NDArray[np.int32]] | None = None
        self._running = False

    def skip_present(self) -> None:
        """Leave alone what is there already."""
        try:
            self._taken |= {name: None for _, name, _ in self._files()}
        except OSError:  # no folder yet: nothing is in it
            return

    def poll(self, *, last: bool = False, whole: bool = False) -> Polled:
        """Read what is new, at most FILES_A_LOOK files; ``whole``: whoever writes them says when they are complete.

        Raises
        ------
        NoResultError : reading needs what is not installed.
        ModelError : the first dump is not of the model that was named.
        """
        problems: list[str] = []
        if not self._ready:  # else a file would be looked at twice in no time, and look as if it were complete
            try:
                problems += self._look(last or whole, told=not whole)
            except OSError as error:
                return Polled(up=False, problems=(f"cannot look into {self.folder}: {error.strerror}",))
        ready, self._ready = self._ready[:FILES_A_LOOK], self._ready[FILES_A_LOOK:]
        arrivals: list[Arrival] = []
        dumps = errors = 0
        for stamp, name, path in ready:
            try:
                arrivals.append(self._arrival(self._read(path)))
            except NoTrafficError:  # the engine was idle: nothing new, and no error
                pass
            except Exception as error:  # also no room for it, or a reader that fails on what nobody foresaw
                foreign = isinstance(error, ModelError) and not self._any
                if foreign or (isinstance(error, PoiseError) and not isinstance(error, TraceError | ModelError)):
                    raise
                failed, tries = self._failed.get(name, (stamp, 0))
                tries = tries + 1 if failed == stamp else 1
                self._failed[name] = stamp, tries
                if last or tries >= UNREADABLE_POLLS:
                    self._taken[name] = stamp
                    errors += 1
                    said = told(error)
                    problems.append(f"left out: {said if name in said else f'{name}: {said}'}")
                continue
            dumps += 1
            self._any = True
            self._taken[name] = stamp
            if self._delete:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    problems.append(f"cannot remove {path}: {error.strerror}")
        notes, self._notes = self._notes, ()
        more = bool(self._ready)
        return Polled(tuple(arrivals), True, dumps, errors, tuple(problems), more=more, notes=notes)

    def first_placement(self, steps: RoutingBatch, num_devices: int) -> Placement | None:
        """Dumps that know say it themselves (:attr:`Arrival.slots`)."""
        return None

    def close(self) -> None:
        """Nothing to do."""

    def _files(self) -> list[tuple[tuple[int, int], str, Path]]:
        """(time and size, name, path) of the plain files, oldest first."""
        out = []
        for path in self.folder.iterdir():
            if path.name.startswith("."):
                continue
            try:
                stat = path.stat()
            except OSError:  # went between the two calls
                continue
            if path.is_file():
                out.append(((stat.st_mtime_ns, stat.st_size), path.name, path))
        return sorted(out)

    def _look(self, complete: bool, *, told: bool) -> list[str]:
        """Find what can be read; returns, where they are to be ``told``, files that were read too early, once each."""
        files = self._files()
        before, now = self._stamp, {name: stamp for stamp, name, _ in files}
        self._stamp = now
        self._taken = {name: stamp for name, stamp in self._taken.items() if name in now}
        self._failed = {name: value for name, value in self._failed.items() if name in now}
        self._ready = [
            (stamp, name, path) for stamp, name, path in files
            if name not in self._taken and (complete or before.get(name) == stamp)
        ]  # fmt: skip
        changed = [name for name, stamp in self._taken.items() if told and stamp not in (None, now[name])]
        self._taken |= dict.fromkeys(changed)
        return [
            f"{name} changed after it was read, and is not read again: write dumps elsewhere and move them here"
            for name in changed
        ]

    def _arrival(self, dump: EngineDump) -> Arrival:
        if dump.profile is not None and dump.trace is None and not self._running:
            self._compare(dump.profile)
        steps = None if dump.trace is None and dump.profile is None else self._steps(dump.traffic)
        return Arrival(steps, dump.slots, dump.recorded_layers)

    def _compare(self, profile: LoadProfile) -> None:
        """Tell once that records one after another are running totals."""
        last, self._last, loads = self._last, None, profile.load_BLE
        if COUNTED in profile.said:
            return
        more = ""
        if last is not None and loads.shape[1:] == last[0].shape[1:] and np.array_equal(profile.layer_ids, last[1]):
            loads, more = np.concatenate([last[0], loads]), " and those before it"
        self._last = loads[1 - COMPARED :].copy(), profile.layer_ids
        if len(loads) < COMPARED:
            return
        try:
            refuse_running(loads, profile.layer_ids, profile.name + more)
        except TraceError as error:
            self._running = True
            self._notes += (f"{error.message}; dumps are read as steps: let the engine set its counters back",)

    def _steps(self, traffic: RoutingTrace | LoadProfile) -> RoutingBatch:
        if isinstance(traffic, RoutingTrace):
            if traffic.step is None and self.tokens_per_step is None:
                self.tokens_per_step = max(LEAST_TOKENS, default_tokens_per_step(traffic.num_tokens))
                self._notes = (_chosen(self.tokens_per_step, traffic.num_tokens),)
            batch = make_batch(traffic, tokens_per_step=self.tokens_per_step, order="file")
        elif self.tokens_per_step is not None:
            batch = make_batch(traffic, tokens_per_step=self.tokens_per_step)
        else:
            batch = recorded_steps(traffic)
        if self.most_steps is None or batch.num_steps <= self.most_steps:
            return batch
        return steps_of(batch, np.linspace(0, batch.num_steps - 1, self.most_steps).round().astype(np.int64))


def _chosen(tokens_per_step: int, rows: int) -> str:
    return f"steps of {tokens_per_step} tokens, chosen by the first {rows} rows; --tokens-per-step sets it"


def recorded_steps(profile: LoadProfile) -> RoutingBatch:
    """Recorded loads as steps of the size they had; those without load (an unused part of a buffer) are left out."""
    load = profile.load_BLE[profile.load_BLE.any(axis=(1, 2))].astype(np.float64)
    return RoutingBatch(
        load, np.full(len(load), 1.0 / len(load)), profile.top_k, profile.layer_ids, order=f"{len(load)} recorded steps"
    )
