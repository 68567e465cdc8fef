"""The example trains, its loss does not depend on the number of ranks, and it goes on from its checkpoint."""

import json

import pytest
from tests.launch import ranks

SMALL = ("--layers", "2", "--hidden", "32", "--experts", "6", "--batch", "6", "--json")


def run(world, folder, *arguments):
    out, *_ = ranks(world, "examples/train_moe.py", *SMALL, *arguments, folder=folder)
    return json.loads(next(line for line in out.splitlines() if line.startswith('{"ranks"')))["rows"]


def test_the_example_trains_and_resumes(tmp_path):
    whole = run(1, tmp_path, "--steps", "10")[0]
    assert whole["losses"][-1] < whole["losses"][0] - 0.3
    first = run(3, tmp_path, "--steps", "6", "--save-every", "6", "--checkpoint", str(tmp_path / "run"), "--policy",
                "hecate:overlap=2")[0]  # fmt: skip
    assert first["losses"] == pytest.approx(whole["losses"][:6], rel=1e-3)
    rest = run(2, tmp_path, "--steps", "10", "--checkpoint", str(tmp_path / "run"), "--rematerialise")[0]
    assert rest["steps"] == 4
    assert rest["losses"] == pytest.approx(whole["losses"][6:], rel=2e-3)
    assert rest["held_out_loss"] == pytest.approx(whole["held_out_loss"], rel=2e-3)


def test_the_example_compares_policies(tmp_path):
    rows = run(2, tmp_path, "--steps", "4", "--compare", "expert-parallelism,full-replication", "--sharding", "even")
    parallel, full = rows
    assert full["losses"] == pytest.approx(parallel["losses"], rel=1e-3)
    assert parallel["imbalance"] == parallel["owner_imbalance"] and full["imbalance"] == pytest.approx(1.0, abs=0.01)
    assert parallel["moved_bytes"]["gather"] == 0 < full["moved_bytes"]["gather"]


def test_the_trainer_s_example_resumes_on_another_number_of_ranks(tmp_path):
    pytest.importorskip("accelerate")
    out = str(tmp_path / "run")
    first, *_ = ranks(2, "examples/train_hf.py", "--output", out, "--steps", "10", folder=tmp_path)
    assert "step 10, loss" in first
    (tmp_path / "more").mkdir()
    more, *_ = ranks(1, "examples/train_hf.py", "--output", out, "--steps", "12", "--resume", folder=tmp_path / "more")
    assert "step 12, loss" in more
