"""Whose plan runs from when on: one rank has it planned aside; all take it at the same rearrangement, or none does.

An engine calls its load balancer on every rank, at the same steps. At each call, a *turn*, the ranks share one array:
the first rank's word and, if it has one, its map. So no rank can differ, whatever happened on the first one; ranks need
no equal processors, and a plan is made once, not once a rank.

A call that serving waits for never waits for the planner: the first rank takes the map that was asked for at the turn
before, if it is there, and hands over the loads of this turn. Where the call is made beside serving (by the worker of
vLLM's asynchronous balancing), it waits, for minutes at most, and the map is of this turn's loads. That is the one
clock that is looked at, by the first rank, whose word the others have. If the map is not there, or its process died, or
the planner raised, or the map in use is another than it was made from, or a rank has an error of its own, all ranks
keep the map in use, and say why. A planner whose processes end, or hang, one after the other without any answer is
given up: the map in use stays for good.

An engine that counts tokens by slot, over more steps than lie between two rearrangements, tells all of them by the map
in use: loads of steps under the map before are another expert's. So nothing is planned until all counted steps are of
one map.

Every rank checks beside that all have the same map in use: its number, and the square, are summed over ranks; they are
all equal if, and only if, n times the sum of squares is the square of the sum, and then every rank sees that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.plugins.aside import Aside
from poise.engines.plugins.child import Answer
from poise.engines.plugins.policy import Asked, usable_map
from poise.util.errors import NoResultError

MOST_LATE = 4
"""Turns that a map may be late in a row, before its process is ended and started anew."""
MOST_SILENT = 64
"""The same of a process that never answered: it compiles, and an engine's turns may be half a second apart. What one
compiled the next finds."""
LONGEST_S = 600.0
"""That the first rank waits, beside serving, before it ends the process: the others wait for its word meanwhile, and
torch's process groups end that after half an hour."""
MOST_TRIED = 3
"""Processes in a row that ended, or were ended, without an answer, before the planner is given up."""
NUMBERS = 2**24
NEW, STAYS, FIRST, LATE, FAILED, OTHER, GIVEN_UP, MIXED = range(1, 9)
WORDS = {
    NEW: "a new map",
    STAYS: "the map in use stays: nothing pays",
    FIRST: "the map in use stays: the planner has the loads now, its map comes at the next rearrangement",
    LATE: "the map in use stays: the planner is late",
    FAILED: "the map in use stays: the planner failed, see the log of the first rank",
    OTHER: "the map in use stays: it is another than the one that was planned from",
    GIVEN_UP: f"the map in use stays from now on: {MOST_TRIED} processes of the planner, one after the other, gave no "
    "answer; a restart of the engine tries again",
    MIXED: "the map in use stays: the engine counts more steps than lie between two rearrangements, and tells those "
    "under the map before as if this one had run; window_size at most step_interval mends that",
}
"""What ranks say, by the first rank's word."""


@dataclass(frozen=True, slots=True)
class TurnRanks:
    """The ranks that plan together.

    Parameters
    ----------
    rank, size : of this rank, and how many there are.
    total : (int64 [X]) -> their sum over ranks; every rank calls it at every turn.
    """

    rank: int
    size: int
    total: Callable[[NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """What came of a turn: the map that all ranks have from now on, why, and what this rank alone can say of it."""

    table_LS: NDArray[np.int64]
    word: int
    said: str


@dataclass(eq=False)
class Turns:
    """The turns of one model's load balancer, on one rank.

    Parameters
    ----------
    aside : the planner; it runs on the first rank alone.
    """

    aside: Aside
    _coming: Future[Answer] | None = None
    _from: Any = None
    _late: int = 0
    _last: NDArray[np.int64] | None = field(default=None, repr=False)
    _since: float = math.inf
    _said: str = field(default="", repr=False)

    def take(
        self, asked: Asked | BaseException, in_use_LS: NDArray[np.int64], ranks: TurnRanks, *, waits: bool,
        settles: int = 1,
    ) -> Taken:  # fmt: skip
        """The map from this turn on.

        Parameters
        ----------
        asked : the call, of which the map in use is known; or the error that this rank alone had with it.
        in_use_LS : the map in use, int [L, S], as the engine gave it.
        ranks : all of them.
        waits : whether nothing waits for this call.
        settles : turns after a change of the map until all steps that are counted are of the new one.
        """
        if self._last is not None:
            self._since = self._since + 1 if np.array_equal(self._last, in_use_LS) else 1
        self._last = np.array(in_use_LS)
        self._said = "" if isinstance(asked, Asked) else f"{type(asked).__name__}: {asked}"
        word, table = 0, None
        if ranks.rank == 0 and isinstance(asked, Asked):
            try:
                word, table = self._first(asked, waits=waits, settled=self._since >= settles)
            except Exception as error:  # no process can be started, say: the others wait for this rank's word
                word, self._said = FAILED, f"{type(error).__name__}: {error}"
        shape = np.shape(in_use_LS)
        mine = np.zeros(4 + in_use_LS.size, np.int64)
        number = int(hashlib.sha256(np.ascontiguousarray(in_use_LS, np.int64).tobytes()).hexdigest(), 16) % NUMBERS
        mine[:4] = number, number**2, isinstance(asked, BaseException), word
        if table is not None:
            mine[4:] = table.ravel() + 1  # an empty slot, -1, is 0
        got = ranks.total(mine)
        in_use = in_use_LS.astype(np.int64)
        stays = asked.kept() if isinstance(asked, Asked) else None
        kept = in_use if stays is None else stays
        if int(got[0]) ** 2 != ranks.size * int(got[1]):
            return Taken(in_use, FAILED, "ranks have different maps in use; a restart mends that")
        if got[2]:
            own = self._said if isinstance(asked, BaseException) else f"{got[2]} ranks had an error of their own"
            return Taken(in_use, FAILED, own)  # who had the error could place no orphans: nobody does
        word = int(got[3])
        if word != NEW:
            return Taken(kept, word, self._said)
        table = got[4:].reshape(shape) - 1
        if not isinstance(asked, Asked) or not valid(table, asked):
            return Taken(kept, FAILED, "the planned map lacks an expert")
        return Taken(table, word, self._said)

    def _first(self, asked: Asked, *, waits: bool, settled: bool) -> tuple[int, NDArray[np.int64] | None]:
        """The first rank's word, and its map; what is next is handed over."""
        kept = asked.kept()
        if kept is None:
            raise NoResultError(f"the map in use is none of {asked.slots} slots for {asked.load_LE.shape[1]} experts")
        if self.aside.fruitless >= MOST_TRIED:
            return GIVEN_UP, None
        self.aside.start()
        if waits and not settled:
            return MIXED, None
        if waits:
            return self._word(self.aside.ask(asked), kept)
        word, table = FIRST if settled else MIXED, None
        if self._coming is not None:
            if not self._coming.done():
                self._late += 1
                if self._late >= (MOST_LATE if self.aside.answered else MOST_SILENT):
                    self.aside.end()
                return LATE, None
            fits = self._from is not None and np.array_equal(self._from, kept)
            word, table = self._word(self._coming, kept) if fits else (OTHER, None)
        self._coming, self._late = None, 0
        self._from = kept if table is None else table
        if settled and asked.load_LE.any():  # a call before anything was served has nothing to plan for
            self._coming = self.aside.ask(asked.moved_on(self._from))
        return word, table

    def _word(self, coming: Future[Answer], kept: NDArray[np.int64]) -> tuple[int, NDArray[np.int64] | None]:
        try:
            answer = coming.result(LONGEST_S)
        except TimeoutError:
            coming.cancel()
            self.aside.end()
            self._said = f"no answer in {LONGEST_S:.0f} s, the planner's process is ended"
            return FAILED, None
        except BaseException as error:
            self._said = f"{type(error).__name__}: {error}"
            return FAILED, None
        self._said = answer.said
        table = np.asarray(answer.table_LS, np.int64)
        if table.shape != kept.shape:
            return OTHER, None
        return (STAYS, None) if np.array_equal(table, kept) else (NEW, table)


def valid(table_LS: NDArray[np.int64], asked: Asked) -> bool:
    """Whether a map holds every expert on the ranks that are left."""
    left = table_LS if asked.active_D is None else table_LS[:, np.repeat(asked.active_D, asked.slots // asked.ranks)]
    layers, experts = asked.load_LE.shape
    return usable_map(left, layers, experts, asked.slots) is not None
