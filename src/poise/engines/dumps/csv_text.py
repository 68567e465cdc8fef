"""Text that is a table: rows of numbers between commas, semicolons or tabs, with a line of names above or without."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from poise.util.errors import TraceError

MAX_CSV_BYTES = 256 << 20
MARKS = (",", "\t", ";")
NUMBER = re.compile(r"[+-]?(\d{1,25}(\.\d{0,25})?|\.\d{1,25})([eE][+-]?\d{1,3})?")
NAME = re.compile(r"[A-Za-z_][\w .:()/%-]{0,60}")
NUMBERED = re.compile(r"\d{1,5}")
"""A column that is named by the number of its expert or layer."""
UNNAMED = "unnamed"
"""A first column that has no name: the index that pandas writes."""
REMARK = "#"
LINE = re.compile(rb"[^\r\n]+")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, eq=False)
class CsvText:
    """A table, not yet read.

    Parameters
    ----------
    head : names of the columns; None: there is no such line.
    columns : how many there are.
    mark : what stands between them.
    body : the rows.
    """

    head: tuple[str, ...] | None
    columns: int
    mark: str
    body: bytes

    def numbers(
        self, name: str, places: Sequence[int], labels: Mapping[int, re.Pattern[str]] | None = None
    ) -> NDArray[np.float64]:
        """Some columns of file ``name``, float64 [rows, columns].

        Parameters
        ----------
        labels : by place, what may stand there instead of a number, as in ``layer_3``: its first group is the number.

        Raises
        ------
        TraceError : something in them is no number, or rows differ in length.
        """
        try:
            return _read(name, self, places)
        except TraceError:
            if not labels:
                raise
        return _read(name, self, places, {at: partial(labelled, labels[at]) for at in places if at in labels})

    def words(self, name: str, place: int) -> NDArray[np.float64]:
        """A column of numbers or words, float64 [rows]: what differs in it differs here, by a chance of 2^-53 not.

        Raises
        ------
        TraceError : rows differ in length.
        """
        return _read(name, self, [place], {place: told_apart})[:, 0]


def labelled(pattern: re.Pattern[str], word: str) -> float:
    """The number of a cell that may be a name, or ValueError."""
    text = word.strip().strip("\"'")
    found = None if NUMBER.fullmatch(text) else pattern.fullmatch(text)
    return float(text if found is None else found[1])


def told_apart(word: str) -> float:
    """A number for a word."""
    return float(hash(word.strip().strip("\"'")) >> 11)


def sniff(start: bytes) -> tuple[tuple[str, ...] | None, int, str] | None:
    """Head, number of columns and mark of a table, told from how it starts; None: it is none."""
    found = _sniff(start)
    return None if found is None else found[:3]


def _sniff(start: bytes) -> tuple[tuple[str, ...] | None, int, str, int] | None:
    """As :func:`sniff`, and the byte at which the rows begin, below remarks and the head."""
    lines = list(_lines(start))
    for above, (line, begin, end) in enumerate(lines):
        remark = line.startswith(REMARK)
        under = above + 1
        while not remark and under < len(lines) and lines[under][0].startswith(REMARK):
            under += 1
        for mark in MARKS:
            if mark not in line:
                continue
            fields = _fields(line.lstrip("# "), mark)
            if all(NUMBER.fullmatch(field) for field in fields):
                return None, len(fields), mark, begin
            names = [fields[0] or UNNAMED, *fields[1:]]
            below = _fields(lines[under][0] if under < len(lines) else "", mark)
            named = all(NAME.fullmatch(name) or NUMBERED.fullmatch(name) for name in names)
            if named and len(below) == len(fields) and any(NUMBER.fullmatch(field) for field in below):
                return tuple(names), len(fields), mark, end
        if not remark:
            break
    return None


def _lines(start: bytes) -> Iterator[tuple[str, int, int]]:
    """Lines with something in them, where each begins and where it ends; a tab before the first name is a mark."""
    for found in LINE.finditer(start):
        text = found[0].decode("utf-8", "replace").removeprefix("\ufeff")
        if text.strip():
            yield text.rstrip().lstrip(" "), found.start(), found.end()


def csv_text(start: bytes, data: bytes) -> CsvText | None:
    """The table in ``data``, of which ``start`` are the first bytes; None: it is none.

    Raises
    ------
    TraceError : it is larger than is read.
    """
    found = _sniff(start)
    if found is None:
        return None
    if len(data) > MAX_CSV_BYTES:
        raise TraceError(f"a table of {len(data)} bytes, at most {MAX_CSV_BYTES} are read", hint="split it")
    return CsvText(*found[:3], data[found[3] :].removeprefix(BOM).lstrip())


def _read(
    name: str,
    text: CsvText,
    places: Sequence[int],
    converters: Mapping[int | str, Callable[[str], float]] | None = None,
) -> NDArray[np.float64]:
    try:
        found = np.loadtxt(
            io.TextIOWrapper(io.BytesIO(text.body), "utf-8"), delimiter=text.mark, usecols=list(places), ndmin=2,
            quotechar='"', converters=converters, encoding=None,
        )  # fmt: skip
    except (ValueError, IndexError, OverflowError) as error:
        raise TraceError(f"{name} is no table of numbers: {str(error)[:200]}") from None
    if not len(found):
        raise TraceError(f"{name} has no rows")
    plain = b'"' not in text.body and b"#" not in text.body
    if plain and text.body.count(text.mark.encode()) != len(found) * (text.columns - 1):
        raise TraceError(f"{name} has rows of more than {text.columns} columns")
    return found


def _fields(line: str, mark: str) -> list[str]:
    return [field.strip().strip("\"'").strip() for field in line.split(mark)]
