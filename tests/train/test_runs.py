"""Cases on four processes: collectives, changes in mid-training, bytes, many steps, refusals (run_cases.py); some on two in ``make test``."""

import pytest
from tests.helpers import few_or
from tests.train.run_cases import MINE

TWO_DO = ["changes", "schedules", "owners_by_price", "slots_from_memory", "steady"]
"""Cases about steps one after the other; four are for what goes over which link, and for several that agree beside one
that refuses."""
ON_TWO = few_or([], TWO_DO)


@pytest.mark.parametrize("case", [name for name in MINE if name not in ON_TWO])
def test_case(case, launched):
    launched("tests/train/run_cases.py", limit_s=210.0)


@pytest.mark.parametrize("case", ON_TWO)
def test_case_on_two(case, launched):
    launched("tests/train/run_cases.py", limit_s=210.0, world=2)


def test_what_runs_on_two_is_there():
    assert set(TWO_DO) < set(MINE)
