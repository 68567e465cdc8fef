"""Cases that fail in every way a rank can, for the test of what runs them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.cases import read_options, run_cases


def fine() -> float:
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def fails_alike() -> None:
    raise ArithmeticError("on every rank")


def fails_on_one() -> None:
    """The other waits for a message that does not come."""
    if dist.get_rank() == 0:
        raise ArithmeticError("on one rank")
    dist.recv(torch.empty(3), 0, tag=77)


def hangs_in_c() -> None:
    """One rank waits for itself and keeps Python's lock: none of its threads can say so."""
    if dist.get_rank() == 0:
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def goes_away() -> None:
    """One rank ends as if all were well."""
    if dist.get_rank() == 0:
        os._exit(0)


def is_killed() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)


CASES = {case.__name__: case for case in (fine, fails_alike, fails_on_one, hangs_in_c, goes_away, is_killed)}
CASES["fine_too"] = fine

if __name__ == "__main__":
    run_cases(CASES, read_options())
