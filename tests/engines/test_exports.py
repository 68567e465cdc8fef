"""Every format as its engine reads it: golden files, round trips, refusals; their own weight movers follow our maps."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.cases import judge
from tests.conftest import VLLM
from tests.engines.mover_cases import CASES

from poise.engines import ascend, sglang, tensorrt, vllm
from poise.engines.exports import TARGETS, ExportOptions
from poise.engines.readers import read_slot_map
from poise.engines.slots import full_table, rows_for
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.util.errors import OptionError, PlacementError

# 2 ranks of 3 slots, 4 experts, MoE layers 1 and 3 of 4; the second layer has an empty slot on rank 0.
SMALL = Placement(
    np.array([[3, 0, 2, 1, 2, 0], [1, -1, 0, 2, 3, 0]]), np.array([0, 0, 0, 1, 1, 1]), 4, 2, np.array([1, 3])
)
ROWS = [[3, 0, 2, 1, 2, 0], [1, 2, 0, 2, 3, 0]]  # 2 and 3 have one replica each and are not on rank 0: the lower


def random_plan(seed, layers=3, experts=16, ranks=4, per_rank=6, empty=0):
    """No expert twice on a rank; some redundant slots empty."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(layers):
        table = np.full((ranks, per_rank), -1)
        for expert in rng.permutation(experts):
            rank = rng.choice(np.flatnonzero((table == -1).any(axis=1)))
            table[rank, np.flatnonzero(table[rank] == -1)[0]] = expert
        for rank, slot in np.argwhere(table == -1)[empty:]:
            table[rank, slot] = rng.choice(np.setdiff1d(np.arange(experts), table[rank]))
        rows.append(np.concatenate([rng.permutation(row) for row in table]))
    ids = np.sort(rng.choice(layers + 3, layers, replace=False))
    return Placement(np.stack(rows), np.repeat(np.arange(ranks), per_rank), experts, ranks, ids)


def test_golden_files(tmp_path):
    out = tmp_path / "file"
    assert sglang.write(SMALL, out, num_hidden_layers=4) == 1
    trivial = [0, 1, 2, 3, 0, 1]
    assert json.loads(out.read_text()) == {"physical_to_logical_map": [trivial, ROWS[0], trivial, ROWS[1]]}
    made = tensorrt.write(SMALL, out, num_hidden_layers=4, num_mtp_layers=2)
    assert (made.layers, made.filled, made.unplanned) == (4, 1, 2)
    assert out.read_text() == (
        "num_slots: 6\ninitial_global_assignments:\n  1: [3, 0, 2, 1, 2, 0]\n  3: [1, 2, 0, 2, 3, 0]\n"
        "  4: [0, 1, 2, 3, 0, 1]\n  5: [0, 1, 2, 3, 0, 1]\nlayer_updates_per_iter: 0\n"
    )
    assert ascend.write(SMALL, out) == (1, 0)
    layers = [
        {"layer_id": at, "device_count": 2,
         "device_list": [{"device_id": d, "device_expert": row[3 * d : 3 * d + 3]} for d in range(2)]}
        for at, row in enumerate(ROWS)
    ]  # fmt: skip
    assert json.loads(out.read_text()) == {"moe_layer_count": 2, "layer_list": layers}
    assert vllm.write_49572(SMALL, out) == (1, 0)
    assert json.loads(out.read_text()) == ROWS
    once = Placement(np.array([[2, 0, 1, 3], [0, 2, 3, 1]]), np.array([0, 0, 1, 1]), 4, 2)
    vllm.write_34811(once, out)
    assert json.loads(out.read_text()) == {"expert_to_ep_rank": [0, 1, 0, 1]}


def parsed(name, text, plan):
    """Slots of the planned layers, as the engine would look them up."""
    if name == "tensorrt-llm":
        data = yaml.safe_load(text)
        assert data["num_slots"] % plan.num_devices == 0 and data["layer_updates_per_iter"] == 0
        rows = [data["initial_global_assignments"][layer] for layer in plan.layer_ids_L.tolist()]
        assert all(set(row) == set(range(plan.num_experts)) for row in rows)  # what the engine asserts
        return rows
    data = json.loads(text)
    if name == "vllm-ascend":
        layers = [data["layer_list"][at] for at in range(data["moe_layer_count"])]  # it looks up by place
        return [[expert for device in layer["device_list"] for expert in device["device_expert"]] for layer in layers]
    if name == "sglang":
        return [data["physical_to_logical_map"][layer] for layer in plan.layer_ids_L.tolist()]
    return data


@pytest.mark.parametrize("name", ["sglang", "tensorrt-llm", "vllm-ascend", "vllm-49572"])
def test_poises_own_readers_read_them(tmp_path, name):
    plan, out = random_plan(0), tmp_path / ("map.yaml" if name == "tensorrt-llm" else "map.json")
    TARGETS[name].write(plan, out, ExportOptions(num_hidden_layers=6))
    record = read_slot_map(out)
    assert record.map_LS is not None
    rows = dict(zip(record.layer_ids_L.tolist(), record.map_LS.tolist(), strict=True))
    places = plan.layer_ids_L.tolist() if name in ("sglang", "tensorrt-llm") else range(3)
    assert [rows[layer] for layer in places] == plan.slot_expert_LS.tolist()


@pytest.mark.parametrize("name", ["sglang", "tensorrt-llm", "vllm-ascend", "vllm-49572"])
@pytest.mark.parametrize("seed", range(4))
def test_round_trips(tmp_path, name, seed):
    plan = random_plan(seed, empty=seed)
    made = TARGETS[name].write(plan, tmp_path / "file", ExportOptions(num_hidden_layers=6))
    rows = np.array(parsed(name, (tmp_path / "file").read_text(), plan))
    used = plan.slot_expert_LS >= 0
    assert made.filled == (~used).sum() == 3 * seed
    np.testing.assert_array_equal(rows[used], plan.slot_expert_LS[used])
    back = Placement(rows, plan.slot_device_S, plan.num_experts, plan.num_devices, plan.layer_ids_L)
    assert not back.has_duplicates and back.diff(back).fetched == 0
    assert made.command and str(tmp_path / "file") in made.command


def test_every_moe_layer_of_the_model_gets_a_row(tmp_path):
    model = replace(ModelSpec.generic(16, 2, np.arange(9)), moe_layer_ids=(2, 3, 5, 7, 8))
    plan = replace(random_plan(0), layer_ids_L=np.array([3, 5, 8]))
    made = TARGETS["tensorrt-llm"].write(plan, tmp_path / "t", ExportOptions(model, num_mtp_layers=1))
    data = yaml.safe_load((tmp_path / "t").read_text())["initial_global_assignments"]
    assert list(data) == [2, 3, 5, 7, 8, 9] and made.unplanned == 3
    assert data[2] == data[9] == [p % 16 for p in range(24)] and data[5] == plan.slot_expert_LS[1].tolist()
    made = TARGETS["vllm-ascend"].write(plan, tmp_path / "a", ExportOptions(model))
    layers = json.loads((tmp_path / "a").read_text())["layer_list"]
    assert len(layers) == 5 and made.unplanned == 2
    assert layers[2]["device_list"][0]["device_expert"] == plan.slot_expert_LS[1, :6].tolist()
    with pytest.raises(PlacementError, match="row for layer 3, the model's MoE layers are 4 to 6"):
        rows_for(plan, (4, 5, 6), engine="x")


def test_filling_takes_the_cheapest_expert_that_is_not_there():
    plan = Placement(np.array([[0, 1, -1, 2, 3, -1]]), np.array([0, 0, 0, 1, 1, 1]), 4, 2)
    table, filled = full_table(plan, engine="x", price_LE=np.array([[1.0, 9.0, 5.0, 3.0]]))
    assert filled == 2 and table.tolist() == [[0, 1, 3, 2, 3, 0]]
    crowded = Placement(np.array([[0, 1, -1]]), np.array([0, 0, 0]), 2, 1)
    assert full_table(crowded, engine="x")[0].tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    "name", [name for name in TARGETS if name not in ("npz", "megatron", "deepspeed", "checkpoint")]
)
def test_unequal_ranks_are_refused_and_nothing_is_written(tmp_path, name):
    uneven = Placement(np.array([[0, 1, 2]]), np.array([0, 0, 1]), 3, 2)
    with pytest.raises(PlacementError, match="1 to 2"):
        TARGETS[name].write(uneven, tmp_path / "file", ExportOptions(num_hidden_layers=1))
    assert not list(tmp_path.iterdir())


def test_what_a_format_cannot_say_is_refused(tmp_path):
    out = tmp_path / "file"
    with pytest.raises(PlacementError, match="6 slots for 4 experts"):
        vllm.write_34811(SMALL, out)
    moved = Placement(np.array([[0, 1, 2, 3], [0, 2, 1, 3]]), np.array([0, 0, 1, 1]), 4, 2, np.array([4, 9]))
    with pytest.raises(PlacementError, match="expert 1 is on rank 0 in layer 4 and on rank 1 in layer 9"):
        vllm.write_34811(moved, out)
    twice = Placement(np.array([[0, 0, 1, 2]]), np.array([0, 0, 1, 1]), 3, 2)
    with pytest.raises(PlacementError, match="device 0 holds expert 0 2 times"):
        ascend.write(twice, out)
    with pytest.raises(OptionError, match="2 MTP layers"):
        tensorrt.write(SMALL, out, num_mtp_layers=2)
    with pytest.raises(OptionError, match="layer 3"):
        tensorrt.write(SMALL, out, num_mtp_layers=2, num_hidden_layers=3)
    with pytest.raises(OptionError, match="every decoder layer"):
        TARGETS["sglang"].write(SMALL, out, ExportOptions())
    assert not out.exists()


def test_open_proposals_say_that_no_release_loads_them(tmp_path):
    plan = Placement(np.array([[2, 0, 1, 3]]), np.array([0, 0, 1, 1]), 4, 2)
    for name in ("vllm-34811", "vllm-49572"):
        made = TARGETS[name].write(plan, tmp_path / name, ExportOptions())
        text = " ".join(made.notes)
        assert name[5:] in text and "no release loads" in text and "checkpoint" in text and "POISE_STATIC_MAP" in text


def test_commands_can_be_pasted_and_name_the_ranks(tmp_path):
    plan = Placement(np.array([[2, 0, 1, 3]]), np.array([0, 0, 1, 1]), 4, 2)
    path = tmp_path / "a map: \U0001f642"
    made = TARGETS["tensorrt-llm"].write(plan, path, ExportOptions())
    assert yaml.safe_load(made.command) == {
        "moe_config": {"load_balancer": str(path)}, "enable_attention_dp": True, "tensor_parallel_size": 2,
        "moe_expert_parallel_size": 2,
    }  # fmt: skip
    for name in ("vllm-ascend", "vllm-34811", "vllm-49572"):
        made = TARGETS[name].write(plan, path, ExportOptions())
        words = shlex.split(made.command)
        assert words[:3] == ["--enable-expert-parallel", "--tensor-parallel-size", "2"]
        assert any("tensor-parallel x data-parallel size must be 2" in note for note in made.notes)


@pytest.mark.parametrize("name", ["megatron", "deepspeed"])
def test_orders_name_the_page_that_applies_them(tmp_path, name):
    made = TARGETS[name].write(Placement(np.array([[1, 0]]), np.array([0, 1]), 2, 2), tmp_path / "o", ExportOptions())
    page = re.search(r"docs/\w+\.md", made.notes[0])
    assert page and "apply_order_to_state" in (Path(__file__).parents[2] / page[0]).read_text("utf-8")


def test_engines_move_weights_to_our_maps(sglang_wheel, vllm_wheel, tmp_path, subtests, monkeypatch):
    """Their own movers, four processes over gloo: ``mover_cases.py``."""
    monkeypatch.setenv("POISE_TEST_WHEEL", str(sglang_wheel))
    monkeypatch.setenv("POISE_TEST_VLLM", str(vllm_wheel(VLLM)))
    monkeypatch.setenv("POISE_TEST_FOLDER", str(tmp_path))
    judge("tests/engines/mover_cases.py", CASES, tmp_path / "results.jsonl", subtests)
