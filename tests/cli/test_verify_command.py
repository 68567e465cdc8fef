"""poise verify on dumps in the engines' own layout."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from poise.cli.main import app
from poise.engines import sglang
from poise.planning.placement import Placement

LAYERS, MOE, EXPERTS, DEVICES = 6, np.array([1, 2, 4]), 8, 4


def run(*args):
    return CliRunner().invoke(app, ["verify", *map(str, args)])


@pytest.fixture
def plan(tmp_path):
    rng = np.random.default_rng(5)
    slots = np.stack([rng.permutation(np.r_[0:8, 0:4]) for _ in MOE]).astype(np.int32)
    placement = Placement(slots, np.repeat(np.arange(DEVICES), 3), EXPERTS, DEVICES, MOE)
    placement.save(tmp_path / "placement.npz")
    return placement


def per_pass(path, running_LS, passes=4):
    """SGLang's recorder, mode per_pass: counts of slots, and the map at the end."""
    rng = np.random.default_rng(1)
    counts = torch.from_numpy(rng.integers(1, 50, (passes, *running_LS.shape)))
    counts[:, [0, 3, 5]] = 0  # dense layers
    records = [{"forward_pass_id": i, "rank": 0, "gatherer_key": "primary", "global_physical_count": count}
               for i, count in enumerate(counts)]  # fmt: skip
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(running_LS)}, path)


def test_a_live_map_is_live_and_a_dropped_one_is_named(plan, tmp_path):
    running, _ = sglang.physical_to_logical(plan, LAYERS)
    per_pass(tmp_path / "expert_distribution_recorder_1_0.pt", running)
    done = run(tmp_path / "placement.npz", tmp_path / "expert_distribution_recorder_1_0.pt")
    assert done.exit_code == 0 and "the plan runs in all 3 layers" in done.stdout
    dropped = running.copy()
    dropped[2] = np.arange(12) % 8
    per_pass(tmp_path / "expert_distribution_recorder_2_0.pt", dropped)
    done = run(tmp_path / "placement.npz", tmp_path / "expert_distribution_recorder_2_0.pt", "--json")
    assert done.exit_code == 1 and "does not run in 1 of 3 layers, 1 of them the trivial map" in done.stderr
    facts = json.loads(done.stdout)
    assert facts["live"] is False and facts["evidence"] == "map"
    assert [(layer["layer"], layer["state"]) for layer in facts["layers"]] == [
        (1, "live"),
        (2, "trivial map"),
        (4, "live"),
    ]


def test_a_server_log_with_its_traffic_tells_too(tmp_path):
    load = np.full((1, LAYERS, EXPERTS), 10)
    load[:, :, :2] = 100
    load[:, [0, 3, 5]] = 0
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": load[0].tolist()}))
    slots = np.tile([0, 2, 3, 1, 4, 5, 0, 6, 7, 1, 2, 3], (3, 1)).astype(np.int32)
    Placement(slots, np.repeat(np.arange(DEVICES), 3), EXPERTS, DEVICES, MOE).save(tmp_path / "placement.npz")
    line = "INFO 11-25 10:00:00 [eplb_state.py:500] EPLB step: {} for model m: avg_tokens={:.2f}, max_tokens=100, balancedness={:.4f}"
    for name, balance in (("on", 0.93), ("off", 0.55)):
        (tmp_path / f"{name}.log").write_text(
            "\n".join(line.format(i, 100 * balance, balance) for i in range(1)) + "\n"
        )
    on = run(tmp_path / "placement.npz", tmp_path / "on.log", "--traffic", tmp_path / "loads.json")
    assert on.exit_code == 0 and "seems to run" in on.stdout, on.output
    off = run(tmp_path / "placement.npz", tmp_path / "off.log", "--traffic", tmp_path / "loads.json")
    assert off.exit_code == 1 and "does not seem to run" in off.stderr
    alone = run(tmp_path / "placement.npz", tmp_path / "on.log")
    assert alone.exit_code == 2 and "neither what slots hold" in alone.stderr


def test_another_model_is_refused(plan, tmp_path):
    per_pass(tmp_path / "a.pt", np.tile(np.arange(16) % 8, (LAYERS, 1)))
    done = run(tmp_path / "placement.npz", tmp_path / "a.pt")
    assert done.exit_code == 2 and "16 slots a layer, the placement has 12" in done.stderr
