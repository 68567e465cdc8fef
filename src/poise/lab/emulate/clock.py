"""The device clock: computing takes as long as a curve says, whatever this machine's cores need for it.

Slept time is an assumption put in, never a measurement: what a run with a device clock shows is how communication and
waiting fall out *if* experts cost what the curve says.
"""

from __future__ import annotations

import csv
import ctypes
import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poise.util.errors import OptionError
from poise.util.files import read_bounded

MAX_TABLE_BYTES = 16 << 20
COLUMNS = ("tokens", "active_experts", "seconds")
PR_SET_TIMERSLACK = 29


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCurve:
    """Seconds of one device's experts: the sum, over experts with tokens, of a piecewise-linear function.

    seconds(n) = sum over e with n[e] > 0 of f(n[e]), where f runs through the knots. Left of the first knot and right
    of the last one the neighbouring segment goes on; ``fixed_seconds`` = f(0+), at least 0, is what an active expert
    costs whatever its tokens are.

    Parameters
    ----------
    tokens_X : float64 [X], tokens of one active expert, rising, above 0, at least two.
    seconds_X : float64 [X], seconds of one active expert with that many tokens.
    spread : largest relative distance of a table's row from the curve: rows with equally many tokens per active
        expert but other numbers of experts agree only as far as this says.
    """

    tokens_X: NDArray[np.float64]
    seconds_X: NDArray[np.float64]
    spread: float = 0.0

    def __post_init__(self) -> None:
        tokens, seconds = np.array(self.tokens_X, dtype=np.float64), np.array(self.seconds_X, dtype=np.float64)
        if tokens.shape != seconds.shape or tokens.ndim != 1 or tokens.size < 2:
            raise OptionError(f"a curve needs two or more knots, got {tokens.size} tokens and {seconds.size} seconds")
        if not (np.isfinite(tokens).all() and tokens[0] > 0 and (np.diff(tokens) > 0).all()):
            raise OptionError(f"a curve's tokens must rise from above 0, got {tokens[:8].tolist()}")
        if not (np.isfinite(seconds).all() and (seconds > 0).all()):
            raise OptionError(f"a curve's seconds must be finite and above 0, got {seconds.min():g}")
        tokens.flags.writeable = seconds.flags.writeable = False
        object.__setattr__(self, "tokens_X", tokens)
        object.__setattr__(self, "seconds_X", seconds)

    @classmethod
    def from_table(cls, rows: Iterable[Sequence[float]]) -> ExpertCurve:
        """A curve from rows (tokens, active experts, seconds); the tokens of a row lie evenly on its experts.

        Rows with equally many tokens per active expert are averaged; ``spread`` keeps how far they lay apart.

        Raises
        ------
        OptionError : a row is not three numbers above 0, or fewer than two different knots are left.
        """
        per_expert: dict[float, list[float]] = {}
        for number, row in enumerate(rows, 1):
            if len(row) != 3 or not all(math.isfinite(value) and value > 0 for value in row):
                raise OptionError(f"row {number} must be tokens, active experts, seconds, all above 0: got {row!r}")
            tokens, active, seconds = row
            per_expert.setdefault(tokens / active, []).append(seconds / active)
        knots = sorted(per_expert)
        mean = [sum(per_expert[x]) / len(per_expert[x]) for x in knots]
        spread = max((abs(y / m - 1) for x, m in zip(knots, mean, strict=True) for y in per_expert[x]), default=0.0)
        return cls(np.array(knots), np.array(mean), spread)

    @classmethod
    def from_csv(cls, path: str | Path) -> ExpertCurve:
        """A curve from a CSV file with the columns tokens, active_experts, seconds (others are left alone).

        Raises
        ------
        OptionError : the file cannot be read, lacks a column, or holds something else than numbers.
        """
        try:
            text = read_bounded(path, MAX_TABLE_BYTES, OptionError).decode("utf-8")
            reader = csv.DictReader(io.StringIO(text, newline=""))
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise OptionError(f"{path} lacks the column {missing[0]!r}", hint=f"columns {', '.join(COLUMNS)}")
            rows = [[float(line[name]) for name in COLUMNS] for line in reader]
        except (TypeError, UnicodeDecodeError, csv.Error) as error:
            raise OptionError(f"{path} is no table of numbers: {error}") from None
        except ValueError as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError(f"{path} is no table of numbers: {error}") from None
        return cls.from_table(rows)

    @property
    def fixed_seconds(self) -> float:
        """f(0+): the first segment, followed down to no tokens, between 0 and the first knot's seconds."""
        (x0, x1), (y0, y1) = self.tokens_X[:2], self.seconds_X[:2]
        return float(min(max(y0 - x0 * (y1 - y0) / (x1 - x0), 0.0), y0))

    def __call__(self, tokens_per_expert: ArrayLike) -> float:
        """Seconds for tokens [experts of the device]; experts without tokens cost nothing."""
        tokens = np.asarray(tokens_per_expert, dtype=np.float64)
        active = tokens[tokens > 0]
        x = np.concatenate(([0.0], self.tokens_X))
        y = np.concatenate(([self.fixed_seconds], self.seconds_X))
        inside = np.interp(active, x, y)
        slope = max((y[-1] - y[-2]) / (x[-1] - x[-2]), 0.0)
        return float((inside + slope * np.maximum(active - x[-1], 0.0)).sum())


@dataclass(frozen=True, slots=True)
class Computed:
    """One computation: seconds it was to take (dilated), seconds the real arithmetic took, and by how much it was late.

    ``late_s`` is what it took beyond ``asked_s``; ``overran`` says that the arithmetic was why, not the sleep.
    """

    asked_s: float
    worked_s: float
    late_s: float

    @property
    def overran(self) -> bool:
        """The real arithmetic took longer than the curve allows: this machine is too slow, or dilation too small."""
        return self.worked_s > self.asked_s


class DeviceClock:
    """Makes computing take as long as a curve says.

    Parameters
    ----------
    seconds_of : tokens per expert of this device -> seconds on the real device; a function or an
        :class:`ExpertCurve`.
    dilation : emulated seconds per real second, as in :class:`~poise.lab.emulate.spec.EmulatedCluster`.
    """

    def __init__(self, seconds_of: Callable[[ArrayLike], float], dilation: float = 1.0) -> None:
        if not (math.isfinite(dilation) and dilation > 0):
            raise OptionError(f"dilation must be finite and above 0, got {dilation!r}")
        self._seconds_of = seconds_of
        self._dilation = dilation
        self._done: list[Computed] = []
        sharpen_sleep()

    @staticmethod
    def now() -> float:
        """Monotonic seconds, for ``since``."""
        return time.monotonic()

    def compute(self, tokens_per_expert: ArrayLike, *, since: float | None = None) -> Computed:
        """Return when the computation of these tokens, begun at ``since`` (default: now), is to be over.

        Real arithmetic done between ``since`` and this call is part of the computation, not added to it. The deadline
        is absolute, so a late wake-up is not carried on into a deadline that the caller sets from the same ``since``.

        Raises
        ------
        OptionError : the curve gives a number that is no time.
        """
        entered = time.monotonic()
        start = entered if since is None else since
        asked = self._seconds_of(tokens_per_expert) * self._dilation
        if not (math.isfinite(asked) and asked >= 0):
            raise OptionError(f"the curve gives {asked!r} seconds", hint="seconds must be finite and at least 0")
        while (left := start + asked - time.monotonic()) > 0:
            time.sleep(left)
        done = Computed(asked_s=asked, worked_s=entered - start, late_s=time.monotonic() - start - asked)
        self._done.append(done)
        return done

    @property
    def computed(self) -> tuple[Computed, ...]:
        """Everything computed so far."""
        return tuple(self._done)

    def report(self) -> dict[str, float]:
        """Computations, how many the arithmetic overran and by how much at most, and the sleep's error.

        Keys: count, asked_s (sum), worked_s (sum), overruns, worst_overrun_s, late_p50_s and late_p99_s (of those that
        were slept).
        """
        over = [one.worked_s - one.asked_s for one in self._done if one.overran]
        slept = [one.late_s for one in self._done if not one.overran] or [0.0]
        return {
            "count": len(self._done),
            "asked_s": sum(one.asked_s for one in self._done),
            "worked_s": sum(one.worked_s for one in self._done),
            "overruns": len(over),
            "worst_overrun_s": max(over, default=0.0),
            "late_p50_s": float(np.percentile(slept, 50)),
            "late_p99_s": float(np.percentile(slept, 99)),
        }


def sharpen_sleep() -> None:
    """Let the kernel wake this thread on time instead of up to 50 microseconds late. Nothing where that is unknown."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
