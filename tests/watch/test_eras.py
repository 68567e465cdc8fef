"""Which map a window is of, and which map a judgement undoes: no engine, no plan, maps and scrapes by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from tests.watch.test_service import CLUSTER, Script, dumps, run, settings

from poise.engines.dump import SlotRecord
from poise.planning.placement import Placement
from poise.util.errors import NoResultError
from poise.watch.effect import MapEffects, WayBack
from poise.watch.engine_metrics import Scrape
from poise.watch.service import Service, Setup, Trouble
from poise.watch.sources import Arrival, Polled

assert dumps  # a fixture of that file


def placed(turn):
    """Eight experts on eight devices, turned by so many."""
    return Placement.from_counts(
        np.roll(np.eye(8, dtype=np.int64), turn, axis=1)[None], slots_D=np.ones(8, np.int64),
        layer_ids_L=np.zeros(1, np.int32), method="hand",
    )  # fmt: skip


A, B, C = placed(0), placed(1), placed(2)


class Engine:
    """Scrapes that are made when told: 1,000 tokens in 60 s, at a TPOT."""

    def __init__(self):
        self.at, self.total, self.waiting, self.started = 0.0, np.zeros(2), [], 1.0

    def serve(self, tpot=0.02, times=1, seconds=60.0):
        for _ in range(times):
            self.at += seconds
            self.total += (1e3, 1e3 * tpot)
            counters = {"gap_count": self.total[0], "gap_sum": self.total[1], "prompt": self.total[0]}
            self.waiting.append(Scrape(self.at, "vllm", 8.0, counters, self.started))

    def restart(self):
        self.started, self.total = self.at, np.zeros(2)

    def scrapes(self):
        now, self.waiting = self.waiting[:64], self.waiting[64:]
        return now, []


def followed():
    engine = Engine()
    return engine, MapEffects(engine, window_s=50.0, clock=lambda: engine.at)


def seen(engine, follow, runs, times, tpot=0.02):
    """Effects of so many looks, a scrape each."""
    out = []
    for _ in range(times):
        engine.serve(tpot)
        out += follow.look(runs)[0]
    return [one.judgement for one in out]


def test_a_map_that_comes_back_soon_is_not_judged_against_itself():
    engine, follow = followed()
    follow.look(A)
    seen(engine, follow, A, 12)
    seen(engine, follow, B, 4, 0.03)
    assert [one.why for one in seen(engine, follow, A, 12)] == ["the map of before runs again"]
    said = seen(engine, follow, C, 2)[0]
    assert 20 <= said.before <= 24  # windows under A, before and after B


def test_a_scrape_is_of_the_map_that_ran_when_it_was_made():
    """A backlog that is read after a change is of before it, and what was saved before the watch is of no map."""
    engine, follow = followed()
    engine.serve(0.09, times=10)  # before the watch
    assert follow.look(A) == ([], [])
    engine.serve(0.02, times=80)
    follow.look(A)  # reads 64 of them
    assert len(follow._era) == 64
    engine.serve(0.05)  # between the two looks: nobody knows of which map
    engine.at += 1.0
    said = [one.judgement for _ in range(2) for one in follow.look(B)[0]]
    assert [(one.before, one.after) for one in said] == [(80, 0)] and said[0].tpot_s[0] == pytest.approx(0.02)
    said = seen(engine, follow, B, 14, 0.03)
    assert said[-1].answer == "hurt" and said[-1].tpot_s[1] == pytest.approx(0.03)
    assert follow.back is not None and follow.back.of(B) and not follow.back.of(A)


@pytest.mark.parametrize(("then", "told"), [(A, True), (C, True), (C, False)])
def test_windows_after_a_restart_wait_for_what_the_engine_runs(then, told):
    engine, follow = followed()
    follow.look(A)
    seen(engine, follow, A, 12)
    engine.restart()
    assert seen(engine, follow, A, 10, 0.03) == []
    assert [one.tpot_s for one in follow._era] == pytest.approx([0.02] * 11)
    said = [one.judgement for one in follow.look(then, told=told)[0]]
    said += seen(engine, follow, then, 2, 0.03)
    if then is A:  # the restart brought no map
        assert said == [] and len(follow._era) == 11 + 9 - 1 + 2
    else:  # what was held is of the new map, if that came with the restart
        assert said[0].before == 11 and said[-1].after == (8 if told else 0)


@pytest.mark.parametrize("late", [False, True])
def test_a_restart_that_the_source_met_holds_nothing(late):
    """The source tells of a restart, and of the same map, before or after the metrics show it."""
    engine, follow = followed()
    follow.look(A)
    seen(engine, follow, A, 12)
    engine.restart()
    if late:
        engine.serve()
        follow.look(A)
    follow.look(A, started=True)
    before = len(follow._era)
    seen(engine, follow, A, 5)
    assert len(follow._era) - before in (3, 4)
    engine.restart()  # and one that it did not meet
    seen(engine, follow, A, 5)
    assert len(follow._era) - before in (3, 4)


@pytest.mark.parametrize(("runs", "goes"), [(A, False), (B, True), (C, False), (placed(3), True)])
def test_a_way_back_is_of_the_map_that_was_judged(runs, goes):
    """B hurt while C waited for a restart, and C runs now: no window of C was seen. A part of the way back is none."""
    asked = []

    def go_back(*way):
        asked.append(way)
        return False

    service = Service(Script(Polled()), Setup(CLUSTER, settings()), effects=MapEffects(Engine()))
    service.controller = SimpleNamespace(running=runs, current=runs, go_back=go_back)
    service._back = WayBack(B, A, 0.03, 0.02, (placed(3),))
    list(service._hear(False))
    assert asked == ([(A, 0.03, 0.02)] if goes else []) and (service._back is not None) == goes
    service.controller.running = B
    list(service._hear(False))
    assert len(asked) == 2 * goes  # what was dropped does not come again


def test_the_service_passes_on_what_is_known_of_the_map(dumps):
    """Said by the engine in a dump, met at a start, neither; and not where a start's map is not known."""
    heard = []

    def look(runs, *, told, started):
        heard.append((told, started))
        return [], []

    ids, table = np.arange(9, dtype=np.int32), np.tile(np.arange(32, dtype=np.int32)[::-1], (9, 1))
    slots = Arrival(None, SlotRecord(ids, table))
    polls = Polled((dumps[0],)), Polled((slots,)), Polled(restarted=True), Polled(), Polled((slots,), restarted=True)
    script = Script(*polls, Polled())
    service = Service(script, Setup(CLUSTER, settings()), effects=SimpleNamespace(look=look, back=None))
    original = script.poll

    def poll(*, last=False):
        got = original(last=last)
        script.start = service.controller.current if got.restarted and not got.arrivals else None
        return got

    script.poll = poll
    run(service, times=6)
    assert heard == [(False, False), (True, False), (False, True), (False, False), (True, False), (False, False)]


def test_a_way_back_that_fits_no_part_is_told_and_dropped():
    def go_back(*way):
        raise NoResultError("no part of the way back fetches at most max_moves = 1 experts: the shortest fetches 8")

    service = Service(Script(Polled()), Setup(CLUSTER, settings()), effects=MapEffects(Engine()))
    service.controller = SimpleNamespace(running=B, current=B, go_back=go_back)
    service._back = WayBack(B, A, 0.03, 0.02)
    (told,) = service._hear(False)
    assert isinstance(told, Trouble) and "the map that hurt stays: no part" in told.message
    assert list(service._hear(False)) == []
