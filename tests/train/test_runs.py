"""Cases on four processes: collectives, changes in mid-training, bytes, many steps, refusals (run_cases.py)."""

import json

from tests.train.launch import torchrun
from tests.train.run_cases import MINE


def test_all_cases(subtests):
    """One launch for all: a fixture would run it on every worker."""
    said = torchrun(4, "tests/train/run_cases.py", check=False)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"case"')]
    failed = {line["case"]: line["failed"] for line in lines if "failed" in line}
    passed = {line["case"] for line in lines if "failed" not in line}
    for case in MINE:
        with subtests.test(case):
            assert case not in failed, failed[case]
            assert case in passed, f"{case} did not run\n{said[-3000:]}"
