"""Routing groups on the command line: planned whole, exported as they are, compared, refused."""

import json

import numpy as np
import pytest
from benchmarks.group_trace import grouped_trace
from typer.testing import CliRunner

from poise import api
from poise.api import compared as compared_by
from poise.cli.main import app
from poise.planning.groups import WholeGroups
from poise.planning.methods.contiguous import deal
from poise.planning.placement import Placement

SIZES = {"num_hidden_layers": 2, "num_experts": 16, "num_experts_per_tok": 3, "hidden_size": 8,
         "moe_intermediate_size": 4, "n_group": 4, "topk_group": 2}  # fmt: skip


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def files(tmp_path):
    """Loads as the router's rule makes them, the tokens of them, and the model's sizes."""
    share = np.random.default_rng(0).normal(size=(2, 16))
    trace = grouped_trace(
        num_tokens=200, num_groups=4, groups_per_token=2, top_k=3, log_share_LE=share, tokens_per_request=40
    )
    in_groups = [len(set(row.tolist())) for row in (trace.experts // 4).reshape(-1, 3)]
    assert max(in_groups) == 2, "the router's rule"
    trace.save(tmp_path / "t.npz")
    loads = np.stack([np.bincount(trace.experts[:, layer].ravel(), minlength=16) for layer in range(2)])
    (tmp_path / "l.json").write_text(json.dumps({"logical_count": loads.tolist()}))
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return tmp_path


def planned(files, *words, cluster="2x2:h100", traffic="l.json"):
    return run("plan", files / traffic, "-c", cluster, "-m", files / "config.json", "-n", 64, "--work", 0.3, "--no-verdict",
               "-o", files / "p.npz", *words)  # fmt: skip


def test_an_order_of_a_model_with_groups_is_exported_as_it_was_planned(files):
    got = planned(files, "--engine", "megatron", cluster="2x4:h100")
    assert got.exit_code == 0, got.output
    assert "Each of 4 routing groups lies whole on a block of ids in 2 of 2 layers." in " ".join(got.stdout.split())
    out = run("export", files / "p.npz", "--to", "megatron", "-m", files / "config.json", "-o", files / "o.json")
    assert out.exit_code == 0, out.output
    for row in json.loads((files / "o.json").read_text())["layers"].values():
        assert all(len(set(block)) == 1 for block in (np.array(row).reshape(4, 4) // 4).tolist())


def test_whole_on_nodes_and_where_it_pays(files):
    got = planned(files, "--keep-groups", "nodes", "-r", 4, "--json")
    assert got.exit_code == 0, got.output
    made = Placement.load(files / "p.npz")
    whole = WholeGroups.on_nodes(16, 4, np.array([0, 0, 1, 1], np.int32))
    assert not whole.torn_LG(made.count_LED()).any() and made.num_slots == 20
    said = json.loads(got.stdout)["details"]
    assert said["groups"]["whole_layers"] == 2 and "at most 2 of 2 nodes" in " ".join(said["notes"])
    soft = planned(files, "--keep-groups", "pays", traffic="t.npz")
    assert soft.exit_code == 0 and "us, in none" in " ".join(soft.stdout.split()), soft.output
    table = run("compare", files / "t.npz", "-c", "2x2:h100", "-m", files / "config.json", "-n", 64, "-p", "round-robin", "-p",
                files / "p.npz", "-p", "lpt", "--keep-groups", "nodes", "--work", 0.2, "--json")  # fmt: skip
    assert table.exit_code == 0, table.output


def test_wrong_groups_exit_with_2(files):
    for words, text in (
        (["--keep-groups", "node"], "unknown way to keep groups"),
        (["--keep-groups", "nodes", "--pooled"], "layer by layer"),
        (["--keep-groups", "nodes", "--survive", "1", "-r", "4"], "4 routing groups lie whole"),
        (["--keep-groups", "nodes", "--engine", "checkpoint"], "blocks of ids, not on nodes"),
        (["--keep-groups", "pays", "--method", "lpt"], "weighed by poise alone, the method asked for is lpt"),
    ):
        got = planned(files, *words)
        assert got.exit_code == 2 and text in " ".join(got.stderr.split()) and not got.stdout, got.output
    three = planned(files, "--keep-groups", "nodes", "-r", 2, cluster="3x2:h100")
    assert three.exit_code == 2 and "18 slots: those have room for 1 each, 3 in all" in " ".join(three.stderr.split())
    assert not (files / "p.npz").exists()
    (files / "config.json").write_text(json.dumps({**SIZES, "n_group": 1}))
    assert "nothing to keep whole" in " ".join(planned(files, "--keep-groups", "pays").stderr.split())


def test_what_keeps_no_groups_in_a_comparison_is_said(files):
    words = ["compare", files / "t.npz", "-c", "2x2:h100", "-m", files / "config.json", "-n", 64, "--work", 0.05,
             "-p", "contiguous", "-p", "lpt", "--fast", "poise", "--steps", 2, "--warm-up", 1, "--json"]  # fmt: skip
    hard = run(*words, "--keep-groups", "nodes")
    assert hard.exit_code == 0, hard.output
    notes = json.loads(hard.stdout)["notes"]
    assert any(note.startswith("lpt is gathered: ") for note in notes), notes
    assert not any(note.startswith("contiguous is gathered") for note in notes), "it keeps four groups on two nodes"
    assert any(note.startswith("lpt + poise keeps no routing groups whole") for note in notes), notes
    soft = json.loads(run(*words, "--keep-groups", "pays").stdout)["notes"]
    assert any(note.startswith("contiguous, lpt: planned as without --keep-groups pays") for note in soft), soft
    assert not any("gathered" in note or "keeps no" in note for note in soft), soft


def test_what_runs_now_is_not_gathered_for_a_verdict(files, monkeypatch):
    rows = {}

    def compared(whole, cluster, placements, **options):
        found = compare(whole, cluster, placements=placements, **options)
        rows.update({entry.name: entry.placement for entry in found.entries})
        return found

    compare = api.compare
    monkeypatch.setattr(compared_by, "compare", compared)
    sizes = {"model": str(files / "config.json"), "tokens_per_step": 64, "redundant": 8}
    said = api.planning_verdict(files / "t.npz", "2x2:h100", method="lpt", keep_groups="nodes", work=0.05, **sizes)
    whole = WholeGroups.on_nodes(16, 4, np.array([0, 0, 1, 1], np.int32))
    first = deal(16, np.full(4, 6), in_turn=False)
    assert whole.torn_LG(first[None]).any() and "contiguous" in said
    assert (rows["contiguous"].count_LED() == first).all() and not whole.torn_LG(rows["lpt"].count_LED()).any()


@pytest.mark.parametrize("devices", ["2x4:h100", "1x2:h100"])
def test_a_watch_for_new_ids_plans_with_groups_whole(files, devices):
    """lpt tears groups, renumbering tears them, and parts of the way: the file follows the plan all the same."""
    out = files / "order.json"
    got = run("watch", files / "t.npz", "-c", devices, "-m", files / "config.json", "-n", 4, "--window", 4, "--every", 4,
              "--method", "lpt", "--once", "--json", "--export", f"megatron:{out}", "-o", files / "now.npz")  # fmt: skip
    assert got.exit_code == 0, got.output
    plans = [line for line in map(json.loads, got.stdout.splitlines()) if line["event"] == "plan"]
    assert any(plan["accepted"] for plan in plans), "or nothing is shown"
    assert all(str(out) in plan["files"] for plan in plans if plan["accepted"])
    for row in json.loads(out.read_text())["layers"].values():
        assert all(len(set(block)) == 1 for block in (np.array(row).reshape(4, 4) // 4).tolist())
    refused = run("watch", files / "t.npz", "-c", "3x1:h100", "-m", files / "config.json", "-n", 4, "-r", 2, "--once",
                  "--export", f"megatron:{out}")  # fmt: skip
    assert refused.exit_code == 2 and refused.stderr
