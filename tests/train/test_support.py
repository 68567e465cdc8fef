"""Training on four processes beside the rest of PyTorch and Hugging Face (support_cases.py)."""

import pytest
from tests.helpers import few_or
from tests.train.support import LIKE, MINE


@pytest.mark.parametrize("case", few_or(list(MINE), [name for name in MINE if name not in LIKE]))
def test_case(case, launched):
    launched("tests/train/support_cases.py")


def test_what_is_left_out_is_like_a_case_that_is_not():
    assert set(LIKE) < set(MINE) and set(LIKE.values()) <= set(MINE) - set(LIKE)
