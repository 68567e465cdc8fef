"""Bytes of an expert's weight, scales included, in the forms that are published; and files beside config.json."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise import ModelSpec
from poise.machine.hfconfig.names import ExpertNames
from poise.machine.model import from_hf_config
from poise.util.errors import ModelError

MODEL = {"model_type": "deepseek_v3", "num_hidden_layers": 5, "n_routed_experts": 12, "num_experts_per_tok": 2,
         "hidden_size": 64, "moe_intermediate_size": 32, "first_k_dense_replace": 2}  # fmt: skip
LAYERS = (2, 3, 4)
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


def compressed(*groups, **more):
    """A compressed-tensors config of (targets, weights) pairs."""
    named = {f"group_{i}": {"targets": targets, "weights": weights} for i, (targets, weights) in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named, **more}


def everywhere(
    name="model.layers.{}.mlp.experts.{}.{}",
    layers=LAYERS,
    experts=range(12),
    matrices=("gate_proj", "up_proj", "down_proj"),
):
    """The names of expert matrices."""
    return [name.format(layer, e, m) for layer in layers for e in experts for m in matrices]


def mixed(algo="NVFP4", names=None):
    """A modelopt config that names every matrix with its type, dense ones in 8 bits."""
    dense = {"model.layers.0.mlp.up_proj": {"quant_algo": "FP8"}, "model.layers.1.mlp.up_proj": {"quant_algo": "ODD"}}
    experts = {name: {"quant_algo": algo, "group_size": 16} for name in names or everywhere()}
    return {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {**dense, **experts}}


SIZES = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1.0),
    ({"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, 33 / 32),
    ({"quant_method": "fp8", "weight_block_size": [1, 128]}, 1 + 4 / 128),
    ({"quant_method": "fp8", "expert_dtype": "fp4"}, 17 / 32),
    ({"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "mlp.gate", "model.layers.0.mlp", "self_attn"]}, 1.0),
    ({"quant_method": "fp8", "modules_to_not_convert": ["mlp.experts"]}, 2.0),
    ({"quant_method": "fbgemm_fp8"}, 1.0), ({"quant_method": "w8a8_int8"}, 1.0),
    ({"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}, 1.0), ({"quant_method": "mxfp8"}, 33 / 32),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}, 17 / 32),
    ({"quant_method": "w4afp8"}, 0.5 + 2 / 128),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128), ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1.0),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*mlp\\.gate": {}, "-:.*shared_expert.*": {}}}, 0.5 + 2.5 / 128),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*experts.*": {}}}, 2.0),
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, 0.5 + 2.5 / 64),
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False}, 0.5 + 2 / 64),
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": ["gate", "experts"]}, 2.0),
    ({"quant_method": "auto-round", "bits": 4, "group_size": 128, "extra_config": {"model.layers.2.mlp.gate": {"bits": 16}}}, 0.5 + 2.5 / 128),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": False}, 0.5625),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 0.5 + 1 / 64 + 1 / 4096),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, 1.0),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, 0.5625),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.0*", "model.layers.*.self_attn*"]}, 0.5625),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*.mlp.experts*"]}, 2.0),
    ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}, 1.0),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ", "group_size": 128}, 0.5 + 2 / 128),
    (mixed(), 0.5625), (mixed("FP8"), 1.0), (mixed(names=["model.layers.2.mlp.shared_experts.up_proj"]), 2.0),
    (mixed(names=everywhere("model.layers.{0}.moe.{2}", experts=[0])), 0.5625),
    (mixed(names=[f"model.layers.{i}.mlp.experts" for i in LAYERS]), 0.5625),
    (compressed((["Linear"], INT4), ignore=["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]), 0.5 + 2 / 32),
    (compressed((["Linear"], {**INT4, "symmetric": False})), 0.5 + 2.5 / 32), (compressed((["Linear"], FLOAT8)), 1.0),
    (compressed((["Linear"], {"num_bits": 8, "type": "int", "strategy": "channel"})), 1.0),
    (compressed((["Linear"], {"num_bits": 4, "type": "float", "group_size": 16}), format="nvfp4-pack-quantized"), 0.5625),
    (compressed((["Linear"], {"num_bits": 4, "type": "float", "group_size": 32}), format="mxfp4-pack-quantized"), 17 / 32),
    (compressed((["Linear"], {"num_bits": 8, "type": "float", "group_size": 32}), format="mxfp8-quantized"), 33 / 32),
    (compressed((["re:.*self_attn.*"], FLOAT8), (["re:.*mlp.experts.*"], INT4)), 0.5 + 2 / 32),
    (compressed((["Linear"], FLOAT8), (["re:.*\\.experts\\.[0-9]+\\..*_proj"], INT4)), 0.5 + 2 / 32),
    (compressed((["re:.*self_attn.*"], FLOAT8)), 2.0), (compressed((["Linear"], INT4), ignore=["re:.*experts.*"]), 2.0),
    (compressed((["Linear"], INT4), ignore=["re:^(?!.*experts).*"]), 0.5 + 2 / 32),
    (compressed((["Linear"], INT4), ignore=everywhere()), 2.0),
    ({"quant_method": "ascend"}, 1.0), ({"quant_method": "ascend", "model_quant_type": "W4A8_DYNAMIC", "group_size": 256}, 0.5 + 2 / 256),
    ({"quant_method": "ascend", "model.layers.0.mlp.up_proj.weight": "FLOAT", **{f"{n}.weight": "W8A8_DYNAMIC" for n in everywhere()}}, 1.0),
    ({"quant_method": "ascend", "model.layers.0.mlp.up_proj.weight": "W8A8", **{f"{n}.weight": "W4A8_DYNAMIC" for n in everywhere()}}, 0.5),
    ({"quant_method": "ascend", "model_quant_type": "W8A8_DYNAMIC", **{f"{n}.weight": "FLOAT" for n in everywhere()}}, 2.0),
    ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}}, "exclude": ["lm_head"]}, 17 / 32),
]  # fmt: skip


@pytest.mark.parametrize(("quant", "size"), SIZES)
def test_bytes_of_a_weight(quant, size):
    assert from_hf_config({**MODEL, "quantization_config": quant}, name="x").weight_bytes == pytest.approx(
        size, rel=1e-12
    )


@pytest.mark.parametrize(
    "quant",
    [
        {"quant_method": "brand_new"}, {"bits": 4}, "fp8", ["fp8"], {"quant_method": "fp8", "expert_dtype": "fp3"},
        {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.3.mlp.experts"]},
        {"quant_method": "fp8", "modules_to_not_convert": everywhere(experts=[5])},
        {"quant_method": "fp8", "modules_to_not_convert": everywhere(matrices=["down_proj"])},
        {"quant_method": "fp8", "modules_to_not_convert": everywhere("model.layers.{0}.moe.{2}", layers=[4])},
        {"quant_method": "fp8", "ignored_layers": "experts"}, {"quant_method": "awq", "bits": 5}, {"quant_method": "awq", "bits": True},
        {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["self_attn.q_proj"]]},
        {"quant_method": "gptq", "bits": 4, "group_size": "x"}, {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*experts.*": {"bits": 8}}},
        {"quant_method": "auto-round", "bits": 4, "extra_config": {".*experts.*": {"bits": 16}}}, {"quant_method": "auto-round", "data_type": "mx_fp"},
        {"quant_method": "modelopt"}, {"quant_method": "modelopt", "quant_algo": "FP3"}, mixed("FP3"), mixed(names=everywhere(layers=[3])),
        {**mixed(), "quantized_layers": {**mixed()["quantized_layers"], "model.layers.3.mlp.experts.4.up_proj": {"quant_algo": "FP8"}}},
        compressed((["Linear"], {**INT4, "num_bits": 6})), compressed((["Linear"], {"num_bits": 4, "type": "float", "group_size": 64})),
        compressed((["re:.*layers.2.mlp.experts.*"], INT4)), compressed((["re:.*experts.*"], INT4), (["re:.*experts.*"], FLOAT8)),
        compressed((["Linear"], INT4), ignore=["re:.*layers\\.4\\..*"]), compressed((["Linear"], INT4), ignore=["re:(a+)+$"]),
        compressed((["Linear"], INT4), ignore=["re:.*a.*a.*a.*a.*a.*a"]), compressed((["Linear"], INT4), ignore=["re:("]),
        compressed((["Linear"], INT4), ignore=[f"re:.*a.*{i}" for i in range(2000)]), compressed((["Linear"], "int4")),
        compressed((["Linear"], INT4), sparsity_config={"format": "sparse-24-bitmask"}), {"quant_method": "compressed-tensors"},
        {"quant_method": "bitsandbytes"}, {"quant_method": "quark"}, {"quant_method": "ascend", "model_quant_type": "W8A8C8"},
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int8"}}, "layer_quant_config": {"*.experts.*": {}}},
    ],
)  # fmt: skip
def test_what_is_not_known_or_holds_for_some_experts_only_is_refused(quant):
    with pytest.raises(ModelError) as caught:
        from_hf_config({**MODEL, "quantization_config": quant}, name="x")
    assert caught.value.hint


def test_expert_dtype_and_what_is_sent():
    """DeepSeek-V4: 4-bit experts in an fp8 checkpoint; activations go out as fp8, unless experts are left in 16 bits."""
    fp8 = {"quant_method": "fp8"}
    spec = from_hf_config({**MODEL, "expert_dtype": "fp4", "quantization_config": fp8}, name="x")
    assert (spec.weight_bytes, spec.dispatch_bytes, spec.combine_bytes) == (17 / 32, 1.0, 2.0)
    out = from_hf_config({**MODEL, "quantization_config": {**fp8, "ignore": ["mlp.experts"]}}, name="x")
    assert (out.weight_bytes, out.dispatch_bytes) == (2.0, 2.0)
    assert from_hf_config({**MODEL, "quantization_config": {"quant_method": "mxfp4"}}, name="x").dispatch_bytes == 2.0
    nvfp4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    assert (
        from_hf_config({**MODEL, "expert_dtype": "fp4", "quantization_config": nvfp4}, name="x").weight_bytes == 0.5625
    )
    for config in ({}, {"quantization_config": {**nvfp4, "ignore": ["mlp.experts"]}}):
        with pytest.raises(ModelError, match="expert_dtype"):
            from_hf_config({**MODEL, "expert_dtype": "fp4", **config}, name="x")
    assert from_hf_config({**MODEL, "expert_dtype": "bf16"}, name="x").weight_bytes == 2.0


@pytest.mark.parametrize(
    ("file", "data", "size"),
    [
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}, 0.5625),
        ("quant_model_description.json", {f"{name}.weight": "W4A8_DYNAMIC" for name in everywhere()}, 0.5),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, 0.5 + 2.5 / 128),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True}, 0.5 + 2.5 / 128),
    ],
)  # fmt: skip
def test_files_beside_the_config(tmp_path, file, data, size):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / file).write_text(json.dumps(data))
    assert ModelSpec.parse(str(tmp_path)).weight_bytes == size
    own = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, **own}))
    assert ModelSpec.parse(str(tmp_path)).weight_bytes == 1.0  # what the config says itself counts
    if file == "quantize_config.json":
        own = {"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": -1}}
        (tmp_path / "config.json").write_text(json.dumps({**MODEL, **own}))
        assert ModelSpec.parse(str(tmp_path)).weight_bytes == 1.0
    if file == "quant_model_description.json":
        (tmp_path / "config.json").write_text(json.dumps({**MODEL, "quantization_config": {"quant_method": "ascend"}}))
        assert ModelSpec.parse(str(tmp_path / "config.json")).weight_bytes == size
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    for broken in ("[]", "{", '"x"'):
        (tmp_path / file).write_text(broken)
        with pytest.raises(ModelError):
            ModelSpec.parse(str(tmp_path))


@pytest.mark.parametrize(
    ("patterns", "whole"),
    [
        (["experts"], True), (["mlp"], True), (["thinker.model.layers.2"], None), (["model.layers.9"], False), ([], False),
        (["block_sparse_moe.experts"], True), (["shared_experts", "gate", "mlp.shared_expert"], False), (["down_proj"], None),
        ([f"language_model.model.layers.{i}.mlp.experts" for i in (2, 3, 4)], True), (["re:language_model.model.layers.*"], True),
        (["*experts*"], True), (["model.layers.[23].mlp.*"], None), (["re:.*w[13]$"], None), (["re:visual.*", "re:.*norm"], False),
    ],
)  # fmt: skip
def test_names(patterns, whole):
    assert ExpertNames(LAYERS, 12, 3).covered(patterns) is whole


def test_other_names_of_the_key():
    """A label of MindIE; MLX's table, which has no method, is refused rather than overlooked."""
    assert from_hf_config({**MODEL, "quantize": "w8a8_dynamic"}, name="x").weight_bytes == 1.0
    for config in ({"quantize": "w8a8sc"}, {"quantization": {"bits": 4, "group_size": 64}}):
        with pytest.raises(ModelError, match="not known"):
            from_hf_config({**MODEL, **config}, name="x")


def test_two_matrices_have_no_gate():
    names = [
        f"backbone.layers.{i}.mixer.experts.{e}.{m}"
        for i in LAYERS
        for e in range(12)
        for m in ("up_proj", "down_proj")
    ]
    assert ExpertNames(LAYERS, 12, 2).covered(names) is True and ExpertNames(LAYERS, 12, 3).covered(names) is None


WORDS = ["quant_method", "ignore", "config_groups", "g", "weights", "targets", "num_bits", "group_size", "quant_algo", "dynamic",
         "quantized_layers", "bits", "modules_to_not_convert", "extra_config", "weight_block_size", "global_quant_config", "weight"]  # fmt: skip
METHODS = ["fp8", "gptq", "awq", "auto-round", "bitsandbytes", "modelopt", "compressed-tensors", "quark", "ascend"]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.floats()
    | st.sampled_from(["experts", "re:.*", "MIXED_PRECISION", "NVFP4", "x"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4), max_leaves=10
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(METHODS), st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=5))
def test_any_quantization_is_read_or_refused(method, quant):
    try:
        assert (
            0
            < from_hf_config({**MODEL, "quantization_config": {**quant, "quant_method": method}}, name="x").weight_bytes
            < 3
        )
    except ModelError:
        pass
