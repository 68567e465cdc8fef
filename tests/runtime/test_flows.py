"""Every data flow on four processes, two nodes: outputs and bytes (``flow_cases.py``)."""

import json

from tests.train.launch import torchrun


def test_flows(subtests):
    said = torchrun(4, "tests/runtime/flow_cases.py")
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"case"')]
    assert len(lines) >= 30
    for line in lines:
        with subtests.test(line["case"]):
            assert "failed" not in line, line["failed"]
