"""Tables with a column an expert, or a column a layer, under a line of names; as rows of layer, expert and count.

``layer,expert_0,expert_1,...`` or ``layer,0,1,...``, also with ``step`` and ``rank``
    a row a layer.
``expert,layer_0,layer_1,...`` or ``expert,0,1,...``
    a row an expert.

Choices of tokens look alike, ``expert_0`` the first of K: they are told by several rows of a layer, by a column that
names tokens, or by numbers that are different in every row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import ReadOptions
from poise.engines.dumps.csv_text import NUMBERED
from poise.engines.dumps.mapping import MAX_TABLE, MAX_TOP_K
from poise.util.errors import TraceError

EXPERT_COLUMN = re.compile(r"(?:logical_?)?(?:experts?|exp|e)_?(\d{1,5})(?:_?(?:counts?|tokens?|loads?|hits?))?")
LAYER_COLUMN = re.compile(r"(?:moe_?)?(?:layers?|block|l)_?(\d{1,5})(?:_?(?:counts?|tokens?|loads?|hits?))?")
INDEX = re.compile(r"unnamed(:[ _]\d+)?|index", re.IGNORECASE)
"""The column that pandas writes in front."""
MAX_IDS = 4096
"""No model has ids as high."""
FEW_ROWS = 3
"""Of fewer rows it is no proof that all have different numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Wide:
    """Which columns are those of experts, or of layers.

    Parameters
    ----------
    role : ``expert`` or ``layer``: what a column is.
    label : the role of the column that says what a row is.
    places : by the number of the expert or layer.
    """

    role: str
    label: str
    places: Mapping[int, int]


def wide_of(heads: Sequence[str], roles: Mapping[str, Sequence[int]]) -> Wide | None:
    """How a table with columns ``heads`` (plain names) and ``roles`` is wide; None: it is not."""
    for role, label, pattern in (("expert", "layer", EXPERT_COLUMN), ("layer", "expert", LAYER_COLUMN)):
        if label not in roles or role in roles:
            continue
        for one in (pattern, NUMBERED):
            found = {at: one.fullmatch(head) for at, head in enumerate(heads) if at not in roles[label]}
            named = [(_number(match), at) for at, match in found.items() if match is not None]
            if len(named) > 1:
                places = dict(named)
                return Wide(role, label, places if len(places) == len(named) else {})
    return None


def numbered(heads: Sequence[str]) -> list[int] | None:
    """Places of columns 0 to n - 1 by number, of a table that has no others but an index in front; else None.

    Their names are numbers, or those of experts.
    """
    first = 1 if INDEX.fullmatch(heads[0]) else 0
    for pattern in (NUMBERED, EXPERT_COLUMN):
        found = [pattern.fullmatch(head.lower()) for head in heads[first:]]
        if len(found) > 1 and None not in found:
            places = {_number(match): at for at, match in enumerate(found, first)}  # type: ignore[arg-type]
            whole = sorted(places) == list(range(len(found)))
            return [places[i] for i in range(len(found))] if whole else None
    return None


def named_experts(heads: Sequence[str]) -> bool:
    """Whether the last of such columns has the name of an expert."""
    return EXPERT_COLUMN.fullmatch(heads[-1].lower()) is not None


def _number(match: re.Match[str]) -> int:
    return int(match[match.lastindex or 0])


def columns_in_order(name: str, wide: Wide, options: ReadOptions) -> list[int]:
    """Places of the columns by number. Layers have those of the model, whose first ones may be dense.

    Raises
    ------
    TraceError : one is named twice; or an expert is missing, or there are not as many as the model has.
    """
    known, found = options.experts, sorted(wide.places)
    if not found:
        raise TraceError(f"{name} has two columns of one {wide.role}", hint="keep one")
    if wide.role == "expert" and found != list(range(len(found))):
        from_one = "; they seem to be counted from 1" if found == list(range(1, len(found) + 1)) else ""
        raise TraceError(
            f"{name} has {len(found)} columns of {wide.role}s, numbered {found[0]} to {found[-1]}{from_one}",
            hint="number them from 0 and leave none out",
        )
    if wide.role == "expert" and known is not None and len(found) not in (known, options.router_experts):
        raise TraceError(
            f"{name} has {len(found)} columns of experts, the model {options.router_experts}",
            hint="check --model or --num-experts",
        )
    return [wide.places[i] for i in found]


def long_rows(
    name: str, wide: Wide, column: Mapping[str, NDArray[np.float64]], count_RC: NDArray[np.float64],
    options: ReadOptions, *, sure: bool,
) -> dict[str, NDArray[np.float64]]:  # fmt: skip
    """Columns layer, expert, count and those of ``column``, [rows * columns], of a wide table.

    Parameters
    ----------
    column : what says which layer (or expert), step and rank a row is of, [rows].
    count_RC : tokens, [rows, columns], columns as by :func:`columns_in_order`.
    sure : that they are loads was said.

    Raises
    ------
    TraceError : several rows are of one layer and step; or rows seem to be what tokens chose.
    """
    rows, columns = count_RC.shape
    if rows * columns > MAX_TABLE:
        raise TraceError(f"{name}: {rows} rows of {columns} numbers are too many")
    keys = np.stack([column[role] for role in sorted(column)], axis=1)
    often = np.unique(keys, axis=0, return_counts=True)[1]
    if often.max() > 1:
        raise TraceError(
            f"{name} has {int(often.max())} rows of one {wide.label}, loads have one: choices of tokens, or steps?",
            hint="a column 'step' tells steps apart; choices are read a row each: layer,expert",
        )
    if not sure and wide.role == "expert":
        others = [column[role] for role in sorted(column) if role != wide.label]
        said = like_choices(count_RC, np.stack(others, axis=1) if others else np.zeros((rows, 1)), options)
        if said:
            raise TraceError(f"{name}: {said}", hint="if they are loads, say so: --format load-csv, or --num-experts")
    out = {role: np.repeat(values, columns) for role, values in column.items()}
    out[wide.role] = np.tile(np.array(sorted(wide.places), np.float64), rows)
    out["count"] = count_RC.ravel()
    return out


def like_choices(count_RC: NDArray[Any], pass_RN: NDArray[np.float64], options: ReadOptions) -> str:
    """Why rows may be K different ids that one token each chose, or ``""``; layers of a pass have as many tokens.

    Parameters
    ----------
    count_RC : tokens, [rows, columns], a column an expert.
    pass_RN : what says of which step and rank a row is, [rows, numbers].
    """
    rows, columns = count_RC.shape
    if rows < FEW_ROWS or columns > MAX_TOP_K or options.experts is not None:
        return ""
    if not np.isfinite(count_RC).all() or (count_RC != np.floor(count_RC)).any() or count_RC.max() >= MAX_IDS:
        return ""
    ordered, sums = np.sort(count_RC, axis=1), count_RC.sum(axis=1)
    passes, number = np.unique(pass_RN, axis=0, return_inverse=True)
    alike = all(np.ptp(sums[number.ravel() == one]) == 0 for one in range(min(len(passes), FEW_ROWS)))
    if alike or (ordered[:, 1:] == ordered[:, :-1]).any():
        return ""
    return (
        f"{columns} different numbers up to {ordered.max():g} in every row may be loads of {columns} experts, or the "
        f"{columns} experts that a token chose"
    )
