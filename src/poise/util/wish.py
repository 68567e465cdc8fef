"""That work under way be ended: somebody's wish, and who is to hear of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the list of commands loads this, and no numpy
    from numpy.typing import NDArray


class Wish:
    """Shared by whoever may have it and all that works meanwhile; flags of compiled code learn of it.

    Attributes
    ----------
    came : whether somebody had it.
    """

    def __init__(self) -> None:
        self.came = False
        self._flags: list[NDArray[Any]] = []
        self._lock = threading.Lock()

    def end(self) -> None:
        """It came; from any thread."""
        with self._lock:
            self.came = True
            for flag in self._flags:
                flag[0] = 1

    @contextmanager
    def told(self, flag: NDArray[Any]) -> Iterator[None]:
        """Meanwhile ``flag[0]`` turns 1 with it."""
        with self._lock:
            self._flags.append(flag)
            if self.came:
                flag[0] = 1
        try:
            yield
        finally:
            with self._lock:
                self._flags = [one for one in self._flags if one is not flag]


OF_PROCESS = Wish()
"""That all end which this process does for another one: what a worker of an executor hears."""
