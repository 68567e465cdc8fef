"""The families: which keys each one's own code reads, one row a family. Checked against transformers in the tests."""

from __future__ import annotations

from dataclasses import dataclass

from poise.machine.hfconfig.layers import (
    Rule,
    blocks,
    every,
    first_always_dense,
    first_dense,
    flagged,
    listed,
    periodic,
    span,
    stepped,
    words,
)

EXPERTS = (
    "n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "num_routed_experts",
    "ffn_config.moe_num_experts",
)  # fmt: skip
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts", "num_selected_experts", "ffn_config.moe_top_k",
)  # fmt: skip
LATENT = ("moe_latent_size", "routed_expert_hidden_size", "moe_hidden_size")
ZERO = ("zero_expert_num", "num_zero_experts")
SWITCHES = ("is_moe", "use_moe", "enable_moe_block")
OWN = "moe_intermediate_size"
PLAIN = "intermediate_size"


@dataclass(frozen=True, slots=True)
class Family:
    """What the keys of one family mean.

    Parameters
    ----------
    layers : which layers are MoE layers.
    width : keys of an expert's inner width; the first that is set counts.
    one_width : those keys must agree (readers of the family do not all take the same one).
    inner : an inner width that no key states; 0: a key does.
    matrices : 3 for gated experts, 2 for others.
    biases : every matrix has one.
    latent : key of the width that experts work in, where it is not the hidden size.
    zero : key of the number of identity experts.
    zeros : that number where no key states it.
    chosen : K, where the router's code has it, whatever the config says; 0: the config says.
    count, hidden : keys of the number of layers and of the hidden size.
    switch : key that must be true, or the model is dense.
    """

    layers: Rule
    width: tuple[str, ...] = (OWN,)
    one_width: bool = False
    inner: int = 0
    matrices: int = 3
    biases: bool = False
    latent: str = ""
    zero: str = ""
    zeros: int = 0
    chosen: int = 0
    count: tuple[str, ...] = ("num_hidden_layers",)
    hidden: tuple[str, ...] = ("hidden_size",)
    switch: str = ""


_EVERY = Family(every())
_EVERY_PLAIN = Family(every(), (PLAIN,))
_QWEN = Family(stepped("decoder_sparse_step", "mlp_only_layers"))


def _deepseek(default: int | None) -> Family:
    return Family(first_dense("first_k_dense_replace", default, "moe_layer_freq"))


def _words(fallback: Rule) -> Family:
    return Family(words(fallback))


def _words_dense(default: int) -> Family:
    return _words(first_dense("first_k_dense_replace", default, "moe_layer_freq"))


_STEP = ("moe_layers_enum", "moe_layer_list")
_HUNYUAN = Family(first_dense("moe_layer_num_skipped", 0), (OWN, PLAIN), one_width=True)
_LONGCAT = Family(
    every(), ("expert_ffn_hidden_size", OWN), zero="zero_expert_num", count=("num_layers",)
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    # every layer; the experts' width is the plain one
    "aria": _EVERY_PLAIN, "flex_olmo": _EVERY_PLAIN, "granitemoe": _EVERY_PLAIN, "granitemoe_swa": _EVERY_PLAIN,
    "granitemoehybrid": _EVERY_PLAIN, "granitemoeshared": _EVERY_PLAIN, "minicpm": _EVERY_PLAIN,
    "minimax": _EVERY_PLAIN, "minimax_m1": _EVERY_PLAIN, "minimax_m2": _EVERY_PLAIN, "minimax_text_01": _EVERY_PLAIN,
    "mixtral": _EVERY_PLAIN, "olmoe": _EVERY_PLAIN,
    "phimoe": Family(every(), (PLAIN,), chosen=2),  # its sparse mixer takes the best, and the best of the rest
    "gpt_oss": Family(every(), (PLAIN,), biases=True),
    "openai_privacy_filter": Family(every(), (PLAIN,), biases=True),
    "grok-1": Family(every(), (OWN, PLAIN)), "grok": Family(every(), (OWN, PLAIN)),
    "git": Family(every(), (OWN, PLAIN)),  # what Grok-2's config calls itself
    # every layer; a width of their own
    "diffusion_gemma": _EVERY, "kolibri1": _EVERY, "qwen3_5_moe": _EVERY, "qwen4_exp": _EVERY, "solar_open": _EVERY,
    "inkling2": Family(every(), (OWN, PLAIN)),
    "zaya": Family(every(), zeros=1),  # the router's last class skips the layer
    "gemma4": Family(every(), switch="enable_moe_block"),
    "doge": Family(every(), inner=1, matrices=2, switch="is_moe"),  # an expert is one neuron: a row in, a row out
    "deepseek_v4": Family(words(every()), (OWN, PLAIN)),
    # every n-th, with exceptions by number
    "qwen2_moe": _QWEN, "qwen3_moe": _QWEN, "qwen3_next": _QWEN, "qwen3_omni_moe": _QWEN, "qwen3_vl_moe": _QWEN,
    "flint": Family(stepped("decoder_sparse_step", "mlp_only_layers", dense=(0, 1))),
    "llama4": Family(listed(("moe_layers",), stepped("interleave_moe_layer_step")), (PLAIN,)),
    "arctic": Family(stepped("moe_layer_frequency", default=2), (PLAIN,)),
    "jamba": Family(periodic((2, 1)), (PLAIN,)),
    "ernie4_5_moe": Family(span("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")),
    # the first ones are dense
    "bailing_moe": _deepseek(0), "bailing_moe_linear": _deepseek(0), "bailing_moe_v2": _deepseek(0),
    "deepseek": _deepseek(0), "deepseek_v2": _deepseek(0), "deepseek_v3": _deepseek(3), "dots1": _deepseek(0),
    "glm4_moe": _deepseek(1), "glm4v_moe": _deepseek(1), "kimi_k2": _deepseek(None), "mistral4": _deepseek(0),
    "kimi_k3": Family(
        first_dense("first_k_dense_replace", None, "moe_layer_freq"), latent="routed_expert_hidden_size"
    ),
    "afmoe": Family(first_dense("num_dense_layers", 1)),
    "lfm2_moe": Family(first_dense("num_dense_layers", 2)),
    "pangu_ultra_moe": Family(first_dense("num_dense_layers")),
    "hunyuan": _HUNYUAN, "hunyuan_image_3_moe": _HUNYUAN, "hunyuan_v1_moe": _HUNYUAN,
    # a list of words, or the first ones are dense
    "axk1": _words_dense(1), "axk2": _words_dense(1), "bailing_hybrid": _words_dense(2),
    "deepseek_v32": _words_dense(3), "dots3_note": _words_dense(1), "glm_moe_dsa": _words_dense(3),
    "kimi_linear": _words_dense(1), "mistral_large4": _words_dense(1), "unlimited_ocr": _words_dense(1),
    "cohere2_moe": Family(words(first_dense("first_k_dense_replace", 0)), (PLAIN,)),
    "deepseek_ocr2": _words(first_dense("first_k_dense_replace", None, "moe_layer_freq")),
    "exaone_moe": _words(flagged("is_moe_layer", first_dense("first_k_dense_replace", 1))),
    "beam": _words(first_always_dense(3)), "glm5_next": _words(first_always_dense(3)),
    "glm4_moe_lite": _words(first_always_dense(1)), "hy_v3": _words(first_always_dense(1)),
    "hy_v4": _words(first_always_dense(1)), "laguna": _words(first_always_dense(1)),
    "mimo_v2_flash": _words(flagged("moe_layer_freq", first_always_dense(1))),
    "inkling": _words(first_dense("dense_mlp_idx", 0)),
    "mellum": _words(every()),
    "minimax_m3_vl": Family(words(flagged("moe_layer_freq", every())), (PLAIN,)),
    "muse_spark": Family(words(every()), latent="moe_hidden_size"),
    # a list of numbers
    "step3": _words(listed(_STEP, first_always_dense(1))), "step3_vl": _words(listed(_STEP, first_always_dense(1))),
    "step3p5": _words(listed(_STEP, first_always_dense(3))), "step3p7": _words(listed(_STEP, first_always_dense(3))),
    "step4": _words(listed(_STEP, first_always_dense(1))),
    # names of their own
    "dbrx": Family(every(), ("ffn_config.ffn_hidden_size",), count=("n_layers", "num_hidden_layers"),
                   hidden=("d_model", "hidden_size")),
    "longcat_flash": _LONGCAT, "longcat_flash_ngram": _LONGCAT,
    "nemotron_h": Family(blocks("hybrid_override_pattern", ("layers_block_type", "layer_types")), matrices=2,
                         latent="moe_latent_size"),
}  # fmt: skip
"""By ``model_type``, without ``_text`` at its end."""

REFUSED: dict[str, str] = {
    "jetmoe": "its attention has routed experts of its own, beside those of the MLP, and poise plans one set a layer",
    "ernie4_5_vl_moe": "text and images have experts of their own, of two widths, in every MoE layer",
    "ernie4_5_moe_vl": "text and images have experts of their own, of two widths, in every MoE layer",
    "switch_transformers": "it is an encoder and a decoder, with experts in both",
    "nllb_moe": "it is an encoder and a decoder, with experts in both",
}
"""Families that a :class:`poise.ModelSpec` cannot describe, and why."""


def family_of(model_type: str) -> tuple[str, Family | None]:
    """The family's name and its row; None for a family that poise does not know."""
    name = model_type.lower().removesuffix("_text")
    return name, FAMILIES.get(name)
