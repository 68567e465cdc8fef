"""The first control-C ends the search of a plan and keeps what it has, the second ends the command."""

import json
import os
import signal
import threading

import pytest
from typer.testing import CliRunner

from poise import api
from poise.cli import ending
from poise.cli.main import app
from poise.planning.budget import Budget
from poise.planning.placement import Placement
from poise.routing.synthetic import zipf_trace

FOR_EVER = ["--work", "1e8"]
"""A month of search: nothing but the interrupt ends it."""


@pytest.fixture(autouse=True)
def heard():
    """Control-C as a terminal's programs take it: whoever started the tests may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.npz"
    zipf_trace(num_tokens=400, num_layers=3, num_experts=8, top_k=2, tokens_per_request=8, seed=1).save(path)
    return path


def interrupted(monkeypatch):
    """Send control-C when compiled code searches, once."""
    at_work, stops = threading.Event(), Budget.stops
    monkeypatch.setattr(Budget, "stops", lambda self, flag: (at_work.set(), stops(self, flag))[1])

    def send():
        assert at_work.wait(120)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("limit", [FOR_EVER, ["--time-limit", "3e7"]], ids=["work", "clock"])
def test_the_best_plan_so_far_is_written(trace, tmp_path, monkeypatch, limit):
    sender = interrupted(monkeypatch)
    words = ["plan", trace, "-c", "2x2:h100", "-r", "4", "-n", "64", *limit, "-o", tmp_path / "p.npz", "--json"]
    before = signal.getsignal(signal.SIGINT)
    got = CliRunner().invoke(app, [*map(str, words)])
    sender.join()
    assert got.exit_code == 0, got.output
    said, plan = json.loads(got.stdout), Placement.load(tmp_path / "p.npz")
    assert said["interrupted"] and not said["cut_by_clock"] and said["verdict"] is None
    assert "interrupted: writing the best plan so far; control-C again ends at once" in " ".join(got.stderr.split())
    assert plan.fitted.about["interrupted"] == "yes" and said["gap"] >= 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_verdict_that_was_cut_short_is_not_told(trace, tmp_path, monkeypatch):
    def cut(*_, time_limit_s, **__):
        time_limit_s.stop()
        return "Not worth it: of plans that nobody has."

    monkeypatch.setattr(api, "planning_verdict", cut)
    words = ["plan", trace, "-c", "2x2:h100", "-r", "4", "-n", "64", "--work", "1", "-o", tmp_path / "p.npz", "--json"]
    got = CliRunner().invoke(app, [*map(str, words)])
    assert got.exit_code == 0 and json.loads(got.stdout)["verdict"] is None and (tmp_path / "p.npz").exists()


def test_the_plan_says_so_in_words(trace, tmp_path, monkeypatch):
    sender = interrupted(monkeypatch)
    words = ["plan", trace, "-c", "2x2:h100", "-r", "4", "-n", "64", *FOR_EVER, "-o", tmp_path / "p.npz"]
    got = CliRunner().invoke(app, [*map(str, words)])
    sender.join()
    assert got.exit_code == 0 and "note: interrupted: this is the best plan so far" in " ".join(got.stdout.split())
    assert "the clock cut" not in got.stdout


def test_the_second_control_c_ends():
    asked = threading.Event()
    with ending.signals_end():
        with pytest.raises(ending.Ended) as caught, ending.first_interrupt(asked.set):
            signal.raise_signal(signal.SIGINT)
            assert asked.wait(60)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second was taken for the first")
        assert caught.value.status == 130
        with pytest.raises(ending.Ended), ending.first_interrupt(asked.set):
            signal.raise_signal(signal.SIGTERM)  # it never waits


def test_a_command_that_is_to_ignore_it_does(monkeypatch):
    """As nohup starts it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ending.first_interrupt(lambda: pytest.fail("asked")):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_budget_that_is_stopped_is_over_with_all_its_parts():
    whole = Budget(1.0, work=1e9)
    part, flag = whole.part(0.5), [0]
    assert part.left() == float("inf") and not part.over("a")
    with part.stops(flag):
        assert flag == [0]
        whole.stop()
        assert flag == [1]
    assert part.stopped and part.left() == whole.left() == 0.0 and part.over("b") and whole.cuts == {"b"}
    with part.part(0.1).stops(late := [0]):
        assert late == [1]
