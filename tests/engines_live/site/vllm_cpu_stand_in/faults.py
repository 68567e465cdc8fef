"""Faults of one rank, by the word in ``STAND_IN_FAULT``: ``WHAT:N``, from the Nth call on, N from 1; each is counted.

``worker``   the rank is killed at the Nth step of the load balancer: no launcher has to be in time for it.
``call``     the rank raises MemoryError before it comes to a plan.
``planner``  the planner's process cannot answer.
``killed``   the planner's process is killed as soon as it was asked.
``late``     the planner's process is stopped for good: it is never there in time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from cpu_stand_in.seen import COUNTS

from poise.engines.plugins import vllm_call
from poise.engines.plugins.aside import Aside


def inject(word: str) -> None:
    """Break what the word says."""
    name, _, number = word.partition(":")
    if name not in WHAT:
        raise ValueError(f"no fault is called {name!r}")
    WHAT[name](int(number))


def _worker(first: int) -> None:
    from vllm.distributed.eplb.eplb_state import EplbState

    step, steps = EplbState.step, [0]

    def ends(self: Any, *arguments: Any, **named: Any) -> None:
        steps[0] += 1
        if steps[0] >= first:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, *arguments, **named)

    EplbState.step = ends


def _call(first: int) -> None:
    asked, calls = vllm_call.asked, [0]

    def fails(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] >= first:
            COUNTS["faults"] += 1
            raise MemoryError(f"asked for by the test, call {calls[0]}")
        return asked(*arguments, **named)

    vllm_call.asked = fails


def _of_process(first: int, then: Callable[[Aside], None], before: Callable[[Any], Any] = lambda asked: asked) -> None:
    ask, calls = Aside.ask, [0]

    def asked(self: Aside, one: Any) -> Any:
        calls[0] += 1
        if calls[0] < first:
            return ask(self, one)
        COUNTS["faults"] += 1
        coming = ask(self, before(one))
        then(self)
        return coming

    Aside.ask = asked


def _signal(number: signal.Signals) -> Callable[[Aside], None]:
    def send(aside: Aside) -> None:
        for _ in range(1000):  # a thread may still be putting the next process in the place of one that is over
            try:
                if aside.pid is not None:
                    os.kill(aside.pid, number)
                    return
            except ProcessLookupError:
                pass
            time.sleep(0.01)

    return send


def _planner(first: int) -> None:
    from dataclasses import replace

    _of_process(first, lambda aside: None, lambda one: replace(one, slots=one.slots - 1))


WHAT: dict[str, Callable[[int], None]] = {
    "worker": _worker,
    "call": _call,
    "planner": _planner,
    "killed": lambda first: _of_process(first, _signal(signal.SIGKILL)),
    "late": lambda first: _of_process(first, _signal(signal.SIGSTOP)),
}
