"""Windows of an engine's own metrics: what it did between two scrapes that lie long enough apart.

A window never spans a start of the engine: its counters begin at 0 then, and what lies on both sides says nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from poise.util.errors import OptionError
from poise.watch.engine_metrics import Scrape

LEAST_TOKENS = 100
"""Gaps between tokens that a window has at least: a mean of fewer says little."""
MOST = 1e12
"""Of any number of a window: what lies above is of no engine, and sums and ratios of such overflow."""


@dataclass(frozen=True, slots=True)
class MetricWindow:
    """What an engine did in some seconds.

    Parameters
    ----------
    begin_s, end_s : when.
    running : requests that ran, mean over the scrapes.
    prompt_per_s : prompt tokens a second.
    tokens_per_s : tokens generated a second.
    tpot_s : mean seconds between two tokens of a request.
    balance : mean over fullest rank, as the engine counts it; None: it does not say.
    """

    begin_s: float
    end_s: float
    running: float
    prompt_per_s: float
    tokens_per_s: float
    tpot_s: float
    balance: float | None = None


class MetricWindows:
    """Scrapes in, windows out.

    Parameters
    ----------
    seconds : that a window has at least.
    """

    def __init__(self, seconds: float) -> None:
        if not (math.isfinite(seconds) and seconds > 0):
            raise OptionError(f"a window of metrics must be above 0 s, got {seconds}")
        self._seconds = seconds
        self._scrapes: list[Scrape] = []

    def cut(self) -> None:
        """Something changed: the next window begins with the next scrape."""
        self._scrapes.clear()

    def add(self, scrape: Scrape) -> tuple[MetricWindow | None, bool]:
        """The window that this scrape ends, or None; and whether the engine was started anew before it."""
        if self._scrapes and scrape.at_s <= self._scrapes[-1].at_s:
            return None, False
        restarted = bool(self._scrapes) and _anew(self._scrapes[-1], scrape)
        if restarted:
            self.cut()
        self._scrapes.append(scrape)
        first = self._scrapes[0]
        if scrape.at_s - first.at_s < self._seconds:
            return None, restarted
        window = _window(self._scrapes)
        self._scrapes = [scrape]
        return window, restarted


def _anew(before: Scrape, after: Scrape) -> bool:
    fell = any(after.counters.get(name, 0.0) < value for name, value in before.counters.items())
    return fell or before.engine != after.engine or before.started_s != after.started_s


def _window(scrapes: list[Scrape]) -> MetricWindow | None:
    """None where too little was served, or a number is of no engine: nan, above MOST, or a TPOT below its inverse."""
    first, last = scrapes[0], scrapes[-1]
    seconds = last.at_s - first.at_s

    def gained(name: str) -> float:
        return last.counters.get(name, 0.0) - first.counters.get(name, 0.0)

    gaps, gap_s, counted = gained("gap_count"), gained("gap_sum"), gained("balance_count")
    running = sum(now.running * (now.at_s - was.at_s) for was, now in pairwise(scrapes)) / seconds
    if gaps < LEAST_TOKENS or gap_s <= 0 or running <= 0:
        return None
    prompt, generated, tpot = gained("prompt") / seconds, gained("generated") / seconds, gap_s / gaps
    balance = gained("balance_sum") / counted if counted > 0 else None
    if tpot < 1 / MOST or not all(0 <= one <= MOST for one in (running, prompt, generated, tpot, balance or 0.0)):
        return None
    return MetricWindow(first.at_s, last.at_s, running, prompt, generated, tpot, balance)
