"""Hugging Face's Trainer on two ranks, and on three what two have written (trainer_cases.py)."""

import pytest
from tests.cases import judge

pytest.importorskip("accelerate")
FIRST = [
    "data_parallel",
    "fsdp2",
    "checkpoint_and_resume",
    "best_model_at_the_end",
    "stock_trainer_that_saves_is_refused",
]


def test_all_cases(tmp_path, subtests):
    from tests.train.trainer_cases import MINE

    assert set(MINE) == {*FIRST, "resume_elsewhere"}
    env = {"POISE_CHECKPOINTS": str(tmp_path / "checkpoints")}
    script = "tests/train/trainer_cases.py"
    judge(script, FIRST, tmp_path / "two", subtests, world=2, env=env)
    judge(script, ["resume_elsewhere"], tmp_path / "three", subtests, world=3, env=env)
