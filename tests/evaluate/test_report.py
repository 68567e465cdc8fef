"""The report, opened in a real browser."""

import os
import shutil

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

import poise
from poise.evaluate.report import write_report
from poise.evaluate.report.page import best_name
from poise.observe.synthetic import zipf_trace

EVIL = "<script>window.hacked = 1</script>"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    trace = zipf_trace(num_tokens=400, num_layers=3, num_experts=8, exponent=1.0)
    mine = poise.plan(trace, "1x4", method="lpt").placement
    evil = poise.Placement(mine.slot_expert_LS, mine.slot_device_S, 8, 4, method=EVIL)
    path = tmp_path_factory.mktemp("report") / "report.html"
    result = poise.compare(trace, "1x4", placements=["contiguous", evil, "eplb"])
    write_report(result, path)
    path.with_suffix(".maps").write_text(str(len({"contiguous", best_name(result)})))
    return path


@pytest.fixture(scope="module")
def browser():
    path = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no browser: the CI script installs chromium")
        pytest.skip("no chromium installed: the report is not opened")
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


def open_page(browser, report, **options):
    page = browser.new_page(**options)
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file://") or page.problems.append(request.url))
    page.goto(report.as_uri())
    return page


def test_it_opens_without_errors_or_network_and_names_are_inert(browser, report):
    page = open_page(browser, report)
    assert page.problems == []
    assert page.evaluate("window.hacked") is None
    assert EVIL in page.locator("table").first.inner_text()
    assert page.locator(".cells rect").count() == 3 * 4 * int(report.with_suffix(".maps").read_text())
    assert page.locator("table").count() == 2 and page.locator("svg").count() in (3, 4)


def test_a_click_sorts(browser, report):
    page = open_page(browser, report)
    table = page.locator("table").nth(1)
    head = table.locator("thead th").nth(1)

    def column():
        return [float(x) for x in table.locator("tbody td:nth-child(2)").all_inner_texts()]

    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending" and column() == sorted(column())
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending" and column() == sorted(column(), reverse=True)


def test_dark_and_narrow(browser, report):
    light, dark = (open_page(browser, report, color_scheme=scheme, viewport={"width": 400, "height": 800})
                   for scheme in ("light", "dark"))  # fmt: skip
    colours = [page.evaluate("getComputedStyle(document.body).backgroundColor") for page in (light, dark)]
    assert colours[0] != colours[1]
    assert light.evaluate("document.documentElement.scrollWidth") <= 400


def test_numbers_on_the_page_are_those_of_the_comparison(browser, tmp_path):
    result = poise.compare(
        poise.LoadProfile(np.arange(1.0, 17).reshape(1, 2, 8)), "1x4", placements=["contiguous", "lpt"]
    )
    write_report(result, tmp_path / "r.html")
    page = open_page(browser, tmp_path / "r.html")
    shown = page.locator("tbody tr").nth(1).locator("td").first.inner_text()
    assert shown == f"{result.rows()[1]['imbalance']:.3f}"
