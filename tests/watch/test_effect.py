"""The watch with an engine's metrics: a map that comes is judged, and one that hurt is left by the door of any other."""

import json

import pytest
from tests.watch.test_engine_metrics import Engine
from tests.watch.test_service import CLUSTER, Script, dumps, of, run, settings

from poise.planning.placement import Placement
from poise.util.errors import OptionError
from poise.watch.board import Board
from poise.watch.effect import Effect, MapEffects, MetricsUrl, ScrapeFolder
from poise.watch.engine_metrics import read_scrape
from poise.watch.metrics import Metrics
from poise.watch.page import Page, PageResponse
from poise.watch.service import Output, Planned, Service, Setup, Trouble
from poise.watch.sources import Polled

assert dumps  # a fixture of that file


class Scraped:
    """An engine whose TPOT depends on the map that runs; a scrape every look."""

    def __init__(self, tpot_of):
        self.engine, self.at, self.tpot_of, self.maps = Engine("vllm"), 0.0, tpot_of, None

    def scrapes(self):
        self.at += 60.0
        tpot = self.tpot_of(self.maps.controller and self.maps.controller.running)
        self.engine.serve(0, 100, 200, tpot)
        return [read_scrape(self.engine.text(), self.at)], []


def watched(tmp_path, dumps, slower, **more):
    """A watch beside an engine in which what ``slower`` names takes 10 % longer; its events."""
    first = []

    def tpot(runs):
        if runs is None:
            return 0.02
        if not first:
            first.append(runs.count_LED())
        return 0.022 if slower(first[0], runs.count_LED()) else 0.02

    source = Scraped(tpot)
    service = Service(
        Script(Polled(), *[Polled((one,)) for one in dumps[:1]], *[Polled()] * 25, *[Polled((one,)) for one in dumps[1:8]],
               Polled()),
        Setup(CLUSTER, settings(**more), redundant=4), [Output("npz", tmp_path / "map.npz")],
        effects=MapEffects(source, window_s=50.0),
    )  # fmt: skip
    source.maps = service
    events, _ = run(service, times=90)
    return service, first[0], events


def test_a_map_that_hurt_is_left(tmp_path, dumps):
    service, first, events = watched(tmp_path, dumps, lambda first, now: (first != now).any())
    plans = [one.decision for one in of(events, Planned)]
    assert [one.reason for one in plans] == ["first", "hurt"] and all(one.accepted for one in plans)
    hurt = plans[1]
    assert hurt.seconds_before == pytest.approx(0.022) and hurt.seconds_after == pytest.approx(0.02)
    assert hurt.cost_seconds > 0 and hurt.moves.fetched > 0
    assert (service.controller.running.count_LED() == first).all()
    assert (Placement.load(tmp_path / "map.npz").count_LED() == first).all()
    words = [one.judgement.answer for one in of(events, Effect) if one.news]
    assert words[:4] == ["cannot tell yet", "did not help", "hurt", "cannot tell yet"]
    assert of(events, Planned)[1].written == (tmp_path / "map.npz",)
    later = [one.judgement.answer for one in of(events, Effect)][-1]
    assert later in ("helped", "cannot tell yet")  # the way back is judged too


def test_a_map_that_helped_stays(tmp_path, dumps):
    _, _, events = watched(tmp_path, dumps, lambda first, now: not (first != now).any())
    assert [one.decision.reason for one in of(events, Planned)] == ["first"]
    assert of(events, Effect)[-1].judgement.answer == "helped"


def test_no_change_goes_nowhere(tmp_path, dumps):
    _, _, events = watched(tmp_path, dumps, lambda first, now: False)
    assert [one.decision.reason for one in of(events, Planned)] == ["first"]
    assert "helped" not in {one.judgement.answer for one in of(events, Effect)}


def test_a_way_back_that_does_not_pay_is_told_and_not_gone(tmp_path, dumps):
    """The price rule of any plan, with measured seconds: a horizon too short for its moves."""
    slower = lambda first, now: (first != now).any()  # noqa: E731
    _, _, events = watched(tmp_path, dumps, slower)
    cost = of(events, Planned)[1].decision.cost_seconds
    _, _, events = watched(tmp_path, dumps, slower, horizon_steps=max(1e-9, 0.5 * cost / 0.002))
    taken = [(one.decision.reason, one.decision.accepted) for one in of(events, Planned)]
    assert ("hurt", True) not in taken


def test_parts_of_the_way_back_go_on_until_it_is_gone(tmp_path, dumps):
    _, _, whole = watched(tmp_path, dumps, lambda first, now: (first != now).any())
    many = of(whole, Planned)[-1].decision.moves.fetched
    service, first, events = watched(tmp_path, dumps, lambda first, now: (first != now).sum() > 2, max_moves=many - 1)
    back = [one.decision for one in of(events, Planned) if one.decision.reason == "hurt" and one.decision.accepted]
    assert len(back) > 1 and all(one.moves.fetched < many for one in back)
    assert (service.controller.running.count_LED() == first).all()


def test_a_restart_is_where_a_map_begins(tmp_path, dumps):
    """With maps for the next start nothing is judged before the engine was started anew, and going back is written."""
    source = Scraped(lambda runs: 0.02)
    script = Script(*[Polled((one,)) for one in dumps[:8]], *[Polled()] * 20, Polled(restarted=True), Polled())
    service = Service(script, Setup(CLUSTER, settings(at_start=True, restart_seconds=5.0), redundant=4),
                      [Output("npz", tmp_path / "map.npz")], effects=MapEffects(source, window_s=50.0))  # fmt: skip
    source.maps = service
    firsts = {}
    source.tpot_of = lambda runs: (
        0.02 if runs is None or not firsts or (runs.count_LED() == firsts["old"]).all() else 0.023
    )
    original = script.poll

    def poll(*, last=False):
        got = original(last=last)
        if got.restarted:
            firsts["old"] = service.controller.running.count_LED()
            script.start = service.controller.current
        return got

    script.poll = poll
    events, _ = run(service, times=60)
    reasons = [one.decision.reason for one in of(events, Planned) if one.decision.accepted]
    assert reasons[-1] == "hurt"
    effects = of(events, Effect)
    planned = next(at for at, one in enumerate(events) if isinstance(one, Planned))
    assert all(at > planned for at, one in enumerate(events) if isinstance(one, Effect)) and effects
    last = of(events, Planned)[-1].decision
    assert last.cost_seconds == 0 and last.restart.measured and last.restart.pays is True
    assert "of a step as measured" in last.restart.sentence()
    assert (Placement.load(tmp_path / "map.npz").count_LED() == firsts["old"]).all()
    assert (service.controller.running.count_LED() != firsts["old"]).any()  # until the next start


def test_metrics_that_cannot_be_read_are_told_and_end_nothing(dumps):
    class Broken:
        def scrapes(self):
            raise ValueError("no")

    service = Service(Script(Polled((dumps[0],)), Polled()), Setup(CLUSTER, settings()), effects=MapEffects(Broken()))
    events, _ = run(service, times=3)
    assert any("metrics were not judged" in one.message for one in of(events, Trouble))


def test_scrapes_over_http_and_from_a_folder(tmp_path):
    engine = Engine("sglang")
    engine.serve(0, 3, 10, 0.1)
    answers = {"/metrics": PageResponse(200, "text/plain", engine.text())}
    page = Page(("127.0.0.1", 0), lambda path: answers.get(path, PageResponse(404, "text/plain", b"no")))
    page.start()
    try:
        for url in (page.url, f"{page.url}metrics"):
            (scrape,), problems = MetricsUrl(url, clock=lambda: 5.0).scrapes()
            assert (scrape.running, scrape.at_s, problems) == (3.0, 5.0, [])
        answers.clear()
        assert MetricsUrl(page.url).scrapes() == ([], [f"{page.url}metrics answers 404: SGLang needs --enable-metrics"])
    finally:
        page.close()
    assert "no answer" in MetricsUrl(page.url).scrapes()[1][0]
    with pytest.raises(OptionError, match="no address"):
        MetricsUrl("ftp://x")
    with pytest.raises(OptionError, match="no folder"):
        ScrapeFolder(tmp_path / "none")
    folder = ScrapeFolder(tmp_path)
    for name, text in (("20.prom", engine.text()), ("10.5.prom", engine.text()), ("30.prom", b"?"), ("x.prom", b"")):
        (tmp_path / name).write_bytes(text)
    scrapes, problems = folder.scrapes()
    assert [one.at_s for one in scrapes] == [10.5, 20.0] and len(problems) == 1 and "30.prom" in problems[0]
    assert folder.scrapes() == ([], [])


def test_the_board_and_metrics_have_it(tmp_path, dumps):
    board, metrics = Board({}, window=4), Metrics()
    assert b"poise_map_effect NaN" in metrics.text()
    _, _, events = watched(tmp_path, dumps, lambda first, now: not (first != now).any())
    for event in events:
        board.note(event)
        metrics.note(event)
    state = json.loads(json.dumps(board.state()["effect"], allow_nan=False))
    assert state["answer"] == "helped" and state["sentence"].startswith("helped: faster in 9 pairs")
    text = metrics.text().decode()
    assert "poise_map_effect 1.0" in text and "poise_map_effect_pairs 9.0" in text
