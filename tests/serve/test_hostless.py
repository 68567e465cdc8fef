"""Serving without the host in any layer, on two processes (``hostless_cases.py``)."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
from tests.cases import judge
from tests.serve.hostless_cases import CASES


def test_on_two_processes(tmp_path, subtests):
    judge("tests/serve/hostless_cases.py", list(CASES), tmp_path, subtests, world=2)
