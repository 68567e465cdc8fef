"""Every data flow on four processes, two nodes: outputs and bytes (``flow_cases.py``)."""

from tests.cases import judge
from tests.runtime.flow_cases import CASES


def test_flows(tmp_path, subtests):
    assert len(CASES) >= 30
    judge("tests/runtime/flow_cases.py", CASES, tmp_path, subtests)
