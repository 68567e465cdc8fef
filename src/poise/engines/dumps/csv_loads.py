"""CSV of layers and experts, as people count them: a row a (layer, expert) with its tokens, or a row a choice.

``layer_id,expert_id,count`` (SGLang until 0.4.6, ``expert_distribution_rank0_*.csv``; many scripts)
    tokens of each expert; columns in any order, with ``step`` or ``rank`` too; rows of one expert are added.
``layer,expert`` (llama.cpp's moe-trace, with a head or without)
    a row a choice in the order of execution: the K choices of every token of a pass, layer after layer. Which rows are
    one token's is certain only where K is known and every layer of every pass has K rows; else they are loads. (The
    tool reads a strided tensor as if it were packed, so a pass of several tokens may name an expert twice.)
a column an expert, or a layer (:mod:`poise.engines.dumps.wide`)

The same as rows of JSON: :mod:`poise.engines.dumps.json_rows`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions
from poise.engines.dumps.csv_choices import OF_A_TOKEN, WEIGHT, check_choices, code, together
from poise.engines.dumps.csv_text import CsvText
from poise.engines.dumps.json_rows import JsonRows, head_of, rows_of
from poise.engines.dumps.mapping import MAX_TABLE, model_layers, names_twice, num_experts
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import listed
from poise.engines.dumps.wide import Wide, columns_in_order, long_rows, wide_of
from poise.routing.ranks import Recorded, named_rank, one_workload
from poise.routing.trace import MAX_EXPERTS, MAX_LOAD, LoadProfile, RoutingTrace
from poise.util.errors import TraceError

ROLES = {
    "layer": re.compile(r"(moe_?)?(layer|block)(_?(id|idx|index|num|number|no))?|l"),
    "expert": re.compile(r"(logical_?)?experts?(_?(id|idx|index|num|number|no))?|e|eid"),
    "count": re.compile(r"(?!token\Z)(total_?|num_?|n_?)?(counts?|tokens?|hits?|selections?|activations?)"
                        r"(_?count|_all_topk)?|n|loads?|(expert|token|logical)_(load|counts?)|freq|frequency"),
    "step": re.compile(r"(forward_?)?(step|pass|iter|iteration)(_?(id|idx|index))?"),
    "rank": re.compile(r"((ep|dp|tp|global)_?)?rank(_?id)?"),
}  # fmt: skip
OF_A_CHOICE = re.compile(r"(token|tok|position|pos|request|req|seq|sample|topk|k)(_?(id|idx|index|pos))?|phase|index"
                         r"|unnamed(:_\d+)?")  # fmt: skip
"""Columns that may stand beside a choice and change nothing about it."""
LABELS = {
    "layer": re.compile(r"(?:model\.)?(?:layers?|block|l)[_. ]?(\d{1,5})(?:\.[\w.]*)?", re.IGNORECASE),
    "expert": re.compile(r"(?:experts?|e)[_. ]?(\d{1,5})", re.IGNORECASE),
}
"""What may stand for the number of a layer or an expert."""
SGLANG_RANK = re.compile(r"expert_distribution_rank\d{1,5}(?!\d)")
"""Old SGLang's files, each of one rank's tokens."""
ORDER = ("layer", "expert", "count")
MAX_ROLE = {"layer": 65_535, "expert": MAX_EXPERTS - 1, "count": MAX_LOAD, "step": 2**31 - 1, "rank": 65_535}


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Columns of one file by their roles, float64 [rows] of whole numbers (``count`` may have fractions)."""

    column: dict[str, NDArray[np.float64]]
    notes: tuple[str, ...] = ()


def _plain(head: Sequence[str]) -> list[str]:
    return [re.sub(r"[\s-]+", "_", name.strip().strip("\"'").lower()) for name in head]


def roles(head: Sequence[str]) -> dict[str, list[int]]:
    """Places of the columns of each role that a head names."""
    names = _plain(head)
    return {role: found for role, pattern in ROLES.items()
            if (found := [at for at, name in enumerate(names) if pattern.fullmatch(name)])}  # fmt: skip


def is_loads(part: Part) -> bool:
    """A head that names a layer and an expert, or one of them and numbers of the other; none and two or three columns.

    Rows of JSON have such a head.
    """
    if part.container in ("json", "json-lines"):
        found = head_of(part.value)
        return found is not None and _is_head(found)
    if part.container != "csv":
        return False
    head = part.value.head
    return part.value.columns in (2, 3) if head is None else _is_head(head)


def _is_head(head: Sequence[str]) -> bool:
    at = roles(head)
    return {"layer", "expert"} <= at.keys() or wide_of(_plain(head), at) is not None


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Loads of all files: files, ranks or steps of them; a trace where rows are certainly tokens."""
    tables = [_table(part, options) for part in parts]
    name = parts[0].name
    notes = [note for table in tables for note in table.notes]
    ids = sorted({int(i) for table in tables for i in np.unique(table.column["layer"])})
    kept, said = model_layers(ids, options.model, name)
    if not kept:
        raise TraceError(f"{name} has no MoE layer of the model", hint="check --model")
    largest = max(int(table.column["expert"].max()) for table in tables)
    experts, more = num_experts(options, largest, name)
    notes += [*said, *more]
    if len(tables) == 1 and set(tables[0].column) == {"layer", "expert"}:
        tokens = _tokens(tables[0], ids, options.k)
        if tokens is not None:
            rows = [ids.index(layer) for layer in kept]
            trace = RoutingTrace(
                tokens[:, rows].astype(np.int16), experts, layer_ids=np.array(kept, np.int32), name=name
            )
            return EngineDump(
                "plain", "load-csv", trace=trace, notes=(*notes, "a pass of one token a time: rows are in order")
            )
        notes.append(f"rows are choices, read as loads: which are one token's is not certain"
                     f"{'' if options.k else ' (--top-k may tell)'}")  # fmt: skip
    load_BLE, added = _steps(parts, tables, kept, experts, options)
    profile = LoadProfile(load_BLE, np.array(kept, np.int32), options.k or 1, name, said=options.said)
    return EngineDump("plain", "load-csv", profile=profile, notes=(*notes, *added))


def _table(part: Part, options: ReadOptions) -> _Table:
    text: CsvText | JsonRows = part.value if part.container == "csv" else rows_of(part.name, part.value)
    head = text.head
    if head is None:
        return _headless(part, text.columns, options)
    at = roles(head)
    wide = wide_of(_plain(head), at)
    if wide is not None:
        return _wide(part, text, wide, options)
    for role, found in at.items():
        if len(found) > 1:
            raise TraceError(
                f"{part.name} has {len(found)} columns of {role}: {listed(head[i] for i in found)}", hint="keep one"
            )
    if not {"layer", "expert"} <= at.keys():
        raise TraceError(f"{part.name} has columns {listed(head)}, none of layers or of experts")
    others = [name for i, name in enumerate(head) if [i] not in at.values()]
    of_a_token = any(OF_A_TOKEN.fullmatch(name) for name in _plain(others))
    strange = [
        name for name, plain in zip(others, _plain(others), strict=True)
        if not (OF_A_CHOICE.fullmatch(plain) or (of_a_token and WEIGHT.fullmatch(plain)))
    ]  # fmt: skip
    if strange and "count" not in at:
        raise TraceError(
            f"{part.name}: a row may be one choice, or column {strange[0][:40]!r} may say how many it stands for",
            hint="call a column of tokens 'count', or leave others out",
        )
    notes = (f"columns {listed(others)} were not read",) if others else ()
    table = _checked(part, _columns(part.name, text, {role: found[0] for role, found in at.items()}), notes)
    if "rank" in at and "count" not in at and _each_once(table, "layer", "expert"):
        raise TraceError(
            f"{part.name} names each expert of a layer once, with a rank: where experts lie, or a choice each",
            hint="loads have a column count; a placement is read from an engine's map",
        )
    if "count" not in at:
        check_choices(part.name, text, _plain(head), table.column, options.router_experts)
    return table


def _columns(name: str, text: CsvText | JsonRows, places: dict[str, int]) -> dict[str, NDArray[np.float64]]:
    """Columns by role, [rows]; layers and experts may be named with a word before the number."""
    labels = {at: LABELS[role] for role, at in places.items() if role in LABELS}
    return dict(zip(places, text.numbers(name, list(places.values()), labels).T, strict=True))


def _wide(part: Part, text: CsvText | JsonRows, wide: Wide, options: ReadOptions) -> _Table:
    """A column an expert, or a layer."""
    assert text.head is not None
    heads = _plain(text.head)
    if named := [head for head in heads if OF_A_TOKEN.fullmatch(head)]:
        raise TraceError(
            f"{part.name} has a column {named[0][:40]!r} and {len(wide.places)} of experts: what tokens chose",
            hint="choices are read a row each: token_id,layer,expert",
        )
    order = columns_in_order(part.name, wide, options)
    at = roles(text.head)
    places = {role: at[role][0] for role in (wide.label, "step", "rank") if role in at and at[role][0] not in order}
    column = _checked(part, _columns(part.name, text, places), ()).column
    count_RC = text.numbers(part.name, order)
    others = [text.head[i] for i in range(len(heads)) if i not in {*order, *places.values()}]
    notes = (f"columns {listed(others)} were not read",) if others else ()
    rows = long_rows(part.name, wide, column, count_RC, options, sure=options.format is not None)
    return _checked(part, rows, notes)


def _each_once(table: _Table, *named: str) -> bool:
    """Whether no two rows are alike in the columns of these roles."""
    alike = together([code(table.column[role]) for role in named])
    return bool(alike.max() + 1 == len(alike))


def _headless(part: Part, width: int, options: ReadOptions) -> _Table:
    """Without a head: in the order layer, expert, count, if that is asked for or the rows show it."""
    if width not in (2, 3):
        raise TraceError(f"{part.name} has {width} columns and no head", hint="name the columns layer,expert,count")
    columns = part.value.numbers(part.name, range(width))
    wanted = ORDER[:width]
    if options.format is None and not (width == 2 and _passes(columns)):
        raise TraceError(
            f"{part.name} has no head: columns may be {', '.join(wanted)}, or expert before layer, or a device last",
            hint=f"write {','.join(wanted)} above them, or say --format load-csv if they are in this order",
        )
    return _checked(part, dict(zip(wanted, columns.T, strict=True)), ("no head: columns are " + ", ".join(wanted),))


def _passes(columns: NDArray[np.float64]) -> bool:
    """Whether choices go through the layers, first column, again and again, and not so in the second one."""
    return _cycle(columns[:, 0]) is not None and _cycle(columns[:, 1]) is None


def _cycle(layer: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """Rows of each layer in each pass, int64 [passes, layers], of a column that runs through all layers repeatedly."""
    starts = np.flatnonzero(np.concatenate([[True], layer[1:] != layer[:-1]]))
    runs = layer[starts]
    count = len(np.unique(runs))
    if count < 2 or len(runs) < 2 * count or len(runs) % count:
        return None
    passes = runs.reshape(-1, count)
    if (passes != passes[0]).any() or (np.diff(passes[0]) <= 0).any():
        return None
    return np.diff(np.append(starts, len(layer))).reshape(-1, count)


def _tokens(table: _Table, ids: Sequence[int], top_k: int | None) -> NDArray[np.int64] | None:
    """Experts [passes, L, K] where each pass is certainly one token: K rows of different experts in every layer."""
    rows = _cycle(table.column["layer"]) if top_k is not None else None
    if rows is None or top_k is None or (rows != top_k).any() or rows.shape[1] != len(ids):
        return None
    tokens = table.column["expert"].astype(np.int64).reshape(-1, len(ids), top_k)
    return None if names_twice(tokens) else tokens


def _checked(part: Part, column: dict[str, NDArray[np.float64]], notes: tuple[str, ...]) -> _Table:
    for role, values in column.items():
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > MAX_ROLE[role]:
            raise TraceError(
                f"{part.name}: {role} must lie in 0..{MAX_ROLE[role]:g}, got {values.min():g}..{values.max():g}"
            )
        if role != "count" and (values != np.floor(values)).any():
            raise TraceError(
                f"{part.name}: {role} must be whole numbers, got {values[values != np.floor(values)][0]:g}"
            )
    return _Table(column, notes)


def _steps(
    parts: Sequence[Part], tables: Sequence[_Table], kept: Sequence[int], experts: int, options: ReadOptions
) -> tuple[NDArray[np.float64], list[str]]:
    """Loads [B, L, E], and notes. A column of ranks says what is one pass; so may the names of files."""
    files = [file for part, table in zip(parts, tables, strict=True) for file in _recorded(part, table, kept, experts)]
    told = any("rank" in table.column for table in tables)
    told |= all(SGLANG_RANK.match(part.name) for part in parts)
    return one_workload(
        files, options.ranks or ("sum" if told else None), allow_missing=options.allow_missing_ranks,
        counters=options.counters,
    )  # fmt: skip


def _recorded(part: Part, table: _Table, kept: Sequence[int], experts: int) -> list[Recorded]:
    """Tokens of each expert, [B, L, E], of each rank of a table."""
    column = table.column
    steps = np.unique(column["step"]) if "step" in column else np.zeros(1)
    ranks = np.unique(column["rank"]) if "rank" in column else np.zeros(1)
    shape = (len(ranks), len(steps), len(kept), experts)
    if len(ranks) * len(steps) * len(kept) * experts > MAX_TABLE:
        raise TraceError(
            f"{len(ranks)} ranks, {len(steps)} steps, {len(kept)} layers and {experts} experts are too many"
        )
    real = np.isin(column["layer"], kept)
    at = np.zeros(int(real.sum()), np.int64)
    for role, values in (("rank", ranks), ("step", steps), ("layer", np.array(kept))):
        at = at * len(values) + (np.searchsorted(values, column[role][real]) if role in column else 0)
    at = at * experts + column["expert"][real].astype(np.int64)
    weights = column["count"][real] if "count" in column else None
    load_RBLE = np.bincount(at, weights, int(np.prod(shape))).reshape(shape).astype(np.float64)
    names = [int(rank) for rank in ranks] if "rank" in column else [named_rank(part.path)]
    return [Recorded(part.name, rank, load) for rank, load in zip(names, load_RBLE, strict=True)]
