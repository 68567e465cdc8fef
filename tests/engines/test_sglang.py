"""SGLang's own loader, from its wheel, takes our file and reads our map from it."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from poise.engines import sglang
from poise.planning.placement import Placement
from poise.util.errors import PlacementError

LAYERS, EXPERTS, DEVICES = 6, 8, 4


def placement(seed=0, empty=False):
    """Layers 2, 3, 5 of 6 are MoE; 12 slots on 4 devices."""
    rng = np.random.default_rng(seed)
    rows = [np.concatenate([rng.permutation(EXPERTS), rng.permutation(EXPERTS)[:4]]) for _ in range(3)]
    slots = np.stack(rows).astype(np.int32)
    if empty:
        slots[:, 8:] = -1
    return Placement(slots, np.repeat(np.arange(DEVICES), 3), EXPERTS, DEVICES, np.array([2, 3, 5]))


class Settings(SimpleNamespace):
    """Engine settings; those that a test does not name are off."""

    def __getattr__(self, name):
        return None


@pytest.fixture
def loader(sglang_wheel, monkeypatch):
    """``compute_initial_expert_location_metadata`` with the parts of the engine that it asks for."""

    def load(path, redundant):
        execution = SimpleNamespace(
            moe=Settings(init_expert_location=str(path), ep_num_redundant_experts=redundant, ep_join_mode="none",
                                ep_dispatch_algorithm=None, moe_a2a_backend="none")
        )  # fmt: skip
        parallel = Settings(nnodes=1, ep_size=DEVICES, elastic_ep_initial_size=None, tp_size=DEVICES)
        parts = {
            "sglang": {}, "sglang.srt": {},
            "sglang.srt.runtime_context": {
                "get_device": lambda: SimpleNamespace(device="cpu"), "get_exec": lambda: execution,
                "get_parallel": lambda: parallel, "get_resources": lambda: SimpleNamespace(),
            },
            "sglang.srt.model_loader": {"get_model_architecture": lambda config: (config, None)},
            "sglang.srt.elastic_ep": {},
            "sglang.srt.elastic_ep.elastic_ep": {"elastic_expanded_world_enabled": lambda: False},
        }  # fmt: skip
        for name, values in parts.items():
            module = ModuleType(name)
            module.__path__ = []
            module.__dict__.update(values)
            monkeypatch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location(
            "engine_location", sglang_wheel / "sglang/srt/eplb/expert_location.py"
        )
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "engine_location", module)
        spec.loader.exec_module(module)
        shape = module.ModelConfigForExpertLocation(num_layers=LAYERS, num_logical_experts=EXPERTS)
        model = SimpleNamespace(hf_config=None, get_model_config_for_expert_location=lambda config: shape)
        return module.compute_initial_expert_location_metadata(model, 0)

    return load


@pytest.mark.parametrize("empty", [False, True])
def test_the_engines_loader_reads_our_map(loader, tmp_path, empty):
    plan = placement(empty=empty)
    filled = sglang.write(plan, tmp_path / "map.json", num_hidden_layers=LAYERS)
    assert filled == (12 if empty else 0)
    got = loader(tmp_path / "map.json", redundant=4)
    table = got.physical_to_logical_map.numpy()
    expected, _ = sglang.physical_to_logical(plan, LAYERS)
    np.testing.assert_array_equal(table, expected)
    used = plan.slot_expert_LS >= 0
    np.testing.assert_array_equal(table[[2, 3, 5]][used], plan.slot_expert_LS[used])
    for row in table:  # dense layers too
        assert set(row.tolist()) == set(range(EXPERTS))
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        slots = got.logical_to_all_physical_map[layer, expert]
        assert sorted(slots[slots >= 0].tolist()) == np.flatnonzero(table[layer] == expert).tolist()


def test_only_the_one_key_is_written_and_it_reads_back(tmp_path):
    plan = placement(3)
    sglang.write(plan, tmp_path / "map.json", num_hidden_layers=LAYERS)
    data = json.loads((tmp_path / "map.json").read_text())
    assert list(data) == ["physical_to_logical_map"]
    back = sglang.read(tmp_path / "map.json", num_devices=DEVICES)
    np.testing.assert_array_equal(back.slot_expert_LS[[2, 3, 5]], plan.slot_expert_LS)


def test_filled_slots_add_no_duplicate_where_there_is_room():
    table, _ = sglang.physical_to_logical(placement(empty=True), LAYERS)
    for row in table[[2, 3, 5]]:
        for device in range(DEVICES):
            held = row[3 * device : 3 * device + 3]
            assert len(set(held.tolist())) == 3


def test_what_sglang_cannot_load_is_refused_and_not_written(tmp_path):
    uneven = Placement(np.array([[0, 1, 2]]), np.array([0, 0, 1]), 3, 2)
    with pytest.raises(PlacementError, match="1 to 2"):
        sglang.write(uneven, tmp_path / "a.json", num_hidden_layers=1)
    with pytest.raises(PlacementError, match="reaches layer 5, the model has 4"):
        sglang.write(placement(), tmp_path / "a.json", num_hidden_layers=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}",
     '{"physical_to_logical_map": [[0, 1], [0]]}',
                                  '{"physical_to_logical_map": [[0, "a"]]}', '{"physical_to_logical_map": [[0, -1]]}',
                                  '{"physical_to_logical_map": [[0, 1, 2]]}', '{"physical_to_logical_map": 1e999}'])  # fmt: skip
def test_broken_files_are_placement_errors(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(PlacementError):
        sglang.read(tmp_path / "a.json", num_devices=2)
