"""Timelines: files hold what was given."""

import json

from poise.simulate.perfetto import Event, write_perfetto


def test_a_file_has_a_process_a_group_and_a_thread_a_device(tmp_path):
    groups = {"measured": [Event("experts", 1, 5.0, 0.25), Event("wait", 0, 5.25, 0.5)], "simulated": []}
    write_perfetto(tmp_path / "t.json", groups)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"measured", "simulated"}
    assert [(e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [
        (1, 0.0, 250000.0),
        (0, 250000.0, 500000.0),
    ]
