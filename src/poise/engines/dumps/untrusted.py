"""Reading what others wrote: sizes first, no pickles, no number that a table cannot hold. Defects are TraceErrors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from poise.routing.trace import MAX_EXPERTS, kept
from poise.util import jsonfile
from poise.util.errors import TraceError
from poise.util.files import READ_BYTES, open_regular, read_bounded, regular_size
from poise.util.room import require

MAX_FILE_BYTES = 8 << 30
MAX_JSON_BYTES = 128 << 20
MAX_CELLS = 1 << 28
"""Most numbers of one table that is spelled out in JSON, or of arrays in a list."""
BIG = 2**31 - 1
NPY = re.compile(
    rb"\x93NUMPY(?:\x01.(..)|[\x02\x03].(....))"
    rb"\{'descr': '([<>|]?(?:[iu][1248]|f[248]))', 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,12}(?:, \d{1,12}){0,7}),?\), \}",
    re.DOTALL,
)


def file_size(path: Path) -> int:
    """Bytes of a regular file.

    Raises
    ------
    TraceError : no such file, no regular one, or it has more than MAX_FILE_BYTES.
    """
    size = regular_size(path, TraceError)
    if size > MAX_FILE_BYTES:
        raise TraceError(f"{size} bytes, at most {MAX_FILE_BYTES} are read")
    return size


def read_bytes(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """The whole file, if it is not larger than ``most``."""
    return read_bounded(path, most, TraceError)


def json_room(data: bytes) -> int:
    """Bytes of memory that the values in some JSON can take at most, or TraceError (:mod:`poise.util.jsonfile`)."""
    return jsonfile.json_room(data, jsonfile.MAX_ROOM, TraceError)


def parse_json(data: bytes) -> Any:
    """JSON without NaN, infinities and repeated keys.

    Raises
    ------
    TraceError : not JSON, too large, as it is or in memory, or nested too deeply.
    """
    if len(data) > MAX_JSON_BYTES:
        raise TraceError(f"a value of {len(data)} bytes in JSON, at most {MAX_JSON_BYTES} are read")
    return jsonfile.parse_json(data, TraceError)


def table(name: str, value: Any, *ndims: int, low: int = 0, high: int = BIG) -> NDArray[np.int64]:
    """Whole numbers within ``low..high`` as int64, of one of the dimensions ``ndims``.

    ``value`` is an array or nested lists; lists are looked through before numpy is, which would take room for text.

    Raises
    ------
    TraceError : anything else, lists of different lengths among it.
    """
    return _whole_numbers(name, value, ndims, low, high).astype(np.int64)


def id_table(name: str, value: Any, *ndims: int, low: int = 0, high: int = MAX_EXPERTS - 1) -> NDArray[np.int16]:
    """Experts or slots as int16, up to MAX_EXPERTS at most; else as :func:`table`, in a quarter of its memory."""
    return kept(_whole_numbers(name, value, ndims, low, high), np.int16)


def _whole_numbers(name: str, value: Any, ndims: tuple[int, ...], low: int, high: int) -> NDArray[Any]:
    array = _array(name, value, max(ndims), {int})
    if array.dtype.kind not in "iu" and array.size:
        raise TraceError(f"{name} must hold whole numbers, got {array.dtype}")
    if array.ndim not in ndims:
        raise TraceError(f"{name} has {array.ndim} dimensions, not {' or '.join(map(str, ndims))}")
    if array.size and (int(array.min()) < low or int(array.max()) > high):
        raise TraceError(f"{name} must lie in {low}..{high}, got {array.min()}..{array.max()}")
    return array


def loads(name: str, value: Any, *ndims: int) -> NDArray[np.float64]:
    """Numbers as float64, of one of the dimensions ``ndims``, range unchecked. Raises as :func:`table`."""
    return counts(name, value, *ndims).astype(np.float64)


def counts(name: str, value: Any, *ndims: int) -> NDArray[Any]:
    """As :func:`loads`, in the type that they have, read-only."""
    array = _array(name, value, max(ndims), {int, float})
    if array.dtype.kind not in "iuf" or array.ndim not in ndims:
        raise TraceError(
            f"{name} must be numbers in {' or '.join(map(str, ndims))} dimensions, got {array.dtype} {array.shape}"
        )
    return kept(array)


def is_stack(value: Any) -> bool:
    """Whether it is a list of arrays of one shape, of one or two dimensions."""
    if not isinstance(value, list) or not value or not isinstance(value[0], np.ndarray) or value[0].ndim not in (1, 2):
        return False
    return all(isinstance(one, np.ndarray) and one.shape == value[0].shape for one in value)


def stacked(value: Any) -> Any:
    """A list of arrays of one shape as one array; anything else as it is.

    Raises
    ------
    TraceError : as :func:`stack_room`.
    """
    if not is_stack(value):
        return value
    stack_room(len(value), value[0])
    return np.stack(value)


def stack_room(count: int, one: NDArray[Any]) -> None:
    """Refuse more arrays than are read: a list may name one array any number of times.

    Raises
    ------
    TraceError : more than MAX_CELLS numbers, or more than memory has left.
    """
    what = f"{count} arrays {list(one.shape)} of {one.dtype}"
    if count * one.size > MAX_CELLS:
        raise TraceError(f"{what} have {count * one.size} numbers, at most {MAX_CELLS} are read")
    require(count * one.nbytes, what, TraceError)


def _array(name: str, value: Any, depth: int, kinds: set[type]) -> NDArray[Any]:
    value = stacked(value)
    if isinstance(value, list):
        if _count(name, value, depth, kinds) > MAX_CELLS:
            raise TraceError(f"{name} has more than {MAX_CELLS} numbers")
        try:
            return np.array(value)
        except (ValueError, OverflowError):
            raise TraceError(f"{name} is no full table: its rows differ in length") from None
    if not isinstance(value, np.ndarray):
        raise TraceError(f"{name} must be a table of numbers, got {type(value).__name__}")
    return value


def _count(name: str, value: list[Any], depth: int, kinds: set[type]) -> int:
    """Numbers in nested lists; stops soon after MAX_CELLS."""
    types = set(map(type, value))
    if types <= kinds:
        return len(value)
    if types != {list} or depth == 1:
        raise TraceError(f"{name} must hold numbers alone, it has {', '.join(sorted(t.__name__ for t in types)[:4])}")
    total = 0
    for row in value:
        total += _count(name, row, depth - 1, kinds)
        if total > MAX_CELLS:
            break
    return total


def whole(name: str, value: Any, low: int = 0, high: int = BIG) -> int:
    """A whole number within ``low..high``, or TraceError."""
    if type(value) is not int or not low <= value <= high:
        raise TraceError(f"{name} must be a whole number in {low}..{high}, got {str(value)[:40]}")
    return value


def npy_file(path: Path) -> NDArray[Any]:
    """The array of a ``.npy`` file of whole numbers or floats, read-only.

    Raises
    ------
    TraceError : as :func:`integer_npy`, or a file of more bytes than :data:`MAX_FILE_BYTES`, or than memory has left.
    """
    with open_regular(path, TraceError) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise TraceError(f"{size} bytes, at most {MAX_FILE_BYTES} are read")
        start, dtype, shape, fortran = _npy_header(stream.read(4096), size, floats=True)
        require(size, f"an array {list(shape)} of {dtype}", TraceError)
        out = np.empty(prod(shape), dtype)
        stream.seek(start)
        view, at = memoryview(cast(Any, out)).cast("B"), 0
        while at < len(view):
            read = stream.readinto(view[at : at + READ_BYTES])  # type: ignore[attr-defined]
            if not read:
                raise TraceError(f"ends after {at} of {len(view)} bytes", hint="the file is truncated")
            at += read
    out = out.reshape(shape, order="F" if fortran else "C")
    out.flags.writeable = False
    return out


def integer_npy(data: bytes) -> NDArray[Any]:
    """An array of whole numbers in numpy's own format; a view of ``data``.

    Raises
    ------
    TraceError : another type of array, or another size than its header claims.
    """
    start, dtype, shape, fortran = _npy_header(data[:4096], len(data), floats=False)
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def _npy_header(head: bytes, held: int, *, floats: bool) -> tuple[int, np.dtype[Any], tuple[int, ...], bool]:
    """Where the numbers of ``held`` bytes begin, their type and shape, and whether they are stored by columns."""
    match = NPY.match(head)
    if match is None or (b"f" in match[3] and not floats):
        raise TraceError("not a numpy array of whole numbers", hint="save plain integers with numpy.save")
    width, raw = (2, match[1]) if match[1] is not None else (4, match[2])
    start = 8 + width + int.from_bytes(raw, "little")
    dtype, shape = np.dtype(match[3].decode()), tuple(int(n) for n in match[5].split(b","))
    size = prod(shape) * dtype.itemsize
    if held - start != size:
        raise TraceError(
            f"claims shape {list(shape)} of {dtype}, {size} bytes, but holds {held - start}",
            hint="the file is truncated or damaged",
        )
    return start, dtype, shape, match[4] == b"True"


def listed(values: Iterable[str], most: int = 6) -> str:
    """The first few of many, for a message."""
    names = list(values)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
