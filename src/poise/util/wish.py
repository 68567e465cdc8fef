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

    Parameters
    ----------
    seen : where another process says that it came (:mod:`poise.util.processes`); None: it is this process's own.

    Attributes
    ----------
    far : it is another process's: whoever waits for it must look.
    """

    def __init__(self, seen: NDArray[Any] | None = None) -> None:
        self.far = seen is not None
        self._seen: Any = bytearray(1) if seen is None else seen
        self._flags: list[NDArray[Any]] = []
        self._lock = threading.Lock()

    @property
    def came(self) -> bool:
        """Whether somebody wishes that the work ends."""
        return bool(self._seen[0])

    def end(self) -> None:
        """It came; from any thread."""
        with self._lock:
            self._seen[0] = 1
            for flag in self._flags:
                flag[0] = 1

    def tell(self, flag: NDArray[Any]) -> None:
        """From now on ``flag[0]`` turns 1 with it."""
        with self._lock:
            self._flags.append(flag)
            if self.came:
                flag[0] = 1

    @contextmanager
    def told(self, flag: NDArray[Any]) -> Iterator[None]:
        """Meanwhile ``flag[0]`` turns 1 with it."""
        self.tell(flag)
        try:
            yield
        finally:
            with self._lock:
                self._flags = [one for one in self._flags if one is not flag]
