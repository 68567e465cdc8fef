"""The model's shape: what an expert weighs, what a token costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.machine.hfconfig.beside import with_quantization
from poise.machine.hfconfig.cached import cached_config, is_model_id
from poise.machine.hfconfig.fields import number
from poise.machine.hfconfig.names import ExpertNames
from poise.machine.hfconfig.read import read_sizes, text_part
from poise.machine.hfconfig.rest import read_rest
from poise.machine.hfconfig.weights import SIXTEEN_BIT, sends_fp8, weight_bytes
from poise.machine.presets import MODELS
from poise.util.errors import ModelError
from poise.util.jsonfile import read_json
from poise.util.words import closest

MAX_CONFIG_BYTES = 2**22
REST_SIZES = (
    "shared_expert_size", "dense_intermediate_size", "vocab_size", "attention_parameters", "score_size",
    "cached_score_size",
)  # fmt: skip


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
    groups_per_token : of those, how many the router takes the experts of a token from; 0: not known.
    num_zero_experts : identity experts, ids from E on, which return a token as it is and compute nothing (LongCat).
    expert_hidden_size : width of what experts take and give, and of what is sent to them, where it is narrower than the
        residual stream (latent experts: Nemotron-H, Kimi-K3); 0: ``hidden_size``.
    expert_bias_parameters : parameters of one expert beside its matrices (gpt-oss), 16-bit whatever the weights are.
    shared_expert_size, dense_intermediate_size, vocab_size, attention_parameters, score_size, cached_score_size : what
        the rest of a step is priced by (:mod:`poise.cost.rest`): summed inner width of an MoE layer's shared experts,
        inner width of a dense layer, entries of the output head, parameters of a layer's attention, and summed widths
        of the keys and values of all heads, of new tokens and in the cache. 0: none, or the config does not say.
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
    expert_hidden_size: int = 0
    expert_bias_parameters: int = 0
    shared_expert_size: int = 0
    dense_intermediate_size: int = 0
    vocab_size: int = 0
    attention_parameters: int = 0
    score_size: int = 0
    cached_score_size: int = 0
    groups_per_token: int = 0

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
        for attr in (
            "num_zero_experts",
            "groups_per_token",
            "expert_hidden_size",
            "expert_bias_parameters",
            *REST_SIZES,
        ):
            if not 0 <= getattr(self, attr) < float("inf"):
                raise ModelError(f"{attr} must be finite and at least 0, got {getattr(self, attr)!r}")
        ids = self.moe_layer_ids
        if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= self.num_hidden_layers:
            raise ModelError(f"moe_layer_ids must ascend within 0..{self.num_hidden_layers - 1}, got {ids}")

    @property
    def num_moe_layers(self) -> int:
        """L."""
        return len(self.moe_layer_ids)

    @property
    def expert_width(self) -> int:
        """Width of what an expert takes and gives: ``expert_hidden_size``, or else ``hidden_size``."""
        return self.expert_hidden_size or self.hidden_size

    @property
    def expert_matrix_parameters(self) -> int:
        """Parameters of one expert's matrices."""
        return self.num_expert_matrices * self.expert_width * self.expert_intermediate_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return self.expert_matrix_parameters + self.expert_bias_parameters

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights."""
        return self.expert_matrix_parameters * self.weight_bytes + 2.0 * self.expert_bias_parameters

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs of one token in one expert."""
        return 2.0 * self.expert_matrix_parameters

    @property
    def dispatch_bytes_per_token(self) -> float:
        """Bytes of one token's hidden state on its way to an expert."""
        return self.expert_width * self.dispatch_bytes

    @property
    def combine_bytes_per_token(self) -> float:
        """Bytes of one token's expert output on its way back."""
        return self.expert_width * self.combine_bytes

    def matches(self, *, num_experts: int, layer_ids: NDArray[Any]) -> None:
        """Raise ModelError unless traffic with these experts and decoder layers can come from this model."""
        if num_experts != self.num_experts:
            both = self.num_zero_experts and num_experts == self.num_experts + self.num_zero_experts
            raise ModelError(
                f"the traffic has {num_experts} experts, {self.name} has {self.num_experts}"
                + f" and {self.num_zero_experts} identity experts" * bool(both),
                hint="'poise convert --model' takes identity experts out" if both else "check --model",
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
        """A preset name (:mod:`poise.machine.presets`), a Hugging Face ``config.json`` or the folder it lies in, or
        the id of a model, ``org/name``, in Hugging Face's cache (:mod:`poise.machine.hfconfig.cached`).

        How weights are quantised may also stand in a file beside it (:mod:`poise.machine.hfconfig.beside`).

        Raises
        ------
        ModelError : unknown preset, unreadable file, an id that is not in the cache, or a config that is not of an MoE
            model.
        """
        if spec in MODELS:
            return from_hf_config(dict(MODELS[spec]), name=spec)
        path, named = Path(spec), ""
        try:
            folder = bool(spec) and path.is_dir()
        except OSError as error:  # a name too long
            raise ModelError(f"cannot read {spec[:200]!r}: {error.strerror}") from None
        if folder:
            path = path / "config.json"
        elif not spec.endswith(".json"):
            if not is_model_id(spec):
                close = closest(spec, MODELS)
                hint = f"did you mean {close}?" if close else f"a config.json, or one of {', '.join(MODELS)}"
                raise ModelError(f"unknown model {spec[:200]!r}", hint=hint)
            named, path = spec, cached_config(spec, MODELS)
        data = read_json(path, MAX_CONFIG_BYTES, ModelError, infinite=True)
        if path.name == "config.json" and isinstance(data, dict):
            data = with_quantization(data, path.parent)
        return from_hf_config(data, name=named or path.parent.name or path.name)


def from_hf_config(config: dict[str, Any], *, name: str) -> ModelSpec:
    """Sizes from a Hugging Face config, by the rules of its family (docs/models.md lists them).

    Of a config with several parts the language model is read (``text_config``, ``thinker_config``, ``llm_config``).
    A family that poise does not know is read by the keys that most families share, and refused where it has others
    that could change the answer. Weights count 2 bytes unless ``quantization_config`` says otherwise, whatever type
    the checkpoint is stored in. ``poise_matrices`` (2 or 3) overrides how many matrices an expert has.

    Raises
    ------
    ModelError : it is no object, a size is missing, of the wrong type or contradicted by another key, no layer is an
        MoE layer, the family has no one set of experts a layer, or the quantization is not known.
    """
    if not isinstance(config, dict):
        raise ModelError(f"{name} is not a model config: it holds a {type(config).__name__}")
    config = text_part(config)
    sizes = read_sizes(config)
    names = ExpertNames(sizes.moe, sizes.experts, sizes.matrices)
    weight = weight_bytes(config, names)
    rest = read_rest(config, sizes)
    return ModelSpec(
        name, sizes.layers, sizes.moe, sizes.experts, sizes.top_k, sizes.hidden, sizes.inner, sizes.matrices, weight,
        1.0 if sends_fp8(config) and weight < SIXTEEN_BIT else 2.0, 2.0, _kv_bytes(config, sizes.hidden),
        _expert_groups(config), sizes.zeros, sizes.expert_hidden, sizes.bias, rest.shared, rest.dense, rest.vocabulary,
        rest.attention, rest.score, rest.cached_score, _groups_per_token(config),
    )  # fmt: skip


def _kv_bytes(config: dict[str, Any], hidden: int) -> float:
    """Key/value cache bytes per token of a layer with attention, 16 bits an element."""
    heads = number(config, "num_attention_heads", "n_heads", default=1) or 1
    kv_heads = number(
        config, "num_key_value_heads", "num_attention_groups", "attn_config.kv_n_heads", default=heads
    )  # fmt: skip
    if config.get("kv_lora_rank"):
        return 2.0 * (number(config, "kv_lora_rank") + number(config, "qk_rope_head_dim", default=64))
    if config.get("attention_kv_lora_dim"):  # Pangu Ultra
        return 2.0 * (number(config, "attention_kv_lora_dim") + number(config, "attention_qk_rope_dim", default=64))
    return 2.0 * 2 * kv_heads * number(config, "head_dim", default=hidden // heads)


def _expert_groups(config: dict[str, Any]) -> int:
    """Routing groups; 1 where the router chooses among the experts of all groups."""
    groups = number(config, "n_group", "num_expert_group", default=1) or 1
    chosen = number(config, "topk_group", default=0)
    return 1 if chosen >= groups or config.get("topk_method") == "greedy" else groups


def _groups_per_token(config: dict[str, Any]) -> int:
    """Groups of a token where they limit it, else 0."""
    return number(config, "topk_group", default=0) if _expert_groups(config) > 1 else 0
