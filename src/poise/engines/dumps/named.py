"""Loads under a name of their own: one table beside plain facts, as ``{"model": "x", "expert_counts": [[...], ...]}``.

JSON, ``.pt`` and ``.npz``; also one such object a step, in a list or one a line. Facts are those that say nothing of
which loads these are, or how many there are, which is compared. Another array or another fact may say that the table is
a part of the loads (of a rank, of a layer): such files are not read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions
from poise.engines.dumps import bare
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import counts, is_stack, stack_room, stacked
from poise.routing.npz import open_npz
from poise.routing.said import COUNTED, SAID, said_in
from poise.util.errors import TraceError

NAME = re.compile(r"(tokens|counts?|loads?)_per_expert|((logical|expert|token)_)*(counts?|loads?)")
LAYERS = "layers"
"""A key that may hold ``{layer: ...}``, and no table."""
HARMLESS = re.compile(
    r"(model|engine|framework|format|schema)(_(name|id|path|type|version))?|version|(created|recorded)(_at)?|date|time|timestamp"
    r"|(start|end)_time|duration(_s|_ms)?|notes?|comments?|description|source|data_?set|task|prompts?|seed|units?|dtype"
    r"|top_?k|k|num_experts_per_tok(en)?|experts_per_token|((num|n|total)_)?(tokens|requests|samples)|batch_size"
    r"|step(_id)?|iter(ation)?(_id)?|phase|mode"
)
"""Facts that cannot say that a table is a part of the loads, nor how to read it."""
_COUNT = r"(?:num|n)_(?:{0})|(?:{0})"
SIZES = {
    "layers": re.compile(_COUNT.format("(?:moe_|hidden_|decoder_)?layers")),
    "experts": re.compile(_COUNT.format("(?:routed_|logical_|global_)?experts")),
    "steps": re.compile(_COUNT.format("(?:steps|iterations|passes)")),
}
"""Facts that say how many there are."""
STEP = re.compile(r"(step|iter(ation)?)(_id)?")
READ_ELSEWHERE = frozenset({"counts"})
"""The member of an ``.npz`` that is poise's own."""
PLAIN = (int, float, str, type(None))


def is_named(part: Part) -> bool:
    """Whether a file has one table of loads with such a name, or one for every step."""
    if part.container == "npz":
        return (
            len(part.value) == 1 and part.value[0] not in READ_ELSEWHERE and NAME.fullmatch(part.value[0]) is not None
        )
    return _is_named(part) and _odd(part) is None


def odd_fact(part: Part) -> str:
    """A hint where a file would be read here but for a fact; else ``""``."""
    odd = _odd(part) if _is_named(part) else None
    return "" if odd is None else f"{odd[:40]!r} may say which part of the loads this is: leave it out if they are all"


def _is_named(part: Part) -> bool:
    """As :func:`is_named`, whatever facts say."""
    if part.container not in ("json", "json-lines", "torch"):
        return False
    if isinstance(part.value, list):
        key = _key(part.value[0]) if part.value and isinstance(part.value[0], dict) else None
        return key is not None and key != LAYERS and not isinstance(part.value[0][key], dict)
    return isinstance(part.value, dict) and _key(part.value) is not None


def _odd(part: Part) -> str | None:
    """The first fact that is none of those known."""
    for one in part.value if isinstance(part.value, list) else [part.value]:
        for key in one if isinstance(one, dict) else ():
            fact = _snake(key)
            known = key in SAID or HARMLESS.fullmatch(fact) or (_size(fact) and type(one[key]) in (int, float))
            if isinstance(one[key], PLAIN) and one[key] is not None and not known:
                return str(key)
    return None


def _size(fact: str) -> str | None:
    """Of what a fact says the number."""
    return next((what for what, names in SIZES.items() if names.fullmatch(fact)), None)


def _snake(key: Any) -> str:
    return re.sub(r"[\s.-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(key))).lower()


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Loads of all files, bare or under a name, with what they say of themselves.

    Raises
    ------
    TraceError : as :func:`plain` and :func:`poise.engines.dumps.bare.read_loads`.
    """
    given = frozenset() if options.counters is None else frozenset({COUNTED})
    said = frozenset.intersection(*(_said(part, given) for part in parts))
    dump = bare.read_loads([plain(part, options) for part in parts], options)
    if not said or dump.profile is None:
        return dump
    return replace(dump, profile=replace(dump.profile, said=dump.profile.said | said))


def _said(part: Part, given: frozenset[str]) -> frozenset[str]:
    if part.container == "npz" or not is_named(part):
        return frozenset()
    objects = part.value if isinstance(part.value, list) else [part.value]
    return frozenset.intersection(*(said_in(part.name, one, given) for one in objects if isinstance(one, dict)))


def plain(part: Part, options: ReadOptions) -> Part:
    """The file as if it held the table alone.

    Raises
    ------
    TraceError : steps have different keys, or tables of different shapes; or a fact says that there are more, or fewer.
    """
    if not is_named(part):
        return part
    if part.container == "npz":
        with open_npz(part.path) as archive:
            header = archive.header(part.value[0])
            header.require((None, None), (None, None, None), kinds="iuf")
            return replace(part, container="npy", value=archive.read(header))
    if isinstance(part.value, dict):
        key = _key(part.value)
        held = stacked(part.value[key])
        if not isinstance(held, dict):
            held = counts(str(key)[:40], held, 2, 3)
        _compare(part.name, part.value, held, options)
        return replace(part, container=_container(part), value=held)
    key, tables, seen = _key(part.value[0]), list[NDArray[Any]](), dict[str, int]()
    for at, step in enumerate(part.value):
        if not isinstance(step, dict) or _key(step) != key:
            raise TraceError(f"{part.name}: object {at} has no table {str(key)[:40]!r} as the first one has")
        tables.append(counts(f"{str(key)[:40]} of object {at}", step[key], 2))
        if tables[-1].shape != tables[0].shape:
            raise TraceError(f"{part.name}: object {at} has {list(tables[-1].shape)} numbers, the first one "
                             f"{list(tables[0].shape)}")  # fmt: skip
        if not at:
            stack_room(len(part.value), tables[0])
        number = next((held for fact, held in step.items() if STEP.fullmatch(_snake(fact)) and held is not None), None)
        if number is not None and (first := seen.setdefault(str(number), at)) != at:
            raise TraceError(
                f"{part.name}: objects {first} and {at} are both of step {str(number)[:40]}: parts of it, or steps",
                hint="write one object a step, with all layers and experts",
            )
        _compare(part.name, step, tables[-1], options)
    return replace(part, container="npy", value=np.stack(tables))


def _compare(name: str, facts: dict[Any, Any], table: Any, options: ReadOptions) -> None:
    """Raise TraceError where a fact names another number of layers, experts or steps than the table has.

    ``{layer: ...}`` names its layers, and may leave out experts without load.
    """
    has = dict[str, float]()
    if isinstance(table, np.ndarray):
        has = dict(zip(("experts", "layers", "steps"), reversed(table.shape), strict=False))
    for what, key, said in _sizes(facts):
        if isinstance(table, dict):
            wide = float(max(map(len, table.values())))
            lists = not any(isinstance(row, dict) for row in table.values())
            wrong, there = what == "experts" and (said < wide or (lists and said != wide)), wide
        else:
            there = has.get(what, said)
            wrong = said != there
        of_model = what == "layers" and options.model is not None and said == options.model.num_hidden_layers
        if wrong and not of_model:
            raise TraceError(
                f"{name}: {key[:40]!r} says {said:g} {what}, the table has {there:g}",
                hint="loads are [layers, experts]; give --model if dense layers are left out"
                if what == "layers" else "loads are [layers, experts] or [steps, layers, experts]",
            )  # fmt: skip


def _sizes(facts: dict[Any, Any]) -> Iterator[tuple[str, str, float]]:
    for key, said in facts.items():
        if (what := _size(_snake(key))) is not None and type(said) in (int, float):
            yield what, str(key), said


def _container(part: Part) -> Any:
    return "json" if part.container == "json-lines" else part.container


def _key(value: dict[Any, Any]) -> Any:
    """The key of the one table among plain facts, or None."""
    tables = [key for key, held in value.items() if not isinstance(held, PLAIN)]
    if len(tables) != 1:
        return None
    key, held = str(tables[0]), value[tables[0]]
    if isinstance(held, dict):
        return tables[0] if (key == LAYERS or NAME.fullmatch(key)) and bare.is_nested(held) else None
    return tables[0] if NAME.fullmatch(key) and _is_table(held) else None


def _is_table(held: Any) -> bool:
    if isinstance(held, np.ndarray):
        return held.ndim in (2, 3)
    return is_stack(held) or (isinstance(held, list) and bool(held) and isinstance(held[0], list) and bool(held[0]))
