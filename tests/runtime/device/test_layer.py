"""The layer without a host on two and on four processes (``layer_cases.py``), and on tensors that have no values."""

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
from tests.cases import judge
from tests.runtime.device.layer_cases import CASES
from tests.runtime.device.test_kernels import ran

SCRIPT = "tests/runtime/device/layer_cases.py"


@pytest.mark.parametrize("case", CASES)
def test_case(case, launched):
    launched(SCRIPT)


def test_on_two_processes(tmp_path, subtests):
    judge(SCRIPT, [case for case in CASES if case.startswith("parity")][:2], tmp_path, subtests, world=2)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_training_step_needs_no_value(where):
    assert "operations without a value" in ran("tests.runtime.device.faked", where)


@pytest.mark.parametrize("where, looks", [("cpu", "counts"), ("meta", "copy")])
def test_a_step_that_looks_at_one_is_refused(where, looks):
    assert ran("tests.runtime.device.faked", where, looks).startswith("refused")
