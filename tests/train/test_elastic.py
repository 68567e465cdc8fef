"""A rank dies, stalls, or a checkpoint is torn: an error everywhere, and the same trajectory after a restart."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.helpers import few_or
from tests.launch import processes, ranks, torchrun
from tests.train import harness as h
from tests.train.elastic_worker import SAVE_EVERY, TOP_K, WORLD_OF_DATA

STEPS = 8
WORKER = "tests/train/elastic_worker.py"


@pytest.fixture(scope="module")
def reference():
    return h.dense("moving-hot", TOP_K, "adamw", WORLD_OF_DATA, steps=STEPS).weights


def error_of(folder, reference):
    found = torch.load(folder / "weights.pt", weights_only=True)
    assert found.keys() == reference.keys()
    return h.worst(found, reference)


def test_a_killed_rank_is_an_error_everywhere_and_training_goes_on_with_fewer(tmp_path, reference):
    ended = processes(4, WORKER, str(tmp_path), "--steps", str(STEPS), "--die", "4", folder=tmp_path)
    assert [code for code, _ in ended] == [3, 3, 3, -9], ended
    for rank in range(3):
        message = (tmp_path / f"rank-{rank}.error").read_text()
        assert f"failed on rank {rank}" in message and "time" not in message.lower(), message
    assert (tmp_path / "latest").read_text() == f"step-{SAVE_EVERY}"
    said = ranks(3, WORKER, str(tmp_path), "--steps", str(STEPS), "--policy", "moon-ep", folder=tmp_path)
    assert f"rank 0 of 3 goes on at step {SAVE_EVERY}" in said[0]
    assert error_of(tmp_path, reference) < 1e-10
    # without poise: torch's own loader, into the unsharded model
    plain = h.build().state_dict()
    with pytest.warns(UserWarning, match="single process"):
        dcp.load({"model": plain}, checkpoint_id=str(tmp_path / "step-6"), no_dist=True)
    assert h.worst(plain, h.dense("moving-hot", TOP_K, "adamw", WORLD_OF_DATA, steps=6).weights) < 1e-10


@pytest.mark.skipif(few_or(False, True), reason="POISE_MANY=1 runs it; what the other ranks say and do: the test above")
def test_torchrun_ends_when_a_rank_is_killed(tmp_path):
    said = torchrun(2, WORKER, str(tmp_path), "--steps", "3", "--die", "1", check=False)
    assert "Signal 9 (SIGKILL)" in said and not (tmp_path / "weights.pt").exists()


def test_a_stalled_rank_runs_into_the_time_out(tmp_path):
    ended = processes(2, WORKER, str(tmp_path), "--steps", "3", "--stall", "1", folder=tmp_path)
    assert ended[0][0] == 3, ended
    assert "timed out" in (tmp_path / "rank-0.error").read_text().lower()


def test_a_torn_checkpoint_leaves_the_one_before(tmp_path, reference):
    ended = processes(2, WORKER, str(tmp_path), "--steps", str(STEPS), "--tear", "5", folder=tmp_path)
    assert [code for code, _ in ended] == [9, 9], ended
    assert (tmp_path / ".step-6.partial").is_dir() and not (tmp_path / "step-6").exists()
    ended = processes(3, WORKER, str(tmp_path), "--steps", str(STEPS), folder=tmp_path)
    assert [code for code, _ in ended] == [0, 0, 0], ended
    assert f"goes on at step {SAVE_EVERY}" in ended[0][1] and (tmp_path / "latest").read_text() == "step-6"
    assert not (tmp_path / ".step-6.partial").exists()
    assert error_of(tmp_path, reference) < 1e-10
