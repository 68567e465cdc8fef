"""The model's shape: what an expert weighs, what a token costs."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.errors import ModelError
from poise.jsonfile import read_json
from poise.presets import MODELS

MAX_CONFIG_BYTES = 2**22
QUANTIZED_BYTES = {"fp8": 1.0, "fbgemm_fp8": 1.0, "mxfp4": 17 / 32}
"""Bytes a weight; MXFP4 has one 8-bit scale for 32 weights. FP8 scales (one for 128 x 128 weights) are left out."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of one MoE model.

    Parameters
    ----------
    name : preset or config it came from.
    num_hidden_layers : decoder layers, dense ones included.
    moe_layer_ids : which of them are MoE layers, ascending; L = len(moe_layer_ids).
    num_experts, top_k : E routed experts, K chosen per token.
    hidden_size : width of the residual stream.
    expert_intermediate_size : inner width of one expert.
    num_expert_matrices : 3 for gated experts (gate, up, down), 2 for plain ones.
    weight_bytes : bytes per expert parameter.
    dispatch_bytes, combine_bytes : bytes per activation element on the way out and back (FP8 dispatch: 1 and 2).
    kv_bytes_per_token_layer : key/value cache bytes per token and layer (for ``stay`` traffic and for
        pricing redundant slots).
    num_expert_groups : routing groups that limit which experts a token may take together (DeepSeek), 1 if none do.
    num_zero_experts : identity experts, ids from E on, which return a token as it is and compute nothing (LongCat).
    """

    name: str
    num_hidden_layers: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_intermediate_size: int
    num_expert_matrices: int = 3
    weight_bytes: float = 2.0
    dispatch_bytes: float = 2.0
    combine_bytes: float = 2.0
    kv_bytes_per_token_layer: float = 0.0
    num_expert_groups: int = 1
    num_zero_experts: int = 0

    def __post_init__(self) -> None:
        for attr in (
            "num_hidden_layers",
            "num_experts",
            "top_k",
            "hidden_size",
            "expert_intermediate_size",
            "num_expert_matrices",
            "weight_bytes",
            "dispatch_bytes",
            "combine_bytes",
            "num_expert_groups",
        ):
            if not 0 < getattr(self, attr) < float("inf"):
                raise ModelError(f"{attr} must be finite and above 0, got {getattr(self, attr)!r}")
        if self.top_k > self.num_experts:
            raise ModelError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if not 0 <= self.kv_bytes_per_token_layer < float("inf"):
            raise ModelError(
                f"kv_bytes_per_token_layer must be finite and at least 0, got {self.kv_bytes_per_token_layer!r}"
            )
        if not 0 <= self.num_zero_experts < float("inf"):
            raise ModelError(f"num_zero_experts must be finite and at least 0, got {self.num_zero_experts!r}")
        ids = self.moe_layer_ids
        if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= self.num_hidden_layers:
            raise ModelError(f"moe_layer_ids must ascend within 0..{self.num_hidden_layers - 1}, got {ids}")

    @property
    def num_moe_layers(self) -> int:
        """L."""
        return len(self.moe_layer_ids)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return self.num_expert_matrices * self.hidden_size * self.expert_intermediate_size

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights."""
        return self.expert_parameters * self.weight_bytes

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs of one token in one expert."""
        return 2.0 * self.expert_parameters

    @property
    def dispatch_bytes_per_token(self) -> float:
        """Bytes of one token's hidden state on its way to an expert."""
        return self.hidden_size * self.dispatch_bytes

    @property
    def combine_bytes_per_token(self) -> float:
        """Bytes of one token's expert output on its way back."""
        return self.hidden_size * self.combine_bytes

    def matches(self, *, num_experts: int, layer_ids: NDArray[Any]) -> None:
        """Raise ModelError unless traffic with these experts and decoder layers can come from this model."""
        if num_experts != self.num_experts:
            raise ModelError(
                f"the traffic has {num_experts} experts, {self.name} has {self.num_experts}", hint="check --model"
            )
        if int(np.max(layer_ids)) >= self.num_hidden_layers:
            raise ModelError(f"the traffic reaches layer {np.max(layer_ids)}, {self.name} has {self.num_hidden_layers}")

    @classmethod
    def generic(cls, num_experts: int, top_k: int, layer_ids: NDArray[Any]) -> ModelSpec:
        """Sizes for when no model is named: hidden 2048, expert 1024, bfloat16. Ratios hold, seconds do not."""
        ids = tuple(int(i) for i in layer_ids)
        return cls("generic", max(ids) + 1, ids, num_experts, top_k, 2048, 1024, kv_bytes_per_token_layer=2048.0)

    @classmethod
    def parse(cls, spec: str) -> ModelSpec:
        """A preset name (:mod:`poise.presets`), or a Hugging Face ``config.json`` or the folder it lies in.

        Raises
        ------
        ModelError : unknown preset, unreadable file, or a config that is not of an MoE model.
        """
        if spec in MODELS:
            return from_hf_config(dict(MODELS[spec]), name=spec)
        path = Path(spec)
        try:
            folder = bool(spec) and path.is_dir()
        except OSError as error:  # a name too long
            raise ModelError(f"cannot read {spec[:200]!r}: {error.strerror}") from None
        if folder:
            path = path / "config.json"
        elif not spec.endswith(".json"):
            close = difflib.get_close_matches(spec, MODELS, 1)
            hint = f"did you mean {close[0]}?" if close else f"a config.json, or one of {', '.join(MODELS)}"
            raise ModelError(f"unknown model {spec[:200]!r}", hint=hint)
        data = read_json(path, MAX_CONFIG_BYTES, ModelError)
        if not isinstance(data, dict):
            raise ModelError(f"{path} is not a model config: it holds a {type(data).__name__}")
        return from_hf_config(data, name=path.parent.name or path.name)


def _field(config: dict[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**7:
                raise ModelError(f"{name} must be a whole number, got {value!r}")
            return value
    if default is None:
        raise ModelError(f"the config has none of {', '.join(names)}", hint="is it a Mixture-of-Experts model?")
    return default


def from_hf_config(config: dict[str, Any], *, name: str) -> ModelSpec:
    """Sizes from a Hugging Face config of the Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek, Kimi, gpt-oss or Llama-4 kind.

    Weights count 2 bytes unless ``quantization_config`` says otherwise, whatever type the checkpoint is stored in.
    ``poise_matrices`` (2 or 3, default 3) is for experts that are not gated.

    Raises
    ------
    ModelError : a size is missing or of the wrong type, no layer is an MoE layer, or the quantization is not known.
    """
    if isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    layers = _field(config, "num_hidden_layers")
    if not 1 <= layers <= 10_000:
        raise ModelError(f"num_hidden_layers must lie in 1..10000, got {layers}")
    experts = _field(config, "n_routed_experts", "num_local_experts", "num_experts")
    top_k = _field(config, "num_experts_per_tok", "moe_top_k", "experts_per_token")
    hidden = _field(config, "hidden_size")
    kind = str(config.get("model_type", ""))
    inner = _field(
        config, *(("intermediate_size",) if "llama4" in kind else ("moe_intermediate_size", "intermediate_size"))
    )
    moe = _moe_layers(config, layers)
    quant = config.get("quantization_config")
    block_fp8 = isinstance(quant, dict) and quant.get("quant_method") == "fp8"  # activations are sent as FP8 too
    heads = _field(config, "num_attention_heads", default=1) or 1
    kv_heads = _field(config, "num_key_value_heads", default=heads)
    head_dim = _field(config, "head_dim", default=hidden // heads)
    kv = 2.0 * 2 * kv_heads * head_dim
    if config.get("kv_lora_rank"):
        kv = 2.0 * (_field(config, "kv_lora_rank") + _field(config, "qk_rope_head_dim", default=64))
    return ModelSpec(
        name, layers, moe, experts, top_k, hidden, inner, _field(config, "poise_matrices", default=3),
        _weight_bytes(quant), 1.0 if block_fp8 else 2.0, 2.0, kv,
        _expert_groups(config),
    )  # fmt: skip


def _expert_groups(config: dict[str, Any]) -> int:
    """Routing groups; 1 where the router chooses among the experts of all groups."""
    groups = _field(config, "n_group", "num_expert_group", default=1) or 1
    chosen = _field(config, "topk_group", default=0)
    return 1 if chosen >= groups or config.get("topk_method") == "greedy" else groups


def _weight_bytes(quant: Any) -> float:
    """Bytes of one expert weight, scales included, under a ``quantization_config``."""
    if not quant:
        return 2.0
    method = str(quant.get("quant_method", "")) if isinstance(quant, dict) else ""
    if method in QUANTIZED_BYTES:
        return QUANTIZED_BYTES[method]
    formats: list[Any] = []
    if method in ("gptq", "awq"):
        formats = [(quant.get("bits"), quant.get("group_size"))]
    elif method == "compressed-tensors" and isinstance(quant.get("config_groups"), dict):
        groups = [group.get("weights") for group in quant["config_groups"].values() if isinstance(group, dict)]
        formats = [(w.get("num_bits"), w.get("group_size")) for w in groups if isinstance(w, dict)]
    if len(set(map(repr, formats))) == 1:
        bits, group = formats[0]
        if bits in (2, 3, 4, 8) and not isinstance(bits, bool):
            scale = 2.0 / group if isinstance(group, int) and group > 0 else 0.0
            return bits / 8 + scale
    raise ModelError(
        f"the size of the expert weights is not known from quantization_config {str(quant)[:120]}",
        hint="remove quantization_config to price 16-bit weights",
    )


def _layer_list(config: dict[str, Any], name: str) -> list[int] | None:
    """A list of layer numbers, or None where the config has none."""
    value = config.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
        raise ModelError(f"{name} must be a list of whole numbers, got {str(value)[:120]}")
    return value


def _moe_layers(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Which decoder layers are MoE layers, by the rule of the config's family."""
    dense = _field(config, "first_k_dense_replace", default=0)
    only = set(_layer_list(config, "mlp_only_layers") or [])
    listed = _layer_list(config, "moe_layers")
    if listed is not None:
        return tuple(sorted(listed))
    if isinstance(config.get("moe_layer_freq"), list):
        flags = _layer_list(config, "moe_layer_freq") or []
        if len(flags) != layers or not set(flags) <= {0, 1}:
            raise ModelError(f"moe_layer_freq has {len(flags)} entries for {layers} layers, or others than 0 and 1")
        return tuple(i for i, flag in enumerate(flags) if flag)
    every = _field(config, "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", default=1) or 1
    if "moe_layer_freq" in config and "decoder_sparse_step" not in config:
        return tuple(i for i in range(layers) if i >= dense and i % every == 0)
    return tuple(i for i in range(layers) if i >= dense and (i + 1) % every == 0 and i not in only)
