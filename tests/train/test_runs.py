"""Cases on four processes: collectives, changes in mid-training, bytes, many steps, refusals (run_cases.py)."""

import pytest
from tests.train.run_cases import MINE


@pytest.mark.parametrize("case", MINE)
def test_case(case, launched):
    launched("tests/train/run_cases.py", limit_s=210.0)
