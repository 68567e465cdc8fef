"""The planner's own process: calls come in, maps go out, until whoever asks is gone.

The process reads pickles of :class:`poise.engines.plugins.policy.Asked` from stdin and
answers each on stdout with a map, or with what went wrong. It ends with its input. It gives way to all that serves: it
runs at a lower priority, on one core, and sees no GPU.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

from poise.engines.plugins.policy import warm_up

ENVIRON = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
           "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
"""What the process has beside its parent's variables."""
GIVES_WAY = 5


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A map, int64 [L, S], and what it is worth; or, without one, what went wrong."""

    table_LS: Any
    said: str


def main() -> None:
    """Answer until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: whoever asks ends, and this with it
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that is printed is an answer
    try:
        os.nice(GIVES_WAY)
    except OSError:
        pass
    serve(sys.stdin.buffer, out)


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    """Answer calls in their order; kernels are compiled before the first."""
    warm_up()
    while True:
        try:
            call = pickle.load(asked)
        except EOFError:
            return
        try:
            answer = Answer(*call.plan())
        except BaseException as error:  # the next call may succeed
            answer = Answer(None, f"{type(error).__name__}: {error}"[:500])
        pickle.dump(answer, answers)
        answers.flush()
