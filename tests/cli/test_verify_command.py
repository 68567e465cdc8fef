"""poise verify on dumps in the engines' own layout."""

import json

import numpy as np
import pytest
import torch
from tests.engines import runs
from typer.testing import CliRunner

from poise.cli.main import app
from poise.engines import sglang
from poise.planning.methods.eplb import rebalance_experts
from poise.planning.placement import Placement
from poise.routing.trace import RoutingTrace

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


def per_pass(path, running_LS, passes=4, *, never_set_back=False):
    """SGLang's recorder, mode per_pass: counts of slots, and the map at the end."""
    rng = np.random.default_rng(1)
    counts = torch.from_numpy(rng.integers(1, 50, (passes, *running_LS.shape)))
    counts[:, [0, 3, 5]] = 0  # dense layers
    counts = counts.cumsum(0) if never_set_back else counts
    records = [{"forward_pass_id": i, "rank": 0, "gatherer_key": "primary", "global_physical_count": count}
               for i, count in enumerate(counts)]  # fmt: skip
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(running_LS)}, path)


def test_totals_prove_a_map_and_are_told(plan, tmp_path):
    running, _ = sglang.physical_to_logical(plan, LAYERS)
    for never_set_back in (False, True):
        per_pass(tmp_path / "expert_distribution_recorder_1_0.pt", running, never_set_back=never_set_back)
        done = run(tmp_path / "placement.npz", tmp_path / "expert_distribution_recorder_1_0.pt")
        assert done.exit_code == 0 and "the plan runs in all 3 layers" in done.stdout
        assert ("running totals, not steps" in done.stderr and "read as steps" in done.stderr) == never_set_back


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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Logs of passes under the plan and under the trivial map, with the tokens that ran."""
    folder, rng = tmp_path_factory.mktemp("server"), np.random.default_rng(2)
    share_LE = runs.popularity(rng, 4, 16, 1.2)
    trivial = np.tile(np.arange(20) % 16, (4, 1)).astype(np.int32)
    fit = runs.loads(runs.tokens(rng, share_LE, 2, 4000), 16).load_BLE[0]
    table = rebalance_experts(fit, 20, 1, 1, 4)[0].astype(np.int32)
    Placement(table, np.repeat(np.arange(4), 5), 16, 4).save(folder / "placement.npz")
    for name, running in (("on", table), ("off", trivial)):
        mean, most, chosen = runs.passes(rng, share_LE, 2, rng.integers(400, 1600, 16), running, 4)
        RoutingTrace(chosen, 16).save(folder / f"{name}.npz")
        lines = [
            f"INFO 11-25 10:00:00 [eplb_state.py:500] EPLB step: {(20 + i) % 30} for model m: avg_tokens={a:.2f}, "
            f"max_tokens={int(b)}, balancedness={a / b:.4f}, steps until the next rearrangement: 9"
            for i, (a, b) in enumerate(zip(mean, most, strict=True))
        ]
        (folder / f"{name}.log").write_text("\n".join(lines) + "\n")
    return folder


PLUGIN = (
    "INFO [vllm_plugin.py:64] poise plans expert placement: PolicySettings(cluster=None, "
    "static_map=StaticMap(path=PosixPath('p.npz')))\n"
)


def test_a_server_log_tells_only_what_no_other_map_explains(server, tmp_path):
    def check(name, head="", *more):
        log = tmp_path / f"{name}.log"
        log.write_text(head + (server / log.name).read_text())
        done = run(server / "placement.npz", log, "--traffic", server / f"{name}.npz", "--json", *more)
        return done.exit_code, json.loads(done.stdout), done.stderr

    code, facts, _ = check("on", PLUGIN)
    assert (code, facts["verdict"], facts["live"]) == (0, "live", True)
    assert [m["map"] for m in facts["maps"] if m["explains"]] == ["plan"]
    assert {"trivial map", "contiguous map"} < {m["map"] for m in facts["maps"]}
    code, facts, said = check("on")  # without the plugin's line the engine's own balancer explains it as well
    assert (code, facts["verdict"]) == (1, "undecided") and "engine's own balancer" in said
    assert check("on", "", "--balancer-off")[1]["verdict"] == "live"
    assert check("on", PLUGIN + "WARNING poise: no; vLLM's own algorithm answers\n")[1]["verdict"] == "undecided"
    assert check("on", PLUGIN, "--against", server / "placement.npz")[1]["verdict"] == "live"
    code, facts, said = check("off", PLUGIN)
    assert code == 1 and facts["verdict"] == "not-live" and "the trivial map" in said
    alone = run(server / "placement.npz", server / "on.log")
    assert alone.exit_code == 2 and "neither what slots hold" in alone.stderr
    assert run(server / "placement.npz", server / "on.log", "--error-rate", 0).exit_code == 2
    words = run(server / "placement.npz", server / "off.log", "--traffic", server / "off.npz")
    assert "what each map would give" in words.stdout and "the plan runs" not in words.output


def test_a_file_is_a_file(plan, tmp_path):
    sglang.write(plan, tmp_path / "map.json", num_hidden_layers=LAYERS)
    done = run(tmp_path / "placement.npz", tmp_path / "map.json")
    assert done.exit_code == 1 and "whether the engine runs it, this file cannot say" in " ".join(done.stderr.split())
    assert "live" not in done.output and "matches" in done.stdout


def test_another_model_is_refused(plan, tmp_path):
    per_pass(tmp_path / "a.pt", np.tile(np.arange(16) % 8, (LAYERS, 1)))
    done = run(tmp_path / "placement.npz", tmp_path / "a.pt")
    assert done.exit_code == 2 and "16 slots a layer, the placement has 12" in done.stderr
