"""Bytes of one expert weight, scales included, from a ``quantization_config`` in the forms that are in use.

Scales of whole rows, tensors and blocks of at least 1,000 weights are left out (0.4 % and less), and so is the
order of activations that GPTQ may store. A size that holds for some experts only is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from poise.machine.hfconfig.names import HINT, ExpertNames
from poise.util.errors import ModelError

Quant = dict[str, Any]
SIXTEEN_BIT = 2.0
MXFP4 = 17 / 32
NVFP4 = 9 / 16
SKIPPED = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "exclude", "llm_int8_skip_modules")
EXPERT_TYPES = {
    "fp4": MXFP4, "mxfp4": MXFP4, "nvfp4": NVFP4, "fp8": 1.0, "int8": 1.0, "bf16": 2.0, "bfloat16": 2.0, "fp16": 2.0,
    "float16": 2.0,
}  # fmt: skip
SIMPLE = {
    "fbgemm_fp8": 1.0, "mxfp4": MXFP4, "mxfp8": 33 / 32, "ptpc_fp8": 1.0, "w8a8_fp8": 1.0, "w8a8_int8": 1.0,
    "experts_int8": 1.0, "blockwise_int8": 1.0, "w4afp8": 0.5 + 2 / 128,
}  # fmt: skip
"""One byte and its like; MXFP has one 8-bit scale for 32 weights, NVFP4 one for 16."""
MODELOPT = {
    "FP8": 1.0, "FP8_PB_WO": 1.0, "FP8_PB_REAL": 1.0, "FP8_PER_CHANNEL_PER_TOKEN": 1.0, "MXFP8": 33 / 32,
    "MXFP4": MXFP4, "W4A8_MXFP4_FP8": MXFP4, "W4A16_MXFP4": MXFP4, "W8A16": 1.0, "INT8_SQ": 1.0, "INT8_WO": 1.0,
    "W8A8_SQ_PER_CHANNEL": 1.0, "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": 1.0, "W8A8_SQ_PER_TENSOR_PLUGIN": 1.0,
}  # fmt: skip
MODELOPT_GROUPS = {
    "NVFP4": (16, 1), "NVFP4_AWQ": (16, 1), "NVFP4_SVDQUANT": (16, 1), "W4A16_NVFP4": (16, 1),
    "W4A8_NVFP4_FP8": (16, 1), "INT4_AWQ": (128, 2), "W4A16_AWQ": (128, 2), "W4A8_AWQ": (128, 2),
    "W4A16_GPTQ": (128, 2), "INT4_WO": (128, 2),
}  # fmt: skip
"""4 bits a weight: weights to a scale unless ``group_size`` says otherwise, bytes of a scale."""


def weight_bytes(config: Mapping[str, Any], names: ExpertNames) -> float:
    """Bytes of one expert weight; 2 where the config names no quantization.

    Parameters
    ----------
    config : keys of the language model, with ``quantization_config`` and ``expert_dtype`` where it has them.
    names : of the experts, for lists of modules that are quantised otherwise.

    Raises
    ------
    ModelError : a form that poise does not know, or experts that are quantised differently.
    """
    quant = _stated(config)
    own = quant.get("expert_dtype") if isinstance(quant, dict) else None
    said = own if own is not None else config.get("expert_dtype")
    dtype = None if said is None else str(said)
    if dtype is not None and dtype not in EXPERT_TYPES:
        raise _unknown(f"expert_dtype {dtype[:60]!r}")
    if not quant:
        if dtype is not None and EXPERT_TYPES[dtype] != SIXTEEN_BIT:
            raise ModelError(
                f"expert_dtype is {dtype!r}, and there is no quantization_config",
                hint="remove expert_dtype to price 16-bit weights",
            )
        return SIXTEEN_BIT
    if not isinstance(quant, dict):
        raise _unknown(quant)
    method = str(quant.get("quant_method") or "").lower().replace("_", "-")
    found = METHODS.get(method, _unknown_method)(quant, names)
    if dtype is None or EXPERT_TYPES[dtype] == found:
        return found
    if method == "fp8":
        return EXPERT_TYPES[dtype] if EXPERT_TYPES[dtype] != 1.0 else found
    if found == SIXTEEN_BIT:
        raise ModelError(
            f"expert_dtype is {dtype!r}, and the {method} quantization_config leaves the experts out",
            hint="remove one of the two",
        )
    return found


def _stated(config: Mapping[str, Any]) -> Any:
    """What the config says of quantization, under the names it goes by."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if config.get(key):
            return config[key]
    label = config.get("quantize")  # MindIE
    return {"quant_method": "ascend", "model_quant_type": str(label).upper()} if label else None


def sends_fp8(config: Mapping[str, Any]) -> bool:
    """Whether engines send activations to experts as FP8: with ``quant_method`` fp8, if experts are not left out."""
    quant = config.get("quantization_config")
    return isinstance(quant, dict) and quant.get("quant_method") == "fp8"


def _fp8(quant: Quant, names: ExpertNames) -> float:
    block = quant.get("weight_block_size")
    size = 1
    for side in block if isinstance(block, list) else []:
        size *= _size(side, "weight_block_size")
    scale = (1.0 if quant.get("scale_fmt") == "ue8m0" else 4.0) / size
    return _unless_skipped(quant, names, 1.0 + (scale if 1 < size < 1000 else 0.0))


def _simple(quant: Quant, names: ExpertNames) -> float:
    return _unless_skipped(quant, names, SIMPLE[str(quant["quant_method"]).lower().replace("-", "_")])


def _integers(quant: Quant, names: ExpertNames) -> float:
    """GPTQ and AWQ: 2, 3, 4 or 8 bits, a 16-bit scale and, where it is kept, a zero point a group."""
    bits = quant.get("bits", quant.get("w_bit"))
    group = quant.get("group_size", quant.get("q_group_size"))
    kept = quant.get("zero_point", True) if "awq" in str(quant.get("quant_method")) else True  # GPTQ always stores them
    for pattern, value in _table(quant, "dynamic").items():
        text = str(pattern)
        if text.startswith("-:"):
            quant = {**quant, "ignore": [*_listed(quant, "ignore"), "re:" + text[2:]]}
        elif names.covered([text.removeprefix("+:")], regular=True) is not False:
            raise _unknown({pattern: value})
    size = _unless_skipped(quant, names, _grouped(bits, group, 2, zero=bool(kept)))
    only = quant.get("modules_in_block_to_quantize")
    if only and names.covered(name for row in only for name in (row if isinstance(row, list) else [row])) is not True:
        raise _unknown({"modules_in_block_to_quantize": only})
    return size


def _auto_round(quant: Quant, names: ExpertNames) -> float:
    if str(quant.get("data_type", "int")) != "int":
        raise _unknown(quant)
    other = [str(name) for name in _table(quant, "extra_config")]
    patterns = [name for name in other if re.search(r"[*+?^$|()\[\]]", name)]
    if names.covered(other) is not False or names.covered(patterns, regular=True) is not False:
        raise _unknown("an extra_config that names experts")
    return _grouped(quant.get("bits"), quant.get("group_size"), 2, zero=True)


def _bitsandbytes(quant: Quant, names: ExpertNames) -> float:
    """4 bits with a scale for 64 weights, 8-bit and double quantised or 32-bit; or 8 bits."""
    if quant.get("load_in_8bit"):
        return _unless_skipped(quant, names, 1.0)
    if not quant.get("load_in_4bit"):
        raise _unknown(quant)
    scales = 1 / 64 + 4 / (64 * 256) if quant.get("bnb_4bit_use_double_quant") else 4 / 64
    return _unless_skipped(quant, names, 0.5 + scales)


def _modelopt(quant: Quant, names: ExpertNames) -> float:
    inner = quant.get("quantization")
    quant = inner if isinstance(inner, dict) else quant
    algo = str(quant.get("quant_algo") or "").upper()
    if algo != "MIXED_PRECISION":
        return _unless_skipped(quant, names, _algo(quant))
    layers = quant.get("quantized_layers")
    if not isinstance(layers, dict) or any(not isinstance(value, dict) for value in layers.values()):
        raise _unknown(quant)
    return _one_of([(name, _algo_or_none(value)) for name, value in layers.items()], names, "quantized_layers")


def _algo(quant: Quant) -> float:
    algo = str(quant.get("quant_algo") or "").upper()
    if algo in MODELOPT:
        return MODELOPT[algo]
    if algo not in MODELOPT_GROUPS:
        raise _unknown(f"quant_algo {algo[:60]!r}" if algo else quant)
    group, scale = MODELOPT_GROUPS[algo]
    return _grouped(4, quant.get("group_size") or group, scale)


def _algo_or_none(quant: Quant) -> float | None:
    """None for a form that is not known: it matters only if experts have it."""
    try:
        return _algo(quant)
    except ModelError:
        return None


def _one_of(entries: list[tuple[str, float | None]], names: ExpertNames, what: str) -> float:
    """The one size that all experts have among modules that are named with their sizes; 2 where none is an expert."""
    sizes: dict[float | None, list[str]] = {}
    for name, size in entries:
        sizes.setdefault(size, []).append(name)
    covered = {size: names.covered(listed) for size, listed in sizes.items()}
    some = [size for size, whole in covered.items() if whole is not False]
    if not some:
        return SIXTEEN_BIT
    if len(some) > 1 or covered[some[0]] is None:
        raise ModelError(f"{what} gives experts different types of weights, or gives one to some of them", hint=HINT)
    if some[0] is None:
        raise _unknown(f"{what}, where experts have a type")
    return some[0]


def _compressed(quant: Quant, names: ExpertNames) -> float:
    groups = quant.get("config_groups")
    sparse = quant.get("sparsity_config")
    if (isinstance(sparse, dict) and sparse.get("format") not in (None, "dense")) or not isinstance(groups, dict):
        raise _unknown(quant)
    named: list[tuple[bool, Any]] = []
    for group in groups.values():
        if not isinstance(group, dict):
            raise _unknown(quant)
        targets = group.get("targets", ["Linear"])
        listed = [str(one) for one in targets] if isinstance(targets, list) else [str(targets)]
        whole = names.covered(one for one in listed if one not in ("Linear", "FusedMoE"))
        if whole is None:
            raise ModelError("config_groups gives some of the experts a type of weights", hint=HINT)
        if whole or {"Linear", "FusedMoE"} & set(listed):
            named.append((whole, group.get("weights")))
    chosen = [weights for whole, weights in named if whole] or [weights for _, weights in named]
    sizes = {SIXTEEN_BIT if weights is None else _scheme(weights, quant) for weights in chosen} or {SIXTEEN_BIT}
    if len(sizes) > 1:
        raise ModelError(f"config_groups gives experts weights of {sorted(sizes)} bytes", hint=HINT)
    return _unless_skipped(quant, names, sizes.pop())


def _scheme(weights: Any, quant: Quant) -> float:
    if not isinstance(weights, dict):
        raise _unknown(quant)
    bits, group, kind = weights.get("num_bits"), weights.get("group_size"), str(weights.get("type", "int"))
    if kind == "float" and bits == 4:
        if group not in (16, 32):
            raise _unknown(weights)
        return _grouped(4, group, 1)
    if kind == "float" and bits != 8:
        raise _unknown(weights)
    scale = 1 if kind == "float" and group == 32 else 2  # MXFP8
    return _grouped(bits, group, scale, zero=kind == "int" and weights.get("symmetric") is False)


def _quark(quant: Quant, names: ExpertNames) -> float:
    whole = quant.get("global_quant_config")
    weight = whole.get("weight") if isinstance(whole, dict) else None
    if names.covered(_table(quant, "layer_quant_config")) is not False:
        raise _unknown("a layer_quant_config that names experts")
    kind = str(weight.get("dtype")) if isinstance(weight, dict) else ""
    group = weight.get("group_size") if isinstance(weight, dict) else None
    if kind in ("fp8_e4m3", "int8") and not group:
        return _unless_skipped(quant, names, 1.0)
    if kind not in ("fp4", "int4", "fp8_e4m3", "int8"):
        raise _unknown(quant)
    scale = 1 if kind.startswith("fp") else 2
    return _unless_skipped(quant, names, _grouped(4 if kind.endswith("4") else 8, group, scale))


def _ascend(quant: Quant, names: ExpertNames) -> float:
    """A table of one type a weight; W8A8 where there is none, which the method's name stands for."""
    types = {str(k): str(v) for k, v in quant.items() if str(k).endswith(".weight") and isinstance(v, str)}
    if types:
        group = quant.get("group_size")
        found = [(k.removesuffix(".weight"), _ascend_bytes(v, group)) for k, v in types.items()]
        return _one_of(found, names, "the table of weights")
    found_bytes = _ascend_bytes(str(quant.get("model_quant_type") or "W8A8"), quant.get("group_size"))
    if found_bytes is None:
        raise _unknown(quant)
    return found_bytes


def _ascend_bytes(kind: str, group: Any) -> float | None:
    if kind == "FLOAT":
        return SIXTEEN_BIT
    known = re.fullmatch(r"W(4|8|16)A(4|8|16)(_DYNAMIC|_MIX|_STATIC|S|_MXFP[48])?", kind)
    if known is None:
        return None
    bits = int(known[1])
    if known[3] and known[3].startswith("_MX"):
        return bits / 8 + 1 / 32
    return _grouped(bits, group, 2) if bits == 4 else bits / 8


def _unknown_method(quant: Quant, names: ExpertNames) -> float:
    raise _unknown(quant)


def _unless_skipped(quant: Quant, names: ExpertNames, size: float) -> float:
    """``size``, or 16 bits where the config leaves the experts out."""
    skipped = [one for key in SKIPPED for one in _listed(quant, key)]
    whole = names.covered(skipped)
    if whole is None:
        raise ModelError("quantization_config leaves some experts in 16 bits and others not", hint=HINT)
    return SIXTEEN_BIT if whole else size


def _listed(quant: Quant, key: str) -> list[str]:
    value = quant.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _unknown({key: value})
    return [str(one) for one in value]


def _table(quant: Quant, key: str) -> dict[str, Any]:
    value = quant.get(key) or {}
    if not isinstance(value, dict):
        raise _unknown({key: value})
    return value


def _grouped(bits: Any, group: Any, scale: int, *, zero: bool = False) -> float:
    """Bytes of a weight of so many bits, with one scale (and one zero point of as many bits) for a group of weights."""
    if bits not in (2, 3, 4, 8) or isinstance(bits, bool):
        raise _unknown(f"weights of {str(bits)[:60]} bits")
    if group is None or group == -1 or group == 0:
        return bits / 8
    return bits / 8 + (scale + (bits / 8 if zero else 0)) / _size(group, "group_size")


def _size(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**24:
        raise _unknown({name: value})
    return value


def _unknown(what: object) -> ModelError:
    return ModelError(f"the size of the expert weights is not known from {str(what)[:160]}", hint=HINT)


METHODS: dict[str, Callable[[Quant, ExpertNames], float]] = {
    "fp8": _fp8, "gptq": _integers, "gptq-marlin": _integers, "awq": _integers, "awq-marlin": _integers,
    "moe-wna16": _integers, "auto-round": _auto_round, "intel/auto-round": _auto_round,
    "bitsandbytes": _bitsandbytes, "modelopt": _modelopt, "modelopt-fp4": _modelopt, "modelopt-fp8": _modelopt,
    "modelopt-mixed": _modelopt, "modelopt-mxfp8": _modelopt, "compressed-tensors": _compressed, "quark": _quark,
    "ascend": _ascend, **{name.replace("_", "-"): _simple for name in SIMPLE},
}  # fmt: skip
"""By ``quant_method``."""
