"""What the engine's own metrics say of each map, one after the other: scrapes in, a judgement of the map that runs out.

A map is judged against the one that ran before it (:mod:`poise.watch.helped`). The windows under a map are those before
the next one. The first window after a change is left out: caches are empty then, and requests of before run out. Maps
that follow each other before FEW windows were seen (a way gone in parts, a plan that is settled soon) are one change:
the last of them is judged against the map before them all; if it is that map, nothing has changed.

A scrape is of the map that ran when it was made, whenever it is read. Between the last look under one map and the first
under the next it is of neither, and of before the first look of none. After a start of the engine windows are held
until a source says what it runs, or starts it with.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from poise.planning.placement import Placement
from poise.util.errors import CommunicationError, OptionError, TraceError
from poise.util.files import read_bounded
from poise.watch.asking import Asker, engine_address
from poise.watch.engine_metrics import Scrape, read_scrape
from poise.watch.helped import MOST_WINDOWS, HelpedSettings, Judgement, MapJudge
from poise.watch.metric_windows import MetricWindow, MetricWindows

TIMEOUT_S = 5.0
MAX_SCRAPE = 16 * 2**20
SCRAPES_A_LOOK = 64
WINDOW_S = 60.0
FEW = 8
"""Windows under a map below which nothing can be said against it."""
_SECONDS = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\.(?:prom|txt)")


class MetricSource(Protocol):
    """Anything that knows an engine's metrics."""

    def scrapes(self) -> tuple[list[Scrape], list[str]]:
        """What is new, oldest first, and what went wrong, for people."""
        ...


class MetricsUrl:
    """An engine's ``/metrics``.

    Parameters
    ----------
    url : ``http://host:port``, or with the path.
    clock : seconds since 1970.

    Raises
    ------
    OptionError : the address is none.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        base = engine_address(url)
        self._asker = Asker(base.removesuffix("/metrics"), most=MAX_SCRAPE)
        self._clock = clock

    def scrapes(self) -> tuple[list[Scrape], list[str]]:
        """The metrics as they are now."""
        headers = {"Accept": "text/plain", "User-Agent": "poise", "Connection": "close"}
        try:
            answer = self._asker.ask("GET", "/metrics", headers, until=time.monotonic() + TIMEOUT_S)
            if answer.status != 200:
                return [], [f"{self._asker.url}/metrics answers {answer.status}: SGLang needs --enable-metrics"]
            return [read_scrape(answer.body, self._clock())], []
        except (CommunicationError, TraceError) as error:
            return [], [f"the engine's metrics were not read: {error.message}"]


class ScrapeFolder:
    """Saved answers of ``/metrics``: files named by the second they are of, ``1700000000.prom``.

    As ``curl -s URL/metrics > new && mv new $(date +%s).prom`` leaves them. Each is read once, and those of before
    ``since_s`` never.
    """

    def __init__(self, folder: Path, *, since_s: float = 0.0) -> None:
        if not folder.is_dir():
            raise OptionError(f"{str(folder)[:80]!r} is no folder of scrapes, and no address of an engine")
        self.folder, self._since_s, self._last = folder, since_s, -1.0

    def scrapes(self) -> tuple[list[Scrape], list[str]]:
        """Files that came since the last look, at most SCRAPES_A_LOOK."""
        try:
            named = [(float(found[1]), one) for one in self.folder.iterdir() if (found := _SECONDS.fullmatch(one.name))]
        except OSError as error:
            return [], [f"cannot look into {self.folder}: {error.strerror}"]
        out, problems = [], []
        for at, path in sorted(one for one in named if one[0] > self._last and one[0] >= self._since_s)[
            :SCRAPES_A_LOOK
        ]:
            self._last = at
            try:
                out.append(read_scrape(read_bounded(path, MAX_SCRAPE, TraceError), at))
            except TraceError as error:
                problems.append(f"{path.name} was left out: {error.message}")
        return out, problems


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """What is known of the map that runs.

    Parameters
    ----------
    judgement : by the engine's own metrics.
    news : the word is another than at the last look.
    """

    judgement: Judgement
    news: bool


@dataclass(frozen=True, slots=True, eq=False)
class WayBack:
    """A map that was measured to be faster than the one that runs.

    Parameters
    ----------
    judged : the map that hurt.
    older : what ran before.
    now_s, then_s : measured seconds between two tokens, under the one that hurt and under the older one.
    parts : placements on the way back that were decided on.
    """

    judged: Placement
    older: Placement
    now_s: float
    then_s: float
    parts: tuple[Placement, ...] = ()

    def of(self, runs: Placement) -> bool:
        """Whether it begins where the engine is: at the map that was judged, or at a part of the way."""
        return any(runs.holds_like(one) for one in (self.judged, *self.parts))


class _Met(NamedTuple):
    """A map that was met: the one before it was known to run until then, this one from then on; ``told``: by the
    engine, not taken to run because it was decided on.
    """

    until_s: float
    from_s: float
    runs: Placement
    told: bool


class MapEffects:
    """Follows maps and metrics.

    Parameters
    ----------
    source : where scrapes come from.
    window_s : seconds of a window.
    clock : seconds since 1970, as scrapes are told in.

    Attributes
    ----------
    back : where to go, because the map that runs hurt; None: nowhere.
    """

    def __init__(
        self, source: MetricSource, *, window_s: float = WINDOW_S, clock: Callable[[], float] = time.time
    ) -> None:
        self._source, self._settings, self._clock = source, HelpedSettings(), clock
        self._windows = MetricWindows(window_s)
        self._era: deque[MetricWindow] = deque(maxlen=MOST_WINDOWS)
        self._runs: Placement | None = None
        self._older: Placement | None = None
        self._before: tuple[MetricWindow, ...] = ()
        self._judge: MapJudge | None = None
        self._warm = True
        self._met: deque[_Met] = deque()
        self._newest: Placement | None = None
        self._looked_s = self._from_s = -math.inf
        self._held: deque[MetricWindow] | None = None  # since a start of the engine with a map that is not known yet
        self._started_s: float | None = None
        self.back: WayBack | None = None

    def look(
        self, runs: Placement | None, *, told: bool = False, started: bool = False
    ) -> tuple[list[Effect], list[str]]:
        """New scrapes, each of the map that ran when it was made, and what went wrong.

        Parameters
        ----------
        runs : the map that runs; None: not known yet, and what is read until then is of no map.
        told : the engine has said so since the last look.
        started : and it was started anew.
        """
        now = self._clock()
        if runs is not None and (self._newest is None or not self._newest.holds_like(runs)):
            self._met.append(_Met(self._looked_s, now, runs, told or started))
            self._newest = runs
        self._looked_s = now
        if started:
            self._started_s = now
        scrapes, problems = self._source.scrapes()
        effects = self._known() if (told or started) and not self._met else []
        for scrape in scrapes:
            while self._met and scrape.at_s > self._met[0].until_s:
                effects += self._meet(self._met.popleft())
            if self._runs is not None and scrape.at_s >= self._from_s:
                effects += self._add(scrape)
        return effects, problems

    def _add(self, scrape: Scrape) -> list[Effect]:
        window, restarted = self._windows.add(scrape)
        if restarted:
            self._warm = False
            self._held = deque(maxlen=MOST_WINDOWS) if self._started_s is None else None
        if self._started_s is not None and scrape.at_s >= self._started_s:
            self._started_s = None
        if window is None:
            return []
        if self._held is not None:
            self._held.append(window)
            return []
        return self._take(window)

    def _known(self) -> list[Effect]:
        """What was held is of the map that runs."""
        held, self._held = self._held or (), None
        return [effect for window in held for effect in self._take(window)]

    def _meet(self, met: _Met) -> list[Effect]:
        self._from_s = met.from_s
        if not met.told:
            self._held = None
        return [*self._turn(met.runs), *self._known()]

    def _turn(self, runs: Placement) -> list[Effect]:
        before, self._runs = self._runs, runs
        if before is None or before.holds_like(runs):
            return []
        self._windows.cut()
        self._warm, self.back = False, None
        if self._older is not None and len(self._era) < FEW and self._older.holds_like(runs):
            self._era = deque(self._before, MOST_WINDOWS)  # it goes on as if nothing had been between
            self._older, self._before, self._judge = None, (), None
            return [Effect(replace(MapJudge((), self._settings).judgement, why="the map of before runs again"), True)]
        if self._older is None or len(self._era) >= FEW:
            self._older, self._before = before, tuple(self._era)
        self._judge = MapJudge(self._before, self._settings)
        self._era.clear()
        return [Effect(self._judge.judgement, True)]

    def _take(self, window: MetricWindow) -> list[Effect]:
        if not self._warm:
            self._warm = True
            return []
        self._era.append(window)
        if self._judge is None or self._judge.judgement.final:
            return []
        word = self._judge.judgement.answer
        found = self._judge.add(window)
        if found.answer == "hurt" and found.tpot_s[1] is not None and found.ratio is not None:
            assert self._older is not None and self._runs is not None
            self.back = WayBack(self._runs, self._older, found.tpot_s[1], found.tpot_s[1] / found.ratio)
        return [Effect(found, found.answer != word)]
