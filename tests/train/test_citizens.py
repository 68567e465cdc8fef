"""Training on four processes beside the rest of PyTorch and Hugging Face (citizen_cases.py)."""

import pytest
from tests.train.citizens import MINE


@pytest.mark.parametrize("case", MINE)
def test_case(case, launched):
    launched("tests/train/citizen_cases.py")
