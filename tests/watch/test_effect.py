"""The watch with an engine's metrics: a map that comes is judged, and one that hurt is left by the door of any other."""

import json

import pytest
from tests.helpers import few_or
from tests.watch.test_engine_metrics import Engine
from tests.watch.test_service import CLUSTER, Script, dumps, of, run, settings
from typer.testing import CliRunner

from poise.cli.main import app
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
        self.engine.serve(0, 100, 100, tpot)
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
        Script(Polled(), *[Polled((one,)) for one in dumps[:1]], *[Polled()] * 10, *[Polled((one,)) for one in dumps[1:6]],
               Polled()),
        Setup(CLUSTER, settings(**more), redundant=4), [Output("npz", tmp_path / "map.npz")],
        effects=MapEffects(source, window_s=50.0, clock=lambda: source.at),
    )  # fmt: skip
    source.maps = service
    events, _ = run(service, times=32)
    return service, first[0], events


@pytest.fixture(scope="module")
def hurt(dumps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hurt")
    return folder, *watched(folder, dumps, lambda first, now: (first != now).any())


@pytest.fixture(scope="module")
def helped(dumps, tmp_path_factory):
    return watched(tmp_path_factory.mktemp("helped"), dumps, lambda first, now: not (first != now).any())[2]


def test_a_map_that_hurt_is_left(hurt):
    tmp_path, service, first, events = hurt
    plans = [one.decision for one in of(events, Planned)]
    assert [one.reason for one in plans] == ["first", "hurt"] and all(one.accepted for one in plans)
    back = plans[1]
    assert back.seconds_before == pytest.approx(0.022) and back.seconds_after == pytest.approx(0.02)
    assert back.cost_seconds > 0 and back.moves.fetched > 0
    assert (service.controller.running.count_LED() == first).all()
    assert (Placement.load(tmp_path / "map.npz").count_LED() == first).all()
    words = [one.judgement.answer for one in of(events, Effect) if one.news]
    assert words[:4] == ["cannot tell yet", "did not help", "hurt", "cannot tell yet"]
    assert of(events, Planned)[1].written == (tmp_path / "map.npz",)
    later = [one.judgement.answer for one in of(events, Effect)][-1]
    assert later in ("helped", "cannot tell yet")  # the way back is judged too


def test_a_map_that_helped_stays(helped):
    assert [one.decision.reason for one in of(helped, Planned)] == ["first"]
    assert of(helped, Effect)[-1].judgement.answer == "helped"


def test_a_way_back_is_gone_if_it_pays(hurt):
    """The price rule of any plan, with measured seconds: on both sides of where it turns."""
    _, service, first, events = hurt
    was = of(events, Planned)[1].decision
    control = service.controller
    assert was.moves.result is control.current
    older = of(events, Planned)[0].decision.moves.result
    gains = []
    for share in (0.5, 2.0):  # of what the steps of the horizon must save
        assert control.go_back(older, 1.0, 1.0)  # nothing saved: the price is what is asked for
        price = control.collect()
        assert not price.accepted and price.cost_seconds > 0
        saved = share * price.cost_seconds / control.settings.horizon_steps
        assert control.go_back(older, 1.0, 1.0 - saved)
        got = control.collect()
        gains.append(got.accepted)
        assert got.reason == "hurt" and got.cost_seconds == price.cost_seconds
    control.moved(done=False)
    assert gains == [False, True] and (control.current.count_LED() == first).all()


@pytest.mark.skipif(few_or(False, True), reason="long: POISE_MANY=1")
def test_parts_of_the_way_back_go_on_until_it_is_gone(tmp_path, dumps, hurt):
    many = of(hurt[3], Planned)[-1].decision.moves.fetched
    service, first, events = watched(tmp_path, dumps, lambda first, now: (first != now).any(), max_moves=many - 1)
    back = [one.decision for one in of(events, Planned) if one.decision.reason == "hurt" and one.decision.accepted]
    assert len(back) > 1 and all(one.moves.fetched < many for one in back)
    assert (service.controller.running.count_LED() == first).all()


def test_a_restart_is_where_a_map_begins(tmp_path, dumps):
    """With maps for the next start nothing is judged before the engine was started anew, and going back is written."""
    source = Scraped(lambda runs: 0.02)
    script = Script(*[Polled((one,)) for one in dumps[:5]], *[Polled()] * 10, Polled(restarted=True), Polled())
    service = Service(script, Setup(CLUSTER, settings(at_start=True, restart_seconds=5.0), redundant=4),
                      [Output("npz", tmp_path / "map.npz")], effects=MapEffects(source, window_s=50.0, clock=lambda: source.at))  # fmt: skip
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
    events, _ = run(service, times=28)
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
    assert [one.at_s for one in ScrapeFolder(tmp_path, since_s=10.6).scrapes()[0]] == [20.0]


def test_the_board_and_metrics_have_it(helped):
    board, metrics = Board({}, window=4), Metrics()
    assert b"poise_map_effect NaN" in metrics.text()
    for event in helped:
        board.note(event)
        metrics.note(event)
    state = json.loads(json.dumps(board.state()["effect"], allow_nan=False))
    assert state["answer"] == "helped" and state["sentence"].startswith("helped: faster in 8 pairs")
    text = metrics.text().decode()
    assert "poise_map_effect 1.0" in text and "poise_map_effect_pairs 8.0" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metrics", "no/such/folder"], "is no folder of scrapes, and no address of an engine"),
        (["--metrics", "ftp://here"], "is no address of an engine"),
        (["--metrics-window", "5"], "--metrics-window is of --metrics"),
        (["--metrics", ".", "--metrics-window", "0"], "must be above 0 s"),
        (["--metrics", "."], "--once waits for none"),
    ],
)
def test_options_that_go_nowhere(words, said):
    got = CliRunner().invoke(app, ["watch", "src/poise/data/demo_trace.npz", "-c", "1x4", "--once", *words])
    assert got.exit_code == 2 and said in " ".join(got.stderr.split()), got.output
