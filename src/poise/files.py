"""Files that others name: regular files alone, read up to a limit.

What ``stat`` says of a device, a FIFO or a file of ``/proc`` is not what reading it gives, and opening a FIFO waits for
a writer. So a file is opened without waiting, looked at once it is open, and never read beyond what the caller allows.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from poise.errors import InputError

READ_BYTES = 1 << 20
KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
         (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))  # fmt: skip


@contextmanager
def open_regular(path: str | Path, error: type[InputError], *, hint: str = "") -> Iterator[BinaryIO]:
    """A regular file, or a link to one, opened for reading; an OSError while it is open becomes ``error`` too.

    Raises
    ------
    InputError : of the type ``error``: there is no such file, it may not be read, or it is a folder, pipe, socket or
        device, which are not waited for.
    """
    try:
        with _opened(path, error, hint) as stream:
            yield stream
    except OSError as problem:
        raise _cannot(path, problem, error, hint) from None


def read_bounded(path: str | Path, most: int, error: type[InputError], *, hint: str = "") -> bytes:
    """All bytes of a regular file.

    Parameters
    ----------
    path : the file.
    most : bytes that it may have; a file that turns out longer costs no more memory than these.
    error : what is raised.
    hint : how to mend a file that cannot be read.

    Raises
    ------
    InputError : of the type ``error``: it has more, or as :func:`open_regular`.
    """
    with open_regular(path, error, hint=hint) as stream:
        said = os.fstat(stream.fileno()).st_size
        data = b"" if said > most else read_at_most(stream, most)
    if max(said, len(data)) > most:
        held = said if said > most else f"more than {most}"
        raise error(f"{str(path)[:200]!r} has {held} bytes, at most {most} are read")
    return data


def read_at_most(stream: BinaryIO, most: int) -> bytes:
    """What is left of a stream, cut after ``most`` + 1 bytes; memory grows with what comes, not with ``most``."""
    data = io.BytesIO()  # gives its bytes away without copying them
    while data.tell() <= most:
        piece = stream.read(min(READ_BYTES, most + 1 - data.tell()))
        if not piece:
            break
        data.write(piece)
    return data.getvalue()


def regular_size(path: str | Path, error: type[InputError], *, hint: str = "") -> int:
    """Bytes that a regular file says it has. Raises as :func:`open_regular`."""
    with open_regular(path, error, hint=hint) as stream:
        return os.fstat(stream.fileno()).st_size


def _opened(path: str | Path, error: type[InputError], hint: str) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode  # before it is opened: opening a device can do something
        if stat.S_ISREG(mode):
            number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            mode = os.fstat(number).st_mode
            if stat.S_ISREG(mode):
                return os.fdopen(number, "rb")
            os.close(number)
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise _cannot(path, problem, error, hint) from None
    kind = next((name for is_kind, name in KINDS if is_kind(mode)), "no regular file")
    raise error(f"cannot read {str(path)[:200]!r}: it is {kind}, not a file", hint=hint)


def _cannot(path: str | Path, problem: Exception, error: type[InputError], hint: str) -> InputError:
    why = "no such file" if isinstance(problem, FileNotFoundError) else getattr(problem, "strerror", None) or problem
    return error(f"cannot read {str(path)[:200]!r}: {why}", hint=hint)
