"""Cases on four processes beside the rest of PyTorch and Hugging Face (citizen_cases.py), all in one launch."""

import json

from tests.train import citizen_compose, citizen_memory, citizen_misuse, citizen_steps  # noqa: F401  (they add cases)
from tests.train.citizen_models import MINE
from tests.train.launch import torchrun


def test_all_cases(tmp_path, subtests):
    """One launch for all: a fixture would run it on every worker."""
    out = tmp_path / "results.jsonl"
    said = torchrun(4, "tests/train/citizen_cases.py", "--out", str(out), check=False, timeout=600)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    passed = {line["case"] for line in lines if not line["failed"]}
    assert len(MINE) > 80
    for case in MINE:
        failed = [f"rank {line['rank']}: {line['failed']}" for line in lines if line["case"] == case and line["failed"]]
        with subtests.test(case):
            assert not failed, "\n".join(failed)
            assert case in passed, f"{case} did not run\n{said[-3000:]}"
