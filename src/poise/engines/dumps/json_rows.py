"""Rows in JSON as a table with named columns: what pandas, ``csv.DictReader`` and loggers write.

``[{"layer": 0, "expert": 3, "count": 5}, ...]``, one such object a line, or the list under one key
``{"layer": [0, ...], "expert": [3, ...], "count": [5, ...]}``, or with objects ``{"0": 0, ...}`` for lists
``{"columns": ["layer", "expert", "count"], "data": [[0, 3, 5], ...]}``

A column of loads may hold a list each, one number an expert: it is as many columns ``expert_0``, ``expert_1``, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dumps.csv_text import NUMBER, labelled, told_apart
from poise.engines.dumps.untrusted import MAX_CELLS
from poise.routing.trace import MAX_EXPERTS
from poise.util.errors import TraceError

LISTS = re.compile(
    r"(tokens|counts?|loads?)_per_expert|(logical_|expert_|token_)*(counts?|loads?|tokens)", re.IGNORECASE
)
"""Columns whose lists are loads."""


@dataclass(frozen=True, slots=True, eq=False)
class JsonRows:
    """A table, as :class:`~poise.engines.dumps.csv_text.CsvText` is one.

    Parameters
    ----------
    head : names of the columns.
    cells : [columns] of as many values each.
    """

    head: tuple[str, ...]
    cells: Sequence[Sequence[Any]]

    @property
    def columns(self) -> int:
        """How many there are."""
        return len(self.head)

    def numbers(
        self, name: str, places: Sequence[int], labels: Mapping[int, re.Pattern[str]] | None = None
    ) -> NDArray[np.float64]:
        """As :meth:`poise.engines.dumps.csv_text.CsvText.numbers`."""
        found = np.empty((len(self.cells[0]), len(places)))
        for at, place in enumerate(places):
            column = self.cells[place]
            if set(map(type, column)) <= {int, float}:
                found[:, at] = _floats(name, self.head[place], column)
            else:
                pattern = (labels or {}).get(place, NUMBER)
                found[:, at] = [_number(name, self.head[place], row, cell, pattern) for row, cell in enumerate(column)]
        return found

    def words(self, name: str, place: int) -> NDArray[np.float64]:
        """As :meth:`poise.engines.dumps.csv_text.CsvText.words`."""
        return np.array([told_apart(str(cell)) for cell in self.cells[place]])


def head_of(value: Any) -> tuple[str, ...] | None:
    """Names of the columns, as the first row shows them; None: it is no table."""
    found = _first(value)
    if found is None:
        return None
    head: list[str] = []
    for name, cell in zip(*found, strict=True):
        lists = isinstance(cell, list) and len(cell) <= MAX_EXPERTS and LISTS.fullmatch(name)
        head += [f"expert_{expert}" for expert in range(len(cell))] if lists else [name]
    return tuple(head)


def _first(value: Any) -> tuple[tuple[str, ...], Sequence[Any]] | None:
    """Names of columns and the first value in each."""
    value = _unwrapped(value)
    if isinstance(value, list):
        first = value[0] if value else None
        return (tuple(map(str, first)), list(first.values())) if isinstance(first, dict) and first else None
    if not isinstance(value, dict):
        return None
    if _is_split(value):
        row = value["data"][0]
        right = isinstance(row, list) and len(row) == len(value["columns"])
        return (tuple(map(str, value["columns"])), row) if right else None
    columns = list(value.values())
    if not all(columns) or {type(column) for column in columns} not in ({list}, {dict}):
        return None
    return tuple(map(str, value)), [next(iter(c.values())) if isinstance(c, dict) else c[0] for c in columns]


def rows_of(name: str, value: Any) -> JsonRows:
    """The table of a file.

    Raises
    ------
    TraceError : rows have different keys, columns different lengths, or it would be too large.
    """
    found, value = _first(value), _unwrapped(value)
    if found is None:
        raise TraceError(f"{name} has no rows of named numbers")
    head = found[0]
    if isinstance(value, list):
        for at, row in enumerate(value):
            if not isinstance(row, dict) or len(row) != len(head) or any(key not in row for key in head):
                keys = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
                raise TraceError(
                    f"{name}: row {at} has {str(keys)[:80]}, row 0 has {str(sorted(head))[:80]}",
                    hint="give every row the same keys",
                )
        cells: list[Sequence[Any]] = [[row[key] for row in value] for key in head]
    elif _is_split(value):
        if any(not isinstance(row, list) or len(row) != len(head) for row in value["data"]):
            raise TraceError(f"{name}: rows are no lists of {len(head)} values, one a column")
        cells = [[row[at] for row in value["data"]] for at in range(len(head))]
    else:
        cells = [_column(name, key, column, next(iter(value.values()))) for key, column in value.items()]
    lengths = sorted({len(column) for column in cells})
    if lengths[0] != lengths[-1] or not lengths[0]:
        raise TraceError(f"{name}: columns have {lengths[0]} to {lengths[-1]} rows")
    return _spread(name, head, cells)


def _unwrapped(value: Any) -> Any:
    """The rows that an object holds under its one key."""
    if isinstance(value, dict) and len(value) == 1:
        inner = next(iter(value.values()))
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            return inner
    return value


def _is_split(value: dict[str, Any]) -> bool:
    columns, data = value.get("columns"), value.get("data")
    return isinstance(columns, list) and isinstance(data, list) and bool(columns) and bool(data)


def _column(name: str, key: str, column: Any, first: Any) -> Sequence[Any]:
    """Values of a column, which are a list, or an object by row: then all columns name the same rows."""
    if isinstance(column, list):
        return column
    if list(column) != list(first):
        raise TraceError(f"{name}: column {str(key)[:40]!r} has other rows than the first one")
    return list(column.values())


def _spread(name: str, head: tuple[str, ...], cells: list[Sequence[Any]]) -> JsonRows:
    """Lists of loads as a column an expert."""
    lists = [at for at, column in enumerate(cells) if isinstance(column[0], list) and LISTS.fullmatch(head[at])]
    if len(lists) != 1:
        return JsonRows(head, cells)
    at = lists[0]
    lengths = sorted({len(cell) if isinstance(cell, list) else 0 for cell in cells[at]})
    if lengths[0] != lengths[-1] or not lengths[0]:
        raise TraceError(
            f"{name}: {head[at][:40]!r} has {lengths[0]} to {lengths[-1]} numbers in a row, loads have one an expert"
        )
    if lengths[0] * len(cells[at]) > MAX_CELLS:
        raise TraceError(f"{name} has more than {MAX_CELLS} numbers")
    kept = [i for i in range(len(head)) if i != at]
    return JsonRows(
        (*(head[i] for i in kept), *(f"expert_{expert}" for expert in range(lengths[0]))),
        [*(cells[i] for i in kept), *zip(*cells[at], strict=True)],
    )


def _floats(name: str, column: str, cells: Sequence[int | float]) -> NDArray[np.float64]:
    try:
        return np.array(cells, np.float64)
    except OverflowError:
        raise TraceError(f"{name}: a number of {column[:40]!r} is beyond what a float holds") from None


def _number(name: str, column: str, row: int, cell: Any, pattern: re.Pattern[str]) -> float:
    """A cell that is a number, or text that is one."""
    try:
        if type(cell) in (int, float):
            return float(cell)
        if isinstance(cell, str):
            return labelled(pattern, cell)
    except (ValueError, OverflowError):
        pass
    raise TraceError(f"{name}: {column[:40]!r} of row {row} is {str(cell)[:40]!r}, no number")
