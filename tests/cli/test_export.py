"""poise export: every target by its name, what it says, and what it refuses."""

import json
import shlex

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from poise.cli.main import app
from poise.engines.exports import TARGETS
from poise.planning.placement import Placement


def run(*words):
    return CliRunner().invoke(app, ["export", *(str(word) for word in words)])


@pytest.fixture
def plan(tmp_path):
    """Two MoE layers (1 and 2), 8 experts in 12 slots on 4 ranks."""
    rng = np.random.default_rng(0)
    rows = [np.concatenate([np.arange(8), rng.permutation(8)[:4]]) for _ in range(2)]
    rows = [row.reshape(3, 4).T.ravel() for row in rows]
    Placement(np.stack(rows), np.repeat(np.arange(4), 3), 8, 4, np.array([1, 2])).save(tmp_path / "p.npz")
    return tmp_path / "p.npz"


@pytest.fixture
def config(tmp_path):
    sizes = {"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 8,
             "moe_intermediate_size": 4, "first_k_dense_replace": 1}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return tmp_path / "config.json"


def test_every_target_is_named_in_the_help(plan):
    text = "".join(run("--help").stdout.split())
    assert all(name in text for name in TARGETS)
    got = run(plan, "--to", "vllm", "-o", plan.parent / "x")
    assert got.exit_code == 2 and "vllm-34811" in got.stderr and not (plan.parent / "x").exists()


@pytest.mark.parametrize("name", ["sglang", "tensorrt-llm", "vllm-ascend", "vllm-49572"])
def test_facts_and_advice(plan, config, name):
    out = plan.parent / "map file"
    got = run(plan, "--to", name, "--model", config, "-o", out, "--json")
    assert got.exit_code == 0, got.output
    data = json.loads(got.stdout)
    assert (data["engine"], data["slots"], data["redundant"], data["devices"]) == (name, 12, 4, 4)
    assert data["filled_slots"] == 0 and data["unplanned_layers"] == 1
    assert out.exists() and str(out) in data["command"]
    said = " ".join(got.stderr.split())
    at = got.stderr.index(f"{data['command']}\n")  # to be copied: whole lines, YAML on lines of its own
    assert got.stderr[:at].endswith("start the engine with\n" if name == "tensorrt-llm" else "start the engine with ")
    assert all(" ".join(note.split()) in said for note in data["notes"]) and "wrote" in said
    plain = run(plan, "--to", name, "--model", config, "-o", out)
    assert plain.exit_code == 0 and plain.stdout.startswith("Placement(")


def test_tensorrt_with_prediction_layers(plan, config):
    out = plan.parent / "t.yaml"
    got = run(plan, "--to", "tensorrt-llm", "-m", config, "--num-mtp-layers", 2, "-o", out, "--json")
    assert got.exit_code == 0 and json.loads(got.stdout)["layers"] == 5
    assert list(yaml.safe_load(out.read_text())["initial_global_assignments"]) == [1, 2, 3, 4, 5]


def test_wrong_options_exit_with_2_and_write_nothing(plan, config):
    out = plan.parent / "out"
    for words in (
        ["--to", "sglang"], ["--to", "tensorrt-llm", "--num-mtp-layers", 1], ["--to", "vllm-34811"],
        ["--to", "tensorrt-llm", "--num-mtp-layers", -1], ["--to", "npz", "--model", "mixtral-8x7b-typo"],
        ["--to", "sglang", "--model", "olmoe-1b-7b"], ["--to", "sglang", "--num-hidden-layers", 0],
    ):  # fmt: skip
        got = run(plan, *words, "-o", out)
        assert got.exit_code == 2 and "error:" in got.stderr and not got.stdout, got.output
        assert not out.exists()
    assert run(plan, "--to", "npz", "-o", plan.parent / "no" / "x").exit_code == 2


def test_orders_check_the_groups_of_a_named_model(tmp_path):
    rows = np.array([[2, 0, 1, 3, 4, 5, 6, 7], [0, 4, 1, 5, 2, 6, 3, 7]])
    Placement(rows, np.repeat([0, 1], 4), 8, 2).save(tmp_path / "p.npz")
    for name in ("megatron", "deepspeed"):
        got = run(tmp_path / "p.npz", "--to", name, "-o", tmp_path / name, "--json")
        assert got.exit_code == 0 and "groups are not checked" in got.stderr, got.output
        data = json.loads((tmp_path / name).read_text())
        assert data["framework"] == name and [sorted(row[:4]) for row in data["layers"].values()] == [
            [0, 1, 2, 3],
            [0, 1, 4, 5],
        ]
    sizes = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 8,
             "moe_intermediate_size": 4, "n_group": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    got = run(tmp_path / "p.npz", "--to", "megatron", "-m", tmp_path / "config.json", "-o", tmp_path / "x")
    assert got.exit_code == 2 and "layer 1" in got.stderr and not (tmp_path / "x").exists(), got.output
    kept = run(
        tmp_path / "p.npz", "--to", "megatron", "-m", tmp_path / "config.json", "--keep-groups", "-o", tmp_path / "x"
    )
    assert kept.exit_code == 0 and "2 routing groups stay whole" in " ".join(kept.stderr.split()), kept.output
    assert [sorted(row[:4]) for row in json.loads((tmp_path / "x").read_text())["layers"].values()] == [
        [0, 1, 2, 3]
    ] * 2
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "topk_group": 2}))  # all groups: no limit
    free = run(tmp_path / "p.npz", "--to", "megatron", "-m", tmp_path / "config.json", "-o", tmp_path / "z", "--json")
    assert free.exit_code == 0 and json.loads(free.stdout)["routing_groups"] == 1, free.output
    alone = run(tmp_path / "p.npz", "--to", "megatron", "--keep-groups", "-o", tmp_path / "y")
    assert alone.exit_code == 2 and "give --model" in alone.stderr


def test_a_checkpoint_needs_the_one_to_relabel(plan, tmp_path):
    got = run(plan, "--to", "checkpoint", "-o", tmp_path / "out")
    assert got.exit_code == 2 and "--checkpoint" in got.stderr and not (tmp_path / "out").exists()


def test_a_checkpoint_is_relabelled(tmp_path):
    rows = np.array([[2, 0, 3, 1], [1, 3, 0, 2]])
    Placement(rows, np.repeat([0, 1], 2), 4, 2).save(tmp_path / "p.npz")
    sizes = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
             "hidden_size": 8, "moe_intermediate_size": 4}  # fmt: skip
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(sizes))
    state = {}
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        state[f"{mlp}.gate.weight"] = np.repeat(np.arange(4, dtype=np.float32), 8).reshape(4, 8)
        for expert in range(4):
            for name, shape in (("gate_proj", (4, 8)), ("up_proj", (4, 8)), ("down_proj", (8, 4))):
                state[f"{mlp}.experts.{expert}.{name}.weight"] = np.full(shape, expert, np.float32)
    save_file(state, source / "model.safetensors")
    got = run(tmp_path / "p.npz", "--to", "checkpoint", "--checkpoint", source, "-o", tmp_path / "new", "--json")
    assert got.exit_code == 0, got.output
    data = json.loads(got.stdout)
    assert data["moved_experts"] == 6 and data["files"] == 3
    assert shlex.split(data["command"])[2:] == [
        str(tmp_path / "new"), "--enable-expert-parallel", "--tensor-parallel-size", "2"
    ]  # fmt: skip
    made = load_file(tmp_path / "new" / "model.safetensors")
    for layer, row in enumerate(rows):
        mlp = f"model.layers.{layer}.mlp"
        new = [int(made[f"{mlp}.experts.{n}.up_proj.weight"][0, 0]) for n in range(4)]
        assert new == made[f"{mlp}.gate.weight"][:, 0].astype(int).tolist()
        assert sorted(new[:2]) == sorted(row[:2].tolist())
