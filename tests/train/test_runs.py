"""Cases on four processes: collectives, changes in mid-training, bytes, many steps, refusals (run_cases.py)."""

from tests.cases import judge
from tests.train.run_cases import MINE


def test_all_cases(tmp_path, subtests):
    judge("tests/train/run_cases.py", MINE, tmp_path, subtests, limit_s=210.0)
