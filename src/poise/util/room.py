"""Memory: what is left of it, what does not fit refused before the kernel ends the process, and work in blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from poise.util.errors import InputError

BLOCK_BYTES = 32 << 20
"""Most bytes of a temporary array."""
FREE_BYTES = 64 << 20
"""Below this nobody is asked."""
GROUPS = Path("/sys/fs/cgroup")


def blocks(count: int, each: int) -> Iterator[slice]:
    """Slices of ``count`` rows of ``each`` bytes, in order: of :data:`BLOCK_BYTES` or one row."""
    rows = max(1, BLOCK_BYTES // max(1, each))
    for first in range(0, count, rows):
        yield slice(first, min(count, first + rows))


def require(bytes_: int, what: str, error: type[InputError], *, hint: str = "") -> None:
    """Refuse what would not fit into memory.

    Raises
    ------
    InputError : of the type ``error``: fewer than ``bytes_`` are available.
    """
    if bytes_ <= FREE_BYTES:
        return
    left = available_bytes()
    if left is not None and bytes_ > left:
        raise error(f"{what} takes {bytes_} bytes of memory, {left} are available", hint=hint or "give a part of it")


def available_bytes() -> int | None:
    """Bytes that this process can still take: of the machine, its control group and its limit; None: unknown."""
    known = [left for left in (_of_machine(), _of_group(), _of_limit()) if left is not None]
    return max(0, min(known)) if known else None


def _of_machine() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _of_group() -> int | None:
    """Of version 2 groups alone; pages of files that are cached in one can be dropped."""
    path = next((line[3:] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")), None)
    if path is None:
        return None
    left = []
    here = GROUPS / path.lstrip("/")
    for folder in (here, *here.parents):
        most, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if most is not None and used is not None:
            cached = [int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith("file ")]
            left.append(most - used + sum(cached))
        if folder == GROUPS:
            break
    return min(left, default=None)


def _of_limit() -> int | None:
    try:
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        pages = int(_lines(Path("/proc/self/statm"))[0].split()[0])
        return limit - pages * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, IndexError, ValueError, OSError):
        return None


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii", "replace").splitlines()
    except OSError:
        return []
