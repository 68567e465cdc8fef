"""Cases on four processes beside the rest of PyTorch and Hugging Face (citizen_cases.py)."""

from tests.cases import judge
from tests.train.citizens import MINE


def test_all_cases(tmp_path, subtests):
    assert len(MINE) > 80
    judge("tests/train/citizen_cases.py", MINE, tmp_path, subtests)
