"""What a rank posts, waits for and leaves undone, in a file that outlives it; and delays by chance, to find races.

``keep(file)`` notes every operation of every process group, from Python, in a ring of lines in a mapped file: what a
rank did last can be read though it was killed, or is blocked in C. Stacks of all its threads go to a file beside it
when the process gets SIGUSR1. ``delay(seed)`` makes every post, wait and hook, the planning thread and the threads that
gloo reads and writes with late by chance, and collects garbage at odd moments, on every rank otherwise.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import gc
import itertools
import mmap
import os
import random
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work

COLLECTIVES = (
    "_allgather_base", "all_gather_single", "all_to_all_single", "allgather", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced", "alltoall", "alltoall_base", "barrier",
    "broadcast", "gather", "reduce", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced", "scatter",
)  # fmt: skip
PAIRS = ("send", "recv")
LINES, WIDTH = 256, 128
ENDED = ("done", "failed")


class Journal:
    """The last operations of this process; see the module docstring.

    Parameters
    ----------
    file : of ``LINES`` lines of ``WIDTH`` bytes.
    """

    def __init__(self, file: Path) -> None:
        file.write_bytes((b" " * (WIDTH - 1) + b"\n") * LINES)
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), LINES * WIDTH)
        self._number = itertools.count()
        self._open: dict[int, str] = {}
        self._of: dict[int, int] = {}
        self.case = ""

    def begin(self, what: str) -> int:
        """An operation is posted; its number."""
        number = next(self._number)
        self._open[number] = f"{self.case}: {what}"
        self.say(number, "posting")
        return number

    def say(self, number: int, state: str) -> None:
        """An operation is in another state."""
        what = self._open.get(number, "")
        line = f"{number:7d} {time.time() % 1e5:9.3f} {state:8s} {what}".encode()[: WIDTH - 1].ljust(WIDTH - 1)
        at = number % LINES * WIDTH
        self._map[at : at + WIDTH - 1] = line
        if state in ENDED:
            self._open.pop(number, None)

    def posted(self, number: int, work: Any) -> None:
        """Follow a work until it is waited for, or nobody holds it."""
        self.say(number, "posted")
        self._of[id(work)] = number
        weakref.finalize(work, self._gone, id(work), number)

    def waits(self, work: Any) -> int | None:
        """The number of a work that is waited for."""
        number = self._of.get(id(work))
        if number is not None:
            self.say(number, "waiting")
        return number

    def _gone(self, key: int, number: int) -> None:
        self._of.pop(key, None)
        if number in self._open:
            self.say(number, "dropped")


def keep(file: Path) -> Journal:
    """Begin to note in ``file``, named ``*.rank-N``; stacks go to ``*.stacks-N`` on SIGUSR1."""
    stacks = file.with_suffix(file.suffix.replace("rank", "stacks")).open("w")
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    journal = Journal(file)
    for name in (*COLLECTIVES, *PAIRS):
        if hasattr(ProcessGroup, name):
            setattr(ProcessGroup, name, _noted(journal, name, getattr(ProcessGroup, name)))
    wait = Work.wait

    @functools.wraps(wait)
    def waited(work: Any, *args: Any, **kwargs: Any) -> Any:
        number = journal.waits(work)
        _late()
        try:
            out = wait(work, *args, **kwargs)
        except BaseException:
            if number is not None:
                journal.say(number, "failed")
            raise
        if number is not None:
            journal.say(number, "done")
        return out

    Work.wait = waited
    return journal


def read(file: Path) -> tuple[list[str], list[str]]:
    """What a journal says, oldest first: operations that were never done, and those that were."""
    text = file.read_bytes().decode(errors="replace") if file.exists() else ""
    lines = sorted(line.rstrip() for line in text.splitlines() if line.strip())
    undone = [line for line in lines if line.split()[2] not in ENDED]
    return undone, [line for line in lines if line.split()[2] in ENDED]


def _noted(journal: Journal, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def post(group: Any, *args: Any, **kwargs: Any) -> Any:
        what = f"{name} {group.group_name} of {group.size()}"
        if name in PAIRS:
            what = f"{name} {group.group_name} peer {args[1]} tag {args[2]} {sum(t.nbytes for t in args[0])} B"
        number = journal.begin(what)
        _late()
        try:
            work = function(group, *args, **kwargs)
        except BaseException:
            journal.say(number, "failed")
            raise
        if work is None:
            journal.say(number, "done")
        else:
            journal.posted(number, work)
        return work

    return post


# ---- delays ---------------------------------------------------------------------------------------------------------

_chance: random.Random | None = None
LATE = ((0.004, 0.2), (0.03, 0.02), (0.2, 0.001))
"""How likely a delay of up to so many seconds is."""
COLLECTED, STALLED = 0.002, 0.0005
"""How likely garbage is collected, and a thread of gloo sleeps for a second."""


def _late() -> None:
    """Sleep by chance, rarely long; collect garbage, or stall gloo, by chance."""
    if _chance is None:
        return
    draw = _chance.random()
    for likely, seconds in LATE:
        if draw < likely:
            time.sleep(seconds * _chance.random())
            break
        draw -= likely
    if _chance.random() < COLLECTED:
        gc.collect()
    if _chance.random() < STALLED:
        stall(_chance.choice(loops()))


def loops() -> list[int]:
    """Threads that read and write gloo's connections, oldest first: one a process group."""
    tasks = sorted(int(task.name) for task in Path("/proc/self/task").iterdir())
    return [task for task in tasks if Path(f"/proc/self/task/{task}/comm").read_text().strip() == "gloo_tcp_loop"]


def stall(thread: int) -> None:
    """Let one thread of this process sleep for a second wherever it is: the handler of SIGHUP, 1, is ``sleep(1)``."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGHUP), ctypes.cast(libc.sleep, ctypes.c_void_p))
    libc.tgkill(os.getpid(), thread, int(signal.SIGHUP))


def delay(seed: int) -> None:
    """From now on: this rank is late by chance, at posts, waits, hooks, and after every part of a step."""
    global _chance
    from poise.runtime import spans

    _chance = random.Random(seed * 1000 + dist.get_rank())
    spans.record(lambda *_: _late())
