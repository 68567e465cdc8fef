"""vllm-ascend's own code, from its wheel, on CPU: what its loader makes of our file, and we of what it records."""

import importlib
import json
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tests.engines import engine_stubs
from tests.engines.test_exports import random_plan

from poise.engines.exports import TARGETS, ExportOptions
from poise.engines.readers import read_slot_map
from poise.machine.model import ModelSpec
from poise.util.errors import PlacementError, TraceError


class Whatever(type):
    """A class that has whatever is asked of it."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Anything(ModuleType):
    """A module that has whatever is imported from it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Whatever(name, (), {})


class Rest(MetaPathFinder, Loader):
    """Finds what nobody else does of the two engines."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith(("vllm.", "vllm_ascend.")) else None

    def create_module(self, spec):
        return Anything(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture
def engine(ascend_wheel, monkeypatch):
    """Its loader (``eplb/core/eplb_utils.py``) and its recorder (``eplb/adaptor/vllm_adaptor.py``)."""
    monkeypatch.setattr(torch.Tensor, "npu", lambda self: self, raising=False)
    with engine_stubs.borrowed("vllm"), engine_stubs.borrowed("vllm_ascend"), engine_stubs.borrowed("torch_npu"):
        log = SimpleNamespace(warning=lambda *_: None, info=lambda *_: None, debug=lambda *_: None)
        engine_stubs.put({"vllm": {}, "vllm.logger": {"logger": log}, "torch_npu": {}})
        root = ascend_wheel / "vllm_ascend"
        engine_stubs.put(
            {"vllm_ascend": {}, "vllm_ascend.eplb": {}, "vllm_ascend.eplb.core": {}, "vllm_ascend.eplb.adaptor": {}},
            paths={
                "vllm_ascend.eplb.core": root / "eplb" / "core",
                "vllm_ascend.eplb.adaptor": root / "eplb" / "adaptor",
            },
        )
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Rest()])
        yield importlib.import_module("vllm_ascend.eplb.core.eplb_utils")


def loaded(engine, path, layer, rank, ranks, experts):
    """(slot of each expert on every rank, this rank's, slot of each expert that this rank sends to, redundant experts)."""
    config = SimpleNamespace(expert_map_path=str(path), dynamic_eplb=False, num_redundant_experts=0)
    return engine.init_eplb_config(
        config, layer, SimpleNamespace(num_experts=experts, ep_size=ranks, ep_rank=rank), tp_size=1
    )


@pytest.mark.parametrize("seed", range(3))
def test_its_loader_holds_what_was_planned(engine, tmp_path, seed):
    plan = random_plan(seed)
    TARGETS["vllm-ascend"].write(plan, tmp_path / "map.json", ExportOptions())
    each = plan.num_slots // plan.num_devices
    for layer, row in enumerate(plan.slot_expert_LS):
        for rank in range(plan.num_devices):
            every, mine, log2phy, redundant = loaded(engine, tmp_path / "map.json", layer, rank, 4, 16)
            assert redundant == plan.num_slots - plan.num_experts
            held = [[int((each_rank == slot).nonzero()) for slot in range(each)] for each_rank in every]
            assert np.concatenate(held).tolist() == row.tolist()
            assert torch.equal(mine, every[rank])
            assert row[log2phy.numpy()].tolist() == list(range(16))  # a slot that it sends to holds the expert


def test_layers_of_multi_token_prediction(engine, tmp_path):
    """One may lack a row, a second ends the start; with rows both are there."""
    plan = random_plan(0)
    TARGETS["vllm-ascend"].write(plan, tmp_path / "map.json", ExportOptions())
    assert engine.expert_file_to_tensor(tmp_path / "map.json", 3) == (None, plan.num_slots)
    with pytest.raises(ValueError, match="Invalid EPLB Table"):
        engine.expert_file_to_tensor(tmp_path / "map.json", 4)
    ids = tuple(plan.layer_ids_L.tolist())
    model = ModelSpec("small", ids[-1] + 1, ids, 16, 2, 64, 32)
    TARGETS["vllm-ascend"].write(plan, tmp_path / "map.json", ExportOptions(model, num_mtp_layers=2))
    for layer in (3, 4):
        rows, slots = engine.expert_file_to_tensor(tmp_path / "map.json", layer)
        assert slots == plan.num_slots and rows.flatten().tolist() == [p % 16 for p in range(24)]


def test_an_expert_twice_on_a_rank_would_lose_a_slot(engine, tmp_path):
    """Why the export refuses it: the loader keeps the last place of an expert, the other slot computes nothing."""
    layer = {"layer_id": 0, "device_count": 2, "device_list": [{"device_id": 0, "device_expert": [0, 0, 1]},
                                                               {"device_id": 1, "device_expert": [2, 3, 1]}]}  # fmt: skip
    (tmp_path / "map.json").write_text(json.dumps({"moe_layer_count": 1, "layer_list": [layer]}))
    every, *_ = loaded(engine, tmp_path / "map.json", 0, 0, 2, 4)
    assert every[0].tolist() == [1, 2, -1, -1]
    from poise.engines import ascend
    from poise.planning.placement import Placement

    with pytest.raises(PlacementError, match="holds expert 0 2 times"):
        ascend.write(Placement(np.array([[0, 0, 1, 2, 3, 1]]), np.repeat([0, 1], 3), 4, 2), tmp_path / "no")


def test_what_it_records_is_read_as_it_runs(engine, tmp_path):
    """Maps as its loader holds them, written by its recorder."""
    plan = random_plan(5)
    TARGETS["vllm-ascend"].write(plan, tmp_path / "map.json", ExportOptions())
    maps = torch.stack([loaded(engine, tmp_path / "map.json", layer, 0, 4, 16)[0] for layer in range(3)])
    adaptor = importlib.import_module("vllm_ascend.eplb.adaptor.vllm_adaptor").VllmEplbAdaptor
    adaptor._export_tensor_to_file(SimpleNamespace(rank_id=0), maps, str(tmp_path / "recorded.json"))
    seen = read_slot_map(tmp_path / "recorded.json")
    np.testing.assert_array_equal(seen.map_LS, plan.slot_expert_LS)
    assert seen.num_devices == 4


def test_a_name_that_it_refuses_is_said(tmp_path):
    """``ascend_config.py``: the file's name must end in .json."""
    plan = random_plan(0)
    for name, said in (("map.json", False), ("map.txt", True)):
        made = TARGETS["vllm-ascend"].write(plan, tmp_path / name, ExportOptions())
        assert any("ends in .json" in note for note in made.notes) == said


def test_another_number_of_devices_than_are_listed(tmp_path):
    layer = {"layer_id": 0, "device_count": 4, "device_list": [{"device_id": d, "device_expert": [2 * d, 2 * d + 1]} for d in range(2)]}  # fmt: skip
    (tmp_path / "map.json").write_text(json.dumps({"moe_layer_count": 1, "layer_list": [layer]}))
    with pytest.raises(TraceError, match="layer_id 0: device_count is 4, device_list has 2"):
        read_slot_map(tmp_path / "map.json")
