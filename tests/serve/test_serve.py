"""Serving on four processes equals the plain transformers model (run_cases.py), all cases in one launch."""

import json

from tests.serve.run_cases import CASES
from tests.train.launch import torchrun


def test_all_cases(tmp_path, subtests):
    """One launch for all: a fixture would run it on every worker."""
    out = tmp_path / "results.jsonl"
    said = torchrun(4, "tests/serve/run_cases.py", "--out", str(out), check=False, timeout=300)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    passed = {line["case"] for line in lines if not line["failed"]}
    assert len(CASES) > 20
    for case in CASES:
        failed = [f"rank {line['rank']}: {line['failed']}" for line in lines if line["case"] == case and line["failed"]]
        with subtests.test(case):
            assert not failed, "\n".join(failed)
            assert case in passed, f"{case} did not run\n{said[-3000:]}"
