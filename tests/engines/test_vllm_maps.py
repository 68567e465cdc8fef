"""Maps of vLLM's proposal #53022 and of HYGON's plugin: what their loaders ask for, and the way back."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tests.engines.test_exports import ROWS, SMALL, random_plan

from poise.engines import hygon, vllm
from poise.engines.dumps.hygon_maps import is_map
from poise.engines.exports import TARGETS, ExportOptions
from poise.engines.readers import ReadOptions, read_dump
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.util.errors import OptionError, PlacementError, TraceError

TRIVIAL = [0, 1, 2, 3, 0, 1]
MODEL = replace(ModelSpec.generic(4, 1, np.arange(4)), moe_layer_ids=(1, 2, 3))


def loader_53022(path, *, layers, experts, slots, groups=1):
    """What ``load_static_expert_map`` asserts (``vllm/models/deepseek_v4/expert_map.py`` of the pull request)."""
    rows = json.loads(path.read_text())
    assert isinstance(rows, list) and len(rows) in (1, layers)
    for row in rows:
        assert all(type(expert) is int for expert in row) and len(row) == slots and set(row) == set(range(experts))
        if slots == experts:
            for block in np.array(row).reshape(groups, -1):
                assert len(set(block // (experts // groups))) == 1
    return rows


def loader_hygon(path, *, key, layers, experts, slots):
    """What ``load_static_eplb_plan`` asserts, of #69 and of later versions, which want the second form."""
    whole = json.loads(path.read_text())
    assert whole["version"] == 2 and whole["format"] == "vllm_offline_eplb_physical_to_logical_by_model"
    one = whole["model_maps"][key]
    assert one["record_kind"] == "proposal" and one["model_name"] and one["model_class"] == key
    said = [
        one[name] for name in ("num_moe_layers", "num_logical_experts", "num_physical_experts", "num_redundant_experts")
    ]
    assert said == [layers, experts, slots, slots - experts] and all(type(number) is int for number in said)
    rows = one["physical_to_logical_map"]
    assert len(rows) == layers
    assert all(len(row) == slots and set(row) == set(range(experts)) for row in rows)
    return rows


def test_every_decoder_layer_and_those_behind_have_a_row(tmp_path):
    made = TARGETS["vllm-53022"].write(SMALL, tmp_path / "map.json", ExportOptions(MODEL, num_mtp_layers=1))
    rows = loader_53022(tmp_path / "map.json", layers=5, experts=4, slots=6)
    assert rows == [TRIVIAL, ROWS[0], TRIVIAL, ROWS[1], TRIVIAL] and made.filled == 1 and made.unplanned == 2
    assert (
        '--enable-eplb --eplb-config \'{"expert_map_path"' in made.command
        and '"num_redundant_experts": 2' in made.command
    )
    with pytest.raises(OptionError, match="every decoder layer"):
        TARGETS["vllm-53022"].write(SMALL, tmp_path / "no", ExportOptions())
    once = Placement(np.array([[2, 0, 1, 3]] * 3), np.array([0, 0, 1, 1]), 4, 2, np.array([1, 2, 3]))
    assert "--enable-eplb" not in TARGETS["vllm-53022"].write(once, tmp_path / "map.json", ExportOptions(MODEL)).command


def test_without_replicas_blocks_hold_one_routing_group(tmp_path):
    torn = Placement(np.array([[0, 1, 2, 3], [0, 2, 1, 3]]), np.array([0, 0, 1, 1]), 4, 2)
    with pytest.raises(PlacementError, match="layer 1: block 0 of 2 holds experts of routing groups 0 and 1"):
        vllm.write_53022(torn, tmp_path / "no", num_hidden_layers=2, num_groups=2)
    whole = Placement(np.array([[2, 3, 1, 0], [1, 0, 3, 2]]), np.array([0, 0, 1, 1]), 4, 2)
    vllm.write_53022(whole, tmp_path / "map.json", num_hidden_layers=2, num_groups=2)
    loader_53022(tmp_path / "map.json", layers=2, experts=4, slots=4, groups=2)
    vllm.write_53022(SMALL, tmp_path / "map.json", num_hidden_layers=4, num_groups=2)  # with replicas they need not


@pytest.mark.parametrize("seed", range(3))
def test_both_lead_back(tmp_path, seed):
    plan = random_plan(seed)
    ids = tuple(plan.layer_ids_L.tolist())
    model = ModelSpec("small", ids[-1] + 1, ids, 16, 2, 64, 32)
    TARGETS["vllm-hygon"].write(plan, tmp_path / "h.json", ExportOptions(model, model_class="SmallForCausalLM"))
    loader_hygon(tmp_path / "h.json", key="SmallForCausalLM", layers=3, experts=16, slots=24)
    TARGETS["vllm-hygon"].write(plan, tmp_path / "old.json", ExportOptions(model))
    TARGETS["vllm-53022"].write(plan, tmp_path / "v.json", ExportOptions(model))
    for name, said in (("h.json", {}), ("old.json", {}), ("v.json", {"format": "vllm-53022"})):
        seen = read_dump(tmp_path / name, options=ReadOptions(model, **said)).slots
        assert seen.layer_ids_L.tolist() == list(ids)
        np.testing.assert_array_equal(seen.map_LS, plan.slot_expert_LS)
    bare = read_dump(tmp_path / "h.json")
    assert bare.layers_by_place and bare.slots.layer_ids_L.tolist() == [0, 1, 2]


def test_a_file_without_a_class_says_what_later_versions_want(tmp_path):
    made = TARGETS["vllm-hygon"].write(SMALL, tmp_path / "m.json", ExportOptions())
    assert any("--model-class" in note for note in made.notes) and made.filled == 1
    whole = json.loads((tmp_path / "m.json").read_text())
    assert whole["format"] == hygon.FORMAT and whole["version"] == 1 and whole["physical_to_logical_map"] == ROWS
    named = TARGETS["vllm-hygon"].write(SMALL, tmp_path / "m.json", ExportOptions(model_class="X"))
    assert not any("--model-class" in note for note in named.notes)


def test_of_a_recorded_file_the_model_is_taken_and_not_its_draft(tmp_path):
    """As HYGON's plugin records a model and its layers of multi-token prediction."""
    one = {"num_logical_experts": 4, "physical_to_logical_map": ROWS}
    draft = {"num_logical_experts": 4, "physical_to_logical_map": [TRIVIAL]}
    whole = {"version": 2, "format": hygon.BY_MODEL, "model_maps": {"Draft": draft, "Model": one}}
    (tmp_path / "m.json").write_text(json.dumps(whole))
    seen = read_dump(tmp_path / "m.json")
    assert seen.slots.map_LS.tolist() == ROWS and any("Draft" in note for note in seen.notes)


@pytest.mark.parametrize("whole, said", [
    ({"format": hygon.FORMAT}, "no physical_to_logical_map"), ({"format": hygon.BY_MODEL, "model_maps": {}}, "model_maps"),
    ({"format": hygon.BY_MODEL, "model_maps": {"A": 3}}, "model_maps"),
    ({"format": hygon.FORMAT, "physical_to_logical_map": [[0, 1], [1]]}, "physical_to_logical_map"),
    ({"format": hygon.FORMAT, "physical_to_logical_map": [[0, 1, 2, 3]], "num_logical_experts": 5}, "num_logical_experts is 5"),
])  # fmt: skip
def test_damaged_files_are_refused(tmp_path, whole, said):
    assert is_map(whole)
    (tmp_path / "m.json").write_text(json.dumps(whole))
    with pytest.raises(TraceError, match=said):
        read_dump(tmp_path / "m.json")
