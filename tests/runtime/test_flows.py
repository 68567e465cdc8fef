"""Every data flow on four processes, two nodes: outputs and bytes (``flow_cases.py``)."""

import pytest
from tests.runtime.flow_cases import CASES


@pytest.mark.parametrize("case", CASES)
def test_case(case, launched):
    launched("tests/runtime/flow_cases.py")
