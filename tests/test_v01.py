"""What 0.1 wrote still loads, and its commands still run. The files were written by that version (goldens/v01)."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import poise
from poise.cli.main import app
from poise.engines.readers import ReadOptions, read_slot_map
from poise.planning.engine_rules import ANY, hold
from poise.planning.placement import EMPTY, Placement

V01 = Path(__file__).parent / "goldens" / "v01"
PLACEMENT = [[1, 3, 6, 0, 1, 2, 0, 2, 4, 2, 5, 7], [0, 2, 6, 0, 5, 7, 0, 1, 3, 2, 4, 5]]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_placements_and_traces_load():
    placement = Placement.load(V01 / "placement.npz")
    assert placement.slot_expert_LS.tolist() == PLACEMENT and placement.layer_ids_L.tolist() == [1, 3]
    assert placement.method == "lpt" and placement.fitted is None and placement.num_devices == 4
    empty = Placement.load(V01 / "empty_slots.npz")
    assert (empty.slot_expert_LS == EMPTY).sum() == 6 and hold(empty, ANY)[1] == 6
    trace = poise.read(V01 / "trace.npz")
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (240, 2, 2, 8)
    assert trace.domain_names == ("de", "en") and trace.home.max() == 3 and trace.layer_ids.tolist() == [1, 3]
    for name in ("loads.json", "loads.npz"):
        loads = poise.read(V01 / name)
        assert loads.layer_ids.tolist() == [1, 3] and loads.load_BLE.sum() == 2 * 480
    assert poise.ModelSpec.parse(str(V01 / "config.json")).moe_layer_ids == (1, 3)


@pytest.mark.parametrize("name", ["sglang.json", "tensorrt-llm.yaml", "vllm-49572.json", "vllm-ascend.json"])
def test_maps_load(name):
    record = read_slot_map(
        V01 / f"map.{name}", options=ReadOptions(model=poise.ModelSpec.parse(str(V01 / "config.json")))
    )
    assert record.layer_ids_L.tolist() == [1, 3] and record.map_LS.tolist() == PLACEMENT


def test_commands_run(tmp_path):
    trace, plan = V01 / "trace.npz", V01 / "placement.npz"
    out = tmp_path / "out.npz"
    commands = [
        ["inspect", trace, "--json"],
        ["inspect", V01 / "loads.json"],
        ["plan", trace, "-c", "1x4:h100", "-r", 4, "--time-limit", 0.2, "-o", out, "--json"],
        ["plan", f"{trace}#domain=de", "-c", "1x4", "--pooled", "--time-limit", 0.2, "-o", out, "--no-verdict"],
        ["plan", trace, "-c", "1x4:h100", "-r", 4, "--current", plan, "--method", "swift-balance", "-o", out],
        ["compare", trace, "-c", "1x4:h100", "-r", 4, "-p", "contiguous", "-p", "eplb", "-p", plan, "--split", "even"],
        ["compare", V01 / "loads.json", "-c", "2x2:h100", "-p", "contiguous", "-p", "lpt", "-n", 64, "--json"],
        ["diff", plan, V01 / "empty_slots.npz", "--json"],
        ["export", V01 / "empty_slots.npz", "--to", "sglang", "--num-hidden-layers", 4, "-o", tmp_path / "map.json"],
        ["convert", tmp_path / "map.json", "--devices", 4, "-o", tmp_path / "back.npz"],
        ["convert", V01 / "loads.json", "-o", tmp_path / "loads.json"],
    ]
    for command in commands:
        got = run(*command)
        assert got.exit_code == 0, (command, got.output, got.stderr)
    back = Placement.load(tmp_path / "back.npz")
    filled, _ = hold(Placement.load(V01 / "empty_slots.npz"), ANY)
    rows = [back.layer_ids_L.tolist().index(layer) for layer in (1, 3)]
    np.testing.assert_array_equal(back.count_LED()[rows], filled.count_LED())


def test_json_keeps_its_keys():
    got = run("compare", V01 / "trace.npz", "-c", "1x4:h100", "-p", "contiguous", "-p", "lpt", "--json")
    keys = {"name", "judged_on", "imbalance", "imbalance_p99", "cross_device_share", "cross_node_share", "step_seconds",
            "efficiency", "moved_bytes_per_step", "speedup", "planning_seconds"}  # fmt: skip
    data = json.loads(got.stdout)
    assert all(keys <= set(row) for row in data["rows"])
    assert {"rows", "verdict", "judged", "cluster", "model", "traffic", "split", "slots", "notes"} <= set(data)
