"""Signals that end a command: what it had begun to write is taken away first."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # the last is not everywhere


class Ended(KeyboardInterrupt):
    """A signal that is to end the command; what catches control-C catches them all."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status by which shells tell it."""
        return 128 + self.number


@contextmanager
def signals_end() -> Iterator[None]:
    """Turn signals into :class:`Ended`, so that blocks in progress clean up; one that is ignored (nohup) stays so.

    Python looks at signals between its own instructions: a call into compiled code ends first.
    """
    if threading.current_thread() is not threading.main_thread():  # only there signals can be taken
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    taken = [number for number, how in before.items() if how in (signal.SIG_DFL, signal.default_int_handler)]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _end(number: int, frame: FrameType | None) -> None:
    handled = sys.exc_info()[1]  # in a handler: what the code that it interrupts is handling
    while handled is not None:
        if isinstance(handled, KeyboardInterrupt):  # a second signal must not break off the cleaning
            return
        handled = handled.__context__
    raise Ended(number)
