"""Recipes as data: what is read of them, what is refused, and that whatever is in a file nothing else happens."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from poise.engines.recipes.launches import read_launches
from poise.engines.recipes.settings import SPELLED, expert_settings
from poise.util.errors import OptionError, PoiseError

SRT = {
    "name": "r1", "model": {"path": "deepseek-ai/DeepSeek-R1-0528", "precision": "fp8"},
    "resources": {"gpu_type": "gb200", "gpus_per_node": 4, "prefill_nodes": 4, "prefill_workers": 2, "decode_nodes": 12,
                  "decode_workers": 1},
    "backend": {
        "prefill_environment": {"A": "1"},
        "sglang_config": {
            "prefill": {"tensor-parallel-size": 8, "expert-parallel-size": 8, "ep-num-redundant-experts": 32,
                        "moe-a2a-backend": "deepep", "deepep-mode": "normal", "mem-fraction-static": 0.8},
            "decode": {"tp_size": 48, "ep_size": 48, "moe_a2a_backend": "deepep", "ep_num_redundant_experts": 32,
                       "enable_eplb": True, "weird_expert_flag": 3},
        },
    },
}  # fmt: skip
TRT = {
    "model": {"path": "nvidia/Kimi-K2-Thinking-NVFP4"}, "resources": {"gpu_type": "gb300", "gpus_per_decode": 16},
    "backend": {"type": "trtllm", "trtllm_config": {"decode": {
        "tensor_parallel_size": 16, "moe_expert_parallel_size": 16, "enable_attention_dp": True,
        "moe_config": {"backend": "TRTLLM", "load_balancer": {"num_slots": 416, "layer_updates_per_iter": 1}}}}},
}  # fmt: skip
SCRIPT = """#!/bin/bash
# python3 -m sglang.launch_server --model-path not/this
EP_SIZE=8
export MODEL="Qwen/Qwen3-235B-A22B"
X=1 python3 -m sglang.launch_server --model-path $MODEL --tp-size ${TP:-16} \\
   --ep-size=$EP_SIZE --ep-num-redundant-experts 16 --init-expert-location /maps/a.json > log 2>&1 &
POISE_STATIC_MAP=m.npz vllm serve openai/gpt-oss-120b -tp 1 -dp 8 --enable-expert-parallel --enable-eplb \\
   --eplb-config '{"num_redundant_experts": 32}' | tee log; rm -rf --tp-size 3 /
trtllm-serve Qwen/Qwen3-30B-A3B --tp_size 4 --ep_size $EP
"""


def read(tmp_path, recipe, name="r.yaml"):
    path = tmp_path / name
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))
    return [expert_settings(one) for one in read_launches(path)]


def test_srt_slurm(tmp_path):
    prefill, decode = read(tmp_path, SRT)
    assert (prefill.engine, prefill.role, prefill.ranks, prefill.redundant) == ("sglang", "prefill", 8, 32)
    assert (prefill.preset, prefill.cluster, prefill.own, prefill.map_file) == ("deepseek-r1", "2x4:gb200", False, "")
    assert "hold experts 0 to 31 again" in prefill.sentence() and prefill.unknown == ()
    assert (decode.role, decode.ranks, decode.own, decode.cluster) == ("decode", 48, True, "12x4:gb200")
    assert decode.unknown == ("weird-expert-flag",) and decode.redundant_of(256, 48) == 32
    with pytest.raises(OptionError, match="256 experts and 32 redundant slots are not shared evenly by 40 ranks"):
        decode.redundant_of(256, 40)


def test_tensorrt(tmp_path):
    (one,) = read(tmp_path, TRT)
    assert (one.engine, one.ranks, one.slots, one.own, one.preset) == ("tensorrt-llm", 16, 416, True, "")
    assert one.redundant_of(384, 16) == 32 and one.cluster == ""
    with pytest.raises(OptionError, match="416 slots a layer cannot hold 512 experts"):
        one.redundant_of(512, 16)
    flags = TRT["backend"]["trtllm_config"]["decode"]
    (file,) = read(tmp_path, {**flags, "moe_config": {"load_balancer": "/eplb/gen_ep16_slots384.yaml"}})
    assert file.map_file == "/eplb/gen_ep16_slots384.yaml" and file.redundant is None
    assert "the map /eplb/gen_ep16_slots384.yaml is loaded" in file.sentence()
    (plain,) = read(tmp_path, {**flags, "moe_config": {"backend": "TRTLLM"}})
    assert (plain.redundant, plain.own, plain.map_file) == (0, False, "")


def test_scripts(tmp_path):
    sglang, vllm, trt = read(tmp_path, SCRIPT, "run.sh")
    assert (sglang.model, sglang.ranks, sglang.redundant, sglang.map_file) == (
        "Qwen/Qwen3-235B-A22B",
        8,
        16,
        "/maps/a.json",
    )
    assert (vllm.preset, vllm.ranks, vllm.redundant, vllm.own, vllm.map_file) == ("gpt-oss-120b", 8, 32, True, "m.npz")
    assert trt.model == "Qwen/Qwen3-30B-A3B" and trt.ranks is None
    assert trt.notes == ("the expert parallel size is $EP, which the recipe does not set",)


def test_llm_d(tmp_path):
    words = '--gpu-memory-utilization 0.9 --enable-eplb --eplb-config \'{"num_redundant_experts":"32"}\''
    prefill, decode = read(tmp_path, {"prefill": {"extra-args": words}, "decode": {"extra-args": words}})
    assert (prefill.role, decode.role, prefill.own, prefill.redundant, prefill.ranks) == (
        "prefill",
        "decode",
        True,
        32,
        None,
    )
    assert "over how many ranks" in prefill.notes[0]


def changed(**flags):
    recipe = json.loads(json.dumps(SRT))
    recipe["backend"]["sglang_config"] = {"decode": recipe["backend"]["sglang_config"]["decode"] | flags}
    return recipe


VLLM = "vllm serve m --tensor-parallel-size 4 "
REFUSED = [
    (changed(**{"ep-size": 16}), "--ep-size is given as 48 and as 16"),
    (changed(**{"expert-parallel-size": 16}), "ep is given as 48 and as 16"),
    (changed(tp_size=24), "decode has 48 GPUs and is started over 24"),
    (changed(tp_size=48, ep_size=96, moe_a2a_backend="none"), "96 expert-parallel ranks on 48 GPUs"),
    (changed(ep_num_redundant_experts=-1), "redundant experts must be a whole number of at least 0, got '-1'"),
    (changed(ep_size="many"), "expert parallel size must be a whole number of at least 1, got 'many'"),
    (VLLM + "--eplb-config '{\"num_redundant_experts\": 8}'", "8 redundant experts with EPLB off"),
    (VLLM + "--enable-eplb", "EPLB on 1 expert-parallel rank, 4 x 1 GPUs"),
    (VLLM + "--num-redundant-experts 4 --enable-expert-parallel --enable-eplb --eplb-config '{\"num_redundant_experts\": 8}'",
     "redundant experts are 4 by one flag and 8 by --eplb-config"),
    (VLLM + "--eplb-config '{'", "--eplb-config is no JSON"),
    (VLLM + "--served-model-name 'x", "cannot be read: 'x of its line 1 is not closed"),
    ("echo hello", "starts no engine that is known"),
    ("vllm serve m\n" * 17, "starts 17 engines, at most 16"),
    ({**TRT["backend"]["trtllm_config"]["decode"], "moe_config": {"load_balancer": [1]}}, "load_balancer is a list"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "said"), REFUSED)
def test_what_is_refused_names_both_numbers(tmp_path, recipe, said):
    with pytest.raises(OptionError) as caught:
        read(tmp_path, recipe, "r.sh" if isinstance(recipe, str) else "r.yaml")
    assert said in caught.value.message


def test_an_all_to_all_backend_settles_the_ranks(tmp_path):
    (one,) = read(tmp_path, changed(ep_size=24))
    assert one.ranks == 48 and one.notes == ("an all-to-all backend makes the expert-parallel size 48 (it says 24)",)


def test_no_spelling_means_two_things():
    for roles in SPELLED.values():
        every = [spelled for all_of in roles.values() for spelled in all_of]
        assert len(every) == len(set(every))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.text(max_size=6) | st.sampled_from(["$X", "trivial", "48"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["load_balancer", "num_slots", "repo"]), inner),
    max_leaves=4,
)  # fmt: skip
FLAGS = st.dictionaries(
    st.sampled_from(sorted({one for roles in SPELLED.values() for all_of in roles.values() for one in all_of})), VALUES
)


@given(FLAGS, st.sampled_from(["sglang_config", "vllm_config", "trtllm_config"]), VALUES)
def test_any_flags_are_read_or_refused(tmp_path_factory, flags, config, odd):
    recipe = {"model": odd, "identity": odd, "resources": odd, "backend": {config: {"decode": flags, "prefill": odd}}}
    try:
        for one in read(tmp_path_factory.mktemp("r"), recipe):
            assert one.sentence() and (one.cluster or True)
    except PoiseError:
        pass


@given(st.text(max_size=120))
def test_any_script_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("r") / "r.sh"
    path.write_bytes(("vllm serve " + text).encode("utf-8", "surrogatepass"))
    try:
        assert len([expert_settings(one) for one in read_launches(path)]) >= 1
    except PoiseError:
        pass


@pytest.mark.parametrize(
    ("model", "preset"),
    [
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"), ("deepseek-ai/DeepSeek-R1", "deepseek-r1"),
        ("/models/DeepSeek-V3-Base/", "deepseek-v3"), ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"), ("zai-org/GLM-4.5", "glm-4.5"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout"), ("moonshotai/Kimi-K2-Instruct-0905", "kimi-k2"),
        ("zai-org/GLM-4.5-Air", ""), ("zai-org/GLM-4.5V", ""), ("zai-org/GLM-4.5-FP8", ""), ("moonshotai/Kimi-K2-Thinking", ""),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", ""), ("deepseek-ai/DeepSeek-V3.1", ""),
        ("nvidia/DeepSeek-R1-0528-FP4", ""), ("Qwen/Qwen3-235B-A22B-FP8", ""), ("Qwen/Qwen3-235B-A22B-Thinking-2507-FP8", ""),
        ("DeepSeek-R1-0528-Qwen3-8B", ""), ("openai/gpt-oss-120b-bf16", ""), ("openai/gpt-oss-20b", "gpt-oss-20b"),
    ],
)  # fmt: skip
def test_a_preset_is_of_just_its_model_and_weights(tmp_path, model, preset):
    assert {one.preset for one in read(tmp_path, SRT | {"model": {"path": model}})} == {preset}


def test_other_weights_than_the_presets_are_no_preset(tmp_path):
    for precision, preset in (("fp8", "deepseek-r1"), ("fp4", ""), ("nvfp4", "")):
        model = {"path": "deepseek-ai/DeepSeek-R1", "precision": precision}
        assert read(tmp_path, SRT | {"model": model})[0].preset == preset
    for flag, preset in (("", "qwen3-30b-a3b"), ("--quantization fp8", ""), ("--quantization $Q", "")):
        assert read(tmp_path, f"vllm serve Qwen/Qwen3-30B-A3B -tp 2 {flag}", "r.sh")[0].preset == preset


def test_a_pipeline_counts_in_gpus_alone(tmp_path):
    scripts = {
        "sglang": "python -m sglang.launch_server --tp-size 8 --ep-size 8 --pp-size 2",
        "vllm": "vllm serve m -tp 8 -pp 2 --enable-expert-parallel",
        "tensorrt-llm": "trtllm-serve m --tp_size 8 --ep_size 8 --pp_size 2",
    }
    for engine, script in scripts.items():
        (one,) = read(tmp_path, script, "r.sh")
        assert (one.engine, one.ranks, one.stages) == (engine, 8, 2) and "2 stages of a pipeline" in one.notes[0]
    sizes = {"tp_size": 24, "ep_size": 24, "moe_a2a_backend": "none"}
    (one,) = read(tmp_path, changed(**sizes, pp_size=2))
    assert (one.ranks, one.stages) == (24, 2)
    with pytest.raises(OptionError, match="has 48 GPUs and is started over 72"):
        read(tmp_path, changed(**sizes, pp_size=3))
    (one,) = read(tmp_path, changed(**sizes, pp_size="$PP"))
    assert (one.ranks, one.stages) == (24, None)


def test_data_parallel_copies_of_sglang_count_in_gpus_where_attention_is_not_within(tmp_path):
    sizes = {"tp_size": 24, "ep_size": 24, "moe_a2a_backend": "none", "dp_size": 2}
    assert read(tmp_path, changed(**sizes))[0].ranks == 24
    with pytest.raises(OptionError, match="has 48 GPUs and is started over 24"):
        read(tmp_path, changed(**sizes, enable_dp_attention=True))


def test_a_size_that_is_not_known_is_not_one(tmp_path):
    tail = "--data-parallel-size 1 --enable-expert-parallel --enable-eplb"
    (one,) = read(tmp_path, f"vllm serve m -tp $TP {tail}", "r.sh")
    assert (one.ranks, one.own, one.redundant) == (None, True, 0) and "$TP" in one.notes[0]
    (one,) = read(tmp_path, f"vllm serve m -tp 8 --no-enable-eplb {tail}".replace(" --enable-eplb", ""), "r.sh")
    assert (one.ranks, one.own) == (8, False)
    (one,) = read(tmp_path, "python -m sglang.launch_server --tp $TP --ep 4 --moe-a2a-backend deepep", "r.sh")
    assert one.ranks is None
    (one,) = read(tmp_path, "python -m sglang.launch_server --tp 8 --moe-a2a-backend $B", "r.sh")
    assert one.ranks is None and "$B" in one.notes[0]


def test_resources_of_one_node_may_be_those_of_each(tmp_path):
    recipe = changed(tp_size=8, ep_size=8)
    recipe["resources"] = {"gpu_type": "gb200", "gpus_per_node": 4, "decode_nodes": 1, "decode_workers": 1}
    (one,) = read(tmp_path, recipe)
    assert one.ranks == 8 and one.notes == (
        "its resources are 4 GPUs, as many as a node has, and it is started over 8: taken as 2 such nodes",
    )
    recipe["resources"]["gpus_per_node"] = 3
    with pytest.raises(OptionError, match="has 3 GPUs and is started over 8"):
        read(tmp_path, recipe)
