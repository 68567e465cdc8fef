"""What people see: how many series a scrape has at the size of a large engine, and the page on a phone and by keyboard."""

import os
import shutil

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from prometheus_client.parser import text_string_to_metric_families
from tests.report.test_report import ARGUMENTS

from poise.control.controller import Look
from poise.control.drift import DriftVerdict
from poise.control.restart import Restart
from poise.watch.board import Board
from poise.watch.effect import Effect
from poise.watch.helped import MapJudge
from poise.watch.measure import Judged
from poise.watch.metric_windows import MetricWindow
from poise.watch.metrics import Metrics
from poise.watch.page import Page, answers
from poise.watch.service import Seen
from poise.watch.sources import Polled

LAYERS, RANKS = 61, 72


def judged(layers=LAYERS, ranks=RANKS):
    load = np.random.default_rng(0).uniform(0.5, 1.5, (layers, ranks))
    return Judged(np.arange(layers, dtype=np.int32), 1.3, load.max(axis=1), load, 0.01)


def look(step=24, restart=None, learning=False):
    verdict = DriftVerdict(False, 0.1, 0.2, 0.5, 3)
    return Seen(Look(step, 1.3, verdict, "idle", learning, restart), judged(), judged(), 0.008)


def effect():
    judge = MapJudge([MetricWindow(0, 60, 10.0, 5.0, 500.0, 0.02)] * 12)
    for _ in range(12):
        judge.add(MetricWindow(0, 60, 10.0, 5.0, 560.0, 0.018))
    return Effect(judge.judgement, True)


def series(text):
    return sum(len(family.samples) for family in text_string_to_metric_families(text))


def test_a_scrape_of_a_large_engine_has_few_series_and_details_are_for_who_asks():
    board, metrics = Board({}, window=4), Metrics()
    answer = answers(board, metrics, stale_s=60.0)
    assert series(answer("/metrics/details").body.decode()) == 0
    for event in (Polled(dumps=1), look(restart=Restart(1.3, 1.1, 0.01, 0.008, 1e4, 5.0)), effect()):
        metrics.note(event)
    before = series(answer("/metrics").body.decode())
    assert LAYERS < before <= 150, before  # 500 are asked for; it does not grow with ranks
    details = answer("/metrics/details").body.decode()
    assert series(details) == LAYERS * RANKS
    family = next(iter(text_string_to_metric_families(details)))
    value = {(s.labels["layer"], s.labels["device"]): s.value for s in family.samples}
    assert value["60", "71"] == pytest.approx(judged().relative_LD[60, 71])
    assert series(answer("/metrics").body.decode()) == before


@pytest.fixture(scope="module")
def browser():
    path = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no browser: the CI script installs chromium")
        pytest.skip("no chromium installed: the page is not opened")
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


WAITS = [
    ((), "first recorded traffic"),
    ((Polled(up=False),), "the source to answer"),
    ((Polled(dumps=1),), "enough steps"),
    ((look(learning=True),), "a reference of this traffic"),
    ((look(restart=Restart(1.3, 1.1, 0.01, 0.008, 1e4, 5.0)),), "takes it at its next start"),
    ((look(), effect()), "the newest map runs"),
]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_at_a_phone_s_width_and_by_keyboard(browser, width):
    board, metrics = Board({"source": "a" * 200}, window=4), Metrics()
    shown = Page(("127.0.0.1", 0), answers(board, metrics, stale_s=60.0))
    shown.start()
    page, problems = browser.new_page(viewport={"width": width, "height": 800}), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    try:
        page.goto(shown.url)
        for events, said in WAITS:
            for event in (Polled(), *events):
                board.note(event)
            page.wait_for_function("said => document.getElementById('waits').textContent.includes(said)", arg=said)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#imbalance").inner_text() == "1.300" and page.locator("#effect").inner_text() == "helped"
        assert "-10.0 %" in page.locator("#effect-sentence").inner_text()
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "heat":
                break
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        for key, cell in (
            ("ArrowDown", "layer 1, device 0"),
            ("ArrowRight", "layer 1, device 1"),
            ("ArrowUp", "layer 0, device 1"),
        ):
            page.keyboard.press(key)
            assert page.locator("#cell").inner_text().startswith(cell)
        assert problems == []
    finally:
        page.close()
        shown.close()
    assert board.state()["effect"]["answer"] == "helped"
