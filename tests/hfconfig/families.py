"""Every MoE causal language model of the installed transformers, on the meta device: what its experts really are."""

import copy
import importlib
import json
import re
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers

from poise.machine.model import from_hf_config
from poise.util.errors import ModelError

EXPERTS = re.compile(r"^class \w*(Experts|TopKRouter|TopkRouter|SparseMoe|MoeBlock|MoE)\w*\(|self\.experts\b", re.M)
TEXT_MODELS = {
    "deepseek_ocr2": "DeepseekOcr2TextModel", "diffusion_gemma": "DiffusionGemmaEncoderTextModel",
    "glm4v_moe": "Glm4vMoeTextModel", "glm5_next": "Glm5NextTextModel", "mistral_large4": "MistralLarge4TextModel",
    "muse_spark": "MuseSparkTextModel", "openai_privacy_filter": "OpenAIPrivacyFilterModel",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel", "qwen3_vl_moe": "Qwen3VLMoeTextModel",
    "step3p7": "Step3p7TextModel", "unlimited_ocr": "UnlimitedOcrTextModel",
}  # fmt: skip
"""Families without a causal language model of their own: their experts are in a model of text within another."""
LAYERS = 7
WORDS = ["dense", "sparse", "dense", "sparse", "sparse", "dense", "sparse"]
ATTENTION = ["linear_attention", "full_attention"] * 3 + ["full_attention"]
# every number is another one, so that a wrong key shows
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 8,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "num_experts_per_tok": 3, "n_shared_experts": 1, "num_shared_experts": 1, "shared_expert_intermediate_size": 20,
    "shared_intermediate_size": 20, "moe_shared_expert_intermediate_size": 20, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "max_position_embeddings": 128, "first_k_dense_replace": 2, "num_dense_layers": 3, "mlp_only_layers": [3],
    "decoder_sparse_step": 2, "expert_layer_period": 3, "expert_layer_offset": 1, "moe_layer_start_index": 1,
    "moe_layer_end_index": 5, "moe_layer_interval": 2, "interleave_moe_layer_step": 3, "mlp_layer_types": WORDS,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_expand": 2, "mamba_d_conv": 2, "mamba_dt_rank": 4, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "ssm_state_size": 8, "n_groups": 1, "conv_kernel": 2, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLA = {"num_key_value_heads": 4}
PARTICULAR = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), MLA),
    "dots3_note": {**MLA, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
                   "swa_kv_lora_rank": 12, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "mistral4": {**MLA, "head_dim": 16},
    "bailing_hybrid": {**MLA, "layer_types": ATTENTION},
    "kimi_linear": {**MLA, "layer_types": ATTENTION, "linear_head_dim": 8, "linear_num_heads": 2},
    "granitemoehybrid": {"layer_types": ATTENTION}, "qwen3_next": {"layer_types": ATTENTION},
    "qwen3_5_moe": {"layer_types": ATTENTION},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 5},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3 + ["conv"]},
    "gemma4": {"enable_moe_block": True, "top_k_experts": 3, "vocab_size_per_layer_input": 61, "global_head_dim": 8,
               "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention"] * 6 + ["full_attention"]},
    "doge": {"is_moe": True, "num_experts": 16},
    "phimoe": {"num_experts_per_tok": 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "qwen4_exp": {"layer_types": ATTENTION, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                  "indexer_budget": 64, "indexer_compress_ratio": 4},
    "longcat_flash": {**MLA, "num_layers": 4, "num_hidden_layers": None, "ffn_hidden_size": 40, "moe_topk": 3,
                      "intermediate_size": None, "expert_ffn_hidden_size": 24, "zero_expert_num": 4},
    "nemotron_h": {"num_hidden_layers": None, "moe_latent_size": 16, "hybrid_override_pattern": "ME*E-ME"},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 5, "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24,
             "moe_num_experts": 8, "moe_top_k": 3}, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "cohere2_moe": {"prefix_dense_intermediate_size": 44},
    "minimax_m3_vl": {"dense_intermediate_size": 44},
}  # fmt: skip
"""What a family needs beside, or instead of, those numbers; None: not that one."""
FIRST = {"first_k_dense_replace": 2}
FIRST_BY_THREES = {**FIRST, "moe_layer_freq": 3}
NO_KEY: dict = {}
OLD_KEYS = {
    **dict.fromkeys(("axk1", "axk2", "dots3_note"), FIRST_BY_THREES),
    **dict.fromkeys(("bailing_hybrid", "cohere2_moe", "deepseek_v32", "exaone_moe", "glm_moe_dsa", "kimi_linear"),
                    FIRST),
    "minimax_m3_vl": {"moe_layer_freq": [0, 1, 0, 1, 1, 0, 1]}, 
    "inkling": {"dense_mlp_idx": 2, "moe_intermediate_size": None, "intermediate_size": 24, "dense_intermediate_size": 44},
    "llama4": {"moe_layers": [0, 4]}, "ernie4_5_moe": {"moe_layer_end_index": -1, "moe_layer_interval": 1},
    "flint": {"mlp_only_layers": None}, "nemotron_h": {"hybrid_override_pattern": None, "moe_latent_size": None,
    "layers_block_type": ["mamba", "moe", "attention", "moe", "moe", "mlp"]},
    **dict.fromkeys(("beam", "deepseek_v4", "glm4_moe_lite", "hy_v3", "hy_v4", "laguna", "mellum", "mimo_v2_flash"), NO_KEY),
}  # fmt: skip
"""Families whose published configs say it otherwise than transformers saves it, or say nothing: without the list of words."""
DEFAULTS = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "gemma4": {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "doge": {"is_moe": True, "num_experts": 256}, "lfm2_moe": {"layer_types": ["conv"] * 13 + ["full_attention"]},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "qwen4_exp": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64,
                  "indexer_compress_ratio": 4},
    "diffusion_gemma": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "deepseek_ocr2": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense"] + ["sparse"] * 13},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"] * 3},
}  # fmt: skip
"""What a default configuration lacks before transformers can build the model, or before it has experts."""


@dataclass(frozen=True)
class Truth:
    """Of a model: what :class:`poise.ModelSpec` should say."""

    num_experts: int
    top_k: int
    moe_layer_ids: tuple[int, ...]
    expert_parameters: int
    num_zero_experts: int


@cache
def names() -> dict[str, tuple[str, str]]:
    """Module and class by family: those whose file has experts or a router, and a causal language model."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text("utf-8")
        causal = re.search(r"^class (\w*ForCausalLM\w*)\(", text, re.M)
        if causal and EXPERTS.search(text):
            found[path.parent.name] = (f"transformers.models.{path.parent.name}.{path.stem}", causal[1])
    return found


@cache
def model_class(family: str) -> type:
    """The causal language model of a family; of those in ``TEXT_MODELS`` the part that reads text."""
    transformers.logging.set_verbosity_error()
    at, name = names().get(family) or (f"transformers.models.{family}.modeling_{family}", TEXT_MODELS[family])
    return getattr(importlib.import_module(at), name)


def config_class(family: str) -> tuple[type, type | None]:
    """The class of the language model's config, and of the one around it."""
    whole = model_class(family).config_class
    if family in TEXT_MODELS:
        return typing.get_type_hints(model_class(family)).get("config", whole), None
    base = whole()
    nested = getattr(base, "text_config", None)
    return (type(nested), whole) if nested is not None and "hidden_size" not in base.to_dict() else (whole, None)


def keys_of(family: str) -> tuple[set[str], dict[str, str]]:
    """The keys that a family's config knows, and other names for some of them."""
    kind, _ = config_class(family)
    names = set(kind().to_dict())
    for base in kind.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    return names, dict(getattr(kind, "attribute_map", {}))


def published(family: str, old: bool = False) -> dict:
    """A small config with the keys that a family's published files have; ``old``: those of files from elsewhere."""
    names, other = keys_of(family)
    small = dict(SMALL)
    for key in ("n_routed_experts", "num_local_experts", "moe_num_experts"):
        small[key] = small["num_experts"]
    for key in ("num_experts_per_token", "moe_topk", "moe_k"):
        small[key] = small["num_experts_per_tok"]
    small["num_expert_group"] = 1
    chosen = {key: value for key, value in small.items() if key in names and key not in other}
    chosen |= {
        key: small[value] for key, value in other.items() if value in small and key in names and value not in names
    }
    chosen |= {other[key]: small[key] for key in other if key in small and other[key] not in chosen}
    chosen |= copy.deepcopy(PARTICULAR.get(family, {}))
    if old:
        chosen.pop("mlp_layer_types", None)
        if family not in ("ernie4_5_moe", "llama4", "flint"):
            chosen.pop("first_k_dense_replace", None)
        chosen |= copy.deepcopy(OLD_KEYS[family])
    return {key: value for key, value in chosen.items() if value is not None}


def default(family: str) -> dict:
    """The default configuration, with as much as it needs to have experts, and 14 layers (more take time, and say no more)."""
    names, _ = keys_of(family)
    count = next((key for key in ("num_layers", "n_layers", "num_hidden_layers") if key in names), "")
    given = DEFAULTS.get(family, {})
    return given if family == "nemotron_h" else {count: 14, **given}


def build(family: str, options: dict) -> tuple[dict, object, object]:
    """The config as a dictionary of every key, the config and the model, without memory for its weights."""
    kind, around = config_class(family)
    config = kind(**copy.deepcopy(options))
    made = model_class(family)
    whole = config if around is None else around(text_config=config)
    with torch.device("meta"):
        model = made(whole)
    return json.loads(whole.to_json_string(use_diff=False)), config, model


def kinds(family: str) -> dict[str, dict]:
    """The configurations that a family is tried on: small ones with the keys of published files, and the default."""
    small = {} if family in TEXT_MODELS else {"small": published(family)}
    old = {"older keys": published(family, old=True)} if family in OLD_KEYS else {}
    return {**small, **old, "default": default(family)}


def said(config: dict) -> Truth:
    """What poise reads."""
    spec = from_hf_config(config, name="x")
    return Truth(spec.num_experts, spec.top_k, spec.moe_layer_ids, spec.expert_parameters, spec.num_zero_experts)


@cache
def compare(family: str) -> tuple[list[str], str]:
    """What differs from transformers, in words; and why poise refuses the family, or ""."""
    wrong, refused = [], ""
    for kind, options in kinds(family).items():
        saved, config, model = build(family, options)
        right = truth(model, config)
        raw = {"model_type": type(config).model_type, **options}
        for form, read in (("saved", saved), ("published", raw), ("nested", {"text_config": raw}))[
            : 1 if kind == "default" else 3
        ]:
            try:
                got = said(read)
            except ModelError as error:
                refused = error.message
            else:
                wrong += [] if got == right else [f"{kind}, {form}: {got}, transformers has {right}"]
    return wrong, refused


def truth(model: object, config: object) -> Truth:
    """Counted in the modules and their parameters."""
    found: dict[int, tuple[int, float, int]] = {}
    for name, module in model.named_modules():
        numbers = re.findall(r"\b(\d+)\.", f"{name}.")
        if name.endswith(".experts") and numbers:
            found[int(numbers[0])] = _of_stack(module)
        elif hasattr(module, "down_embed"):  # Doge: an expert is a row of each of two tables
            found[int(numbers[0])] = (
                module.num_experts,
                sum(t.weight.shape[1] for t in (module.down_embed, module.up_embed)),
                0,
            )
    [(experts, parameters, zeros)] = set(found.values())
    routers = [m for n, m in model.named_modules() if hasattr(m, "num_router_classes")]
    zeros += routers[0].num_router_classes - experts if routers else 0
    top_k = {
        m.top_k
        for n, m in model.named_modules()
        if re.search(r"\b\d+\.", n) and isinstance(getattr(m, "top_k", None), int)
    }
    [chosen] = top_k or {getattr(config, "top_k_experts", None) or config.num_experts_per_tok}
    return Truth(experts, chosen, tuple(sorted(found)), int(parameters), zeros)


def _of_stack(module: object) -> tuple[int, float, int]:
    """E, parameters of one expert, identity experts."""
    stacks = [p for _, p in module.named_parameters() if p.dim() == 3]
    if not stacks:  # DBRX: the experts' rows lie below one another
        experts = module.num_experts
        return experts, sum(p.numel() for p in module.parameters()) / experts, 0
    experts = min(p.shape[0] for p in stacks)
    biases = [p for _, p in module.named_parameters() if p.dim() == 2]
    each = sum(p[0].numel() for p in (*stacks, *biases))
    return experts, each, getattr(module, "zero_expert_num", 0)
