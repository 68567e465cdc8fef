"""The what-if panel in a real browser: by keys, without a script, narrow, and inert names."""

import numpy as np
import pytest
from tests.report.test_report import EVIL, MADE, browser, compare_with, open_page, planted
from typer.testing import CliRunner

from poise.cli.main import app
from poise.replay.what_if import WhatIf
from poise.report import write_report
from poise.report.page import render
from poise.routing.synthetic import zipf_trace

__all__ = ["browser", "compare_with", "planted"]
SHAPE = (3, 2, 2, 2)
CHOOSE = """
(settings) => settings.map((setting) => {
  ["redundant", "tokens", "machine"].forEach((key, axis) => {
    document.querySelectorAll(`#what-if input[name=what-if-${key}]`)[setting[axis]].click();
  });
  return [...document.querySelectorAll("#what-if .figure")].map((cell) => cell.textContent);
})
"""


@pytest.fixture(scope="module")
def grid():
    """Figures that say which cell they are of; one map does not exist in one of them."""
    r, n, m, a = np.indices(SHAPE)
    seconds = 1e-3 * (10 + 5 * r + 3 * n + 2 * m) * np.where(a == 1, 0.8 - 0.1 * r, 1.0)
    seconds[2, 1, 1, 1] = np.nan
    return WhatIf((0, 4, 8), (256, 4096), ("h100", EVIL), ("contiguous", EVIL), seconds, 1 + 0.25 * (a + n), 1e-3 * np.full(SHAPE[:3], 5.0),
                  (1, 0, 0))  # fmt: skip


@pytest.fixture(scope="module")
def report(planted, grid, tmp_path_factory):
    path = tmp_path_factory.mktemp("what-if") / "report.html"
    write_report(planted, path, what=grid)
    return path


@pytest.fixture
def opened(browser, report):
    """Opens the report; pages go when the test does: their pictures move."""
    pages = []

    def once(**options):
        pages.append(open_page(browser, report, reduced_motion="reduce", **options))
        return pages[-1]

    yield once
    for page in pages:
        page.close()


def shown(page):
    return page.locator("#what-if .figure").all_inner_texts(), page.locator("#what-if output").inner_text()


def test_keys_choose_a_setting(opened, grid):
    page = opened()
    assert page.problems == [] and page.evaluate("window.hacked") is None
    assert shown(page) == (
        ["15.00 ms, 1.00 × mean", "10.50 ms, 1.25 × mean", "5.00 ms"],
        f"{EVIL} saves 30.0% over contiguous.",
    )
    assert max(row.bounding_box()["height"] for row in page.locator("#what-if tr").all()) < 50, "a name is in one line"
    page.locator("#what-if input[name=what-if-redundant]:checked").focus()
    page.keyboard.press("ArrowRight")  # 8 redundant slots
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # 4,096 tokens
    figures, said = shown(page)
    assert figures == ["23.00 ms, 1.25 × mean", "13.80 ms, 1.50 × mean", "5.00 ms"] and "saves 40.0%" in said
    widths = [bar.bounding_box()["width"] for bar in page.locator("#what-if .track i").all()]
    assert widths[1] / widths[0] == pytest.approx(0.6, abs=5e-3) and widths[0] == max(widths)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")  # the other machine, on which there is no such map
    assert shown(page) == (
        ["25.00 ms, 1.25 × mean", "no such map", "5.00 ms"],
        "Not worth it: nothing saves 1 % over contiguous.",
    )
    assert page.problems == [] and page.locator("#what-if input").count() == 7
    outline = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert page.evaluate(outline) == "solid", "what has the focus is seen"


def test_every_cell_is_what_the_grid_says(opened, grid):
    page = opened()
    said = page.evaluate(CHOOSE, list(np.ndindex(SHAPE[:3])))
    for at, texts in zip(np.ndindex(SHAPE[:3]), said, strict=True):
        want = ["no such map" if np.isnan(x) else f"{1e3 * x:.2f}" for x in grid.seconds_RNMA[at]]
        assert [text.split(" ms")[0] for text in texts[:2]] == want, at


def test_without_a_script_the_report_s_own_setting_is_there(opened):
    page = opened(java_script_enabled=False)
    assert shown(page) == (
        ["15.00 ms, 1.00 × mean", "10.50 ms, 1.25 × mean", "5.00 ms"],
        f"{EVIL} saves 30.0% over contiguous.",
    )
    assert not page.locator("#what-if fieldset").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(opened, scheme):
    page = opened(color_scheme=scheme, viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#whatif h2").is_visible() and page.problems == []


def test_without_a_grid_there_is_no_panel(planted):
    assert 'id="what-if"' not in render(planted, MADE)


def test_compare_prices_a_grid_when_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zipf_trace(num_tokens=512, num_layers=2, num_experts=8, top_k=2, exponent=1.2).save("t.npz")
    words = ["compare", "t.npz", "-c", "1x4", "-r", "4", "-p", "contiguous", "-p", "eplb", "-n", "64", "--work", "1"]
    refused = CliRunner().invoke(app, [*words, "--what-if"])
    assert refused.exit_code == 2 and "--what-if is a panel of the report" in refused.stderr
    done = CliRunner().invoke(app, [*words, "--what-if", "--html", "r.html"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "r.html").read_text("utf-8")
    assert '<section id="whatif">' in page and 'href="#whatif"' in page and len(page) < 1e6
