"""Cases on four processes: collectives, changes in mid-training, bytes, many steps, refusals (run_cases.py)."""

import json

import pytest
from tests.train.launch import torchrun

CASES = ("collectives", "changes", "schedules", "memory", "slots_from_memory", "wire", "steady", "refusals")


@pytest.fixture(scope="module")
def results():
    lines = [json.loads(line) for line in torchrun(4, "tests/train/run_cases.py", check=False).splitlines()
             if line.startswith('{"case"')]  # fmt: skip
    failed = {line["case"]: line["failed"] for line in lines if "failed" in line}
    return {line["case"]: line for line in lines if "failed" not in line}, failed


@pytest.mark.parametrize("case", CASES)
def test_case(case, results):
    passed, failed = results
    assert case in passed, failed.get(case, f"{case} did not run: {list(failed)}")
