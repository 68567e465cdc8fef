"""The first control-C ends the search of a plan and keeps what it has, the second ends the command."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from html import unescape
from importlib import import_module
from io import StringIO

import pytest
from rich.console import Console
from tests.helpers import few_or
from typer.testing import CliRunner

from poise import api
from poise.cli import ending
from poise.cli.main import app
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.placement import Placement
from poise.planning.solve import solve as solving
from poise.replay.compare import INTERRUPTED
from poise.replay.serving import FastLoop, replay_steps
from poise.report import write_report
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.stepwise.driver import LayerDriver
from poise.stepwise.registry import parse_policy
from poise.util.errors import NoResultError, OptionError
from poise.util.wish import Wish

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
    monkeypatch.setattr(Budget, "stops", lambda self, *words: (at_work.set(), stops(self, *words))[1])

    def send():
        assert at_work.wait(120)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "limit", few_or([FOR_EVER, ["--time-limit", "3e7"]], [FOR_EVER]), ids=few_or(["work", "clock"], ["work"])
)
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


GOES_ON = "interrupted: going on with the best plans so far; control-C again ends at once"


def test_compare_goes_on_with_the_best_plans_so_far(trace, tmp_path, monkeypatch):
    sender = interrupted(monkeypatch)
    words = ["compare", trace, "-c", "2x2:h100", "-r", "4", "-n", "64", "-p", "contiguous", "-p", "poise", "-p", "lpt",
             "--fast", "poise-near", "--warm-up", "1", "--html", tmp_path / "r.html", "--what-if", *FOR_EVER, "--json"]  # fmt: skip
    got = CliRunner().invoke(app, [*map(str, words)])
    sender.join()
    assert got.exit_code == 0, got.output
    said, told = json.loads(got.stdout), " ".join(got.stderr.split())
    assert said["interrupted"] and GOES_ON in told and "the panel 'what if' is left out: interrupted" in told
    assert {row["name"] for row in said["rows"]} == {"contiguous", "poise", "lpt", "bound"}, "lpt takes no time"
    cut = [note for note in said["notes"] if "interrupted" in note]
    assert len(cut) == 2 and cut[0].startswith("poise: interrupted: this is the best plan so far"), cut
    assert cut[1].startswith("lpt + poise-near left out: interrupted before step 1 of"), cut
    assert not [note for note in said["notes"] if "the clock cut" in note] and (tmp_path / "r.html").exists()


@pytest.mark.parametrize("command", ["verdict", "homes"])
def test_what_was_cut_short_is_no_verdict(command, tmp_path, monkeypatch):
    """It is judged and shown, and its map is written: but nothing is recommended, and nothing advised against."""
    trace = tmp_path / "trace.npz"
    zipf_trace(num_tokens=400, num_layers=3, num_experts=32, top_k=4, tokens_per_request=8, seed=1).save(trace)
    sender, page, plan = interrupted(monkeypatch), tmp_path / "v.html", tmp_path / "p.npz"
    more = {
        "verdict": ["-m", "gpt-oss-20b", "--phase", "prefill", "-n", "64", "-r", "4", "-o", plan, "--html", page],
        "homes": ["-n", "64", "--placement-out", plan],
    }
    words = [command, trace, "-c", "2x2:h100", *more[command], *FOR_EVER, "--json"]
    got = CliRunner().invoke(app, [*map(str, words)])
    sender.join()
    assert got.exit_code == 0, got.output
    said = json.loads(got.stdout)
    assert said["interrupted"] and GOES_ON in " ".join(got.stderr.split())
    assert Placement.load(plan).num_devices == 4
    if command == "homes":
        assert not said["worth_it"] and said["sentence"].startswith("No verdict: interrupted")
    else:
        assert said["verdict"] == "insufficient_evidence" and said["flags"] == []
        assert "interrupted" in said["reason"] and "interrupted" in page.read_text()
    assert not [note for note in said["notes"] if "the clock cut" in note]


@pytest.mark.parametrize("command", ["verdict", "homes"])
def test_reading_takes_none_of_the_time(command, trace, monkeypatch):
    """And control-C ends it: what is shared with the search begins after it."""
    order, load = [], api.load
    module = import_module(f"poise.cli.{command}")
    monkeypatch.setattr(api, "load", lambda *words: (order.append("read"), load(*words))[1])

    def begins(*words, **named):
        order.append("budget")
        raise OptionError("enough")

    monkeypatch.setattr(module, "Budget", begins)
    more = {"verdict": ["-m", "gpt-oss-20b"], "homes": []}
    assert "enough" in CliRunner().invoke(app, [command, str(trace), "-c", "2x2:h100", *more[command]]).stderr
    assert order == ["read", "budget"]


def without_end(problem, name, budget, seed):
    """A start that ends when its plan is to, and not before."""
    while budget.left() > 0:
        time.sleep(0.01)
    return MADE_HERE(problem, "contiguous", budget, seed)


MADE_HERE = solving._start


def test_starts_in_other_processes_hear_the_control_c_of_compare(trace, monkeypatch):
    waiting, ended, hung = threading.Event(), threading.Event(), []
    monkeypatch.setattr(solving, "_start", without_end)
    take = solving._Starts.take
    monkeypatch.setattr(solving._Starts, "take", lambda self, name: (waiting.set(), take(self, name))[1])

    def send():
        assert waiting.wait(120)
        os.kill(os.getpid(), signal.SIGINT)
        if not ended.wait(120):  # nobody heard the first
            hung.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    words = ["compare", trace, "-c", "2x2:h100", "-r", "4", "-n", "64", "-p", "contiguous", "-p", "poise",
             "--executor", "processes:1", *FOR_EVER, "--json"]  # fmt: skip
    got = CliRunner().invoke(app, [*map(str, words)])
    ended.set()
    sender.join()
    assert not hung and got.exit_code == 0, got.output
    assert json.loads(got.stdout)["interrupted"] and GOES_ON in " ".join(got.stderr.split())


def test_the_demo_shows_what_it_has(tmp_path, monkeypatch):
    compare = api.compare

    def cut(*words, placements, wish, **more):
        wish.end()
        blocks = placements[0]
        return compare(*words, placements=(blocks, replace(blocks, method="poise")), wish=wish, **more)

    monkeypatch.setattr(api, "compare", cut)
    got = CliRunner().invoke(app, ["demo", "--html", str(tmp_path / "r.html")])
    said = " ".join(got.stdout.split())
    assert INTERRUPTED in unescape((tmp_path / "r.html").read_text())
    assert got.exit_code == 0 and "the panel 'what if' is left out: interrupted" in got.stderr, got.output
    assert INTERRUPTED in said and "poise, as vLLM will load it" in said
    assert "ot worth it" not in said and "fast loop" not in said, "it was not judged"
    assert 'id="whatif"' not in (tmp_path / "r.html").read_text()


def stopped(trace, **more):
    """A comparison that somebody ended before it began."""
    wish = Wish()
    wish.end()
    return api.compare(trace, "2x2:h100", redundant=4, tokens_per_step=64, work=1, wish=wish, **more)


def test_no_verdict_is_told_of_plans_that_were_cut_short(trace, tmp_path):
    whole = api.compare(trace, "2x2:h100", redundant=4, tokens_per_step=64, work=1, placements=("contiguous", "poise"))
    cut = stopped(trace, placements=("contiguous", "poise"))
    for found, has in ((whole, False), (cut, True)):
        found.table(console := Console(file=StringIO(), width=200))
        write_report(found, tmp_path / "r.html")
        page = unescape((tmp_path / "r.html").read_text())
        shown = " ".join(console.file.getvalue().split())
        for text in (shown, unescape(found._repr_html_()), page, found.to_json()["verdict"]):
            assert (INTERRUPTED in text) == has and ("is most even on" in text) != has, text


@pytest.mark.parametrize("limit", ["work", "wish", "budget"])
def test_a_map_of_a_comparison_says_of_itself_what_that_of_a_plan_does(trace, limit):
    wish, more = Wish(), {"redundant": 4, "tokens_per_step": 64, "engine": "vllm", "seed": 3}
    if limit != "work":
        wish.end()
    whole = Budget(1.0, work=1, wish=wish)
    named = {"time_limit_s": whole} if limit == "budget" else {"work": 1, "wish": wish}
    found = api.compare(trace, "2x2:h100", fit=trace, placements=("contiguous", "poise"), **named, **more)
    assert found.interrupted == wish.came
    for entry in (found.entries[0], found.entries[-1]):
        alone = api.plan(trace, "2x2:h100", method=entry.name, time_limit_s=Budget(1.0, work=1, wish=wish), **more)
        mine, other = entry.placement.fitted, alone.placement.fitted
        assert dict(mine.about) == dict(other.about) and ("interrupted" in mine.about) == wish.came
        assert mine.traffic.share_of(other.traffic) == other.traffic.share_of(mine.traffic)


def test_a_budget_has_a_wish_of_its_own(trace):
    with pytest.raises(OptionError, match="a wish of its own"):
        api.compare(trace, "2x2", placements=("lpt",), time_limit_s=Budget(1.0, work=1), wish=Wish())
    whole = Budget(1.0, work=1)
    assert not api.compare(trace, "2x2", placements=("lpt",), time_limit_s=whole, wish=whole.wish).interrupted


@pytest.mark.parametrize("there", [True, False])
def test_the_map_of_the_demo_says_that_it_was_cut_short_or_why_it_is_not_there(tmp_path, monkeypatch, there):
    compare = api.compare

    def cut(*words, wish, placements, **more):
        wish.end()
        return compare(*words, wish=wish, placements=placements if there else (placements[0],), **more)

    monkeypatch.setattr(api, "compare", cut)
    got = CliRunner().invoke(app, ["demo", "--html", str(tmp_path / "r.html"), "-o", str(tmp_path / "p.npz")])
    if there:
        about = Placement.load(tmp_path / "p.npz").fitted.about
        assert got.exit_code == 0 and about["interrupted"] == "yes" and about["method"] == "poise", got.output
        assert about["command"].startswith("poise")
    else:
        assert got.exit_code == 1 and "there is no map of poise to show" in got.stderr, got.output
        assert not (tmp_path / "p.npz").exists()


def test_a_fast_loop_is_left_between_two_of_its_steps():
    trace, wish = zipf_trace(num_tokens=400, num_layers=3, num_experts=8, top_k=2, tokens_per_request=8), Wish()
    batch = make_batch(trace, tokens_per_step=64).at_home(4)
    took = LayerDriver.choose

    class Stopped:
        def choose(self, view):
            wish.end()
            return took(self, view)

    loop = FastLoop(parse_policy("expert-parallelism"), 0)
    placement = api.plan(trace, "1x4", method="contiguous").placement
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerDriver, "choose", Stopped.choose)
        with pytest.raises(NoResultError, match=f"interrupted before step 2 of {batch.num_steps}"):
            replay_steps(batch, placement, loop, Cluster.parse("1x4"), ModelSpec.generic(8, 2, trace.layer_ids),
                         traffic="home", warm_up=0, wish=wish)  # fmt: skip


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


def test_budgets_of_one_wish_end_together():
    wish = Wish()
    one, other = Budget(1.0, wish=wish), Budget(1.0, work=5, wish=wish)
    wish.end()
    assert one.stopped and other.stopped and other.left() == 0.0 and not Budget(1.0).stopped
