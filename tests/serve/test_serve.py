"""Serving on four processes equals the plain transformers model (run_cases.py)."""

from tests.cases import judge
from tests.serve.run_cases import CASES


def test_all_cases(tmp_path, subtests):
    assert len(CASES) > 20
    judge("tests/serve/run_cases.py", CASES, tmp_path, subtests)
