"""``poise verify`` on forty-eight windows of running engines with the plan, and as many without: some minutes."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import chain

import pytest
from tests.engines_live.checks import right
from tests.engines_live.environment import ENGINE
from tests.engines_live.runs import poise
from tests.engines_live.windows import EACH, WORLDS, WindowRuns

APART = 0.05
"""Predicted and trivial balance differ by so much where verify has to decide."""


@pytest.fixture(scope="module")
def windows(runs):
    if not os.environ.get("POISE_ENGINES_WINDOWS"):
        pytest.skip("six starts and 96 windows, some minutes: POISE_ENGINES_WINDOWS=1")
    folder = runs.folder / "windows"
    folder.mkdir(exist_ok=True)
    return WindowRuns(ENGINE, folder)


def words_of(windows, ran, asked_of, *more):
    """(word, whether it has to be decided) of each window of a run: ``asked_of(world)`` is the plan, and more to ask."""
    right(windows, ran)
    for number, log in windows.logs_of(ran):
        out = poise("verify", *asked_of(number // EACH), log, "--traffic", windows.traffic_of(number), "--model",
                    windows.model / "config.json", "--json", *more, codes=(0, 1))  # fmt: skip
        found = json.loads(out)
        assert found["evidence"] == "balance"
        balance = found["balance"]
        yield found["verdict"], abs(balance["predicted"] / balance["without_plan"] - 1) >= APART


def judged(words, row, seconds, expected, wrong):
    """No false word; the right one on three of four windows where plan and no plan are apart."""
    counts = Counter(words)
    assert counts.total() == len(WORLDS) * EACH
    decided, apart = counts[expected, True], sum(n for (_, far), n in counts.items() if far)
    each = ", ".join(f"{n} {word}" for word, n in sorted(Counter(word for word, _ in counts.elements()).items()))
    row(
        seconds,
        f"{counts.total()} windows: {each}; {apart} with plan and no plan 5 % apart or more, {decided} of them {expected}",
    )
    assert not any(counts[word, far] for word in wrong for far in (True, False)), counts
    return decided, apart


def test_windows_with_the_plan(windows, row):
    """verify on 48 windows of engines that run the plan: never not-live, and live on three of four where it matters"""
    rans = [windows.with_plan(world) for world in range(len(WORLDS))]
    words = chain.from_iterable(words_of(windows, ran, lambda world: [windows.plan_of(world)]) for ran in rans)
    decided, apart = judged(words, row, sum(ran.seconds for ran in rans), "live", ["not-live"])
    assert decided >= 0.75 * apart and apart >= 40


def test_windows_without_the_plan(windows, row):
    """verify on 48 windows of an engine under its first map: never live, and not-live on three of four where it matters"""
    ran = windows.without
    decided, apart = judged(
        words_of(windows, ran, lambda world: [windows.plan_of(world)], "--balancer-off"),
        row,
        ran.seconds,
        "not-live",
        ["live"],
    )
    assert decided >= 0.75 * apart and apart >= 40


def test_windows_under_another_plan(windows, row):
    """verify on 48 windows of engines that run the plan of other words, which it is told may run: never live"""
    rans = [windows.with_plan(world) for world in range(len(WORLDS))]

    def asked_of(world):
        return windows.plan_of((world - 1) % len(WORLDS)), "--against", windows.plan_of(world)

    judged(chain.from_iterable(words_of(windows, ran, asked_of) for ran in rans), row, 0, "not-live", ["live"])
