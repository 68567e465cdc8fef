"""One budget for all of a plan: every stage ends with its clock, work units need none, and what was cut is said."""

import json
import threading
from concurrent.futures import Executor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, tiny_batch, tiny_cluster, tiny_model
from typer.testing import CliRunner

import poise
from poise.cli import terminal
from poise.cli.main import app
from poise.machine.cluster import from_preset
from poise.machine.model import ModelSpec
from poise.planning import budget as module
from poise.planning.budget import Budget
from poise.planning.engine_rules import NONE
from poise.planning.methods import exflow
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve import search as searching
from poise.planning.solve import solve as solving
from poise.planning.solve.anneal import annealed
from poise.planning.solve.effort import price_seconds, some_steps, start_seconds, state_seconds
from poise.planning.solve.milp import Milp
from poise.planning.solve.search import search
from poise.planning.solve.solve import METHODS, solve
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.util.compilation import Compilation
from poise.util.errors import NoResultError, OptionError
from poise.util.executors import Serial

TRACE = zipf_trace(num_tokens=400, num_layers=3, num_experts=8, top_k=2, tokens_per_request=8, stickiness=0.3, seed=1)


class Clock:
    """Goes on by a step whenever it is read."""

    def __init__(self, step: float, jumps_at: int | None = None) -> None:
        self.step, self.jumps_at, self.reads, self.time = step, jumps_at, 0, 0.0

    def __call__(self) -> float:
        self.reads += 1
        self.time += 1e9 if self.reads == self.jumps_at else self.step
        return self.time


def make_problem(traffic="home_node_dedup", slots=(3, 3, 3, 3), trace=TRACE, **more):
    batch = make_batch(trace, tokens_per_step=64)
    model = ModelSpec.generic(8, 2, batch.layer_ids_L)
    return PlacementProblem(batch, from_preset([2, 2], "h100"), model, np.array(slots), traffic, **more)


def test_parts_share_the_seconds_and_end_in_turn():
    now = [0.0]
    whole = Budget(10.0, now=lambda: now[0])
    now[0] = 1.0
    first = whole.part(0.4)
    assert first.seconds == 4.0 and first.left() == pytest.approx(3.0) and not first.over("first")
    now[0] = 6.0
    second = whole.part(0.3, until=0.7)  # the first took two seconds of its clock, not of its share
    inner = second.part(0.5)
    assert (second.seconds, inner.seconds) == (3.0, 1.5)
    assert second.left() == pytest.approx(1.0) and inner.left() == pytest.approx(0.5)
    assert first.over("first") and first.left() == 0.0 and not whole.over("whole") and not whole.beyond()
    assert whole.cuts == second.cuts == inner.cuts == {"first"}
    now[0] = 12.5
    assert whole.beyond().startswith("took 12.5 s, the limit was 10 s")


def test_what_cannot_be_stopped_is_made_to_fit():
    now = [0.0]
    whole = Budget(10.0, now=lambda: now[0])
    assert whole.afford(9.0, "price") == 9.0 and not whole.cuts
    now[0] = 8.0
    assert whole.afford(2.0, "price") == 2.0 and not whole.cuts
    assert whole.part(1.0).afford(3.0, "price") == pytest.approx(2.0) and whole.cuts == {"price"}
    now[0] = 99.0
    assert whole.afford(3.0, "price") == pytest.approx(1.0) and Budget(1.0, work=1.0).afford(3.0, "price") == 3.0


def test_work_has_no_clock():
    clock = Clock(1e12)
    spent = Budget(1.0, work=60, now=clock)
    assert spent.seconds == pytest.approx(2.0) and spent.part(0.5).seconds == pytest.approx(1.0)
    flag = np.zeros(1, np.int64)
    with spent.part(0.1).stops(flag):
        assert threading.active_count() == threading.active_count()
    assert spent.part(1e-9).left() == np.inf and not spent.over("anything")
    assert not spent.cuts and not flag[0] and clock.reads == 0
    assert Budget.of(spent) is spent and spent.part(0.5).work == 60


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_above_zero(bad):
    with pytest.raises(OptionError, match="time limit must be above 0"):
        Budget(bad)
    with pytest.raises(OptionError, match="work must be above 0"):
        Budget(1.0, work=bad)


def test_the_flag_is_set_while_others_work():
    flag, seen = np.zeros(1, np.int64), threading.Event()
    with Budget(5.0, now=Clock(1.0)).stops(flag):
        for _ in range(2000):
            if flag[0] or seen.wait(0.01):
                break
    assert flag[0] == 1


LOOPS = {
    "exact-balance": "exact-balance", "flash-lb": "flash-lb", "swift-balance": "swift-balance",
    "grace-moe": "grace-moe", "coactivation": "coactivation", "exact": "exact", "moetuner-equal": "moetuner",
    "exflow": "exflow", "poise": "starts",
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("reads", [2, 4, 9])
def test_every_stage_that_would_go_on_asks_the_clock_and_stops(name, reads):
    """The clock jumps to the end when it is read for the second, fourth or ninth time."""
    problem, clock = make_problem(), Clock(1e-3, jumps_at=reads)
    if name == "moetuner-equal":  # on few devices its second programme is a path: nothing to cut
        problem = replace(problem, cluster=from_preset([3, 3], "h100"), slots_D=np.full(6, 2))
    budget = Budget(10.0, now=clock)
    try:
        problem.check(METHODS[name].plan(problem, time_limit_s=budget).placement)
    except NoResultError as error:
        assert name in ("exact", "exact-balance"), error  # half a proof is none
    assert clock.reads < reads or budget.cuts
    if reads == 2:
        assert LOOPS[name] in budget.cuts
        assert clock.reads <= reads + 50  # a layer or a start asks once more


@given(st.integers(3, 400), st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_wherever_the_clock_ends_it_there_is_a_plan(reads, seed):
    problem = make_problem()
    clock = Clock(1e-4, jumps_at=reads)
    got = solve(problem, time_limit_s=Budget(0.5, now=clock), seed=seed)
    problem.check(got.placement)
    problem.engine.check(got.placement, problem.slots_D)
    assert 0 <= got.gap < 1
    # at its last reads the search may be done: the price that is left fits into the grace
    assert clock.reads <= reads + 3 or got.details["cut_by_clock"]


def test_the_search_stops_between_two_changes():
    """A clock that has run out leaves the starts: a descent would take millions of updates."""
    problem = make_problem()
    starts = [METHODS["lpt"].plan(problem, time_limit_s=1.0).placement]
    whole = search(problem, starts, time_limit_s=Budget(0.4, work=12.0), seed=0)
    cut = search(problem, starts, time_limit_s=Budget(1e3, now=Clock(1e3)), seed=0)
    assert whole.details["updates"] > 1e6
    assert cut.details["kicks"] == 0 and cut.details["updates"] < 0.1 * whole.details["updates"]
    problem.check(cut.placement)


def starts_whose_last_is_best(last, steps=2):
    """A problem, three placements, and what each takes."""
    trace = zipf_trace(num_tokens=4000, num_layers=3, num_experts=8, top_k=2, exponent=1.2, seed=2)
    batch = make_batch(trace, steps=steps)
    cluster = replace(tiny_cluster(np.random.default_rng(0), (2, 2), equal=True), memory_bytes_per_s=1e9)
    problem = PlacementProblem(batch, cluster, tiny_model(batch), np.full(4, 3), "home", engine=NONE)
    starts = [METHODS[name].plan(problem, time_limit_s=1.0).placement for name in ("round-robin", "contiguous", last)]
    seconds = [seconds_of(problem, start) for start in starts]
    assert seconds[-1] < 0.95 * min(seconds[:-1]), "the case needs a start that is much better"
    return problem, starts, seconds


def seconds_of(problem, placement):
    return problem.pricing.cost(problem.batch, placement.count_LED()).seconds_BL.sum()


@pytest.mark.parametrize("last", ["lpt", "eplb", "flash-lb"])
@pytest.mark.parametrize("cut", ["clock", "wish", "wish with work"])
def test_a_search_that_is_cut_before_the_starts_are_priced_leaves_out_none(last, cut):
    """The best of them comes last: the plan is not worse than it is."""
    problem, starts, seconds = starts_whose_last_is_best(last)
    budget = Budget(1e3, now=Clock(1e3 if cut == "clock" else 1e-9), work=30.0 if cut == "wish with work" else None)
    if cut != "clock":
        budget.stop()
    found = search(problem, starts, time_limit_s=budget, seed=0)
    assert seconds_of(problem, found.placement) <= seconds[-1] * (1 + 1e-9) and found.details["updates"] < 1e5


def test_a_start_that_is_made_when_the_clock_runs_out_is_priced(monkeypatch):
    problem, starts, seconds = starts_whose_last_is_best("flash-lb")
    now = [0.0]
    budget = Budget(10.0, now=lambda: now[0])

    def slow(_):
        now[0] = 100.0
        return starts[-1]

    monkeypatch.setattr(searching, "plain_start", slow)
    found = search(problem, starts[:2], time_limit_s=budget, seed=0)
    assert "flash-lb" in found.details["starts"] and "starts" in budget.cuts
    assert seconds_of(problem, found.placement) < min(seconds[:2])


@pytest.mark.parametrize("stops_at", [1, 2, 3])
def test_a_wish_while_starts_are_priced_leaves_steps_out_and_no_start(monkeypatch, stops_at):
    problem, starts, seconds = starts_whose_last_is_best("flash-lb", steps=200)
    problem = replace(problem, batch=replace(problem.batch, request_T=None))  # searched on these steps
    overhead = (len(starts) + searching.OPTIONS) * price_seconds(problem) + state_seconds(problem)
    budget, calls, price = Budget(3 * overhead, work=3 * overhead * 30), [], searching._price

    def priced(asked, placement):
        calls.append(asked.batch.num_steps)
        if len(calls) == stops_at:
            budget.stop()
        return price(asked, placement)

    monkeypatch.setattr(searching, "_price", priced)
    found = search(problem, starts, time_limit_s=budget, seed=0)
    assert calls[:stops_at] == [200] * stops_at and 0 < max(calls[stops_at:]) == min(calls) < 100
    assert found.details["searched_on"].endswith("of 200 steps") and set(found.details["starts"]) >= {"flash-lb"}
    assert seconds_of(problem, found.placement) <= seconds[-1] * 1.01, "some steps stand for all"


def test_on_2048_devices_cheap_starts_fit_and_flash_lb_does_not():
    """DeepSeek-V3's 58 layers, 300 units: ten nominal seconds, of which four are for starts."""
    rng = np.random.default_rng(0)
    batch = load_batch(rng, experts=256, layers=58)
    cluster = tiny_cluster(rng, (8,) * 256)
    problem = PlacementProblem(batch, cluster, tiny_model(batch), np.ones(2048, np.int64), "home")
    assert sum(start_seconds(problem, name, 2.0) for name in ("lpt", "eplb", "eplb-global")) < 4
    assert start_seconds(problem, "flash-lb", 2.0) > 100
    near = replace(problem, split="near")
    assert price_seconds(near) - price_seconds(problem) > 0.1


def test_starts_of_a_moment_are_made_though_the_clock_is_over():
    """As where the plan before took its time: a verdict compared blocks of experts with EPLB's map."""
    problem = make_problem()
    found = solve(problem, time_limit_s=Budget(1.0, now=Clock(10.0)))
    assert {"lpt", "eplb", "eplb-global"} <= set(found.details["starts"]) and "flash-lb" in found.details[
        "starts_left_out"
    ]
    best = min(seconds_of(problem, solve(problem, method=name).placement) for name in ("contiguous", "lpt", "eplb"))
    assert seconds_of(problem, found.placement) <= best * (1 + 1e-9)


class AtOnce(Executor):
    """Other processes that are infinitely fast."""

    def submit(self, fn, /, *args, **kwargs):
        return Serial().submit(fn, *args, **kwargs)


@pytest.mark.parametrize("executor", [AtOnce, Serial])
def test_starts_that_other_processes_have_made_are_taken_though_the_plan_is_to_end(monkeypatch, executor):
    """Where they are made one after the other, those that are left are not begun any more."""
    problem, begun, start = make_problem(), [], solving._start
    budget = Budget(1.0, work=120.0, executor=executor())

    def stopping(problem, name, own, seed):
        begun.append(name)
        made = start(problem, name, Budget(1.0, work=30.0), seed)
        if name == "contiguous":
            budget.stop()
        return made

    monkeypatch.setattr(solving, "_start", stopping)
    found = solve(problem, time_limit_s=budget)
    early = begun.index("contiguous") + 1
    assert (len(begun) > early + 5) if executor is AtOnce else (len(begun) == early)
    assert not set(begun) & set(found.details.get("starts_left_out", ()))
    assert {"lpt", "eplb", "flash-lb"} & set(found.details["starts"]) == {"lpt", "eplb", "flash-lb"} & set(begun)


def test_annealing_that_is_cut_leaves_its_start():
    """Half-way an annealed layer is hot: worse than where it began."""
    problem = make_problem()
    budget = Budget(1.0, now=Clock(10.0))
    flags = SimpleNamespace(
        cut=annealed(problem, proposals=2_000_000, budget=budget), none=annealed(problem, proposals=0)
    )
    assert (flags.cut.slot_expert_LS == flags.none.slot_expert_LS).all() or budget.cuts == set()
    assert not Budget(1.0, work=1.0).cuts


def test_a_descent_of_exflow_stops_after_a_sweep(monkeypatch):
    calls = []
    best_layer = exflow.best_layer
    monkeypatch.setattr(exflow, "best_layer", lambda *given, **more: calls.append(1) or best_layer(*given, **more))
    flow = np.random.default_rng(0).random((4, 8, 8))
    for budget, most in ((Budget(1.0, now=Clock(10.0)), 9), (Budget(1.0, work=1e-4), 9), (Budget(1.0, work=60), 1e9)):
        calls.clear()
        exflow.descend(flow, np.array([4, 4]), 5, seed=0, budget=budget)
        assert 9 <= len(calls) <= most and (most < 1e9 or len(calls) > 100)


def test_a_programme_has_nodes_for_work_and_a_clock_besides_for_seconds():
    for budget, seconds in ((Budget(1.0, work=60), np.inf), (Budget(2.0, now=Clock(0.25)), 1.5)):
        milp = Milp()
        x = milp.columns(-np.array([3.0, 2.0, 2.0]))
        milp.row(0, x, np.array([2.0, 1.0, 1.0]), 2)
        assert milp.solve(budget=budget, stage="here").objective == -4.0
        assert milp.model.getOptionValue("time_limit")[1] == pytest.approx(seconds)
        assert 0 < milp.model.getOptionValue("mip_max_nodes")[1] < 1e6 and not budget.cuts
    late, milp = Budget(2.0, now=Clock(3.0)), Milp()
    milp.columns(np.ones(3))
    with pytest.raises(NoResultError, match="3 columns"):
        milp.solve(budget=late, stage="here")
    assert late.cuts == {"here"} and milp.solve(budget=late, stage="here", needed=True).objective == 0.0


def bytes_of(tmp_path, name, **options):
    got = poise.plan(TRACE, "2x2:h100", redundant=4, tokens_per_step=64, seed=7, **options)
    got.placement.save(tmp_path / name)
    return got, (tmp_path / name).read_bytes()


@pytest.mark.parametrize("method", ["poise", "moetuner-equal", "exflow", "poise-stay"])
def test_work_gives_the_same_bytes_however_fast_the_clock(tmp_path, monkeypatch, method):
    one, first = bytes_of(tmp_path, "one.npz", work=2.0, method=method)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=Clock(1e9)))
    two, second = bytes_of(tmp_path, "two.npz", work=2.0, method=method)
    assert first == second and one.objective == two.objective
    for plan in (one, two):
        assert "cut_by_clock" not in plan.details and "cut_by_clock" not in plan.placement.fitted.about
        assert plan.placement.fitted.about["work"] == "2"
    assert len(bytes_of(tmp_path, "three.npz", work=0.01, method=method)[1]) > 0


def test_a_cut_is_said_in_the_table_the_json_and_the_file(tmp_path):
    trace = tmp_path / "trace.npz"
    TRACE.save(trace)
    command = [
        "plan",
        str(trace),
        "--cluster",
        "2x2:h100",
        "--redundant",
        "4",
        "--no-verdict",
        "--tokens-per-step",
        "64",
    ]
    for limit, cut in ((["--time-limit", "1e-6"], True), (["--work", "2"], False)):
        file = tmp_path / f"{cut}.npz"
        shown = CliRunner().invoke(app, [*command, *limit, "-o", str(file)])
        assert shown.exit_code == 0, shown.output
        assert ("the clock cut the search" in shown.stdout) == cut and ("--work" in shown.stdout) == cut
        about = Placement.load(file).fitted.about
        assert ("cut_by_clock" in about) == cut and ("work" in about) != cut
        told = json.loads(CliRunner().invoke(app, [*command, *limit, "--json", "-o", str(file)]).stdout)
        assert told["cut_by_clock"] is cut and ("cut_by_clock" in told["details"]) == cut
    bad = CliRunner().invoke(app, [*command, "--work", "0", "-o", str(tmp_path / "none.npz")])
    assert bad.exit_code == 2 and "work must be above 0" in bad.stderr


def test_large_traffic_is_searched_and_priced_on_some_steps_and_says_so():
    rng = np.random.default_rng(0)
    batch = load_batch(rng, experts=8, layers=2, steps=4000)
    cluster = tiny_cluster(rng, (2, 2), equal=True)
    problem = PlacementProblem(batch, cluster, tiny_model(batch), np.full(4, 3))
    got = solve(problem, work=0.4)
    assert got.details["searched_on"].endswith(" of 4,000 steps") and got.details["priced_on"].endswith(
        " of 4,000 steps"
    )
    more = solve(problem, work=40.0)
    assert "priced_on" not in more.details
    assert more.objective == pytest.approx(solve(problem, method="lpt", work=40.0).objective, rel=0.2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.booleans())
@settings(max_examples=30, deadline=None)
def test_some_steps_are_steps_of_the_whole(seed, kept, tokens):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, (2, 1))
    batch = tiny_batch(rng, devices=3, tokens=(4, 3, 5, 2, 6)) if tokens else load_batch(rng, steps=5)
    problem = PlacementProblem(batch, cluster, tiny_model(batch), np.full(3, 4))
    part = some_steps(problem, float(kept), 5.0).batch
    if kept >= 5:
        assert part is batch
        return
    assert part.num_steps == kept and part.drawn_from == 5 and part.weight_B.sum() == pytest.approx(1.0)
    taken = [next(b for b in range(5) if (batch.load_BLE[b] == load).all()) for load in part.load_BLE]
    if tokens:
        assert taken == sorted(taken)
        home_T = batch.home_of_tokens(3)
        rows = np.concatenate([np.arange(*batch.start_B[b : b + 2]) for b in taken])
        assert (part.experts_TLK == batch.experts_TLK[rows]).all() and (part.home_of_tokens(3) == home_T[rows]).all()
        assert (np.diff(part.start_B) == np.diff(batch.start_B)[taken]).all()


def test_none_of_equal_weight_is_lost_where_weights_are_zero():
    rng = np.random.default_rng(0)
    batch = load_batch(rng, steps=4)
    batch = replace(batch, weight_B=np.array([1.0, 0.0, 0.0, 0.0]))
    problem = PlacementProblem(batch, tiny_cluster(rng), tiny_model(batch), np.full(3, 4))
    assert some_steps(problem, 1.0, 4.0).batch.weight_B.tolist() == [1.0]


def test_compiling_is_said_and_not_charged(monkeypatch, capsys):
    mine = Compilation()
    monkeypatch.setattr(terminal, "COMPILATION", mine)
    monkeypatch.setattr(module, "COMPILATION", mine)
    with terminal.compiling():
        before = module._now()
        mine.start("who")
        mine._open[0] = ("who", mine._open[0][1] - 50.0)  # it began 50 s ago
        assert module._now() < before - 49.0
        mine.end("who")
        assert module._now() < before - 49.0
    said = capsys.readouterr().err
    assert "compiling" in said and "compiled 1 function in 50 s" in said
