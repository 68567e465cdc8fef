"""Signals that end a command: what it had begun to write is taken away first."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from poise.util.wish import Wish

ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # the last is not everywhere


LEAVE_S = 4.5
"""Seconds after a signal at which a watch is gone, whatever holds it."""


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


@contextmanager
def first_interrupt(ask: Callable[[], None]) -> Iterator[None]:
    """Meanwhile the first control-C calls ``ask``, in a thread of its own, and the second does what it did before.

    Compiled code holds back what Python does on a signal, not what the system writes on one: the thread reads that.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def listen() -> None:
        while number := ours.recv(1):
            if number[0] == signal.SIGINT:
                ask()
                return

    listener = threading.Thread(target=listen, name="poise-interrupt", daemon=True)
    listener.start()
    written = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda number, frame: signal.signal(signal.SIGINT, before))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(written)
        theirs.close()
        listener.join()
        ours.close()


@contextmanager
def best_so_far(say: Callable[[str], None]) -> Iterator[Wish]:
    """Meanwhile the first control-C is a wish that work end with what it has, and is said; the second ends it."""
    wish = Wish()

    def ask() -> None:
        wish.end()
        say("interrupted: going on with the best plans so far; control-C again ends at once")

    with first_interrupt(ask):
        yield wish


class WatchEnding:
    """Supervisors end a sidecar with SIGTERM, a terminal that goes with SIGHUP: it leaves as with control-C, at once.

    The signal interrupts what is done at the moment, but a file that is being written; a second one changes nothing.
    What has not ended after LEAVE_S (a disk that hangs) is ended by the system, with SIGALRM.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.came = False
        self._held = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # only there signals can be taken
            for number in self.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self._before[number] = signal.signal(number, self._take)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """Take signals as before; an interrupt is the end of a watch, and no error."""
        if self.came:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        return kind is KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            return
        self.came = True
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LEAVE_S)
        if not self._held:
            raise KeyboardInterrupt

    @contextmanager
    def later(self) -> Iterator[None]:
        """What is done here is done to its end; the signal counts then."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self.came and not self._held:
                raise KeyboardInterrupt

    def wait(self, seconds: float) -> None:
        """Sleep; not at all after a signal that was lost (Python drops what is raised inside a destructor)."""
        if self.came:
            raise KeyboardInterrupt
        time.sleep(seconds)

    def leave(self) -> None:
        """After a signal: neither wait for a plan that is being made nor unload libraries, which takes seconds."""
        if self.came:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(0)
