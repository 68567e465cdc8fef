"""What published configurations mean, and which are refused: families that transformers lacks, unknown ones, contradictions."""

import numpy as np
import pytest
from benchmarks.train_memory import Activations
from hypothesis import given, settings
from hypothesis import strategies as st

from poise import ModelSpec
from poise.machine.model import from_hf_config
from poise.machine.presets import MODELS
from poise.util.errors import ModelError

PLAIN = {
    "num_hidden_layers": 6,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
}
K3 = {"model_type": "kimi_k3_text", "num_hidden_layers": 93, "hidden_size": 7168, "num_experts": 896,
      "num_experts_per_token": 16, "moe_intermediate_size": 3072, "intermediate_size": 33792, "first_k_dense_replace": 1,
      "routed_expert_hidden_size": 3584, "kv_lora_rank": 512}  # fmt: skip
PUBLISHED = {
    "arctic": ({"num_hidden_layers": 35, "num_local_experts": 128, "num_experts_per_tok": 2, "hidden_size": 7168,
                "intermediate_size": 4864, "moe_layer_frequency": 2}, 128, 2, range(1, 35, 2), 3 * 7168 * 4864),
    "step3_text": ({"num_hidden_layers": 61, "moe_num_experts": 48, "moe_top_k": 3, "hidden_size": 7168,
                    "intermediate_size": 18432, "moe_intermediate_size": 5120, "num_nextn_predict_layers": 2,
                    "moe_layers_enum": ",".join(map(str, range(4, 63)))}, 48, 3, range(4, 61), 3 * 7168 * 5120),
    "step3p5": ({"num_hidden_layers": 45, "moe_num_experts": 288, "moe_top_k": 8, "hidden_size": 4096,
                 "moe_intermediate_size": 1280}, 288, 8, range(3, 45), 3 * 4096 * 1280),
    "kimi_k3": (K3, 896, 16, range(1, 93), 3 * 3584 * 3072),
    "hunyuan": ({"num_hidden_layers": 64, "num_experts": 16, "moe_topk": 1, "hidden_size": 6400,
                 "intermediate_size": 18304}, 16, 1, range(64), 3 * 6400 * 18304),
    "hunyuan_v1_moe": ({"num_hidden_layers": 4, "num_experts": 64, "moe_topk": [1, 8, 8, 8], "hidden_size": 4096,
                        "intermediate_size": 3072, "moe_intermediate_size": [3072] * 4, "moe_layer_num_skipped": 1},
                       64, 8, range(1, 4), 3 * 4096 * 3072),
    "Grok-1": ({"num_hidden_layers": 64, "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 6144,
                "intermediate_size": 32768, "moe_intermediate_size": 16384, "hidden_act": "gelu"}, 8, 2, range(64),
               3 * 6144 * 16384),
    "nemotron_h": ({"num_hidden_layers": 8, "n_routed_experts": 512, "num_experts_per_tok": 22, "hidden_size": 4096,
                    "moe_intermediate_size": 2688, "moe_latent_size": 1024, "mlp_hidden_act": "relu2",
                    "hybrid_override_pattern": "MEM*EME-"}, 512, 22, (1, 4, 6), 2 * 1024 * 2688),
    "bailing_moe_v2": ({**PLAIN, "first_k_dense_replace": 4, "n_group": 8, "topk_group": 4}, 16, 4, (4, 5), 3 * 64 * 32),
    "minimax_m3_vl": ({"num_hidden_layers": 6, "num_local_experts": 128, "num_experts_per_tok": 4, "hidden_size": 64,
                       "intermediate_size": 24, "dense_intermediate_size": 96, "moe_layer_freq": [0, 0, 0, 1, 1, 1]},
                      128, 4, (3, 4, 5), 3 * 64 * 24),
    "exaone_moe": ({**PLAIN, "intermediate_size": 96, "is_moe_layer": [False] + [True] * 5}, 16, 4, range(1, 6), 3 * 64 * 32),
    "mimo_v2_flash": ({**PLAIN, "moe_layer_freq": [0, 0, 1, 1, 1, 1]}, 16, 4, range(2, 6), 3 * 64 * 32),
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_configs(kind):
    config, experts, top_k, layers, parameters = PUBLISHED[kind]
    spec = from_hf_config({"model_type": kind, **config}, name=kind)
    assert (spec.num_experts, spec.top_k, spec.moe_layer_ids) == (experts, top_k, tuple(layers))
    assert spec.expert_parameters == parameters


def test_latent_experts_are_sent_their_own_width():
    spec = from_hf_config({"model_type": "kimi_k3", "text_config": K3}, name="k3")
    assert (spec.hidden_size, spec.expert_hidden_size, spec.expert_width) == (7168, 3584, 3584)
    assert (spec.dispatch_bytes_per_token, spec.combine_bytes_per_token) == (3584 * 2, 3584 * 2)
    assert spec.flops_per_token == 2 * spec.expert_parameters
    wide = from_hf_config({k: v for k, v in K3.items() if k != "routed_expert_hidden_size"}, name="k3")
    assert wide.expert_hidden_size == 0 and wide.expert_parameters == 2 * spec.expert_parameters
    fewer = Activations().per_token(wide, 1.0) - Activations().per_token(spec, 1.0)
    assert fewer == 92 * 16 * 2 * 2 * (7168 - 3584)


def test_biases_are_16_bit_whatever_the_weights_are():
    sizes = {
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "intermediate_size": 32,
    }
    spec = from_hf_config(
        {"model_type": "gpt_oss", **sizes, "quantization_config": {"quant_method": "mxfp4"}}, name="x"
    )
    assert spec.expert_bytes == 3 * 64 * 32 * 17 / 32 + 2 * (2 * 32 + 64) and spec.flops_per_token == 2 * 3 * 64 * 32


def test_identity_experts():
    config = {"model_type": "longcat_flash", "num_layers": 4, "num_hidden_layers": 8, "hidden_size": 64, "moe_topk": 3,
              "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "n_routed_experts": 16, "zero_expert_num": 8}  # fmt: skip
    spec = from_hf_config(config, name="x")
    assert (spec.num_experts, spec.num_zero_experts, spec.num_hidden_layers) == (16, 8, 4)
    with pytest.raises(ModelError, match="num_zero_experts"):
        ModelSpec("x", 1, (0,), 4, 2, 8, 8, num_zero_experts=-1)


@pytest.mark.parametrize("around", ["text_config", "llm_config", "language_config", "thinker_config"])
def test_nested_configs(around):
    """The language model's; its empty keys hide nothing, and a speech model beside it is not read."""
    quant = {"quant_method": "fp8"}
    inner = {**PLAIN, "model_type": "qwen3_moe", "decoder_sparse_step": 2, "quantization_config": None}
    talker = {"text_config": {**PLAIN, "num_experts": 99}}
    spec = from_hf_config(
        {around: inner, "quantization_config": quant, "talker_config": talker, "model_type": "a"}, name="x"
    )
    assert (spec.moe_layer_ids, spec.num_experts, spec.weight_bytes) == ((1, 3, 5), 16, 1.0)
    deep = from_hf_config({"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": PLAIN}}, name="x")
    assert deep.num_experts == 16
    with pytest.raises(ModelError, match="both have experts"):
        from_hf_config({around: inner, "language_model_config": PLAIN}, name="x")
    with pytest.raises(ModelError, match="differ"):
        from_hf_config(
            {around: {**PLAIN, "quantization_config": {"quant_method": "awq"}}, "quantization_config": quant}, name="x"
        )


@pytest.mark.parametrize("kind", [None, "qwen2_moe", "qwen3_moe", "brand_new_moe"])
def test_every_0_th_layer_is_none(kind):
    with pytest.raises(ModelError, match="decoder_sparse_step is 0"):
        from_hf_config({**PLAIN, "model_type": kind, "decoder_sparse_step": 0}, name="x")


@pytest.mark.parametrize("config", [[], [1], "x", None, 3])
def test_a_config_that_is_no_object(config):
    with pytest.raises(ModelError, match="x is not a model config: it holds a"):
        from_hf_config(config, name="x")


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        ({}, range(6)), ({"first_k_dense_replace": 2}, range(2, 6)), ({"num_dense_layers": 1}, range(1, 6)),
        ({"moe_layer_freq": 1}, range(6)), ({"moe_layer_freq": [0, 1] * 3}, (1, 3, 5)),
        ({"mlp_layer_types": ["dense", "sparse"] * 3}, (1, 3, 5)), ({"decoder_sparse_step": 3}, (2, 5)),
        ({"mlp_only_layers": [0, 4]}, (1, 2, 3, 5)), ({"moe_layers": [1, 3]}, (1, 3)), ({"moe_layers_enum": "2, 4"}, (2, 4)),
        ({"is_moe_layer": [0, 0, 1, 1, 1, 1], "first_k_dense_replace": 2}, range(2, 6)),
        ({"dense_intermediate_size": 99, "intermediate_size": 99}, range(6)),
        ({"layer_types": ["full_attention"] * 6, "sliding_window_pattern": 3, "rope_interleave": True}, range(6)),
        ({"num_shared_experts": 2, "n_shared_experts": 2, "shared_expert_intermediate_size": 9, "router_aux_loss_coef": 0.1,
          "norm_topk_prob": True, "moe_router_dtype": "fp32", "use_expert_bias": True, "output_router_logits": False,
          "routed_scaling_factor": 2.5, "num_local_experts": 16, "moe_capacity_factor": 1.5}, range(6)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [None, "brand_new_moe"])
def test_unknown_families_are_read_by_plain_keys(kind, change, layers):
    spec = from_hf_config({**PLAIN, "model_type": kind, **change}, name="x")
    assert (spec.moe_layer_ids, spec.expert_parameters) == (tuple(layers), 3 * 64 * 32)


@pytest.mark.parametrize(
    "change",
    [
        {"hybrid_override_pattern": "ME*EME"}, {"layers_block_type": ["mamba", "moe"] * 3}, {"expert_layer_period": 2},
        {"layer_types": ["attention", "moe"] * 3}, {"moe_layer_frequency": 2}, {"moe_layer_freq": 2}, {"moe_every_n_layer": 2},
        {"moe_latent_size": 16}, {"routed_expert_hidden_size": 16}, {"zero_expert_num": 4}, {"num_null_experts": 4},
        {"n_dense_first_layers": 1}, {"moe_intermediate_size": None, "intermediate_size": 8, "dense_intermediate_size": 99}, {"moe_inter_dim": 16}, {"num_sparse_encoder_layers": 3},
        {"expert_intermediate_size": 24}, {"moe_layer_start_index": 1}, {"moe_config": {"experts": 3}},
        {"num_local_experts": 8}, {"n_routed_experts": 4}, {"moe_topk": 2}, {"num_experts_per_tok": [4, 4, 4, 4, 4, 2]},
        {"num_experts_per_tok": [4, 4]}, {"num_experts": [16, 16]}, {"hidden_act": "relu2"},
        {"first_k_dense_replace": 1, "mlp_only_layers": [3]}, {"mlp_layer_types": ["dense"]}, {"mlp_layer_types": ["odd"] * 6},
        {"block_configs": [{"num_experts": 8}]}, {"num_experts": 1}, {"num_experts": 0}, {"is_moe_layer": [2] * 6}, {"moe_layers": [9]}, {"parallel_expert_intermediate_size": 8}, {"use_moe": False}, {"poise_matrices": True},
        {"moe_intermediate_size": None, "first_k_dense_replace": 1, "intermediate_size": 96}, {"moe_layers_enum": "1,x"},
    ],
)  # fmt: skip
def test_unknown_families_with_keys_that_could_change_the_answer_are_refused(change):
    with pytest.raises(ModelError) as caught:
        from_hf_config({**PLAIN, "model_type": "brand_new_moe", **change}, name="x")
    assert list(change)[-1].removeprefix("poise_") in str(caught.value) and (
        caught.value.hint or "moe_layers" in change
    )


def test_the_way_out_of_an_activation_that_may_have_no_gate():
    spec = from_hf_config(
        {**PLAIN, "model_type": "brand_new_moe", "hidden_act": "relu2", "poise_matrices": 2}, name="x"
    )
    assert spec.expert_parameters == 2 * 64 * 32


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("qwen3_moe", {"first_k_dense_replace": 3}, "first_k_dense_replace"),
        ("glm4_moe_lite", {"first_k_dense_replace": 3}, "first_k_dense_replace"),
        ("qwen3_moe", {"num_local_experts": 99}, "num_local_experts"), ("deepseek_v3", {"moe_topk": 3}, "moe_topk"),
        ("mixtral", {"moe_latent_size": 16, "intermediate_size": 8}, "moe_latent_size"),
        ("hunyuan", {"intermediate_size": 99}, "intermediate_size"), ("kimi_k2", {}, "first_k_dense_replace"),
        ("gemma4", {}, "enable_moe_block"), ("deepseek_v3", {"moe_intermediate_size": None, "intermediate_size": 9}, "moe_int"),
        ("gpt_oss", {"block_configs": [{}]}, "block_configs"), ("jamba", {"num_experts": 1}, "num_experts is 1"),
        ("granitemoehybrid", {"num_experts": 0}, "num_experts is 0"), ("jetmoe", {}, "attention"), ("ernie4_5_moe_vl", {}, "images"), ("switch_transformers", {}, "decoder"),
        ("phimoe", {"intermediate_size": 8}, "num_experts_per_tok is 4, routers of phimoe choose 2"),
        ("nemotron_h", {"hybrid_override_pattern": "ME|EME"}, "hybrid_override_pattern"), ("nemotron_h", {}, "hybrid_override"),
        ("nemotron_h", {"hybrid_override_pattern": "ME*EME*"}, "7 entries"), ("deepseek_v3", {"first_k_dense_replace": 9}, "no layer"),
        ("nemotron_h", {"hybrid_override_pattern": "ME*EME", "layers_block_type": ["moe"] * 6}, "different layers"),
    ],
)  # fmt: skip
def test_known_families_may_not_contradict_themselves(kind, change, named):
    with pytest.raises(ModelError, match=named):
        from_hf_config({**PLAIN, "model_type": kind, **change}, name="x")


def test_configs_under_other_names():
    """Grok-2's ``model_type``, mixers of Granite's layers, and the compressed cache of Pangu Ultra."""
    grok = {**PLAIN, "model_type": "git", "residual_moe": True, "intermediate_size": 99}
    assert from_hf_config(grok, name="x").expert_parameters == 3 * 64 * 32
    mixers = {**PLAIN, "model_type": "granitemoehybrid", "intermediate_size": 32, "layers_block_type": ["mamba"] * 6}
    assert from_hf_config(mixers, name="x").num_moe_layers == 6
    pangu = {**PLAIN, "model_type": "pangu_ultra_moe", "num_dense_layers": 3, "attention_kv_lora_dim": 512,
             "attention_qk_rope_dim": 64, "num_attention_heads": 4}  # fmt: skip
    assert from_hf_config(pangu, name="x").kv_bytes_per_token_layer == 2 * (512 + 64)


def test_loads_of_identity_experts_name_the_command_that_takes_them_out():
    spec = from_hf_config({**PLAIN, "model_type": "longcat_flash", "zero_expert_num": 4, "num_layers": 6}, name="x")
    with pytest.raises(ModelError, match=r"20 experts, x has 16 and 4 identity experts\nhint: 'poise convert --model'"):
        spec.matches(num_experts=20, layer_ids=np.arange(6))
    with pytest.raises(ModelError, match=r"19 experts, x has 16\nhint: check --model"):
        spec.matches(num_experts=19, layer_ids=np.arange(6))


def test_presets_keep_their_sizes():
    """Experts, parameters of one in millions, MoE layers and bytes a weight: as in 0.1."""
    read = {name: ModelSpec.parse(name) for name in MODELS}
    found = {
        n: (s.num_experts, round(s.expert_parameters / 1e6), s.num_moe_layers, s.weight_bytes) for n, s in read.items()
    }
    assert found["deepseek-v3"] == (256, 44, 58, 1.0) and found["kimi-k2"] == (384, 44, 60, 1.0)
    assert found["gpt-oss-120b"] == (128, 25, 36, 17 / 32) and found["llama-4-maverick"] == (128, 126, 24, 2.0)
    assert found["mixtral-8x7b"] == (8, 176, 32, 2.0) and read["bert-moe"].expert_parameters == 2 * 1024 * 2048


KEYS = [*PLAIN, "model_type", "mlp_layer_types", "first_k_dense_replace", "moe_layer_freq", "mlp_only_layers", "text_config",
        "hybrid_override_pattern", "quantization_config", "expert_dtype", "moe_layers", "moe_topk", "ffn_config"]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.sampled_from(["", "ME", "3,4", "dense", "mixtral", "nemotron_h", "fp8"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from([*KEYS, "quant_method", "ignore"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_no_config_of_a_stranger_is_anything_but_read_or_refused(change):
    try:
        spec = from_hf_config({**PLAIN, **change}, name="x")
    except ModelError:
        return
    assert spec.moe_layer_ids and spec.expert_bytes > 0
