"""Was a measurement left alone? What kept it from a core, and what others did meanwhile.

Two signs, and only both together say that a number cannot be trusted. The effect: repeats in which a thread was ready
to run and waited for a core, or repeats that differ. The cause: work of others on the cores this process may use, or
cores that a hypervisor took away. Ranks that are more than the cores wait for each other, which is part of what they
measure; others who leave cores free do no harm. Where the system tells neither (other than Linux), repeats that differ
are all there is.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

HELD = 0.1
"""A repeat in which a thread waited for a core longer than this part of its time does not count."""
APART = 0.25
"""Quartiles of the repeats further apart than this part of their median: the repeats do not agree."""
OTHERS = 0.1
"""Others that take more than this part of the cores may be why."""
LEAST_REPEATS = 3
"""So many repeats must have been left alone, if as many were made."""

PROC = Path("/proc")


def waits_s() -> dict[str, float]:
    """Seconds each thread of this process has been ready without running; empty where the system does not tell."""
    out = {}
    try:
        threads = os.listdir(PROC / "self/task")
    except OSError:
        return {}
    for thread in threads:
        try:
            out[thread] = int((PROC / "self/task" / thread / "schedstat").read_text("ascii").split()[1]) / 1e9
        except (OSError, ValueError, IndexError):  # ended meanwhile, or a kernel without
            continue
    return out


def held_s(before: dict[str, float]) -> float:
    """The longest that any one thread has waited since :func:`waits_s` was ``before``."""
    return max((now - before[thread] for thread, now in waits_s().items() if thread in before), default=0.0)


def busy_s() -> float | None:
    """Seconds that the cores this process may use have worked, or were taken away, since the machine started.

    Without interrupts, which are the network's, whoever's traffic it carries. None where the system does not tell.
    """
    try:
        lines = [line.split() for line in (PROC / "stat").read_text("ascii").splitlines()]
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        # user nice system idle iowait irq softirq steal
        ticks = [[int(number) for number in line[1:9]] for line in lines if line and line[0] in mine]
    except (OSError, ValueError, AttributeError):
        return None
    if not ticks or min(map(len, ticks)) < 8:
        return None
    return sum(user + nice + system + steal for user, nice, system, _, _, _, _, steal in ticks) / os.sysconf(
        "SC_CLK_TCK"
    )


def own_s() -> float:
    """Seconds of a core that this process and the children it has waited for have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


class Meter:
    """What others do while something is measured: from its making to the question."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), busy_s(), own_s()

    def used_s(self) -> float:
        """Seconds of a core that this process has used."""
        return own_s() - self._own

    def others(self, used_s: float | None = None) -> float | None:
        """Part of the cores that others took; None if nobody knows.

        Parameters
        ----------
        used_s : seconds of a core that all processes which measure here have used; None: this one alone.
        """
        busy, seconds = busy_s(), time.monotonic() - self._began
        if busy is None or self._busy is None or seconds <= 0:
            return None
        mine = self.used_s() if used_s is None else used_s
        return max(0.0, busy - self._busy - mine) / seconds / len(os.sched_getaffinity(0))


def left_alone(seconds: Sequence[float], held: Sequence[float]) -> list[float]:
    """The repeats in which no thread waited for long, of seconds [repeats] and the longest wait in each."""
    return [took for took, wait in zip(seconds, held, strict=True) if wait <= HELD * took]


def settle(seconds: Sequence[float], held: Sequence[float]) -> tuple[list[float], bool]:
    """The repeats that count, and whether they can be trusted: enough were left alone, and they agree.

    If too few were left alone all count.
    """
    alone = left_alone(seconds, held)
    if len(alone) < min(LEAST_REPEATS, len(seconds)):
        return list(seconds), False
    low, middle, high = np.quantile(alone, [0.25, 0.5, 0.75])
    return alone, bool(high - low <= APART * middle)


def why_not(steady: Iterable[bool], others: float | None, *, spared: float = 0.0) -> str:
    """Why rows cannot be trusted; empty if they can, or if nobody else took the cores.

    Parameters
    ----------
    steady : of each row, as from :func:`settle`.
    others : part of the cores that others took, None if nobody knows.
    spared : this part of the rows may be unsteady.
    """
    rows = list(steady)
    bad = len(rows) - sum(rows)
    if bad <= spared * len(rows) or (others is not None and others <= OTHERS):
        return ""
    whose = "nothing tells what others did" if others is None else f"others took {others:.0%} of the cores meanwhile"
    return f"{bad} of {len(rows)} rows waited for a core or do not repeat, and {whose}"
