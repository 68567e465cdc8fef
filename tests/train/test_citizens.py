"""Cases on four processes beside the rest of PyTorch and Hugging Face (citizen_cases.py), all in one launch."""

import json

import pytest
from tests.train import citizen_compose, citizen_memory, citizen_misuse, citizen_steps  # noqa: F401  (they add cases)
from tests.train.citizen_models import MINE
from tests.train.launch import torchrun

CASES = tuple(MINE)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("citizens") / "results.jsonl"
    said = torchrun(4, "tests/train/citizen_cases.py", "--out", str(out), check=False, timeout=600)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {line["case"]: line for line in lines if not line["failed"]}, lines, said


@pytest.mark.parametrize("case", CASES)
def test_case(case, results):
    passed, lines, said = results
    failed = [f"rank {line['rank']}: {line['failed']}" for line in lines if line["case"] == case and line["failed"]]
    assert not failed, "\n".join(failed)
    assert case in passed, f"{case} did not run\n{said[-3000:]}"
