"""What benchmarks/gpu.py makes of its parts: a part that fails is wrong and not the end, and no figure of a GPU without one."""

from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed: pip install 'poise-moe[device]'")
from benchmarks import gpu, gpu_layers


def event(kind, stream, start, nanoseconds):
    return SimpleNamespace(
        device_type=lambda: f"DeviceType.{kind}", device_resource_id=lambda: stream, start_ns=lambda: start,
        duration_ns=lambda: nanoseconds,
    )  # fmt: skip


def test_streams_are_busy_as_long_as_their_events_and_beside_another_where_both_are():
    events = [
        event("CUDA", 7, 0, 4000),
        event("CUDA", 7, 2000, 4000),
        event("CUDA", 20, 5000, 3000),
        event("CPU", 1, 0, 9000),
    ]
    profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
    rows = {(row["where"], row["stream"]): row for row in gpu_layers.streams(profiler)}
    assert rows["CUDA", 7]["busy_us"] == 6.0 and rows["CUDA", 20]["busy_us"] == 3.0 and rows["CPU", 1]["busy_us"] == 9.0
    assert rows["CUDA", 7]["beside_another_us"] == rows["CUDA", 20]["beside_another_us"] == 1.0
    assert rows["CPU", 1]["beside_another_us"] == 0.0 and rows["CUDA", 7]["events"] == 2


def test_a_part_that_fails_is_wrong_and_says_so():
    def fails(what):
        raise ValueError(what)

    got = gpu_layers.tried(fails, "no room")
    assert not got["right"] and got["error"] == "ValueError: no room"
    assert gpu.verdict(got) == "WRONG: ValueError: no room" and gpu.verdict({"right": True}) == "right"


def test_without_a_gpu_no_figure_of_one_is_written():
    layers = {"right": True, "parity": {"outputs": 1e-16}, "sizes": [], "seconds": 1.0}
    rows = gpu.timeless([{"where": "CPU", "stream": 1, "events": 3, "busy_us": 5.0, "beside_another_us": 0.0}])
    train = {"right": True, "apart": 1e-15, "counted_MB": 0.1, "streams": rows, "seconds": 2.0}
    result = {"correctness": {"cases": 8, "asked": 8, "wrong": None}, "layers": layers, "train": train}
    said = gpu.report(result, "Triton's interpreter")
    assert "were not run" in said and "_us" not in said and "right" in said and "WRONG" not in said


def test_the_interpreters_record_has_no_time_and_no_prediction(monkeypatch, tmp_path):
    rows = [{"where": "CPU", "stream": 1, "events": 3, "busy_us": 5.0, "beside_another_us": 0.0}]
    parts = {
        "hostless": {"right": True, "parity": {"outputs": 0.0}, "sizes": []},
        "trained": {"right": True, "apart": 0.0, "streams": rows},
    }
    for name, part in parts.items():
        monkeypatch.setattr(gpu_layers, name, lambda *given, part=part: dict(part))
    monkeypatch.setattr(gpu, "correctness", lambda *given: {"cases": 8, "asked": 8, "wrong": None})
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    (tmp_path / "benchmarks" / "reports").mkdir(parents=True)
    assert gpu.main() == 0
    (record,) = (tmp_path / "benchmarks" / "reports").glob("*-gpu.json")
    assert "_us" not in record.read_text("utf-8") and "predicted" not in record.read_text("utf-8")
    assert '"events": 3' in record.read_text("utf-8")
