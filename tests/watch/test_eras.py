"""Which map a window is of, and which map a judgement undoes: no engine, no plan, maps and scrapes by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from tests.watch.test_service import CLUSTER, Script, settings

from poise.planning.placement import Placement
from poise.watch.effect import Effect, MapEffects, WayBack
from poise.watch.engine_metrics import Scrape
from poise.watch.service import Service, Setup
from poise.watch.sources import Polled


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
    return engine, MapEffects(engine, window_s=50.0)


def judged(effects):
    return [one.judgement for one in effects if isinstance(one, Effect)]


def test_a_map_that_comes_back_soon_is_not_judged_against_itself():
    engine, follow = followed()
    follow.look(A)
    for _ in range(12):
        engine.serve()
        follow.look(A)
    follow.look(B)
    engine.serve(0.03, times=4)
    follow.look(B)
    (said,), _ = follow.look(A)
    assert said.judgement.why == "the map of before runs again"
    for _ in range(12):
        engine.serve()
        assert follow.look(A) == ([], [])
    (said,), _ = follow.look(C)
    assert 20 <= said.judgement.before <= 24  # windows under A, before and after B


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
