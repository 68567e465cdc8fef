"""Any combination of options, micro-batches and moves equals a dense run (two processes; more of them in the slices)."""

import pytest
from tests.train.option_cases import MINE


@pytest.mark.parametrize("case", MINE)
def test_case(case, launched):
    launched("tests/train/option_cases.py", world=2)
