"""Timelines: simulated steps fill the modelled time, files hold what was given."""

import itertools
import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from poise.cost.step import BatchCost
from poise.evaluate.timeline import Event, simulated_step, write_perfetto


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_every_device_fills_the_modelled_step(layers, devices, seed):
    make = np.random.default_rng(seed)
    compute_LD = make.uniform(0, 2, (layers, devices))
    one = {name: make.uniform(0, 1, (1, layers)) for name in ("dispatch", "combine", "kv", "weights", "control")}
    cost = BatchCost(compute_LD.max(axis=1)[None], one["dispatch"], one["combine"], one["kv"],
                     np.ones((1, layers, devices)), np.ones((1, layers)), np.zeros((1, layers)), np.zeros((1, layers)),
                     one["weights"], one["control"])  # fmt: skip
    events = simulated_step(cost, 0, compute_LD, window_s=0.5)
    total = float(cost.seconds_BL.sum()) + 0.5 * layers
    for device in range(devices):
        mine = sorted((e for e in events if e.lane == device), key=lambda e: e.start_s)
        assert np.isclose(sum(e.seconds for e in mine), total)
        assert all(np.isclose(a.start_s + a.seconds, b.start_s) for a, b in itertools.pairwise(mine))
        assert np.isclose(sum(e.seconds for e in mine if e.name == "experts"), compute_LD[:, device].sum())


def test_a_file_has_a_process_a_group_and_a_thread_a_device(tmp_path):
    groups = {"measured": [Event("experts", 1, 5.0, 0.25), Event("wait", 0, 5.25, 0.5)], "simulated": []}
    write_perfetto(tmp_path / "t.json", groups)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"measured", "simulated"}
    assert [(e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [
        (1, 0.0, 250000.0),
        (0, 250000.0, 500000.0),
    ]
