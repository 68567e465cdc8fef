"""Training on four processes beside the rest of PyTorch and Hugging Face (support_cases.py)."""

import pytest
from tests.train.support import MINE


@pytest.mark.parametrize("case", MINE)
def test_case(case, launched):
    launched("tests/train/support_cases.py")
