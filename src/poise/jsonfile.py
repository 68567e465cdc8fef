"""JSON files of others: sizes first, every defect a typed error. Values are the caller's to check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from poise.errors import InputError
from poise.files import read_bounded

MAX_ROOM = 2 << 30
"""Most bytes of memory that the values of a JSON file may take."""
ROOM = {b"[": 64, b"{": 256, b",": 40, b'"': 32, b":": 72}
"""What each such byte may stand for in memory: a list, a dict, a number in it, half of a text, an entry of a dict."""


def json_room(data: bytes, most: int, error: type[InputError]) -> int:
    """Bytes of memory that the values in some JSON can take at most, told without parsing it.

    A text with one wide character takes four bytes for each of its characters.

    Raises
    ------
    InputError : of the type ``error``: more than ``most``.
    """
    room = len(data) * (1 if data.isascii() else 4)
    room += sum(data.count(mark) * each for mark, each in ROOM.items())
    if room > most:
        raise error(
            f"JSON of {len(data)} bytes may take {room} bytes in memory, at most {most} are given",
            hint="split it into several files",
        )
    return room


def read_json(path: Path, most: int, error: type[InputError], *, hint: str = "") -> Any:
    """What a JSON file holds.

    Parameters
    ----------
    path : the file.
    most : bytes that are read at most.
    error : what is raised.
    hint : how to mend a file that cannot be read.

    Raises
    ------
    InputError : of the type ``error``: no such file, no regular file, too large, or not JSON.
    """
    data = read_bounded(path, most, error, hint=hint)
    json_room(data, MAX_ROOM, error)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise error(f"{str(path)[:200]!r} is not JSON: {str(problem)[:200]}") from None
