"""JSON files of others: sizes first, every defect a typed error. Values are the caller's to check."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from poise.util.errors import InputError
from poise.util.files import read_bounded

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


def parse_json(data: bytes | str, error: type[InputError], *, infinite: bool = False, room: int = MAX_ROOM) -> Any:
    """JSON as its standard has it: no key twice in an object, no NaN, no number beyond a float.

    Parameters
    ----------
    data : the text.
    error : what is raised.
    infinite : take NaN, infinities and what rounds to one, as Hugging Face configs have them.
    room : bytes of memory that its values may take.

    Raises
    ------
    InputError : of the type ``error``: it is not, is nested too deeply, or its values may take more than ``room``.
    """
    json_room(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data, room, error)
    try:
        return json.loads(data, **_settings(infinite))
    except (ValueError, RecursionError) as problem:
        raise error(f"not JSON: {str(problem)[:200]}", hint="was it cut short?") from None


def strict_decoder() -> json.JSONDecoder:
    """What :func:`parse_json` parses by, for who reads piece by piece."""
    return json.JSONDecoder(**_settings(infinite=False))


def _settings(infinite: bool) -> dict[str, Any]:
    numbers: dict[str, Any] = {} if infinite else {"parse_constant": _no_number, "parse_float": _finite}
    return {"object_pairs_hook": unique, **numbers}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict; a key that comes twice is a ValueError: which of its values counts, readers disagree on."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} appears twice in an object")
    return out


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:40]} is beyond what a float holds")
    return value


def read_json(path: Path, most: int, error: type[InputError], *, hint: str = "", infinite: bool = False) -> Any:
    """What a JSON file holds, as :func:`parse_json` reads it.

    Parameters
    ----------
    path : the file.
    most : bytes that are read at most.
    error : what is raised.
    hint : how to mend a file that cannot be read.
    infinite : as in :func:`parse_json`.

    Raises
    ------
    InputError : of the type ``error``: no such file, no regular file, too large, or not JSON.
    """
    data = read_bounded(path, most, error, hint=hint)
    try:
        return parse_json(data, error, infinite=infinite)
    except error as problem:
        raise error(f"{str(path)[:200]!r}: {problem.message}", hint=problem.hint) from None
