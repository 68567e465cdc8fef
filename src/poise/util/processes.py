"""Processes of this machine as an executor, which see the wishes of the process that they work for."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from poise.util.errors import CommunicationError
from poise.util.wish import Wish

T = TypeVar("T")
WISHES = 4096
"""Bytes that are shared with workers: one a wish that is alive."""


class SeeingProcesses(Executor):
    """Workers deaf to control-C at a terminal, which comes to all of its processes: what it ends is for the first to
    say. A piece sees its own plan's wish alone (:meth:`place_of`); :meth:`end` ends all pieces, those that look at no
    wish too.
    """

    def __init__(self, workers: int) -> None:
        import multiprocessing  # which most commands do without
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing.sharedctypes import RawArray

        # A fork of a process with threads may hang: workers begin anew.
        context = multiprocessing.get_context("spawn")
        theirs, self._ours = context.Pipe(duplex=False)
        shared = RawArray("B", WISHES)
        self._seen = np.frombuffer(shared, np.uint8)
        self._free, self._places = deque(range(WISHES)), WeakKeyDictionary[Wish, int]()
        self._one_asks = threading.Lock()
        self._pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(theirs, shared))

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """As of any executor; a worker that it starts is deaf from its first instruction on."""
        with _deaf():
            return self._pool.submit(_piece, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of any executor."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def place_of(self, wish: Wish) -> int:
        """Where workers see a wish (:func:`seen`).

        Raises
        ------
        CommunicationError : more wishes are alive than there is room for.
        """
        with self._one_asks:
            if wish not in self._places:
                if not self._free:
                    raise CommunicationError(f"{WISHES} plans share these workers, there is no room for one more")
                place = self._free.popleft()  # that which has been free longest: nobody looks there any more
                self._seen[place] = 0
                self._places[wish] = place
                weakref.finalize(wish, self._free.append, place)
                wish.tell(self._seen[place : place + 1])
            return self._places[wish]

    def end(self) -> None:
        """End the pieces that run, and each one that begins, with their workers."""
        self._ours.close()  # an end of a pipe that is gone is seen at every copy of the other


@contextmanager
def _deaf() -> Iterator[None]:
    """Meanwhile control-C waits, and comes never to a process that is started: it has no handler yet and would die."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_BETWEEN = threading.Lock()
"""Of a worker that waits for a piece or sends what one gave: it must not end in the middle of that."""
_SHARED: list[NDArray[np.uint8]] = []
"""What a worker shares with the process that it works for; elsewhere empty."""


def _begin(theirs: Any, shared: Any) -> None:
    """A worker: deaf to the terminal, but not to the process that it works for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _SHARED.append(np.frombuffer(shared, np.uint8))
    _BETWEEN.acquire()
    threading.Thread(target=_hear, args=(theirs,), name="poise-end", daemon=True).start()


def _hear(theirs: Any) -> None:
    with suppress(OSError):  # so Windows says it
        theirs.poll(None)
    _BETWEEN.acquire()
    os._exit(1)


def _piece(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    _BETWEEN.release()
    try:
        return fn(*args, **kwargs)
    finally:
        _BETWEEN.acquire()


def seen(place: int | None) -> Wish:
    """The wish of the process that this one works for; one that never comes where there is none to be seen."""
    return Wish() if place is None or not _SHARED else Wish(_SHARED[0][place : place + 1])
