"""The service on traffic that drifts, without a network: it re-plans, writes, tells; and goes on where something fails."""

import json

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.watch.replay_server import Traffic, balance

from poise.control import controller as control_module
from poise.control.controller import ControlSettings, steps_of
from poise.engines.dump import SlotRecord
from poise.machine.cluster import from_preset
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.routing.trace import LoadProfile
from poise.util.errors import NoResultError, OptionError, PlacementError
from poise.watch import board as board_module
from poise.watch.board import Board
from poise.watch.metrics import Metrics
from poise.watch.service import Output, Planned, Seen, Service, Setup, Told, Trouble, rows_of
from poise.watch.sources import Arrival, Polled, recorded_steps

WINDOW, EVERY, STEPS = 12, 6, 12
# Slow enough that computing decides, so that balance is worth something.
CLUSTER = from_preset([4, 4], "h100", flops_per_s=1e9, intra_latency_s=0.0, inter_latency_s=0.0)
CHANGE = 8 * STEPS


def settings(**more):
    options = {"window": WINDOW, "every": EVERY, "method": "lpt", "background": False, **more}
    return ControlSettings(**options)


@pytest.fixture(scope="module")
def dumps():
    """Arrivals of a dump each: eight in English, then ten in Python."""
    traffic = Traffic(seed=3)
    names = ["english"] * 8 + ["python"] * 10
    return [
        Arrival(recorded_steps(LoadProfile(np.array([traffic.step(name) for _ in range(STEPS)]))), None, 9)
        for name in names
    ]


class Script:
    """A source that brings what it was given, one look after the other; the last look over and over."""

    def __init__(self, *polls):
        self.polls, self.closed, self.start = list(polls), 0, None

    def poll(self, *, last=False):
        return self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]

    def first_placement(self, steps, num_devices):
        if isinstance(self.start, Exception):
            raise self.start
        return self.start

    def close(self):
        self.closed += 1


def run(service, times=1):
    """Events of so many looks."""
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == times:
            raise KeyboardInterrupt

    events = []
    with pytest.raises(KeyboardInterrupt):
        for event in service.run(once=False, interval_s=5.0, wait=wait):
            events.append(event)
    return events, waits


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def drift(dumps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    outputs = [Output("npz", folder / "p.npz"), Output("sglang", folder / "map.json")]
    source = Script(Polled(tuple(dumps), dumps=len(dumps), errors=1))
    service = Service(source, Setup(CLUSTER, settings(), redundant=8), outputs, measured=True)
    board, metrics = Board({"source": "test"}, window=WINDOW, clock=lambda: 100.0), Metrics()
    events = []
    for event in service.run(once=True, interval_s=1.0, wait=lambda seconds: None):
        events.append(event)
        board.note(event)
        metrics.note(event)
    return service, events, board, metrics, folder


def test_it_plans_after_the_change_and_the_prediction_comes_true(drift, dumps):
    service, events, *_ = drift
    seen, plans = of(events, Seen), of(events, Planned)
    assert [look.look.step for look in seen] == list(range(EVERY, STEPS * len(dumps) + 1, EVERY))
    alarms = [look.look.step for look in seen if look.look.verdict and look.look.verdict.drifted]
    assert alarms and CHANGE < alarms[0] <= CHANGE + WINDOW
    assert [plan.decision.reason for plan in plans] == ["first", "drift", "settled"]
    assert plans[0].decision.accepted and plans[1].decision.accepted
    for plan in plans:
        assert plan.after.imbalance <= plan.before.imbalance and plan.gap >= 0
        assert plan.written == (tuple(output.path for output in service.outputs) if plan.decision.accepted else ())
    after = [s.now.imbalance for s in seen if 4 * WINDOW + WINDOW <= s.look.step <= CHANGE]
    assert after and max(after) < 1.1 * plans[0].after.imbalance
    last = seen[-1]
    assert last.now.imbalance < 0.9 * last.first.imbalance and last.now.seconds >= last.bound_seconds
    assert last.now.imbalance == pytest.approx(last.look.imbalance)
    assert service.source.closed == 1


def test_what_is_written_is_what_serves_and_balances_the_new_traffic(drift):
    service, _, _, _, folder = drift
    kept, written = Placement.load(folder / "p.npz"), json.loads((folder / "map.json").read_text())
    np.testing.assert_array_equal(kept.slot_expert_LS, service.controller.current.slot_expert_LS)
    table = np.array(written["physical_to_logical_map"])
    assert table.shape == (9, 40)
    np.testing.assert_array_equal(table[1:], kept.slot_expert_LS)
    fresh = Traffic(seed=11)
    count = np.sum([fresh.step("python") for _ in range(40)], axis=0)
    first = np.zeros_like(table)
    first[1:] = service._first.slot_expert_LS
    first[0] = np.arange(40) % 32
    assert balance(table, count) < 0.8 * balance(first, count)


def test_the_board_and_the_metrics_say_the_same(drift, dumps):
    _, _, board, metrics, _ = drift
    state = board.state()
    json.dumps(state, allow_nan=False)
    found = {(s.name, tuple(s.labels.values())): s.value
             for family in text_string_to_metric_families(metrics.text().decode()) for s in family.samples}  # fmt: skip
    plans, last = state["plans"], state["looks"][-1]
    taken = [plan for plan in plans if plan["accepted"]]
    assert found["poise_imbalance", ()] == last["imbalance"] and found["poise_up", ()] == 1
    assert found["poise_imbalance", ("running",)] == found["poise_imbalance", ("after_restart",)] == last["imbalance"]
    assert found["poise_restart_pays", ()] == found["poise_restart_gain_ratio", ()] == 0
    assert found["poise_imbalance_first_placement", ()] == last["first"]
    assert found["poise_imbalance_predicted", ()] == taken[-1]["predicted"]
    assert (
        found["poise_last_plan_gap", ()] == plans[-1]["gap"]
        and found["poise_last_plan_gain_ratio", ()] == plans[-1]["gain"]
    )
    assert found["poise_step_seconds_modelled", ("current",)] == last["seconds"] >= last["bound"]
    assert found["poise_step_seconds_modelled", ("bound",)] == last["bound"]
    assert found["poise_steps_total", ()] == state["steps"] == STEPS * len(dumps)
    assert found["poise_dumps_total", ()] == state["dumps"] == len(dumps) and found["poise_dump_errors_total", ()] == 1
    assert found["poise_plans_total", ("true",)] == len(taken) and found["poise_plans_total", ("false",)] == len(
        plans
    ) - len(taken)
    assert found["poise_moves_total", ()] == state["moves"] == sum(plan["moves"] for plan in taken)
    assert found["poise_moved_bytes_total", ()] == state["moved_bytes"] == sum(plan["bytes"] for plan in taken)
    tested = [look for look in state["looks"] if look["p_value"] is not None][-1]
    assert found["poise_drift_p_value", ()] == tested["p_value"] and found["poise_drift_alarm", ()] == tested["alarm"]
    layers = [found["poise_layer_imbalance", (str(layer),)] for layer in range(1, 9)]
    np.testing.assert_allclose(layers, state["heat"]["imbalance"], rtol=1e-3)
    assert state["heat"]["layers"] == list(range(1, 9))
    np.testing.assert_allclose(np.mean(state["heat"]["relative"], axis=1), 1.0, atol=2e-3)
    for plan in taken[:2]:
        look = next(look for look in state["looks"] if look["step"] >= plan["step"] + WINDOW)
        assert plan["measured"] == look["imbalance"]
    assert abs(taken[0]["measured"] / taken[0]["predicted"] - 1) < 0.1


def test_a_reader_gets_only_what_it_has_not_and_history_is_bounded(drift, monkeypatch):
    _, events, board, _, _ = drift
    newest = board.state()["newest"]
    assert [look["n"] for look in board.state(newest - 2)["looks"]] == [newest - 1, newest]
    nothing = board.state(newest)
    assert nothing["looks"] == [] and nothing["heat"] is None and nothing["plans"]
    monkeypatch.setattr(board_module, "LOOKS", 10)
    small = Board({}, window=WINDOW)
    for event in [*events, Trouble("a"), Trouble("a", bad_dump=True), Trouble("b")]:
        small.note(event)
    state = small.state()
    assert len(state["looks"]) == 10 and state["looks"][-1]["n"] == state["newest"] == newest
    assert [(p["message"], p["times"]) for p in state["problems"]] == [("a", 2), ("b", 1)] and state["dump_errors"] == 2


def test_without_listeners_nothing_is_measured(dumps):
    service = Service(Script(Polled(tuple(dumps[:5]))), Setup(CLUSTER, settings()))
    events = list(service.run(once=True, interval_s=1.0, wait=lambda seconds: None))
    assert all(event.now is None for event in of(events, Seen)) and of(events, Planned)[0].gap is None


def test_a_dump_of_another_shape_is_left_out(dumps):
    other = Arrival(recorded_steps(LoadProfile(np.ones((3, 4, 32)))))
    more = Arrival(recorded_steps(LoadProfile(np.ones((3, 9, 16)), layer_ids=np.arange(9))))
    thin = Arrival(steps_of(dumps[0].steps, slice(0, 4)))
    service = Service(Script(Polled((dumps[0], other, more, thin))), Setup(CLUSTER, settings()))
    events, _ = run(service)
    assert [t.bad_dump for t in of(events, Trouble)] == [True, True] and service.controller.step == STEPS + 4
    assert "4 layers from 0 to 3, the first had 8 from 1 to 8" in of(events, Trouble)[0].message


def test_waits_are_the_sources_or_the_interval(dumps):
    polls = [Polled(up=False, problems=("down",), wait_s=0.5), Polled((dumps[0],)), Polled()]
    service = Service(source := Script(*polls), Setup(CLUSTER, settings()))
    events, waits = run(service, times=3)
    assert waits == [0.5, 5.0, 5.0] and of(events, Polled) == polls and source.closed == 1


def test_what_is_left_is_asked_for_at_once(dumps):
    def service():
        return Service(
            Script(*[Polled((dumps[k],), more=k < 2) for k in range(3)], Polled()), Setup(CLUSTER, settings())
        )

    events, waits = run(service(), times=2)
    assert [len(of(events, Polled)), waits] == [4, [5.0, 5.0]]
    kept = service()
    list(kept.run(once=True, interval_s=1.0, wait=pytest.fail))
    assert kept.controller.step == 3 * STEPS


def test_moves_in_parts_are_measured_only_where_they_serve_for_a_window(dumps):
    service = Service(
        Script(Polled(tuple(dumps[:8]))), Setup(CLUSTER, settings(max_moves=10), redundant=8), measured=True
    )
    board, events = Board({}, window=WINDOW), []
    for event in service.run(once=True, interval_s=1.0, wait=pytest.fail):
        board.note(event)
        events.append(event)
    taken, looks = [plan for plan in board.state()["plans"] if plan["accepted"]], board.state()["looks"]
    assert len(taken) >= 3 and {plan["reason"] for plan in taken} == {"first", "continued"}
    for plan, after in zip(taken, [*taken[1:], None], strict=True):
        end = len(looks) * EVERY if after is None else after["step"]
        look = next((one for one in looks if plan["step"] + WINDOW <= one["step"] <= end), None)
        assert plan["measured"] == (None if look is None else look["imbalance"])
    assert taken[0]["measured"] is None and taken[0]["superseded"]

    replaced = Board({}, window=WINDOW)
    for event in events:
        replaced.note(event)
        if isinstance(event, Planned):
            replaced.note(Told("another map", replaced=True))
    assert all(plan["measured"] is None for plan in replaced.state()["plans"])


def test_the_engines_start_is_what_it_was_started_with_last(dumps):
    service = Service(
        source := Script(Polled(tuple(dumps[:7]))), Setup(CLUSTER, settings(), redundant=8), measured=True
    )
    events, _ = run(service)
    last = of(events, Seen)[-1]
    assert last.now.imbalance < 0.9 * last.first.imbalance
    source.start = service.controller.current
    source.polls = [Polled((dumps[7],), restarted=True)]
    events, _ = run(service)
    assert [told.message for told in of(events, Told)] == ["the engine was started anew"]
    assert all(seen.now.imbalance == seen.first.imbalance for seen in of(events, Seen)) and of(events, Seen)
    old = Placement(np.tile(np.arange(40) % 32, (9, 1)), np.repeat(np.arange(8), 5), 32, 8)
    source.start = old
    events, _ = run(service)
    assert "not with the newest placement" in of(events, Told)[0].message and service._first is not old
    assert of(events, Seen)[-1].now.imbalance < of(events, Seen)[-1].first.imbalance
    thin = Placement(np.tile(np.arange(32), (9, 1)), np.repeat(np.arange(8), 4), 32, 8)
    for start, words in (
        (OptionError("not a .json file"), "not a .json"),
        (thin, "32 slots a layer, plans are for 40"),
    ):
        source.start, before = start, service._first
        events, _ = run(service)
        assert words in of(events, Trouble)[0].message and service._first is before


def test_the_engines_own_map_counts(dumps):
    steps = dumps[0].steps
    table = np.tile(np.arange(32, dtype=np.int32)[::-1].copy(), (9, 1))
    record = SlotRecord(np.arange(9, dtype=np.int32), table)
    arrivals = (Arrival(steps, record), *dumps[1:5])
    service = Service(Script(Polled(arrivals), Polled((Arrival(None, record),))), Setup(CLUSTER, settings()))
    events, _ = run(service, times=1)
    assert of(events, Planned)[0].decision.accepted
    np.testing.assert_array_equal(service._first.slot_expert_LS, table[1:])
    planned = service.controller.current
    assert (planned.slot_expert_LS != table[1:]).any()
    events, _ = run(service, times=1)  # the engine says that it still runs what it was started with
    assert [told.replaced for told in of(events, Told)] == [True]
    np.testing.assert_array_equal(service.controller.current.slot_expert_LS, table[1:])
    record = SlotRecord(np.arange(9, dtype=np.int32), np.roll(table, 1, axis=1))
    service.source = Script(Polled((Arrival(None, record),)))
    run(service)
    np.testing.assert_array_equal(service._first.slot_expert_LS, record.map_LS[1:])
    narrow = SlotRecord(np.arange(9, dtype=np.int32), np.zeros((9, 33), np.int32))
    service.source = Script(Polled((Arrival(None, narrow),)))
    events, _ = run(service)
    assert "33 slots cannot be shared evenly by 8 devices" in of(events, Trouble)[0].message


def test_where_maps_apply_at_the_start_what_runs_and_what_would_run_are_two_numbers(dumps):
    """A plan for the traffic is written; the engine runs its old map, then another, then the new one."""
    rows = np.array([1, *range(1, 9)])
    old = np.tile(np.arange(32, dtype=np.int32)[::-1], (9, 1))
    ids = np.arange(9, dtype=np.int32)
    source = Script(Polled((Arrival(dumps[0].steps, SlotRecord(ids, old)), *dumps[1:6])))
    service = Service(source, Setup(CLUSTER, settings(at_start=True, restart_seconds=5.0)), measured=True)
    board, metrics = Board({}, window=WINDOW), Metrics()

    def go():
        events, _ = run(service)
        for event in events:
            board.note(event)
            metrics.note(event)
        found = {tuple(s.labels.values()): s.value for family in text_string_to_metric_families(metrics.text().decode())
                 for s in family.samples if s.name == "poise_imbalance"}  # fmt: skip
        return of(events, Seen)[-1], found, [told.message for told in of(events, Told)], of(events, Planned)

    seen, found, _, plans = go()
    control = service.controller
    assert plans[0].decision.accepted and plans[0].decision.restart.restart_seconds == 5.0
    np.testing.assert_array_equal(control.running.slot_expert_LS, old[1:])
    assert found[()] == found["running",] == seen.look.imbalance == pytest.approx(seen.now.imbalance)
    assert found["after_restart",] == seen.look.restart.imbalance_after < 0.9 * found["running",]
    state = board.state()
    assert state["looks"][-1]["after_restart"] == found["after_restart",] and "5 s" in state["looks"][-1]["restart"]
    measured = state["plans"][0]["measured"]
    assert measured < 0.9 * state["plans"][0]["before"] and measured == pytest.approx(
        state["plans"][0]["predicted"], rel=0.1
    )

    other = np.roll(old, 7, axis=1)
    source.polls = [Polled((Arrival(dumps[6].steps, SlotRecord(ids, other)),))]
    seen, found, told, _ = go()
    assert (
        told == ["the engine runs another map than before, and not the newest"] and control.running.method == "engine"
    )
    newest = control.current
    source.polls = [Polled((Arrival(dumps[7].steps, SlotRecord(ids, newest.slot_expert_LS[rows - 1])),))]
    seen, found, told, _ = go()
    assert told == ["the engine runs the newest map"] and control.running is newest is control.current
    assert found["running",] == found["after_restart",] == seen.look.imbalance and seen.look.restart is None


def test_a_restart_that_is_met_brings_in_the_newest_map(dumps):
    service = Service(
        source := Script(Polled(tuple(dumps[:6]))), Setup(CLUSTER, settings(at_start=True), redundant=8), measured=True
    )
    events, _ = run(service)
    look = of(events, Seen)[-1].look
    assert look.restart is not None and look.imbalance > look.imbalance_after_restart and look.restart.pays is None
    source.start = service.controller.current
    source.polls = [Polled((dumps[6],), restarted=True)]
    events, _ = run(service)
    assert of(events, Seen)[-1].look.restart is None and service.controller.running is service.controller.current


def test_what_cannot_be_written_is_tried_again(dumps, tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    polls = (Polled(tuple(dumps[:3])), Polled((dumps[3],)), Polled())
    outputs = [Output("sglang", folder / "map.json"), Output("npz", tmp_path / "p.npz")]
    service = Service(Script(*polls), Setup(CLUSTER, settings()), outputs)
    board, events, waits = Board({}, window=WINDOW), [], []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 1:
            folder.rmdir()
        if len(waits) == 3:
            folder.mkdir()
        if len(waits) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for event in service.run(once=False, interval_s=1.0, wait=wait):
            events.append(event)
            board.note(event)
    plan = of(events, Planned)[0]
    assert plan.decision.accepted and plan.written == (tmp_path / "p.npz",)
    after = events[events.index(plan) + 1 :]  # a failure; it is tried before the next look, and again
    assert [type(event) for event in after] == [Trouble, Trouble, Polled, Told, Polled]
    assert "tried again" in after[0].message and after[3].written == (folder / "map.json",)
    assert board.state()["plans"][0]["files"] == [str(tmp_path / "p.npz"), str(folder / "map.json")]
    assert (folder / "map.json").exists()


def test_one_output_that_fails_at_the_end_does_not_cost_the_others(dumps, tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    outputs = [Output("sglang", folder / "map.json"), Output("npz", tmp_path / "p.npz")]
    service = Service(Script(Polled(tuple(dumps[:5]))), Setup(CLUSTER, settings()), outputs)
    with pytest.raises(PlacementError, match=r"map\.json"):
        for event in service.run(once=True, interval_s=1.0, wait=pytest.fail):
            if isinstance(event, Seen) and folder.exists():
                folder.rmdir()
    assert (tmp_path / "p.npz").exists()


def test_a_plan_that_fails_does_not_end_the_watch(dumps, monkeypatch):
    real, calls = control_module.solve, []

    def solve(problem, **options):
        calls.append(1)
        if len(calls) == 1:
            raise NoResultError("no luck")
        return real(problem, **options)

    monkeypatch.setattr(control_module, "solve", solve)
    service = Service(Script(Polled(tuple(dumps[:8]))), Setup(CLUSTER, settings()))
    events, _ = run(service)
    assert [t.message for t in of(events, Trouble)] == ["no plan: no luck"] and of(events, Planned)[0].decision.accepted
    monkeypatch.setattr(control_module, "solve", lambda problem, **options: (_ for _ in ()).throw(NoResultError("no")))
    service = Service(Script(Polled(tuple(dumps[:8]))), Setup(CLUSTER, settings()))
    with pytest.raises(NoResultError):
        list(service.run(once=True, interval_s=1.0, wait=lambda seconds: None))


def test_what_does_not_fit_is_said_at_the_start(dumps, tmp_path):
    def start(setup, *outputs):
        list(Service(Script(Polled((dumps[0],))), setup, outputs).run(once=False, interval_s=1.0, wait=pytest.fail))

    with pytest.raises(PlacementError, match="as many slots on every rank"):
        start(Setup(CLUSTER, settings(), redundant=3), Output("sglang", tmp_path / "m.json"))
    with pytest.raises(PlacementError, match="cannot write"):
        start(Setup(CLUSTER, settings()), Output("npz", tmp_path / "none" / "p.npz"))
    with pytest.raises(OptionError, match="cannot keep"):
        Output("checkpoint", tmp_path / "c")
    with pytest.raises(OptionError, match="no row for layer 8"):
        placement = Placement(np.tile(np.arange(32), (8, 1)), np.repeat(np.arange(8), 4), 32, 8)
        start(Setup(CLUSTER, settings(), placement=placement))
    with pytest.raises(ValueError, match="experts"):
        start(Setup(CLUSTER, settings(), ModelSpec.parse("mixtral-8x7b")))
    assert sorted(tmp_path.iterdir()) == []


def test_rows_of_other_layers_are_dropped():
    whole = Placement(np.tile(np.arange(8), (4, 1)), np.repeat(np.arange(4), 2), 8, 4, np.array([0, 1, 3, 7]))
    part = rows_of(whole, np.array([1, 7], np.int32))
    assert part.layer_ids_L.tolist() == [1, 7] and part.num_slots == 8
    assert rows_of(whole, whole.layer_ids_L) is whole
