"""Budget: what a search may spend, shared out from the whole to its stages.

A budget has *nominal* seconds. Each stage turns its own into what it counts (updates, proposals, nodes, steps) by fixed
rates, so that what it does depends on the problem, the limit and the seed alone. A clock, if there is one, ends a stage
that takes longer; then another run may end elsewhere, and :attr:`Budget.cuts` says which stage was cut.

Somebody who waits may stop it too (:meth:`Budget.stop`): then all stages end as if the clock had run out.

``work`` units instead of seconds leave the clock out: one unit is a million elementary updates of the search, 1/30 of a
nominal second.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from poise.util.compilation import COMPILATION
from poise.util.errors import OptionError
from poise.util.executors import Serial, place_of
from poise.util.processes import seen
from poise.util.wish import Wish

UPDATES_PER_SECOND = 30e6
"""Elementary updates in a nominal second."""
UNIT = 1e6
"""Elementary updates in a unit of work."""
LEAST_PACE, GRACE = 0.05, 0.1
TICK_S = 0.01
"""How often the clock is looked at while compiled code runs."""


def _now() -> float:
    """Seconds of a clock that stands still while functions are compiled or loaded."""
    return time.monotonic() - COMPILATION.spent()


class Budget:
    """Nominal seconds, and a clock that ends them or none.

    Parameters
    ----------
    seconds : nominal seconds; they begin now.
    work : units of work instead; no clock ends anything then.
    now : seconds of a clock, for tests.
    executor : where pieces of a plan that do not depend on each other run; None: here, one after the other.
    wish : that ends it too, as :meth:`stop` does, shared with other budgets; None: one of its own.

    Attributes
    ----------
    work : as given, of the whole.
    cuts : stages that the clock cut short, shared with all parts.
    wish : that ends it.

    In another process a budget has what was left of the clock, cuts of its own, no executor, and the same wish where it
    can be seen there (:func:`poise.util.executors.hears`).

    Raises
    ------
    OptionError : seconds or work are not above 0.
    """

    def __init__(
        self, seconds: float, *, work: float | None = None, now: Callable[[], float] = _now,
        executor: Executor | None = None, wish: Wish | None = None,
    ) -> None:  # fmt: skip
        for what, value in (("the time limit", seconds), ("work", work)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise OptionError(f"{what} must be above 0, got {value}")
        self.seconds = seconds if work is None else work * UNIT / UPDATES_PER_SECOND
        self.work, self.cuts, self.executor = work, set[str](), executor
        self._clock = None if work is not None else now
        self._held, self.wish = [0.0], Wish() if wish is None else wish
        self._began = self._now()
        self._start = (self._began, time.process_time() if self._clock else 0.0)
        self._ends = self._began + self.seconds if self._clock else math.inf

    @classmethod
    def of(cls, limit: float | Budget, work: float | None = None, executor: Executor | None = None) -> Budget:
        """A budget that was given, or one for a limit in seconds that begins now."""
        return limit if isinstance(limit, Budget) else cls(limit, work=work, executor=executor)

    def __getstate__(self) -> dict[str, Any]:
        place = place_of(self.executor, self.wish)
        return {"seconds": self.seconds, "work": self.work, "left": self.left(), "wish": place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.seconds, self.work, self.cuts, self.executor = state["seconds"], state["work"], set(), None
        self._clock = None if math.isinf(state["left"]) else _now
        self._held, self.wish = [0.0], seen(state["wish"])
        self._began = self._now()
        self._start = (self._began, time.process_time() if self._clock else 0.0)
        self._ends = self._began + state["left"]

    def part(self, share: float, *, until: float | None = None) -> Budget:
        """``share`` of the nominal seconds; the clock ends it where ``until`` of the whole is over (default: share)."""
        out = object.__new__(Budget)
        out.seconds, out.work, out.cuts, out.executor = share * self.seconds, self.work, self.cuts, self.executor
        out._clock, out._held, out._start, out._began = self._clock, self._held, self._start, self._now()
        out.wish = self.wish
        out._ends = self._began + (share if until is None else until) * (self._ends - self._began)
        return out

    @property
    def spread(self) -> bool:
        """Whether there is more than one piece of a plan under way at a time."""
        return self.executor is not None and not isinstance(self.executor, Serial)

    def stop(self) -> None:
        """End it and all its parts as if the clock ran out, clock or none; from any thread.

        Pieces of it on an executor of other processes end too where those can be told
        (:func:`poise.util.executors.hears`).
        """
        self.wish.end()

    @property
    def stopped(self) -> bool:
        """Whether somebody wished so (:meth:`stop`)."""
        return self.wish.came

    def left(self) -> float:
        """Seconds until the clock ends it, at least 0; infinite without a clock. 0 once it was stopped."""
        if self.wish.came:
            return 0.0
        return max(0.0, self._ends - self._now()) if self._clock else math.inf

    def afford(self, seconds: float, stage: str) -> float:
        """Nominal seconds that a stage which cannot be stopped may take: as given, unless the clock leaves too little.

        The share of a core that this process has had so far is what it is thought to get, and a tenth of its seconds
        it may take beyond its end. A stage that gets less is cut.
        """
        if self._clock is None and not self.wish.came:
            return seconds
        passed, worked = self._now() - self._start[0], time.process_time() - self._start[1]
        pace = min(1.0, max(LEAST_PACE, worked / passed)) if self._clock is _now and passed > TICK_S else 1.0
        most = pace * max(self.left(), GRACE * self.seconds)
        if most >= seconds:
            return seconds
        self.cuts.add(stage)
        return most

    def _now(self) -> float:
        return self._clock() - self._held[0] if self._clock else 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile the clock of the whole stands still: traffic is read."""
        since = self._now()
        try:
            yield
        finally:
            self._held[0] += self._now() - since

    def beyond(self) -> str:
        """In words, that the clock has gone a fifth beyond the end: a plan of this size needs as much; else ``""``."""
        passed = self._now() - self._began if self._clock else 0.0
        if passed <= 1.2 * self.seconds:
            return ""
        return (
            f"took {passed:.1f} s, the limit was {self.seconds:g} s: traffic of this size needs as much on this machine"
        )

    def cut_words(self, what: str) -> list[str]:
        """That the clock cut a search, and how ``what`` comes out the same each time; none where it did not."""
        if not self.cuts or self.stopped:
            return []
        return [f"the clock cut the search ({', '.join(sorted(self.cuts))}): --work gives the same {what} each time"]

    def over(self, stage: str) -> bool:
        """Whether the clock has run out, asked by a stage that would go on: it is cut then."""
        if self.left() > 0:
            return False
        self.cuts.add(stage)
        return True

    @contextmanager
    def stops(self, flag: NDArray[Any], stage: str = "") -> Iterator[None]:
        """Meanwhile ``flag[0]`` turns 1 when the clock runs out; compiled code that releases the GIL looks at it. A
        ``stage`` that is named is cut then.
        """
        with self.wish.told(flag):
            if self._clock is None and not self.wish.far:
                yield
            else:
                yield from self._watched(flag)
        if stage and flag[0]:
            self.over(stage)

    def _watched(self, flag: NDArray[Any]) -> Iterator[None]:
        done = threading.Event()

        def look() -> None:
            while not done.wait(TICK_S):
                if self.left() <= 0:
                    flag[0] = 1
                    return

        watcher = threading.Thread(target=look, name="poise-clock", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


Limit = float | Budget
"""Seconds that begin now, or what is left of a budget."""
