"""Did a map help? Windows before it against windows after it, each with one of like load. Pure; looked at any time.

Step 1  Pair. A window after the map is paired with a window before it of like load: requests running and prompt tokens
        a second both within ``tolerance``. Each window is used once, and only loads choose it. More load never makes
        tokens faster, so for ``helped`` the later window has at least the load of the earlier one, and for the other
        words at most: what remains of a difference in load speaks against what is claimed, and a drift of load alone
        claims nothing.
Step 2  Bet. Without an effect the later window of a pair is the faster one with odds of at most one half, whatever came
        before. What a bet against that has won (Robbins' mixture over all odds above one half) exceeds 1 / a with
        probability at most a, *however often it is looked at* (Ville's inequality), so no number of looks is settled.
Step 3  Say. ``helped`` and ``hurt`` with half of ``alpha`` each; ``did not help``, that the map is not faster by
        ``margin`` or more, with ``alpha`` of its own. What was said stays, but that ``did not help`` may turn out to be
        ``hurt``, which takes longer to tell.

Before all that the same bet is made between the earlier and the later half of the windows before the map: where it
finds a difference in either direction, the engine changes by itself, and nothing is said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import comb, exp, log
from typing import Any, Literal

from poise.util.errors import OptionError
from poise.watch.metric_windows import MetricWindow

HelpedWord = Literal["helped", "did not help", "hurt", "cannot tell yet"]
ALPHA, MARGIN, TOLERANCE = 0.05, 0.01, 0.05
EVEN = 1e-6
"""Logarithm of a ratio that counts as none: sums of histograms are rounded."""
MOST_WINDOWS = 240
"""On either side that are kept, the newest: four hours of minutes."""


@dataclass(frozen=True, slots=True)
class HelpedSettings:
    """How it is judged.

    Parameters
    ----------
    alpha : odds that ``helped`` or ``hurt`` is said of a map that changes nothing, and that ``did not help`` is said of
        one that helps by ``margin`` or more.
    margin : share of TPOT below which a gain is none.
    tolerance : by how much loads of a pair may differ, as a share of the earlier one.
    """

    alpha: float = ALPHA
    margin: float = MARGIN
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if not (0 < self.alpha < 1 and 0 <= self.margin < 1 and 0 < self.tolerance < 1):
            got = f"{self.alpha}, {self.margin} and {self.tolerance}"
            raise OptionError(f"alpha, margin and tolerance must be shares, got {got}")


def won(wins: int, bets: int) -> float:
    """What a fortune of 1 has become after ``bets`` fair bets of which ``wins`` were won: the mean, over all odds p
    from one half to 1 alike, of ``(2 p) ** wins * (2 (1 - p)) ** (bets - wins)``.
    """
    return sum(comb(bets + 1, j) for j in range(wins + 1)) / ((bets + 1) * comb(bets, wins))


@dataclass(slots=True)
class _Bet:
    """Pairs of one direction: ``heavier``: the later window has at least the load of the earlier one, else at most."""

    earlier: list[MetricWindow]
    heavier: bool
    tolerance: float
    log_ratios: list[float] = field(default_factory=list)

    def add(self, later: MetricWindow) -> None:
        """Pair it, if there is a window to pair it with: the one of most alike load."""
        best: tuple[float, int] | None = None
        for at, one in enumerate(self.earlier):
            apart = self._apart(one, later)
            if apart is not None and (best is None or apart < best[0]):
                best = apart, at
        if best is not None:
            self.log_ratios.append(log(later.tpot_s / self.earlier.pop(best[1]).tpot_s))

    def _apart(self, one: MetricWindow, later: MetricWindow) -> float | None:
        total = 0.0
        for was, now in ((one.running, later.running), (one.prompt_per_s, later.prompt_per_s)):
            more = (now - was) if self.heavier else (was - now)
            if not 0 <= more <= self.tolerance * was:
                return None
            total += more / was if was > 0 else 0.0
        return total

    def fortune(self, shift: float, *, faster: bool) -> float:
        """Of betting that the later window takes less than ``exp(-shift)`` times the earlier one, or more."""
        moved = [ratio + shift for ratio in self.log_ratios]
        return won(sum(one < -EVEN if faster else one > EVEN for one in moved), len(moved))


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is known of a map.

    Parameters
    ----------
    answer : the word. why : in half a sentence, for people.
    pairs : windows of like load, of the direction with more.
    before, after : windows on either side.
    ratio : TPOT after over before, median over pairs of both directions; None: no pair.
    fortunes : what the bets on ``helped``, ``hurt`` and ``did not help`` have won.
    tpot_s, tokens_per_s, balance : of all windows before and after, means; None: not known.
    """

    answer: HelpedWord
    why: str
    pairs: int
    before: int
    after: int
    ratio: float | None
    fortunes: tuple[float, float, float]
    tpot_s: tuple[float | None, float | None] = (None, None)
    tokens_per_s: tuple[float | None, float | None] = (None, None)
    balance: tuple[float | None, float | None] = (None, None)

    @property
    def final(self) -> bool:
        """Whether the word stays."""
        return self.answer in ("helped", "hurt")

    def sentence(self) -> str:
        """The word and the numbers."""
        head = "did not help, it hurt" if self.answer == "hurt" else self.answer
        said = f"{head}: {self.why}"
        if self.ratio is not None:
            said += f"; TPOT at like load {100 * (self.ratio - 1):+.1f} %"
        for name, (was, now), unit in (
            ("TPOT", tuple(x if x is None else 1e3 * x for x in self.tpot_s), " ms"),
            ("throughput", self.tokens_per_s, " tokens/s"), ("balance", self.balance, ""),
        ):  # fmt: skip
            if was is not None and now is not None:
                said += f"; {name} {was:,.4g} -> {now:,.4g}{unit}"
        return said

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "answer": self.answer, "why": self.why, "pairs": self.pairs, "windows_before": self.before,
            "windows_after": self.after, "tpot_ratio": self.ratio, "tpot_seconds": list(self.tpot_s),
            "tokens_per_second": list(self.tokens_per_s), "balance": list(self.balance),
            "fortunes": dict(zip(("helped", "hurt", "did_not_help"), self.fortunes, strict=True)),
        }  # fmt: skip


class MapJudge:
    """Judges one map: windows from before it at once, those after it as they come.

    Parameters
    ----------
    before : windows under the old map, oldest first; the newest MOST_WINDOWS count.
    settings : how.
    """

    def __init__(self, before: Sequence[MetricWindow], settings: HelpedSettings | None = None) -> None:
        before = before[-MOST_WINDOWS:]
        self.settings = s = settings or HelpedSettings()
        self._before, self._after = tuple(before), deque[MetricWindow](maxlen=MOST_WINDOWS)
        self._heavier, self._lighter = (_Bet(list(before), heavier, s.tolerance) for heavier in (True, False))
        half = len(before) // 2
        self._restless = _changes(before[:half], before[half:], s)
        self._seen, self._gained = 0, True
        self.judgement = self._say()

    def add(self, window: MetricWindow) -> Judgement:
        """Take in a window under the new map; a word that is final stays, with its numbers."""
        if not self.judgement.final:
            self._seen += 1
            self._after.append(window)
            self._heavier.add(window)
            self._lighter.add(window)
            self._gained = self.judgement.answer != "did not help"
            self.judgement = self._say()
        return self.judgement

    def _say(self) -> Judgement:
        gain = -log(1.0 - self.settings.margin)
        helped = self._heavier.fortune(0.0, faster=True)
        hurt = self._lighter.fortune(0.0, faster=False)
        none = self._lighter.fortune(gain, faster=False)
        ratios = sorted(self._heavier.log_ratios + self._lighter.log_ratios)
        pairs = max(len(self._heavier.log_ratios), len(self._lighter.log_ratios))
        answer, why = self._word(helped, hurt, none, pairs)
        return Judgement(
            answer, why, pairs, len(self._before), self._seen,
            exp((ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2.0) if ratios else None,
            (helped, hurt, none), *(_means(self._before, self._after, name) for name in
                                    ("tpot_s", "tokens_per_s", "balance")),
        )  # fmt: skip

    def _word(self, helped: float, hurt: float, none: float, pairs: int) -> tuple[HelpedWord, str]:
        s, sure = self.settings, 2.0 / self.settings.alpha
        if self._restless:
            return "cannot tell yet", f"the {len(self._before)} windows before it differ among themselves at like load"
        if helped >= sure and self._gained:
            return "helped", f"faster in {_many(self._heavier)} of like or more load"
        if hurt >= sure:
            return "hurt", f"slower in {_many(self._lighter)} of like or less load"
        if none >= 1.0 / s.alpha or not self._gained:
            return "did not help", f"not {100 * s.margin:g} % faster in {_many(self._lighter)} of like or less load"
        if not self._before:
            return "cannot tell yet", "no window was seen before it"
        if not self._seen:
            return "cannot tell yet", "no window was seen after it"
        if not pairs:
            return "cannot tell yet", (
                f"none of {self._seen} windows has the load of one of the {len(self._before)} before it"
            )
        return "cannot tell yet", f"{pairs} pairs of windows of like load, {self._seen} after it"


def _many(bet: _Bet) -> str:
    return f"{len(bet.log_ratios)} pairs of windows"


def _changes(earlier: Sequence[MetricWindow], later: Sequence[MetricWindow], settings: HelpedSettings) -> bool:
    """Whether the same bets find a difference between windows under one map."""
    for heavier in (True, False):
        bet = _Bet(list(earlier), heavier, settings.tolerance)
        for one in later:
            bet.add(one)
            if bet.fortune(0.0, faster=heavier) >= 2.0 / settings.alpha:
                return True
    return False


def _means(
    before: Iterable[MetricWindow], after: Iterable[MetricWindow], name: str
) -> tuple[float | None, float | None]:  # fmt: skip
    sides: list[float | None] = []
    for side in (before, after):
        known = [value for one in side if (value := getattr(one, name)) is not None]
        sides.append(sum(known) / len(known) if known else None)
    return sides[0], sides[1]
