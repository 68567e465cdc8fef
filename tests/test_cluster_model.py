"""Clusters and models: specs, YAML, presets, Hugging Face configs."""

import numpy as np
import pytest
import transformers

from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec, from_hf_config
from poise.machine.presets import DEVICES, MODELS
from poise.util.errors import ClusterError, InputError, ModelError


def test_specs():
    assert Cluster.parse("2x8").num_devices == 16 and Cluster.parse("3x2:a100").num_nodes == 3
    one, four = Cluster.parse("1x2:h100"), Cluster.parse("1x2:h100@tp4")
    for name in ("flops_per_s", "memory_bytes_per_s", "memory_bytes", "intra_bytes_per_s", "inter_bytes_per_s"):
        assert getattr(four, name) == 4 * getattr(one, name)
    for preset in DEVICES:
        assert Cluster.parse(f"1x8:{preset}").name == preset


@pytest.mark.parametrize(
    "spec", ["", "8", "0x8", "2x0", "x", "2x8:nope", "2x8:h100@tp0", "99999x99999", "-1x2", "a.yaml", "2X8"]
)
def test_bad_specs_are_cluster_errors(spec):
    with pytest.raises(ClusterError):
        Cluster.parse(spec)


def test_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "preset: a100\ndevices_per_node: [2, 1]\nspeed: [1, 0.5, 2]\ninter_bytes_per_s: 1e9\nnic_shared: true\nname: lab\n"
    )
    cluster = Cluster.parse(path)
    assert cluster.node_D.tolist() == [0, 0, 1] and cluster.speed_D.tolist() == [1, 0.5, 2]
    assert cluster.inter_bytes_per_s == 1e9 and cluster.nic_shared and cluster.name == "lab"
    assert cluster.flops_per_s == DEVICES["a100"]["flops_per_s"]


BAD_YAML = {
    "alias": "devices_per_node: &x [1]\nspeed: *x",
    "cycle": "devices_per_node: &x [*x]",
    "laughs": "a: &a [x, x]\nb: &b [*a, *a]\ndevices_per_node: *b",
    "twice": "devices_per_node: 2\ndevices_per_node: 3",
    "unknown": "devices_per_nod: 2",
    "type": "devices_per_node: two",
    "list": "- 1",
    "nan": "devices_per_node: 2\nflops_per_s: .nan",
    "zero": "devices_per_node: 2\nflops_per_s: 0",
    "speeds": "devices_per_node: 2\nspeed: [1]",
    "negative speed": "devices_per_node: 1\nspeed: [-1]",
    "object": "devices_per_node: !!python/object/apply:os.system [ls]",
    "preset": "devices_per_node: 2\npreset: none",
    "huge": "devices_per_node: 2\nnodes: 999999",
    "nothing": "",
    "broken": "a: [",
    "nodes": "nodes: 3\ndevices_per_node: [1, 2]",
    "bool": "devices_per_node: true",
    "complex key": "? [a, b]\n: 1",
    "long": "x: " + "a" * 2**20,
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_a_cluster_error(tmp_path, name):
    (tmp_path / "c.yaml").write_text(BAD_YAML[name])
    with pytest.raises(ClusterError):
        Cluster.parse(tmp_path / "c.yaml")


def test_an_unknown_key_gets_a_suggestion(tmp_path):
    (tmp_path / "c.yaml").write_text("devices_per_node: 2\nflops_per_sec: 1")
    with pytest.raises(ClusterError, match="flops_per_s"):
        Cluster.parse(tmp_path / "c.yaml")


def test_a_thousand_damaged_yaml_files(tmp_path):
    text = "preset: a100\nnodes: 2\ndevices_per_node: 4\ninter_bytes_per_s: 12.5e9\nspeed: [1,1,1,1,1,1,1,1]\n"
    rng, path, refused = np.random.default_rng(0), tmp_path / "c.yaml", 0
    for _ in range(1000):
        broken = bytearray(text.encode())
        for _ in range(int(rng.integers(1, 4))):
            broken[rng.integers(len(broken))] = rng.integers(256)
        path.write_bytes(bytes(broken))
        try:
            Cluster.parse(path)
        except ClusterError:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("kind", "options", "experts", "top_k", "layers"),
    [
        ("MixtralConfig", {}, 8, 2, range(32)),
        ("OlmoeConfig", {}, 64, 8, range(16)),
        ("Qwen2MoeConfig", {"decoder_sparse_step": 2, "num_hidden_layers": 6}, 60, 4, [1, 3, 5]),
        ("Qwen3MoeConfig", {"mlp_only_layers": [0], "num_hidden_layers": 4}, 128, 8, [1, 2, 3]),
        ("DeepseekV3Config", {"num_hidden_layers": 5}, 256, 8, [3, 4]),
        ("GptOssConfig", {}, 128, 4, range(36)),
    ],
)
def test_hugging_face_configs(kind, options, experts, top_k, layers):
    config = getattr(transformers, kind)(**options).to_dict()
    spec = from_hf_config(config, name=kind)
    assert (spec.num_experts, spec.top_k, spec.moe_layer_ids) == (experts, top_k, tuple(layers))
    assert spec.hidden_size == config["hidden_size"] and spec.flops_per_token > 0


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, 1), ({"n_group": None}, 1), ({"n_group": 1, "topk_group": 1}, 1), ({"n_group": 8}, 8),
        ({"n_group": 8, "topk_group": 4}, 8), ({"num_expert_group": 4, "topk_group": 2}, 4),
        ({"n_group": 8, "topk_group": 8}, 1), ({"n_group": 8, "topk_group": 3, "topk_method": "greedy"}, 1),
        ({"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}, 8),
        ({"text_config": {"n_group": 4, "topk_group": 2}}, 4),
    ],
)  # fmt: skip
def test_routing_groups_count_where_they_limit_the_router(options, groups):
    config = {**transformers.MixtralConfig().to_dict(), **options}
    assert from_hf_config(config, name="groups").num_expert_groups == groups


def test_model_presets():
    sizes = {name: ModelSpec.parse(name) for name in MODELS}
    assert sizes["deepseek-v3"].moe_layer_ids == tuple(range(3, 61)) and sizes["deepseek-v3"].num_expert_groups == 8
    assert sizes["llama-4-maverick"].num_moe_layers == 24
    # Hecate's table: 1.84 B parameters, nearly all of them experts
    small = sizes["gpt-moe-s"]
    assert small.expert_parameters * small.num_experts * small.num_moe_layers == pytest.approx(1.84e9, rel=0.05)


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": "x"}, {"num_hidden_layers": -1}, {"num_hidden_layers": 0}, {"num_local_experts": None},
     {"num_experts_per_tok": 99}, {"hidden_size": 0}, {"hidden_size": 1.5}, {"num_attention_heads": "a"},
     {"intermediate_size": None}, {"mlp_only_layers": 3}, {"moe_layers": [99]}, {"first_k_dense_replace": 99},
     {"n_group": "8"}, {"n_group": 8, "topk_group": True}],
)  # fmt: skip
def test_broken_configs_are_model_errors(change):
    config = {**transformers.MixtralConfig().to_dict(), **change}
    with pytest.raises(ModelError):
        from_hf_config(config, name="broken")


@pytest.mark.parametrize("name", ["mixtral", "none.json", ""])
def test_unknown_models(name, tmp_path):
    with pytest.raises(ModelError):
        ModelSpec.parse(name)


def test_bad_config_files(tmp_path):
    for text in ("", "[]", "{", "{}", '{"num_hidden_layers": NaN}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError):
            ModelSpec.parse(str(tmp_path / "config.json"))


def test_traffic_of_another_model_is_refused():
    with pytest.raises(ModelError, match="128 experts, mixtral-8x7b has 8"):
        ModelSpec.parse("mixtral-8x7b").matches(num_experts=128, layer_ids=np.array([0]))
    with pytest.raises(ModelError, match="layer 40"):
        ModelSpec.parse("mixtral-8x7b").matches(num_experts=8, layer_ids=np.array([40]))
