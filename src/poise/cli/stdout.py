"""stdout, which may be full, or be read no further by who asked for it. Rich is not loaded here: help does without."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Unwritable(Exception):
    """stdout takes nothing more, for this reason."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason

    def told(self) -> str:
        """What to tell about it; nothing where who read enough has gone. Nothing is written on stdout any more.

        Also not what Python still holds for it when it ends.
        """
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return "" if isinstance(self.reason, BrokenPipeError) else f"cannot write what is to be said: {self.reason}"


@contextmanager
def writing() -> Iterator[None]:
    """What is written here goes to stdout, and an OSError is of that stream: :class:`Unwritable`.

    Those of files are poise's own errors; any other is a fault of the program and passes.
    """
    try:
        yield
    except OSError as error:
        raise Unwritable(error) from error
