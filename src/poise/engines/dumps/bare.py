"""Numbers without a word about what they are: bare arrays of ``.npy``, ``.pt``, JSON and CSV.

A table [layers, experts] of loads, a trace [tokens, layers] of ids (ExFlow's), a map [layers, slots] of ids and a
placement [layers, experts] of devices look alike. One of them is taken only where the numbers leave no other; else
both are named, and ``--format`` decides. ``{layer: {expert: tokens}}`` and ``{layer: [numbers]}`` say what their keys
are, but not their values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions
from poise.engines.dumps.csv_text import CsvText
from poise.engines.dumps.folded import PROOF_BITS, TOKENS, never_alike
from poise.engines.dumps.mapping import (
    BY_PLACE,
    MAX_MTP_LAYERS,
    MAX_TOP_K,
    check_ids,
    decoder_layers,
    model_layers,
    names_twice,
    num_experts,
    rows_alone,
)
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import MAX_CELLS, counts, is_stack, listed, stacked, whole
from poise.engines.dumps.wide import like_choices, named_experts, numbered
from poise.routing.npz import open_npz
from poise.routing.ranks import Recorded, named_rank, one_workload
from poise.routing.trace import MAX_EXPERTS, MAX_LOAD, LoadProfile
from poise.util.errors import TraceError

MAX_LAYERS = 2048
"""A table of more rows is none of layers: no model comes near."""
MAX_IDS, MANY_IDS = 4096, 1024
"""No model has ids as high as the first; those above the second stand in tables of many choices."""
MANY = 3
"""Layers, or experts, of which it is no chance that their first loads count up, or that all have as many tokens."""
ONE = 1.01
"""Up to here a sum of probabilities in 16 bits may come instead of 1."""
SHARES = "shares of each expert of a layer look alike"
LEAST_EXPERTS = 4
"""Of fewer experts, counts may well happen to name each once."""
MEANINGS = {
    "load-table": {2: "loads [layers, experts]", 3: "loads [steps, layers, experts]"},
    "exflow": {2: "expert ids [tokens, layers]", 3: "expert ids [tokens, layers, experts a token]"},
    "vllm-49572": {2: "a map [layers, slots] of expert ids"},
    "step-routing": {2: "expert ids [tokens, experts a token] of one layer"},
    "": {2: "the device of each expert"},
}
LAYER_KEY = re.compile(
    r"(?:(?:model\.)?(?:layers?|block)[_. ]?)?(\d{1,5})"
    r"(?:\.(?:mlp|moe|experts|gate|router|block_sparse_moe|feed_forward))*"
)
LAYER_NAME = re.compile(r"(?:model\.)?(?:layers?|block|l)[_. ]?(\d{1,5})(?:\.[\w.]*)?", re.IGNORECASE)
"""What an index may say instead of a number."""
ROUTER_KEY = re.compile(r"\.(?:gate|router)(?:\.|$)")
EXPERT_KEY = re.compile(r"(?:experts?[_. ]?)?(\d{1,5})")
STEP_NAME = re.compile(r"\d{1,9}_(\d{1,5})")


class AmbiguousError(TraceError):
    """The numbers can be of several formats."""


def is_bare(part: Part) -> bool:
    """An array, lists of numbers, or many columns without names, and nothing else."""
    if part.container == "npz":
        return part.value in (["data"], ["arr_0"])
    if part.container in ("npy", "torch", "json") and (isinstance(part.value, np.ndarray) or is_stack(part.value)):
        return True
    if part.container == "csv":
        return part.value.columns > 3 if part.value.head is None else numbered(part.value.head) is not None
    return part.container == "json" and _first_number(part.value)


def _first_number(value: Any) -> bool:
    depth = 0
    while isinstance(value, list) and value and depth < 3:
        value, depth = value[0], depth + 1
    return depth > 0 and type(value) in (int, float)


def decide(part: Part, options: ReadOptions) -> str:
    """The name of the one format that a bare table can be of.

    Raises
    ------
    TraceError : no format fits, or several do.
    """
    array = table_of(part)
    if array.ndim == 1:
        if part.container == "json" and _is_map(array[None], options):
            return "vllm-49572"
        raise TraceError(f"one row of {array.size} numbers, and no map that holds every expert", hint="docs/dumps.md")
    found = readings(array, options, npz=part.container == "npz", named=STEP_NAME.fullmatch(part.path.stem) is not None)
    if part.container == "csv" and part.value.head is not None and named_experts(part.value.head):
        found = [name for name in found if name == "load-table"]
        if found and array.size and (said := like_choices(array, np.zeros((len(array), 1)), options)):
            raise AmbiguousError(said, hint="if they are loads, say so: --format load-table, or --num-experts")
    if found == ["exflow"] and options.model is None and array.shape[1] > len(array):
        raise AmbiguousError(
            f"ids {_shape(array)}: {len(array)} tokens of {array.shape[1]} layers, or {len(array)} layers of "
            f"{array.shape[1]} tokens",
            hint="store [tokens, layers, experts a token]; if it is, say so: --format exflow, or give --model",
        )
    odd = _not_loads(array, options) if array.size and found in ([], ["load-table"]) else ""
    if odd:
        raise AmbiguousError(
            f"numbers {_shape(array)}: {odd}",
            hint="give loads [layers, experts] alone; or say that these are such: --format load-table",
        )
    if len(found) == 1 and found[0]:
        return found[0]
    if not found:
        model = "" if options.router_experts is None else f" of the model's {options.router_experts} experts"
        model += "" if options.model is None else f" and {options.model.num_hidden_layers} layers"
        raise TraceError(
            f"numbers {_shape(array)} that are no table of loads, no ids and no map{model}",
            hint=_other_experts(array, options) or "docs/dumps.md",
        )
    named = " or ".join(f"--format {name}" for name in found if name)
    raise AmbiguousError(
        f"numbers {_shape(array)} may be {' or '.join(MEANINGS[name][array.ndim] for name in found)}",
        hint=f"say which: {named}",
    )


def _not_loads(array: NDArray[Any], options: ReadOptions) -> str:
    """Why numbers that could be a table of loads by shape and range are probably none, or ``""``."""
    routed = "" if options.model is not None or not array.size else _of_tokens(array)
    if routed:
        return f"{routed}, as rows of a router's answers to tokens do; {SHARES}"
    if array.ndim == 2:
        for line, what in (
            (array[:, 0], "column counts, as numbers of layers do"),
            (array[0], "row counts, as a head does"),
        ):
            if _counts_up(line):
                return f"from {line[0]:g} to {line[-1]:g} the first {what}"
    may_be_ids = array.dtype.kind in "iu" and 0 <= array.min() <= array.max() < MAX_IDS
    if array.ndim == 3 and may_be_ids and array.shape[1] <= MAX_TOP_K:
        some = array[:: max(1, len(array) // TOKENS)]
        if never_alike(some[:, :, layer, None] for layer in range(some.shape[2])):
            return (f"no column has a number twice in its {array.shape[1]} rows, as if they were [tokens, experts a "
                    "token, layers] of ids")  # fmt: skip
    sums = array.sum(axis=-1, dtype=np.float64)
    exchanged = False
    if array.ndim == 2 and array.shape[1] >= MANY:
        exchanged = _alike(array.sum(axis=0, dtype=np.float64)) and not _alike(sums)
    elif array.ndim == 3 and min(sums.shape) > 1 and len(sums) >= MANY:
        exchanged = all(map(_alike, sums.T)) and not all(map(_alike, sums))
    axes = "rows are experts, and columns layers" if array.ndim == 2 else "layers come first, then steps"
    if exchanged:
        return f"it seems that {axes}: every layer of a step has as many tokens"
    return _of_scores(array) if options.model is None and array.size else ""


def _counts_up(line: NDArray[Any]) -> bool:
    """Whether numbers are those of experts, or layers, from 0 or 1 on."""
    return len(line) >= MANY and line[0] in (0, 1) and bool((np.diff(line) == 1).all())


def _of_tokens(array: NDArray[Any]) -> str:
    """What [..., E] have in common with what a router gives tokens, not layers: probabilities, scores, weights of K.

    Whole numbers [steps, L, E] are loads: masks of K a row add up to the same ones where the middle axis is of layers.
    """
    rows = array.reshape(-1, array.shape[-1])
    if len(rows) < MANY or not np.isfinite(rows).all():
        return ""
    chosen, most = np.count_nonzero(rows, axis=1), float(rows.max())
    top_k, whole_numbers = int(chosen[0]), rows.dtype.kind in "iu" or bool((rows == np.floor(rows)).all())
    if whole_numbers and len(array) < len(rows):
        return ""
    if (chosen == top_k).all() and 1 <= top_k <= min(MAX_TOP_K, rows.shape[1] // 2) and most <= ONE:
        return f"every row has {top_k} numbers above 0" + (
            ": loads of one token [layers, experts], or choices [tokens, experts] of a layer" if whole_numbers else ""
        )
    if whole_numbers:
        return ""
    sums = rows.sum(axis=1, dtype=np.float64)
    for unit, what in ((1, "1"), (100, "100, as per cents do")):
        if np.allclose(sums, unit, rtol=0, atol=(ONE - 1) * unit):
            return f"every row adds up to {what}"
    return ""


def _of_scores(array: NDArray[Any]) -> str:
    """Fractions none of which is above 1: what a router that scores each expert alone gives tokens (DeepSeek's)."""
    fractions = array.dtype.kind == "f" and len(array.reshape(-1, array.shape[-1])) >= MANY
    if not fractions or not 0 < float(array.max()) <= 1 or (array == np.floor(array)).all():
        return ""
    return f"no number is above 1, as a router's answers to tokens are; {SHARES}"


def _alike(sums: NDArray[np.float64]) -> bool:
    return bool(sums[0] > 0 and np.allclose(sums, sums[0], rtol=1e-9, atol=0))


def _other_experts(array: NDArray[Any], options: ReadOptions) -> str:
    """What to mend where the numbers fit another E."""
    if options.router_experts is None or options.model is not None:
        return "check --model" if options.model is not None else ""
    free = readings(array, replace(options, num_experts=None, zero_experts=None))
    widths = [array.shape[-1]] if "load-table" in free else []
    widths += [int(array.max(initial=0)) + 1] if "exflow" in free else []
    known = options.router_experts - options.zeros
    more = next((width - known for width in widths if known < width <= 2 * known), 0)
    return f"check --num-experts; or, with identity (zero) experts, give --zero-experts {more}" if more else ""


def readings(array: NDArray[Any], options: ReadOptions, *, npz: bool = False, named: bool = False) -> list[str]:
    """Names of formats that numbers [A, B] or [A, B, C] can be of; ``""``: devices of experts.

    Parameters
    ----------
    array : the numbers.
    options : E, K and the model, where they are known.
    npz : an archive with this array alone, which is how one layer's ids come.
    named : the file's name tells that layer.
    """
    ids = array.dtype.kind in "iu" and array.size > 0 and int(array.min()) >= 0
    found = ["load-table"] if _may_be_loads(array, options) else []
    if not ids:
        return found
    if npz:
        step = array.ndim == 2 and _distinct(array) and _may_be_ids(array, options)
        return (["step-routing"] if named else [*found, "step-routing"]) if step else found
    if array.ndim == 2 and _is_map(array, options):
        sure = int(array.max()) + 1 >= LEAST_EXPERTS and not _is_devices(array)
        return ["vllm-49572"] if sure else [*found, "vllm-49572", *([""] if _is_devices(array) else [])]
    if _may_be_tokens(array, options):
        found.append("exflow")
    if array.ndim == 2 and _is_devices(array):
        found.append("")
    return found


def _layers_fit(layers: int, options: ReadOptions) -> bool:
    if options.model is None:
        return layers <= MAX_LAYERS
    return any(
        0 <= layers - n <= MAX_MTP_LAYERS for n in (options.model.num_hidden_layers, len(options.model.moe_layer_ids))
    )


def _may_be_loads(array: NDArray[Any], options: ReadOptions) -> bool:
    layers, experts = array.shape[-2:]
    if not array.size or array.min() < 0 or experts > MAX_EXPERTS:
        return False
    known = (None, experts) if options.experts is None else (options.experts, options.router_experts)
    return _layers_fit(layers, options) and experts in known and experts > 1


def _may_be_ids(array: NDArray[Any], options: ReadOptions) -> bool:
    """Below E; without it, no higher than any model's, and not far more experts than there are choices."""
    top, known = int(array.max()), options.router_experts
    return top < known if known else top < MAX_IDS and (top < MANY_IDS or top < 4 * array.size)


def _may_be_tokens(array: NDArray[Any], options: ReadOptions) -> bool:
    """Ids of tokens; a record may keep fewer experts a token than the model has."""
    if array.ndim == 3 and (array.shape[2] > (options.k or MAX_TOP_K) or not _distinct(array)):
        return False
    return _may_be_ids(array, options) and _layers_fit(array.shape[1], options)


def _distinct(array: NDArray[Any]) -> bool:
    """Whether a token's experts, the last axis, are different ones, as a router chooses them."""
    return array.shape[-1] <= MAX_TOP_K and not names_twice(array)


def _is_map(array: NDArray[Any], options: ReadOptions) -> bool:
    """Every row holds every expert."""
    top = int(array.max()) if array.size and array.dtype.kind in "iu" else -1
    experts = options.router_experts or top + 1
    if not 0 < experts <= array.shape[1] or top >= experts or int(array.min()) < 0 or len(array) > MAX_LAYERS:
        return False
    return all(len(np.unique(row)) == experts for row in array)


def _is_devices(array: NDArray[Any]) -> bool:
    """Every row has the numbers of all devices, each as often: where experts of even shares lie."""
    devices = int(array.max()) + 1
    share, rest = divmod(array.shape[1], devices)
    if rest or share < 2 or devices < 2 or len(array) > MAX_LAYERS:
        return False
    return all((np.bincount(row, minlength=devices) == share).all() for row in array.astype(np.int64))


def _shape(array: NDArray[Any]) -> str:
    return f"{list(array.shape)} from {array.min():g} to {array.max():g}" if array.size else f"{list(array.shape)}"


def table_of(part: Part) -> NDArray[Any]:
    """A file's numbers, of one to three dimensions."""
    if part.container == "npz":
        with open_npz(part.path) as archive:
            header = archive.header(part.value[0])
            header.require((None, None), (None, None, None), kinds="iuf")
            return archive.read(header)
    array = stacked(part.value)
    if part.container in ("csv", "json"):
        found = _of_csv(part.name, array) if part.container == "csv" else counts(part.name, array, 1, 2, 3)
        if found.dtype.kind in "iu":
            return found
        whole_numbers = (found == np.floor(found)).all() if found.size else False
        return found.astype(np.int64) if whole_numbers and np.abs(found).max() < 2**53 else found
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf" or array.ndim not in (1, 2, 3):
        raise TraceError(f"{part.name} is no table of numbers in 1 to 3 dimensions")
    return array


def below_head(part: Part, array: NDArray[Any], *, ids: bool = False) -> tuple[NDArray[Any], list[str]]:
    """Numbers as :func:`table_of` gives them, and a note if the first row is a head of numbers, as pandas writes it.

    Of loads, where it has as many tokens as every other row, it is a layer; of ``ids`` of tokens it is a token where
    there are too few layers for another one of so many tokens not to choose 0, 1, 2, ... by chance.
    """
    headless = part.container == "csv" and part.value.head is None and len(array) > 1
    if not headless or not _counts_up(array[0]):
        return array, []
    if _chosen_by_chance(array) if ids else _alike(array.sum(axis=1, dtype=np.float64)):
        return array, []
    return array[1:], [f"{part.name}: the first row, {array[0, 0]:g} to {array[0, -1]:g}, was taken for a head"]


def _chosen_by_chance(array: NDArray[Any]) -> bool:
    """Whether the first of [tokens, layers] may well be drawn, as often as each of its ids is in the other rows."""
    share_L = (array[1:] == array[0]).mean(axis=0)
    return float(np.log2(np.maximum(share_L, 0.5 / len(array))).sum()) > -PROOF_BITS


def _of_csv(name: str, text: CsvText) -> NDArray[np.float64]:
    """The numbers of a table that names no columns, or numbers them; an index beside them counts nothing.

    Raises
    ------
    TraceError : the column beside them is no index.
    """
    if text.head is None:
        return text.numbers(name, range(text.columns))
    order = numbered(text.head)
    assert order is not None
    if 0 not in order:
        index = text.numbers(name, [0], {0: LAYER_NAME})[:, 0]
        if not np.array_equal(index, np.arange(len(index))):
            raise TraceError(
                f"{name}: the column without a name goes from {index[0]:g} to {index[-1]:g} in {len(index)} rows, an "
                f"index from 0 to {len(index) - 1}",
                hint="name it layer, or expert, if that is what it numbers",
            )
    return text.numbers(name, order)


def is_nested(value: Any) -> bool:
    """``{layer: {expert: tokens}}``, or ``{layer: [numbers]}``."""
    return (
        isinstance(value, dict) and 0 < len(value) <= 65_536 and all(LAYER_KEY.fullmatch(str(key)) for key in value)
        and all(_is_row(row) for row in value.values())
    )  # fmt: skip


def _is_row(row: Any) -> bool:
    if isinstance(row, dict):
        return bool(row) and bool(EXPERT_KEY.fullmatch(str(next(iter(row)))))
    return (isinstance(row, list) and _first_number(row[:1])) or (isinstance(row, np.ndarray) and row.ndim == 1)


def read_loads(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Loads of all files; layers by place where the table does not name them.

    Files of several ranks are read by :func:`poise.routing.ranks.one_workload`.
    """
    if any(isinstance(part.value, dict) for part in parts):
        return _read_nested(parts, options)
    steps, heads = [], []
    for part in parts:
        array = table_of(part)
        if not array.size:
            raise TraceError(f"{part.name} is empty: {list(array.shape)}", hint="record again with traffic")
        array, said = below_head(part, array)
        heads += said
        if array.ndim == 1:
            raise TraceError(f"{part.name} has one row; loads are [layers, experts] or [steps, layers, experts]")
        steps.append(counts(part.name, array, 2, 3).reshape(-1, *array.shape[-2:]))
        if steps[-1].shape[1:] != steps[0].shape[1:]:
            raise TraceError(
                f"{part.name} has [layers, experts] {list(steps[-1].shape[1:])}, {parts[0].name} "
                f"{list(steps[0].shape[1:])}"
            )
    files = [Recorded(part.name, named_rank(part.path), step) for part, step in zip(parts, steps, strict=True)]
    load_BLE, added = one_workload(
        files, options.ranks, allow_missing=options.allow_missing_ranks, counters=options.counters
    )
    width = load_BLE.shape[2]
    if options.experts is not None and width not in (options.experts, options.router_experts):
        raise TraceError(
            f"{parts[0].name} has {width} experts a layer, the model {options.router_experts}", hint="check --model"
        )
    rows, ids, notes = decoder_layers(load_BLE.shape[1], options.model, parts[0].name)
    profile = LoadProfile(rows_alone(load_BLE, rows, 1), ids, options.k or 1, parts[0].name, said=options.said)
    guessed, recorded = options.model is None, load_BLE.shape[1]
    return EngineDump("plain", "load-table", profile=profile, recorded_layers=recorded, layers_by_place=guessed,
                      notes=(*([BY_PLACE] if guessed else []), *heads, *added, *notes))  # fmt: skip


def _read_nested(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    found = [_nested(part, said=options.format is not None) for part in parts]
    ids, notes = model_layers(sorted({layer for rows in found for layer in rows}), options.model, parts[0].name)
    if not ids:
        raise TraceError(f"{parts[0].name} has no MoE layer of the model", hint="check --model")
    largest = max(max(row) for rows in found for row in rows.values())
    experts, said = num_experts(options, largest, parts[0].name)
    if len(found) * len(ids) * experts > MAX_CELLS:
        raise TraceError(f"{len(found)} files of {len(ids)} layers and {experts} experts are too many")
    load_BLE = np.zeros((len(found), len(ids), experts))
    for step, rows in enumerate(found):
        for at, layer in enumerate(ids):
            row = rows.get(layer, {})
            load_BLE[step, at, list(row)] = list(row.values())
    if options.format is None:
        lists = any(not isinstance(row, dict) for part in parts for row in part.value.values())
        _refuse_ids(parts[0].name, load_BLE[:, load_BLE.any(axis=(0, 2))].reshape(-1, experts), options, lists=lists)
    files = [Recorded(part.name, named_rank(part.path), load[None]) for part, load in zip(parts, load_BLE, strict=True)]
    together, added = one_workload(
        files, options.ranks, allow_missing=options.allow_missing_ranks, counters=options.counters
    )
    profile = LoadProfile(together, np.array(ids, np.int32), options.k or 1, parts[0].name, said=options.said)
    return EngineDump("plain", "load-table", profile=profile, notes=(*notes, *said, *added))


def _refuse_ids(name: str, loads_LE: NDArray[np.float64], options: ReadOptions, *, lists: bool) -> None:
    """Raise AmbiguousError where numbers may be no tokens: devices, or, in lists, ids of experts."""
    if not loads_LE.size or (loads_LE != np.floor(loads_LE)).any():
        return
    whole_LE = loads_LE.astype(np.int64)
    devices, ids = _is_devices(whole_LE), lists and _may_be_ids(whole_LE, options)
    if devices or ids:
        raise AmbiguousError(
            f"{name} may be tokens of each expert, or {'ids of experts' if ids else MEANINGS[''][2]}: numbers from "
            f"{whole_LE.min()} to {whole_LE.max()}",
            hint="if they are tokens, say so: --format load-table",
        )


def _nested(part: Part, *, said: bool) -> dict[int, dict[int, float]]:
    if not is_nested(part.value):
        raise TraceError(f"{part.name} is not {{layer: {{expert: tokens}}}}")
    out: dict[int, dict[int, float]] = {}
    lengths = {len(row) for row in part.value.values() if not isinstance(row, dict)}
    if len(lengths) > 1:
        raise TraceError(f"{part.name} has {min(lengths)} to {max(lengths)} numbers a layer, loads have one an expert")
    for key, row in part.value.items():
        layer = _number(LAYER_KEY, key)
        named = row if isinstance(row, dict) else dict(enumerate(row.tolist() if isinstance(row, np.ndarray) else row))
        experts = {_number(EXPERT_KEY, name): _tokens(value) for name, value in named.items()}
        if len(experts) != len(named) or layer in out:
            raise TraceError(f"{part.name}: layer {layer} is named twice, or an expert of it")
        out[layer] = experts
    check_ids(part.name, list(out))
    gate = next((str(key) for key in part.value if ROUTER_KEY.search(str(key))), None)
    odd = next((n for row in out.values() for n in row.values() if n != int(n)), None)
    if gate is not None and odd is not None and not said:
        raise AmbiguousError(
            f"{part.name}: {odd:g} beside {gate[:60]!r} may be loads, or scores or corrections of a router",
            hint="if they are loads, say so: --format load-table",
        )
    return out


def _number(pattern: re.Pattern[str], key: Any) -> int:
    match = pattern.fullmatch(str(key))
    if match is None:
        raise TraceError(f"{str(key)[:40]!r} is no number of a layer or expert")
    return whole("a layer or expert", int(match[1]), high=65_535)


def _tokens(value: Any) -> float:
    if type(value) not in (int, float):
        raise TraceError(f"tokens must be numbers, got {listed([str(value)[:40]])}")
    if not 0 <= value <= MAX_LOAD:
        raise TraceError(f"tokens must lie in 0..{MAX_LOAD:g}, got {str(value)[:40]}")
    return float(value)
