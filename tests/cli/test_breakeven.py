"""poise breakeven and compare --fast from the command line."""

import json
from importlib.resources import files

import numpy as np
import pytest
from typer.testing import CliRunner

from poise.cli.main import app
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.replay.breakeven import breakeven, drifting_batch
from poise.util.errors import OptionError

DEMO = str(files("poise") / "data" / "demo_trace.npz")
SMALL = f"{DEMO}#domain=python"


def run(*args):
    return CliRunner().invoke(app, list(args))


def test_breakeven_from_the_command_line():
    got = run("breakeven", "-c", "1x4:h100", "-m", "mixtral-8x7b", "--sizes", "64,16384", "--step-slots", "0,2",
              "--steps", "3", "--json")  # fmt: skip
    assert got.exit_code == 0, got.output
    said = json.loads(got.stdout)
    assert [row["tokens"] for row in said["rows"]] == [64, 16384]
    assert said["rows"][0]["speedup"]["0"] >= 0.97
    assert "pays" in said["verdict"] or "Not worth it" in said["verdict"]
    for bad in (["--sizes", "8,4"], ["--sizes", "x"], ["--step-slots", "-1"], ["--traffic", "pigeon"]):
        assert run("breakeven", "-c", "1x4", "-m", "mixtral-8x7b", *bad).exit_code == 2


def test_large_batches_pay_and_tiny_ones_do_not():
    got = breakeven(
        Cluster.parse("1x8:h100+datasheet"), ModelSpec.parse("llama-4-maverick"), sizes=(64, 65536), slots=(2,), steps=4
    )
    assert got.rows[1].speedups[0] > 1.05 and got.rows[0].speedups[0] > 0.97
    assert got.pays_from == 65536 and got.slots_wanted() == 2
    with pytest.raises(OptionError, match="ascend"):
        breakeven(Cluster.parse("1x2"), ModelSpec.parse("mixtral-8x7b"), sizes=())


def test_drifting_loads_have_the_tokens_asked_for():
    batch = drifting_batch(100, 4, 2, 8, 2, skew=2.0, seed=0)
    np.testing.assert_allclose(batch.load_BLE.sum(axis=2), 200)


def test_compare_with_a_fast_loop():
    got = run("compare", DEMO, "-c", "1x4:h100", "-r", "4", "-n", "256", "--steps", "6", "--warm-up", "0", "-p", "lpt",
              "--fast", "split", "--fast", "poise:objective=tokens", "--step-slots", "1", "--traffic", "home", "--json")  # fmt: skip
    assert got.exit_code == 0, got.output
    rows = {row["name"]: row for row in json.loads(got.stdout)["rows"] if row["judged_on"] == "held-out"}
    assert rows["lpt + poise:objective=tokens"]["imbalance"] < rows["lpt + split"]["imbalance"] + 1e-9
    assert rows["lpt + split"]["imbalance"] < rows["lpt"]["imbalance"]
    assert rows["lpt + poise:objective=tokens"]["moved_bytes_per_step"] > 0
    for bad in (
        ["--fast", "magic"],
        ["--fast", "split", "--fast-over", "nobody"],
        ["--fast", "split", "--predictor", "x"],
    ):
        assert run("compare", DEMO, "-c", "1x4", "-p", "lpt", "-n", "4096", *bad).exit_code == 2


def test_plan_says_what_it_gains(tmp_path):
    got = run("plan", SMALL, "-c", "1x4:h100", "-n", "2048", "--method", "lpt", "--time-limit", "0.2", "-o",
              str(tmp_path / "p.npz"), "--json")  # fmt: skip
    assert got.exit_code == 0, got.output
    assert "held-out" in json.loads(got.stdout)["verdict"] or "beats" in json.loads(got.stdout)["verdict"]
    again = run("plan", SMALL, "-c", "1x4:h100", "-n", "2048", "--time-limit", "0.2", "-o", str(tmp_path / "q.npz"),
                "--current", str(tmp_path / "p.npz"), "--migration-steps", "0.001", "--no-verdict", "--json")  # fmt: skip
    assert again.exit_code == 0 and json.loads(again.stdout)["verdict"] is None
