"""Exchanges measured on the ranks: what the runtime does for a layer without its arithmetic.

A round is a dispatch (counts to everyone, then rows) and a combine (the same rows back), by the functions the runtime
uses. The cost model charges one start-up to each of the two, so a row is half a round. Then come as many rounds without
counts: what is missing in them is what counts add, their exchange and that ranks leave it one after the other. A pause
stands between exchanges, as experts and attention do; an exchange lasts from when the last rank begins until the last
is done, as in the tables. Sizes are found first; then all exchanges are run in turn, again and again, so that a busy
minute of the machine falls on one repeat of each and not on all of one.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from poise.lab.calibrate.fit import LinkRow, fit_links
from poise.lab.calibrate.patterns import PortBytes, balanced, bulk_patterns, peer_counts, port_bytes, ring
from poise.lab.emulate.quiet import LEAST_REPEATS, held_s, settle, waits_s
from poise.runtime.collectives import exchange
from poise.runtime.dispatch import all_counts

ROW_BYTES = 64
WARM_UP = 2
"""Rounds that are not counted: connections are made, windows open."""
FIRST_BYTES, GROWTH = 16 * 1024, 4
MOST_BYTES = 2**30
MOST_ROUNDS = 32
PAUSE_S = 0.02
"""Experts or attention lie between two exchanges of a layer: what is still in sockets is gone, idle ports are ready."""
LONG_START_UPS = 8.0
"""An exchange that is to tell a rate lasts at least as long as so many start-ups."""
REPEAT_LONGS = 1.5
"""A repeat, with its pauses, lasts at least as long as so many of them."""
LONGER = 6.0
"""Beside the size that lasts long enough, one this many times longer: it tells the rate. The shorter one is slower by
what even exchanges lose, which does not grow with their bytes."""
LONGEST_S = 2.0
"""A longer exchange is not tried."""


@dataclass(slots=True)
class CalibrationRanks:
    """What every rank knows of the run; decisions are made from numbers that all ranks have agreed on.

    Parameters
    ----------
    node_D : int32 [D], node of each rank.
    device : where tensors live.
    counts : numbers a rank tells the others before a dispatch (the runtime: one an expert).
    sharing : ranks on this machine, emulated nodes or not.
    """

    node_D: NDArray[np.int32]
    device: torch.device
    counts: int = 64
    sharing: int = 1
    began: float = field(default_factory=time.monotonic)

    def agree(self, *numbers: float) -> list[float]:
        """The largest of each number over all ranks. A barrier, too."""
        if len(self.node_D) == 1:
            return list(numbers)
        both = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        out: list[float] = both.tolist()
        return out

    def elapsed(self) -> float:
        """Seconds since the run began, agreed."""
        return self.agree(time.monotonic() - self.began)[0]

    def wait(self) -> None:
        """Until this device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Parameters
    ----------
    seconds : for all exchanges together, about; three repeats are made at least, if as many are asked for.
    long_s : an exchange that is to tell a rate lasts at least so long; a repeat lasts some times that.
    repeats : of each row at most; their median counts.
    longer : also one that is some times as long.
    """

    seconds: float = 40.0
    long_s: float = 0.05
    repeats: int = 7
    longer: bool = True


Took = tuple[float, float]
"""Seconds of an exchange, and how many of them the rank that waited longest for a core waited."""


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """One exchange: its sizes in rows int64 [D, D], how many rounds make a repeat, and seconds as first seen."""

    name: str
    rows_DD: NDArray[np.int64]
    ports: PortBytes
    rounds: int
    seconds: float

    def row(self, took: list[Took], alone: list[Took]) -> LinkRow:
        (all_s, steady), (all_alone_s, alone_steady) = (settle(*zip(*one, strict=True)) for one in (took, alone))
        low, middle, high = (float(value) for value in np.quantile(all_s, [0.25, 0.5, 0.75]))
        alone_low, alone_s, alone_high = (float(value) for value in np.quantile(all_alone_s, [0.25, 0.5, 0.75]))
        ports = self.ports
        return LinkRow(
            self.name, ports.intra, ports.inter, ports.node, ports.peers, middle, low, high, len(all_s), self.rounds,
            alone_s, ports.intra_even, ports.inter_even, alone_low, alone_high, steady and alone_steady,
        )  # fmt: skip


def measure_links(ranks: CalibrationRanks, effort: Effort, *, find_nic: bool = False) -> list[LinkRow]:
    """Rows of every pattern this shape has, from a few bytes to exchanges that last long enough.

    Parameters
    ----------
    ranks, effort : the run.
    find_nic : also the pattern that tells one network port a device from one a node.
    """
    devices, begin = len(ranks.node_D), ranks.elapsed()
    runner = _Runner(ranks)
    cases = [
        runner.case(f"{peers} peers", ring(devices, peers) * ROW_BYTES * peers, effort)
        for peers in peer_counts(devices)
    ]
    effort = replace(effort, long_s=max(effort.long_s, LONG_START_UPS * cases[-1].seconds))
    patterns = bulk_patterns(ranks.node_D, single=find_nic)
    for name, matrix in patterns.items():
        cases += _grow(name, matrix, runner, effort)
    if "all" in patterns:
        once = [[(case.seconds, 0.0)] for case in cases]
        found = fit_links([case.row(one, one) for case, one in zip(cases, once, strict=True)]).constants
        matrix = balanced(ranks.node_D, found["intra_bytes_per_s"], found["inter_bytes_per_s"])
        cases += _grow("balanced", matrix, runner, effort)
    sweep = sum(4 * case.rounds * (case.seconds + PAUSE_S) for case in cases)
    repeats = int(min(effort.repeats, max(LEAST_REPEATS, (begin + effort.seconds - ranks.elapsed()) / sweep)))
    took: list[list[tuple[Took, Took]]] = [[] for _ in cases]
    todo = list(range(len(cases)))
    for turn in itertools.count(1):
        for index in todo:
            took[index].append(runner.run(cases[index].rows_DD, cases[index].rounds))
        if turn < repeats:
            continue
        rows = [case.row(*map(list, zip(*seen, strict=True))) for case, seen in zip(cases, took, strict=True)]
        todo = [index for index, row in enumerate(rows) if not row.steady]
        if not todo or ranks.elapsed() > begin + effort.seconds:
            return rows
    raise AssertionError("unreachable")


def _grow(name: str, matrix_DD: NDArray[np.float64], runner: _Runner, effort: Effort) -> list[_Case]:
    """One pattern, larger and larger until an exchange lasts long enough, and one beyond that."""
    cases: list[_Case] = []
    size = float(FIRST_BYTES)
    while size <= MOST_BYTES:
        cases.append(runner.case(name, matrix_DD * size, effort))
        last = cases[-1].seconds
        if last < effort.long_s:
            size *= min(GROWTH, max(1.5, 1.2 * effort.long_s / last))
            continue
        size *= LONGER
        if not effort.longer or size > MOST_BYTES or last * LONGER > LONGEST_S:
            break
        cases.append(runner.case(name, matrix_DD * size, effort, tries=1))
        if cases[-1].seconds > last * LONGER / 2:
            break
        size *= GROWTH  # the one before was late, not long
    return cases


class _Runner:
    """Runs rounds of dispatch and combine from one buffer."""

    def __init__(self, ranks: CalibrationRanks) -> None:
        self.ranks = ranks
        self._rank = dist.get_rank()
        self._buffer_nd = torch.zeros(0, ROW_BYTES, dtype=torch.uint8, device=ranks.device)
        self._ids_TK = torch.zeros(1, 1, dtype=torch.int64, device=ranks.device)

    def case(self, name: str, bytes_DD: NDArray[np.float64], effort: Effort, tries: int = WARM_UP) -> _Case:
        """An exchange, warmed up, with as many rounds a repeat as make it last."""
        rows_DD = np.ceil(bytes_DD / ROW_BYTES).astype(np.int64)
        ports = port_bytes(rows_DD.astype(np.float64) * ROW_BYTES, self.ranks.node_D)
        seconds = max(min(self._rounds(*self._mine(rows_DD), 1, True)[0] for _ in range(tries)), 1e-7)
        rounds = int(min(MOST_ROUNDS, max(1, np.ceil(REPEAT_LONGS * effort.long_s / (seconds + PAUSE_S) / 2))))
        return _Case(name, rows_DD, ports, rounds, seconds)

    def run(self, rows_DD: NDArray[np.int64], rounds: int) -> tuple[Took, Took]:
        """Half a round, and half a round without counts."""
        mine = self._mine(rows_DD)
        return self._rounds(*mine, rounds, True), self._rounds(*mine, rounds, False)

    def _mine(self, rows_DD: NDArray[np.int64]) -> tuple[torch.Tensor, list[int], list[int]]:
        """What this rank sends: rows, how many to each rank, and how many come from each."""
        sent_D, got_D = rows_DD[self._rank].tolist(), rows_DD[:, self._rank].tolist()
        if len(self._buffer_nd) < sum(sent_D):
            self._buffer_nd = torch.zeros(sum(sent_D), ROW_BYTES, dtype=torch.uint8, device=self.ranks.device)
        return self._buffer_nd[: sum(sent_D)], sent_D, got_D

    def _rounds(self, x_nd: torch.Tensor, sent_D: list[int], got_D: list[int], rounds: int, counted: bool) -> Took:
        """Half a round, on average: from when the last rank begins an exchange until the last is done with it."""
        ranks, group = self.ranks, dist.group.WORLD
        marks: list[float] = []
        held = 0.0
        ranks.agree(0.0)
        # on one machine all read one clock; elsewhere ranks leave a barrier closer together than clocks are
        zero = 0.0 if ranks.sharing == len(ranks.node_D) else time.perf_counter()
        for _ in range(rounds):
            waited = waits_s()
            marks.append(time.perf_counter() - zero)
            if counted:
                all_counts(self._ids_TK, ranks.counts, group)
            y_nd = exchange(x_nd, sent_D, got_D, group)
            ranks.wait()
            marks.append(time.perf_counter() - zero)
            held += held_s(waited)
            time.sleep(PAUSE_S)
            waited = waits_s()
            marks.append(time.perf_counter() - zero)
            exchange(y_nd, got_D, sent_D, group)
            ranks.wait()
            marks.append(time.perf_counter() - zero)
            held += held_s(waited)
            time.sleep(PAUSE_S)
        *last, held = ranks.agree(*marks, held)
        return (sum(last[1::2]) - sum(last[::2])) / rounds / 2, held / rounds / 2
