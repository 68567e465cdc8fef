"""Sizes beside the experts against the models that transformers builds, in the families whose keys are the usual ones."""

import re

import pytest
from tests.hfconfig import families

from poise.machine.model import from_hf_config

SAME = (
    "aria", "axk1", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "flint", "gemma4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hy_v3", "jamba", "kimi_linear", "kolibri1", "lfm2_moe", "llama4", "mellum",
    "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "mistral4", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
    "solar_open", "zaya", "deepseek_ocr2", "glm4v_moe", "mistral_large4", "openai_privacy_filter", "qwen3_omni_moe", "qwen3_vl_moe",
    "unlimited_ocr",
)  # fmt: skip
"""Others have gates in their attention, linear attention or widths of their own: what is read of them is near, or 0."""
ATTENTION, SHARED, EXPERTS = "attn|attention", "shared|share_expert", "experts|router|gate.weight|gate.wg|gate_weight"


def counted(model, spec):
    """Parameters of attention of each layer, and widths of shared experts and dense layers, from the modules."""
    layers = {}
    for name, parameter in model.named_parameters():
        found = re.search(r"(?:^|\.)layers\.(\d+)\.(.*)$", name)
        if found and parameter.dim() == 2 and min(parameter.shape) > 1 and not re.search("index|conv|mamba", found[2]):
            layers.setdefault(int(found[1]), []).append((found[2], parameter.numel()))
    wide, moe = spec.num_expert_matrices * spec.hidden_size, set(spec.moe_layer_ids)

    def total(layer, match, leave="-"):
        return sum(n for name, n in layers[layer] if re.search(match, name) and not re.search(leave, name))

    attention = {total(layer, ATTENTION) for layer in layers}
    shared = {total(layer, SHARED) / wide for layer in layers if layer in moe}
    dense = {total(layer, ".", f"{ATTENTION}|{SHARED}|{EXPERTS}") / wide for layer in layers if layer not in moe}
    return attention, shared, dense


@pytest.mark.parametrize("family", SAME)
def test_what_is_read_is_what_the_modules_have(family):
    """Fails if a key of shared or dense widths is read for another, or attention is counted with a matrix too few."""
    config, _, model = families.build(family, families.published(family))
    spec = from_hf_config(config, name=family)
    attention, shared, dense = counted(model, spec)
    assert spec.attention_parameters in attention and shared == {spec.shared_expert_size}
    assert dense <= {spec.dense_intermediate_size} and spec.vocab_size == 61


@pytest.mark.parametrize("listed", [False, True])
def test_shared_experts_may_be_listed_a_layer(listed):
    """As Hunyuan-A13B's config has them; where layers differ, the mean of those that are MoE layers."""
    config = {
        "model_type": "hunyuan_v1_moe", "hidden_size": 64, "num_hidden_layers": 4, "num_experts": 8, "moe_topk": [2] * 4,
        "moe_intermediate_size": [48] * 4, "intermediate_size": 48, "num_shared_expert": [2] * 4 if listed else 2,
    }  # fmt: skip
    assert from_hf_config(config, name="x").shared_expert_size == 96
    assert from_hf_config({**config, "num_shared_expert": [2, 2, 2, 1]}, name="x").shared_expert_size == 84
    assert from_hf_config({**config, "num_shared_expert": [2, 2, 2]}, name="x").shared_expert_size == 0, (
        "of which layers?"
    )
    later = {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "hidden_size": 64, "num_hidden_layers": 4,
             "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "intermediate_size": 48}  # fmt: skip
    for counts in ([0, 1, 1, 1], [1, 1, 1]):
        assert from_hf_config({**later, "n_shared_experts": counts}, name="x").shared_expert_size == 48
