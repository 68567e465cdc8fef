"""poise convert: what it writes is what the other verbs read."""

import json

import numpy as np
import pytest
import torch
from tests.engines import dumps
from typer.testing import CliRunner

from poise.cli.main import app
from poise.planning.placement import Placement
from poise.routing.files import read
from poise.routing.trace import LoadProfile, RoutingTrace


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dumps.CONFIG))
    return tmp_path / "config.json"


def made(tmp_path, name, seed=0):
    (tmp_path / name).mkdir()
    return tmp_path / name, dumps.MAKERS[name](tmp_path / name, np.random.default_rng(seed))


def test_tokens_become_a_trace_that_plan_takes(tmp_path, config):
    place, known = made(tmp_path, "sglang_per_token")
    got = run("convert", place, "-o", tmp_path / "t.npz", "--model", config, "--json")
    assert got.exit_code == 0, got.output
    facts = json.loads(got.stdout)
    assert (facts["engine"], facts["kind"], facts["wrote"]) == ("sglang", "per-token", "trace")
    assert facts["trace"] == {"tokens": 30, "requests": 4, "decoded": 12, "layers": dumps.MOE, "experts": 8, "top_k": 2}
    assert facts["slots"]["slots"] == dumps.SLOTS and facts["recorded_layers"] == dumps.LAYERS
    trace = read(tmp_path / "t.npz")
    assert isinstance(trace, RoutingTrace)
    np.testing.assert_array_equal(trace.experts, known.experts_TLK)
    got = run("plan", tmp_path / "t.npz", "-c", "1x4", "--method", "lpt", "--model", config, "-o", tmp_path / "p.npz")
    assert got.exit_code == 0, got.output
    assert Placement.load(tmp_path / "p.npz").layer_ids_L.tolist() == dumps.MOE
    got = run("convert", place, "-o", tmp_path / "t.json")
    assert got.exit_code == 2 and "name it .npz" in got.stderr


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_loads_become_a_profile_with_their_layer_numbers(tmp_path, suffix):
    place, known = made(tmp_path, "sglang_per_pass")
    out = tmp_path / f"loads.{suffix}"
    got = run("convert", place, "-o", out)
    assert got.exit_code == 0 and "EngineDump(sglang per-pass: loads of 3 steps" in got.stdout
    profile = read(out)
    assert isinstance(profile, LoadProfile) and profile.layer_ids.tolist() == dumps.MOE
    np.testing.assert_array_equal(profile.load_BLE, known.load_BLE)
    if suffix == "json":
        assert np.shape(json.loads(out.read_text())["logical_count"]) == (3, dumps.LAYERS, dumps.EXPERTS)
        again = run("convert", out, "-o", tmp_path / "again.json")
        assert again.exit_code == 0 and (tmp_path / "again.json").read_bytes() == out.read_bytes()
    assert run("plan", out, "-c", "1x4", "--method", "lpt", "-o", tmp_path / "p.npz").exit_code == 0


def test_maps_become_placements_if_asked(tmp_path, config):
    place, _ = made(tmp_path, "vllm_49572")
    got = run("convert", place, "-o", tmp_path / "x.npz", "--model", config)
    said = " ".join(got.stderr.split())
    assert (
        got.exit_code == 2 and "a map of slots, no traffic" in said and "poise verify" in said and "--devices" in said
    )
    assert not (tmp_path / "x.npz").exists()
    place, known = made(tmp_path, "ascend_map")
    got = run("convert", place, "-o", tmp_path / "x.npz", "--model", config, "--json")  # the file has the devices
    assert got.exit_code == 0 and json.loads(got.stdout)["wrote"] == "placement"
    plan = Placement.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(plan.slot_expert_LS, known.map_LS)
    assert plan.num_devices == 4 and plan.layer_ids_L.tolist() == dumps.MOE
    assert run("convert", place, "-o", tmp_path / "y.npz", "--devices", 5).exit_code == 2


def test_a_balance_alone_is_told_and_not_written(tmp_path):
    place, _ = made(tmp_path, "vllm_log")
    got = run("convert", place, "-o", tmp_path / "x.npz")
    assert got.exit_code == 2 and "no traffic" in got.stderr and not (tmp_path / "x.npz").exists()


def test_a_map_of_the_engine_serves_as_placement(tmp_path):
    place, known = made(tmp_path, "sglang_per_token")
    for path in place.iterdir():
        data = torch.load(path, weights_only=True)
        map_LS = data.pop("last_physical_to_logical_map")
        torch.save(data, path)
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical_map": map_LS.tolist()}))
    assert run("convert", place, "-o", tmp_path / "t.npz").exit_code == 2
    got = run("convert", place, "-o", tmp_path / "t.npz", "--placement", tmp_path / "map.json")
    assert got.exit_code == 0, got.output
    np.testing.assert_array_equal(read(tmp_path / "t.npz").experts, known.experts_TLK)


def test_a_recorded_run_of_a_plan_is_verified(tmp_path, config):
    """Plan, run with the plan's map, record, and ask whether it is what ran."""
    load, _ = made(tmp_path, "sglang_stat")
    assert (
        run("plan", load / "expert_distribution_recorder_1.5.pt", "-c", "1x4", "-o", tmp_path / "p.npz").exit_code == 2
    )
    assert run("convert", load, "-o", tmp_path / "loads.json").exit_code == 0
    got = run("plan", tmp_path / "loads.json", "-c", "1x4", "-r", 4, "--method", "eplb", "-o", tmp_path / "p.npz")
    assert got.exit_code == 0, got.output
    plan = Placement.load(tmp_path / "p.npz")
    rng = np.random.default_rng(0)
    for name, map_LS in (("live", plan.slot_expert_LS), ("trivial", np.tile(np.arange(12) % 8, (3, 1)))):
        (tmp_path / name).mkdir()
        slots = dumps.slots_of(rng, dumps.choices(rng, 40), map_LS)
        record = dumps.token_record(0, 0, slots, range(40), [40], 1)
        torch.save(dumps.detail([record], dumps.on_all_layers(map_LS)), tmp_path / name / "x.pt")
    assert run("verify", tmp_path / "p.npz", tmp_path / "live").exit_code == 0
    got = run("verify", tmp_path / "p.npz", tmp_path / "trivial", "--json")
    assert got.exit_code == 1 and {layer["state"] for layer in json.loads(got.stdout)["layers"]} == {"trivial map"}


def test_usage(tmp_path):
    place, _ = made(tmp_path, "sglang_routed")
    got = run("convert", place, "-o", tmp_path / "t.npz")
    assert got.exit_code == 2 and "--top-k" in got.stderr
    assert run("convert", place, "-o", tmp_path / "t.npz", "--top-k", 2, "--num-experts", 8).exit_code == 0
    assert run("convert", place, "-o", tmp_path / "t.npz", "--format", "sglang").exit_code == 2
    assert run("convert", tmp_path / "nowhere", "-o", tmp_path / "t.npz").exit_code == 2
    assert run("convert", place, "-o", tmp_path / "no" / "t.npz").exit_code == 2


def test_identity_experts_are_set_apart(tmp_path):
    """Tokens and loads of 5 experts and 3 identity experts; the files say what share computes nothing."""
    place, known = made(tmp_path, "selection_trace")
    refused = run("convert", place, "--num-experts", 5, "-o", tmp_path / "t.npz")
    assert refused.exit_code == 2 and "--zero-experts 3" in " ".join(refused.stderr.split())
    got = run("convert", place, "--num-experts", 5, "--zero-experts", 3, "-o", tmp_path / "t.npz", "--json")
    assert got.exit_code == 0 and json.loads(got.stdout)["trace"]["experts"] == 5
    idle = float((known.experts_TLK >= 5).mean())
    assert json.loads(run("inspect", tmp_path / "t.npz", "--json").stdout)["identity_share"] == pytest.approx(idle)
    place, known = made(tmp_path, "load_history")
    for name in ("p.json", "p.npz"):
        got = run("convert", place, "--num-experts", 5, "--zero-experts", 3, "-o", tmp_path / name)
        assert got.exit_code == 0 and "computes nothing" in got.stderr
        profile = read(tmp_path / name)
        np.testing.assert_array_equal(profile.load_BLE.sum(axis=(1, 2)), known.load_BLE[:, :, :5].sum(axis=(1, 2)))
        np.testing.assert_array_equal(profile.idle_BL.sum(axis=1), known.load_BLE[:, :, 5:].sum(axis=(1, 2)))
        share = json.loads(run("inspect", tmp_path / name, "--json").stdout)["identity_share"]
        assert share == pytest.approx(known.load_BLE[:, :, 5:].sum() / known.load_BLE.sum())
