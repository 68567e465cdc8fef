"""Relabelled checkpoints: the same logits, the same bytes in other places."""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engines.checkpoint_cases import (
    EXPERTS,
    LAYOUTS,
    expert_placement,
    files_of,
    layers_of,
    random_placement,
    read_checkpoint,
    tensors_of,
    write_checkpoint,
)
from tests.serve.models import CONFIGS, SMALL, dense, moe_layers, prompts
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, DeepseekV3Config

from poise.engines.checkpoints.checkpoint import load_relabelling, relabel_checkpoint
from poise.engines.checkpoints.permutation import permutation
from poise.planning.placement import Placement
from poise.util.errors import ModelError, PlacementError

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
GROUPED = DeepseekV3Config(
    **SMALL, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=3, num_key_value_heads=4,
    n_routed_experts=16, n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=8,
    qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8,
)  # fmt: skip
LOGIT_LIMIT = 1e-12


class Double(TorchFunctionMode):
    """What a model computes in float32 whatever its type (routers, norms, softmax), in float64: sums over experts come
    in another order after relabelling, which float32 would show."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def load(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, local_files_only=True)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    with Double():
        parts = [model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] for tokens in prompts(2)]
    assert parts[0].dtype == torch.float64
    return torch.cat(parts)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Random models saved in several shards: folder, MoE layers, experts, groups, logits."""

    @cache
    def save(name: str):
        folder = tmp_path_factory.mktemp(name) / "model"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CONFIGS, "deepseek_v3", GROUPED)
            model = dense(name)
        model.save_pretrained(folder, max_shard_size="60KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        experts, groups = (16, 4) if name == "deepseek_v3" else (8, 1)
        return folder, moe_layers(model), experts, groups, logits(load(folder))

    return save


@pytest.fixture(params=FAMILIES)
def family(request, saved):
    return saved(request.param)


def test_logits_are_the_originals(family, tmp_path):
    folder, layers, experts, groups, before = family
    placement = expert_placement(experts, experts // 2, layers, groups, seed=3)
    report = relabel_checkpoint(placement, folder, tmp_path / "new")
    assert report.moved_experts == (permutation(placement) != np.arange(experts)).sum() > experts // 2
    model = load(tmp_path / "new")
    assert distance(before, logits(model)) <= LOGIT_LIMIT
    assert report.files == len(list((tmp_path / "new").iterdir()))
    # the comparison can fail: with the router's rows as they were, other experts are chosen
    for layer, order in load_relabelling(tmp_path / "new").rows().items():
        block = model.model.layers[layer].mlp
        router = block.router if hasattr(block, "router") else block.gate
        router.weight.data = router.weight.data[np.argsort(order)]
    assert distance(before, logits(model)) > 1e-3


def test_back_and_forth_gives_the_same_bytes(family, tmp_path):
    folder, layers, experts, groups, _ = family
    relabel_checkpoint(expert_placement(experts, experts // 4, layers, groups, seed=4), folder, tmp_path / "new")
    undo = load_relabelling(tmp_path / "new").inverse().placement()
    report = relabel_checkpoint(undo, tmp_path / "new", tmp_path / "back")
    assert any("relabelled itself" in note for note in report.notes)
    before, after = files_of(folder), files_of(tmp_path / "back")
    assert load_relabelling(tmp_path / "back").moved == 0
    assert {name: data for name, data in after.items() if name != "poise-relabelling.json"} == before
    assert files_of(tmp_path / "new") != before


def test_broken_groups_change_the_function(saved, tmp_path):
    """Why they are refused: the same relabelling without the check gives other logits."""
    folder, layers, experts, _, before = saved("deepseek_v3")
    placement = expert_placement(experts, 4, layers, 1, seed=0)
    with pytest.raises(PlacementError, match="layer 1: device 0 holds a part of routing group"):
        relabel_checkpoint(placement, folder, tmp_path / "new")
    shutil.copytree(folder, tmp_path / "model")
    text = (folder / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**json.loads(text), "n_group": 1}))
    relabel_checkpoint(placement, tmp_path / "model", tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text(text)
    assert distance(before, logits(load(tmp_path / "new"))) > 1e-3


def test_groups_that_limit_nothing_may_be_broken(tmp_path):
    source = write_checkpoint(tmp_path / "model", "deepseek-fp8", topk_group=4)
    placement = expert_placement(EXPERTS, 4, [1, 2], 1, seed=0)
    assert not any("groups" in note for note in relabel_checkpoint(placement, source, tmp_path / "new").notes)
    limited = write_checkpoint(tmp_path / "limited", "qwen2-gptq", num_expert_group=4, topk_group=2)
    with pytest.raises(PlacementError, match="a part of routing group"):
        relabel_checkpoint(placement, limited, tmp_path / "third")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_count", [1, 4])
def test_every_layout(layout, shard_count, tmp_path):
    source = write_checkpoint(tmp_path / "model", layout, shards=shard_count)
    before = files_of(source)
    placement = random_placement(layout, seed=shard_count)
    seen = []
    report = relabel_checkpoint(placement, source, tmp_path / "new", progress=lambda stage, share: seen.append(share))
    order = dict(zip(layers_of(layout), permutation(placement).tolist(), strict=True))
    assert read_checkpoint(tmp_path / "new") == tensors_of(layout, order) != tensors_of(layout)
    assert {layer: row.tolist() for layer, row in load_relabelling(tmp_path / "new").rows().items()} == order
    assert files_of(source) == before
    kinds = [kind for _, kind, _, _ in LAYOUTS[layout][1]]
    assert report.tensors == len(order) * (sum("rows" in kind for kind in kinds) + EXPERTS * kinds.count("single"))
    assert report.bytes == sum(len(data) for data in files_of(tmp_path / "new").values())
    assert seen and seen == sorted(seen) and seen[-1] == 1.0
    assert not [path for path in tmp_path.iterdir() if path.name not in ("model", "new")]


def test_layers_without_a_row_and_prediction_layers_keep_their_ids(tmp_path):
    extra = {
        f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight": ("F16", (2, 2), bytes([layer, e] * 4))
        for layer in (3, 4) for e in range(EXPERTS)
    } | {
        "mtp.layers.1.mlp.experts.0.up_proj.weight": ("F16", (1,), b"ab"),
        "model.layers.3.mlp.gate.weight": ("F16", (EXPERTS, 1), bytes(2 * EXPERTS)),
    }  # fmt: skip
    source = write_checkpoint(tmp_path / "model", "qwen2-gptq", more=extra)
    placement = random_placement("qwen2-gptq", seed=1)
    report = relabel_checkpoint(placement, source, tmp_path / "new")
    order = dict(enumerate(permutation(placement).tolist()))
    assert read_checkpoint(tmp_path / "new") == {**tensors_of("qwen2-gptq", order), **extra}
    assert "3 layers with experts" in report.notes[0] and "mtp.layers.1.mlp" in report.notes[0]
    # a placement may name a layer of multi-token prediction
    three = Placement(placement.slot_expert_LS[:1], placement.slot_device_S, EXPERTS, EXPERTS, np.array([3]))
    relabel_checkpoint(three, source, tmp_path / "third")
    got = read_checkpoint(tmp_path / "third")
    for new, old in enumerate(order[0]):
        assert got[f"model.layers.3.mlp.experts.{new}.up_proj.weight"][2] == bytes([3, old] * 4)
    assert got["model.layers.0.mlp.gate.weight"] == tensors_of("qwen2-gptq")["model.layers.0.mlp.gate.weight"]


def test_a_config_that_names_experts_gets_their_new_ids(tmp_path):
    names = ["lm_head", "model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.30", "re:.*experts.*"]
    source = write_checkpoint(
        tmp_path / "model", "qwen2-gptq", quantization_config={"quant_method": "x", "ignore": names[:2] + names[3:]}
    )
    placement = random_placement("qwen2-gptq", seed=2)
    relabel_checkpoint(placement, source, tmp_path / "new")
    place = permutation(placement)[1].tolist().index(3)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == [
        "lm_head",
        f"model.layers.1.mlp.experts.{place}.up_proj",
        "re:.*experts.*",
    ]
    for name, match in [(names[2], "the model has 8 experts"), ("other.layers.1.mlp.experts.3", "no experts under")]:
        config["quantization_config"]["ignore"] = [name]
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=match):
            relabel_checkpoint(placement, source, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]


def test_other_files_come_along_and_other_weights_do_not(tmp_path):
    source = write_checkpoint(tmp_path / "model", "granite")
    (source / "code").mkdir()
    (source / "code" / "modeling.py").write_text("x = 1")
    (source / ".cache").mkdir()
    (source / ".cache" / "state").write_text("old")
    os.mkfifo(source / "pipe")
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "code/model.pth"):
        (source / name).write_bytes(b"old ids")
    link = source / "model-00001-of-00003.safetensors"
    (tmp_path / "blobs").mkdir()
    link.rename(tmp_path / "blobs" / "b")
    link.symlink_to(tmp_path / "blobs" / "b")  # as the hub's cache lies
    report = relabel_checkpoint(random_placement("granite", 0), source, tmp_path / "new")
    got = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert got == {"config.json", "tokenizer.json", "code/modeling.py", "poise-relabelling.json", "model.safetensors.index.json"} | {
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    }  # fmt: skip
    assert not (tmp_path / "new" / link.name).is_symlink()
    assert report.notes == (
        "weights with the old ids were left out: code/model.pth, consolidated.safetensors, model.gguf, pytorch_model.bin",
    )


def test_twice_leads_back_to_the_first(tmp_path):
    source = write_checkpoint(tmp_path / "model", "minimax")
    relabel_checkpoint(random_placement("minimax", 0), source, tmp_path / "once")
    report = relabel_checkpoint(random_placement("minimax", 1), tmp_path / "once", tmp_path / "twice")
    total = load_relabelling(tmp_path / "twice")
    assert total.source == "model" and any("'model'" in note for note in report.notes)
    order = {layer: row.tolist() for layer, row in total.rows().items()}
    assert read_checkpoint(tmp_path / "twice") == tensors_of("minimax", order)
