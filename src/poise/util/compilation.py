"""What this process has compiled: told apart from the compiler, which takes seconds to load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Compilation:
    """What this process has compiled, and who wants to know of it.

    Attributes
    ----------
    count : functions compiled, not loaded from a cache.
    seconds : wall time that took; a function compiled while another is counts once.
    loading : wall time that others took to load.
    on_first : called once, before the first function is compiled.
    """

    def __init__(self) -> None:
        self.count, self.seconds, self.loading = 0, 0.0, 0.0
        self.on_first: Callable[[], None] | None = None
        self._open: list[tuple[Any, float]] = []

    def spent(self) -> float:
        """Seconds of compiling and loading so far, of a function that is at it too."""
        opened = self._open[:1]
        return self.seconds + self.loading + (time.perf_counter() - opened[0][1] if opened else 0.0)

    @property
    def busy(self) -> bool:
        """Whether a function is being compiled right now."""
        return any(who is not None for who, _ in list(self._open))

    @contextmanager
    def load(self) -> Iterator[None]:
        """Meanwhile a function is loaded from the cache."""
        since = time.perf_counter()
        self._open.append((None, since))
        try:
            yield
        finally:
            self._open.pop()
            self.loading += 0.0 if self._open else time.perf_counter() - since

    def start(self, who: Any) -> None:
        """A function is about to be compiled."""
        if self.on_first is not None and not self.count:
            self.on_first()
        self.count += 1
        self._open.append((who, time.perf_counter()))

    def end(self, who: Any) -> None:
        """It is compiled; what began inside it and failed ends too."""
        while self._open:
            opened, since = self._open.pop()
            if opened is who:
                self.seconds += 0.0 if self._open else time.perf_counter() - since
                return


COMPILATION = Compilation()
