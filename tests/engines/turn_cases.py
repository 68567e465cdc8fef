"""TurnRanks that take turns, as threads of one process, and a planner that does what a test says."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from poise.engines.plugins.child import Answer
from poise.engines.plugins.policy import asked
from poise.engines.plugins.settings import PolicySettings
from poise.engines.plugins.turns import TurnRanks, Turns

RANKS, LAYERS, EXPERTS, SLOTS = 4, 2, 8, 12
QUICK = PolicySettings(time_limit_s=0.002)
TRIVIAL = np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1))


def call(old=TRIVIAL, seed=0, **more):
    loads = np.random.default_rng(seed).integers(1, 100, (LAYERS, EXPERTS)) ** 2
    return asked(loads, SLOTS, 1, 1, RANKS, old, settings=QUICK, **more)


def shuffled(table, seed=0):
    """Another map that holds what this one does."""
    return np.random.default_rng(seed).permuted(table, axis=1)


class Planner:
    """Answers when it is told to."""

    def __init__(self):
        self.asked, self.coming, self.ended, self.started = [], [], 0, 0
        self.answered, self.fruitless = True, 0

    def start(self):
        self.started += 1

    def ask(self, one):
        self.asked.append(one)
        self.coming.append(Future())
        return self.coming[-1]

    def answers(self, table=None, error=None):
        if error is not None:
            self.coming[-1].set_exception(error)
        else:
            self.coming[-1].set_result(Answer(table, "said"))

    def end(self):
        self.ended += 1


class Together:
    """``RANKS`` ranks, each with turns of its own; the first one's planner is the test's."""

    def __init__(self, planner=None):
        self.planner, others = planner or Planner(), [Planner() for _ in range(RANKS - 1)]
        self.turns = [Turns(one) for one in (self.planner, *others)]
        self.others = others
        self._lock, self._barrier, self._sum = threading.Lock(), threading.Barrier(RANKS, timeout=20), None

    def _total(self, mine):
        with self._lock:
            self._sum = mine.copy() if self._sum is None else self._sum + mine
        self._barrier.wait()
        out = self._sum.copy()
        if self._barrier.wait() == 0:
            self._sum = None
        self._barrier.wait()
        return out

    def turn(self, one, in_use=TRIVIAL, *, errors=None, maps=None, waits=False, settles=1):
        """What every rank takes; ``errors``: rank -> its own; ``maps``: rank -> the map it has in use."""
        errors, maps = errors or {}, maps or {}

        def take(rank):
            ranks = TurnRanks(rank, RANKS, self._total)
            return self.turns[rank].take(
                errors.get(rank, one), maps.get(rank, in_use), ranks, waits=waits, settles=settles
            )

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(take, range(RANKS)))


def same(taken):
    """The one map and word that all ranks have."""
    for one in taken[1:]:
        np.testing.assert_array_equal(one.table_LS, taken[0].table_LS)
        assert one.word == taken[0].word
    return taken[0].table_LS, taken[0].word
