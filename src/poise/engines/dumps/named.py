"""Loads under a name of their own: one table beside plain facts, as ``{"model": "x", "expert_counts": [[...], ...]}``.

JSON, ``.pt`` and ``.npz``; also one such object a step, in a list or one a line. What else is an array, or names a
rank, is no plain fact: such files are not read here.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dumps.bare import is_nested
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import counts, stacked
from poise.routing.npz import open_npz
from poise.util.errors import TraceError

NAME = re.compile(r"(tokens|counts?|loads?)_per_expert|((logical|expert|token)_)*(counts?|loads?)")
LAYERS = "layers"
"""A key that may hold ``{layer: ...}``, and no table."""
RANK = re.compile(r"(^|_)(rank|ranks|size|offset)($|_)")
"""Facts after which a table is a part of the loads."""
READ_ELSEWHERE = frozenset({"counts"})
"""The member of an ``.npz`` that is poise's own."""
PLAIN = (int, float, str, type(None))


def is_named(part: Part) -> bool:
    """Whether a file has one table of loads with such a name, or one for every step."""
    if part.container == "npz":
        return (
            len(part.value) == 1 and part.value[0] not in READ_ELSEWHERE and NAME.fullmatch(part.value[0]) is not None
        )
    if part.container not in ("json", "json-lines", "torch"):
        return False
    if isinstance(part.value, list):
        key = _key(part.value[0]) if part.value and isinstance(part.value[0], dict) else None
        return key is not None and key != LAYERS and not isinstance(part.value[0][key], dict)
    return isinstance(part.value, dict) and _key(part.value) is not None


def plain(part: Part) -> Part:
    """The file as if it held the table alone.

    Raises
    ------
    TraceError : steps have different keys, or tables of different shapes.
    """
    if not is_named(part):
        return part
    if part.container == "npz":
        with open_npz(part.path) as archive:
            header = archive.header(part.value[0])
            header.require((None, None), (None, None, None), kinds="iuf")
            return replace(part, container="npy", value=archive.read(header))
    if isinstance(part.value, dict):
        return replace(part, container=_container(part), value=part.value[_key(part.value)])
    key, tables = _key(part.value[0]), list[NDArray[Any]]()
    for at, step in enumerate(part.value):
        if not isinstance(step, dict) or _key(step) != key:
            raise TraceError(f"{part.name}: object {at} has no table {str(key)[:40]!r} as the first one has")
        tables.append(counts(f"{str(key)[:40]} of object {at}", step[key], 2))
        if tables[-1].shape != tables[0].shape:
            raise TraceError(f"{part.name}: object {at} has {list(tables[-1].shape)} numbers, the first one "
                             f"{list(tables[0].shape)}")  # fmt: skip
    return replace(part, container="npy", value=np.stack(tables))


def _container(part: Part) -> Any:
    return "json" if part.container == "json-lines" else part.container


def _key(value: dict[Any, Any]) -> Any:
    """The key of the one table among plain facts, or None."""
    tables = [key for key, held in value.items() if not isinstance(held, PLAIN)]
    if len(tables) != 1 or any(RANK.search(str(key)) for key in value):
        return None
    key, held = str(tables[0]), value[tables[0]]
    if isinstance(held, dict):
        return tables[0] if (key == LAYERS or NAME.fullmatch(key)) and is_nested(held) else None
    return tables[0] if NAME.fullmatch(key) and _is_table(held) else None


def _is_table(held: Any) -> bool:
    held = stacked(held)
    if isinstance(held, np.ndarray):
        return held.ndim in (2, 3)
    return isinstance(held, list) and bool(held) and isinstance(held[0], list) and bool(held[0])
