"""poise plan --survive and poise export --losses."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from poise.cli.main import app
from poise.machine.model import ModelSpec
from poise.planning.losses import Losses
from poise.planning.placement import EMPTY, Placement
from poise.routing.synthetic import zipf_trace


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


SIZES = {"num_hidden_layers": 2, "num_experts": 12, "num_experts_per_tok": 2, "hidden_size": 8,
         "moe_intermediate_size": 4}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survive")
    zipf_trace(num_tokens=200, num_layers=2, num_experts=12, top_k=2, tokens_per_request=8).save(folder / "t.npz")
    (folder / "config.json").write_text(json.dumps(SIZES))
    return folder


def plan(files, *words):
    return run("plan", files / "t.npz", "-c", "2x2", "-r", 12, "-m", files / "config.json", "--method", "eplb", "--no-verdict",
               "--work", 0.5, "-o", files / "p.npz", *words)  # fmt: skip


@pytest.mark.parametrize(("word", "losses"), [("1", [[0], [1], [2], [3]]), ("node", [[0, 1], [2, 3]])])
def test_a_plan_and_what_follows_each_loss(files, word, losses):
    got = plan(files, "--survive", word, "--survive-cost", 0.5, "--json")
    assert got.exit_code == 0, got.output
    data, each = json.loads(got.stdout), ModelSpec.parse(str(files / "config.json")).expert_bytes
    kept, placement = Losses.load(files / "p.losses.npz"), Placement.load(files / "p.npz")
    assert (kept.before.slot_expert_LS == placement.slot_expert_LS).all()
    assert [row["lost"] for row in data["losses"]] == losses == [list(loss.lost) for loss in kept.losses]
    held = placement.count_LED() > 0
    for row, loss in zip(data["losses"], kept.losses, strict=True):
        orphans = int((~np.delete(held, row["lost"], axis=2).any(axis=2)).sum())
        assert row["orphans"] == row["least_reads"] == orphans and row["read_bytes"] == orphans * each
        assert row["copied_bytes"] == loss.copies * each and row["bound"] <= row["after"] * (1 + 1e-9)
        assert row["after"] <= row["first"] * (1 + 1e-9)
    about = data["details"]["survive"]
    assert about["orphans"] == sum(row["orphans"] for row in data["losses"]) <= about["orphans_before"]
    assert about["cost"] <= 0.5 == about["most_cost"]
    said = plan(files, "--survive", word)
    assert said.exit_code == 0 and "vLLM's rule" in said.stdout and "--survive-cost" in said.stdout
    assert "p.losses.npz: what follows each loss" in said.stderr.replace("\n", "")


def test_copies_have_a_budget(files):
    got = plan(files, "--survive", "node", "--survive-copies", 0, "--json")
    assert {row["copies"] for row in json.loads(got.stdout)["losses"]} == {0}
    assert all(row["first"] == row["after"] for row in json.loads(got.stdout)["losses"])


@pytest.mark.parametrize("target", ["npz", "sglang", "vllm-ascend", "tensorrt-llm", "vllm-49572"])
def test_maps_after_each_loss_are_exported(files, target):
    assert plan(files, "--survive", "1").exit_code == 0
    kept, out = Losses.load(files / "p.losses.npz"), files / "map.out"
    words = ["export", files / "p.npz", "--to", target, "-m", files / "config.json"]
    got = run(*words, "-o", out, "--losses", files / "p.losses.npz", "--json")
    assert got.exit_code == 0, got.output
    said = json.loads(got.stdout)["losses"]
    assert [one["lost"] for one in said] == [[0], [1], [2], [3]] and {one["devices"] for one in said} == {3}
    for loss, one in zip(kept.losses, said, strict=True):
        assert one["file"] == str(files / f"map.lost-{loss.name}.out")
        loss.after_on_rest.save(files / "alone.npz")
        again = ["export", files / "alone.npz", "--to", target, "-m", files / "config.json", "-o", files / "again.out"]
        assert run(*again).exit_code == 0
        if target == "npz":
            alone = Placement.load(one["file"])
            assert (alone.slot_expert_LS == loss.after_on_rest.slot_expert_LS).all() and alone.num_devices == 3
            assert not (alone.slot_expert_LS == EMPTY).any()
        else:
            assert (files / "again.out").read_bytes() == (files / f"map.lost-{loss.name}.out").read_bytes()


def test_what_is_refused(files):
    assert plan(files, "--survive", "1").exit_code == 0
    few = run("plan", files / "t.npz", "-c", "2x2", "-r", 0, "-o", files / "q.npz", "--survive", 1, "--work", 0.1)
    assert few.exit_code == 1 and "9 slots are left for 12 experts" in few.stderr and "--redundant 4" in few.stderr
    assert not (files / "q.npz").exists()
    for words, text in (
        (["--survive", "rack"], "rack"), (["--survive", "1", "--survive-cost", -1], "at least 0"),
        (["--survive", "1", "--pooled"], "layer by layer"),
    ):  # fmt: skip
        got = plan(files, *words)
        assert got.exit_code == 2 and text in got.stderr, (words, got.output)
    one = run("plan", files / "t.npz", "-c", "1x4", "-r", 12, "-o", files / "q.npz", "--survive", "node", "--work", 0.1)
    assert one.exit_code == 2 and "1 node: nothing is left" in one.stderr
    other = Placement.load(files / "p.npz")
    Placement(other.slot_expert_LS[:, ::-1], other.slot_device_S, 12, 4).save(files / "other.npz")
    got = run("export", files / "other.npz", "--to", "npz", "-o", files / "x.npz", "--losses", files / "p.losses.npz")
    assert got.exit_code == 2 and "of another placement" in got.stderr and not (files / "x.npz").exists()
    got = run("export", files / "p.npz", "--to", "npz", "-o", files / "x.npz", "--losses", files / "p.npz")
    assert got.exit_code == 2 and "it is an expert placement" in got.stderr
