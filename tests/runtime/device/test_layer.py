"""The layer without a host on two and on four processes (``layer_cases.py``), and on tensors that have no values."""

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
from tests.cases import judge
from tests.helpers import few_or
from tests.launch import ranks
from tests.runtime.device.layer_cases import CASES

SCRIPT = "tests/runtime/device/layer_cases.py"


ON_TWO = [case for case in CASES if case.startswith("parity")][:2]
ALIKE = set(ON_TWO[1:])
"""On four in ``make test-all`` alone: what is left has all kinds of experts, with and without step slots."""


@pytest.mark.parametrize("case", few_or(list(CASES), [case for case in CASES if case not in ALIKE]))
def test_case(case, launched):
    launched(SCRIPT)


def test_on_two_processes(tmp_path, subtests):
    judge(SCRIPT, ON_TWO, tmp_path, subtests, world=2)
    assert ALIKE < set(CASES)


VALUES = {
    "cpu": "operations without a value",
    "meta": "operations without a value",
    "cpu:counts": "refused",
    "meta:copy": "refused",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What is said of each step: a line beginning with its name."""
    (lines,) = ranks(1, "tests/runtime/device/faked.py", *VALUES, folder=tmp_path_factory.mktemp("faked"))
    return dict(line.split(" ", 1) for line in lines.splitlines())


@pytest.mark.parametrize("step", VALUES)
def test_a_training_step_needs_no_value_and_one_that_looks_at_one_is_refused(said, step):
    assert VALUES[step] in said[step] and said[step].startswith("refused") == (VALUES[step] == "refused")
