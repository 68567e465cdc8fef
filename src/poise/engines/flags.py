"""How each engine is told to balance experts: by its own EPLB, or by a map that poise made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from poise.planning.engine_rules import parse_engine


@dataclass(frozen=True, slots=True)
class EplbSetting:
    """What is to be turned on.

    Parameters
    ----------
    own : by the engine's own EPLB; else by the map that ``poise verdict -o placement.npz`` writes.
    redundant, ranks, experts : R slots a layer in all, EP ranks, E.
    model : as ``poise export --model`` takes it.
    """

    own: bool
    redundant: int
    ranks: int
    experts: int
    model: str


def _vllm(want: EplbSetting) -> tuple[str, ...]:
    plugin = "" if want.own else "POISE_STATIC_MAP=$PWD/placement.npz (with poise installed beside vLLM) and "
    config = json.dumps({"num_redundant_experts": want.redundant})
    return (f"vLLM: {plugin}--enable-expert-parallel --enable-eplb --eplb-config '{config}'",)


def _sglang(want: EplbSetting) -> tuple[str, ...]:
    head = f"SGLang: --ep-size {want.ranks} --ep-num-redundant-experts {want.redundant}"
    if want.own:
        return (f"{head} --enable-eplb",)
    return (*_export("sglang", "experts.json", want), f"{head} --init-expert-location experts.json")


def _tensorrt(want: EplbSetting) -> tuple[str, ...]:
    if want.own:
        slots = want.experts + want.redundant
        return (f"TensorRT-LLM: moe_config: {{load_balancer: {{num_slots: {slots}, layer_updates_per_iter: 2}}}}",)
    return (*_export("tensorrt-llm", "balance.yaml", want), "TensorRT-LLM: moe_config: {load_balancer: balance.yaml}")


def _ascend(want: EplbSetting) -> tuple[str, ...]:
    if want.own:
        config = {"eplb_config": {"dynamic_eplb": True, "num_redundant_experts": want.redundant}}
        return (f"vllm-ascend: DYNAMIC_EPLB=true and --additional-config '{json.dumps(config)}'",)
    static = json.dumps({"eplb_config": {"expert_map_path": "map.json"}})
    return (*_export("vllm-ascend", "map.json", want), f"vllm-ascend: --additional-config '{static}'")


def _export(target: str, file: str, want: EplbSetting) -> tuple[str, ...]:
    return (f"poise export placement.npz --to {target} --model {want.model} -o {file}",)


_FLAGS: dict[str, Callable[[EplbSetting], tuple[str, ...]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "tensorrt-llm": _tensorrt,
    "vllm-ascend": _ascend,
}


def eplb_flags(engine: str, want: EplbSetting) -> tuple[str, ...]:
    """Lines to type, for one engine; for ``any`` of vLLM, SGLang and TensorRT-LLM.

    Raises
    ------
    OptionError : unknown engine.
    """
    parse_engine(engine)
    if engine in _FLAGS:
        return _FLAGS[engine](want)
    if engine in ("any", "none"):
        return tuple(line for name in ("vllm", "sglang", "tensorrt-llm") for line in _FLAGS[name](want))
    return (f"{engine}: poise export placement.npz --to {engine} --model {want.model} (docs/engines.md)",)
