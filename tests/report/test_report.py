"""The report, opened in a real browser."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from tests.helpers import planted_affinity
from typer.testing import CliRunner

import poise
from poise.cli.main import app
from poise.cost.pricing import Pricing
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.replay.compare import IN_SAMPLE, Comparison, Entry, compare
from poise.replay.serving import FastLoop
from poise.replay.static import replay
from poise.report import write_report
from poise.report.charts import as_script, duration, size, ticks
from poise.report.page import render
from poise.report.view import MOST_COLUMNS, Columns, Made, View
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.stepwise.registry import POLICIES

EVIL = "<script>window.hacked = 1</script>{{STYLE}}</script>"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
SECTIONS = ["wait", "load", "time", "shift", "links", "flow", "timeline", "moves", "numbers", "facts"]
MADE = Made("2026-01-01 00:00 UTC", "poise 0", EVIL)


def compare_with(trace, placements, **options):
    """The best of the fixed placements is known: it is the last."""
    result = poise.compare(trace, "2x2", placements=placements, **options)
    assert View.of(result).fixed.name == result.entries[-1].name
    return result


@pytest.fixture(scope="module")
def planted():
    """Under ``stay`` the last placement keeps every token where it is; its name wants to be a script."""
    trace, group_LE = planted_affinity(num_tokens=256, num_layers=4)
    evil = poise.Placement.from_devices(group_LE, 4, method=EVIL)
    return compare_with(trace, ["contiguous", evil], traffic="stay", tokens_per_step=32)


@pytest.fixture(scope="module")
def report(planted, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(planted, path, command=EVIL)
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


@pytest.fixture(scope="module")
def page(browser, report):
    """Opened once for tests that click on different parts of it; after the last of them nothing has gone wrong."""
    opened = open_page(browser, report)
    yield opened
    assert opened.problems == []


def open_page(browser, report, **options):
    page = browser.new_page(**options)
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file://") or page.problems.append(request.url))
    page.goto(report.as_uri())
    return page


def test_it_opens_without_errors_or_network_and_names_are_inert(page, planted):
    assert page.problems == []
    assert page.evaluate("window.hacked") is None
    assert EVIL in page.locator("#numbers table").first.inner_text()
    assert EVIL in page.locator("footer").inner_text() and "numpy" in page.locator("footer").inner_text()
    assert [page.locator("section[id]").nth(i).get_attribute("id") for i in range(len(SECTIONS))] == SECTIONS
    links = page.locator("nav a").all()
    assert [link.get_attribute("href") for link in links] == [f"#{key}" for key in SECTIONS]
    assert page.title().startswith(f"poise: {EVIL} and contiguous, generic on")
    assert planted.verdict() in page.locator("h1").inner_text()


def test_a_click_sorts(page):
    table = page.locator("table.sorts").nth(1)
    head = table.locator("thead th").nth(1)

    def column():
        return [float(x) for x in table.locator("tbody td:nth-child(2)").all_inner_texts()]

    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending" and column() == sorted(column())
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending" and column() == sorted(column(), reverse=True)


def test_cells_say_their_value_to_pointer_and_keys(page, planted):
    figure = page.locator("#load figure.matrix").first
    said, svg = figure.locator("output"), figure.locator("svg")
    load_LD = planted.replays["contiguous", planted.judged_on].relative_load_LD()
    svg.focus()
    for key, (layer, device) in (
        ("ArrowDown", (0, 0)), ("ArrowDown", (1, 0)), ("ArrowRight", (1, 1)), ("ArrowUp", (0, 1)), ("ArrowUp", (0, 1)),
    ):  # fmt: skip
        page.keyboard.press(key)
        words = re.fullmatch(r"layer (\d+), device (\d+): ([\d.]+) × mean", said.inner_text())
        assert (int(words[1]), int(words[2])) == (layer, device)
        assert float(words[3]) == pytest.approx(load_LD[layer, device], abs=6e-4)
    box = figure.locator(".ground").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.99, box["y"] + box["height"] * 0.99)
    assert said.inner_text().startswith(f"layer {len(load_LD) - 1}, device 3:")


def test_the_slider_changes_the_flow(browser, report):
    page = open_page(browser, report)
    slider, name = page.locator("#flow-pair"), page.locator("#flow-name")
    first = page.locator("#flow .sankey svg").first
    slider.focus()
    page.keyboard.press("Home")
    before = (name.inner_text(), first.inner_html())
    assert before[0].startswith("layer 0 to layer 1")
    page.keyboard.press("ArrowRight")
    after = (name.inner_text(), first.inner_html())
    assert after[0].startswith("layer 1 to layer 2") and after[1] != before[1] and page.problems == []
    # the planted placement keeps every flow, contiguous does not
    ribbons, kept = (
        [page.locator("#flow .sankey").nth(which).locator(kind).count() for which in (0, 1)]
        for kind in (".ribbon", ".ribbon.stay")
    )
    assert ribbons[0] == ribbons[1] == kept[1] > kept[0] > 0
    assert "same device 100.0%" in page.locator("#flow .sankey figcaption").nth(1).inner_text()
    first.focus()
    page.keyboard.press("ArrowDown")
    data = json.loads(page.locator("#flow-data").inner_text())["pairs"][1]
    expert, to, pairs = data["flows"][0][:3]
    said = page.locator("#flow .sankey output").first.inner_text()
    assert said.startswith(f"expert {expert} to expert {to}: {pairs} (")
    assert float(said.split("(")[1].split("%")[0]) == pytest.approx(100 * pairs / data["total"], abs=0.051)


def test_dark_and_narrow(browser, report):
    light, dark = (open_page(browser, report, color_scheme=scheme, viewport={"width": 360, "height": 800})
                   for scheme in ("light", "dark"))  # fmt: skip
    colours = [page.evaluate("getComputedStyle(document.body).backgroundColor") for page in (light, dark)]
    assert colours[0] != colours[1]
    assert light.evaluate("document.documentElement.scrollWidth") <= 360
    # words in pictures are not shrunk until nobody can read them
    size = light.evaluate(
        "Math.min(...[...document.querySelectorAll('svg')].map(s => s.clientWidth / s.viewBox.baseVal.width))"
    )
    assert size * 11 > 7
    dark.emulate_media(media="print")
    assert dark.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--panel')") == "#fff"


def test_without_scripts_numbers_and_pictures_are_there(browser, report):
    page = open_page(browser, report, java_script_enabled=False)
    for key in SECTIONS:
        assert page.locator(f"#{key} h2").is_visible()
    for key in ("wait", "load", "time", "shift", "links", "flow", "timeline", "moves"):
        assert page.locator(f"#{key} svg").first.is_visible()
    assert not page.locator("#flow-pair").is_visible() and page.locator("noscript p").is_visible()


def test_numbers_on_the_page_are_those_of_the_comparison(browser, tmp_path):
    result = poise.compare(
        poise.LoadProfile(np.arange(1.0, 17).reshape(1, 2, 8)), "1x4", placements=["contiguous", "lpt"]
    )
    write_report(result, tmp_path / "r.html")
    page = open_page(browser, tmp_path / "r.html")
    shown = page.locator("#numbers tbody tr").nth(1).locator("td").first.inner_text()
    assert shown == f"{result.rows()[1]['imbalance']:.3f}"
    assert page.problems == [] and page.locator("#flow").count() == 0  # loads alone do not say where tokens go
    assert "loads alone" in page.locator("#facts").inner_text()
    assert page.locator("#links tbody tr").count() == 4  # one node: no network
    stay = page.locator("#links tbody td").first.inner_text()
    assert f"({1 - result.rows()[0]['cross_device_share']:.1%})" in stay


def test_a_fast_loop_is_shown_by_the_best_fixed_placement():
    trace = zipf_trace(num_tokens=256, num_layers=2, num_experts=8, top_k=2, exponent=1.2)
    batch, cluster = make_batch(trace, tokens_per_step=32), Cluster.parse("1x4:h100+datasheet")
    model = ModelSpec.generic(8, 2, batch.layer_ids_L)
    fixed = poise.Placement.from_devices(np.tile(np.arange(8) // 2, (2, 1)), 4)
    entries = [Entry("first", fixed), Entry("quick", fixed, fast=FastLoop(POLICIES["split"], 1))]
    result = compare({IN_SAMPLE: batch}, entries, pricing=Pricing(cluster, model, "home", "even"),
                     slots_D=np.full(4, 2))  # fmt: skip
    view = View.of(result)
    assert view.fixed.name == "first" and view.pictured == (entries[0],)
    page = render(result, MADE)
    assert "Nothing: no fixed placement beats first." in page
    assert ("quick plans every step anew" in page) == (view.best.name == "quick")


def large():
    """8 x 8 devices, 58 layers, 256 experts, 8 a token, some replicas; two placements that differ everywhere."""
    rng = np.random.default_rng(0)
    trace = zipf_trace(num_tokens=64, num_layers=58, num_experts=256, top_k=8, tokens_per_request=1)
    batch, cluster = make_batch(trace, tokens_per_step=64), Cluster.parse("8x8:h100+datasheet")
    model, entries, replays = ModelSpec.generic(256, 8, batch.layer_ids_L), [], {}
    for name in ("one", "two"):
        experts = np.stack([np.concatenate([rng.permutation(256), rng.integers(256, size=64)]) for _ in range(58)])
        placement = poise.Placement(rng.permuted(experts, axis=1), np.repeat(np.arange(64), 5), 256, 64)
        entries.append(Entry(name, placement))
        replays[name, IN_SAMPLE] = replay(batch, placement, cluster, model, traffic="home_node_dedup", split="even")
    # the better one last, so that every section is there
    entries.sort(key=lambda entry: -replays[entry.name, IN_SAMPLE].step_seconds_B.mean())
    return Comparison(tuple(entries), {IN_SAMPLE: batch}, replays, {IN_SAMPLE: replays["one", IN_SAMPLE].bound_B},
                      Pricing(cluster, model, "home_node_dedup", "even"), np.full(64, 5))  # fmt: skip


def test_a_large_cluster_fits_into_two_megabytes(browser, tmp_path):
    write_report(large(), tmp_path / "large.html")
    assert (tmp_path / "large.html").stat().st_size < 2e6
    page = open_page(browser, tmp_path / "large.html")
    assert page.problems == [] and page.locator("section[id]").count() == len(SECTIONS)
    assert len(json.loads(page.locator("#flow-data").inner_text())["pairs"]) == 57


def test_the_command_line_is_in_the_footer(tmp_path, monkeypatch):
    zipf_trace(num_tokens=64, num_layers=2, num_experts=8).save(tmp_path / "a <b>.npz")
    words = ["compare", str(tmp_path / "a <b>.npz"), "-c", "1x4", "-p", "lpt", "--html", str(tmp_path / "r.html")]
    monkeypatch.setattr("sys.argv", ["poise", *words])
    assert CliRunner().invoke(app, words).exit_code == 0
    footer = (tmp_path / "r.html").read_text("utf-8").split("<footer>")[1]
    assert f"poise compare &#x27;{tmp_path}/a &lt;b&gt;.npz&#x27; -c 1x4" in footer


def test_columns_of_large_clusters_are_few_and_cover_all():
    for spec in ("1x1", "1x72", "8x8", "12x8", "16x8", "256x8", "2x200", "1000x1"):
        cluster = Cluster.parse(spec)
        columns = Columns.of(cluster)
        assert len(columns.names) <= 2 * MOST_COLUMNS and (np.diff(columns.first_G) > 0).all()
        assert columns.sum(np.ones(cluster.num_devices)).sum() == cluster.num_devices
        assert columns.many == (cluster.num_devices > MOST_COLUMNS)
        assert columns.max(np.arange(cluster.num_devices))[-1] == cluster.num_devices - 1
        for column in columns.breaks:
            first = columns.first_G[column]
            assert cluster.node_D[first] == cluster.node_D[first - 1] + 1
    assert Columns.of(Cluster.parse("2x2")).breaks == (2,) and Columns.of(Cluster.parse("4x1")).breaks == ()
    assert Columns.of(Cluster.parse("16x8")).names[:2] == ("0-1", "2-3")


def test_data_cannot_leave_its_element_and_figures_read_well():
    name = "</script><!--<b>"
    script = as_script({"name": name}, "x")
    assert script.count("<") == 2
    assert json.loads(script[script.index(">") + 1 : -len("</script>")])["name"] == name
    for count, words in (
        (0, "0 B"),
        (999, "999 B"),
        (1e3, "1.00 kB"),
        (1.5e6, "1.50 MB"),
        (999.6e6, "1.00 GB"),
        (2e13, "20.0 TB"),
    ):
        assert size(count) == words
    for seconds, words in (
        (0, "0 µs"),
        (2e-6, "2.00 µs"),
        (0.0015, "1.50 ms"),
        (0.9999, "1.00 s"),
        (3, "3.00 s"),
        (600, "10.0 min"),
    ):
        assert duration(seconds) == words
    assert ticks(0, 10, 5) == pytest.approx([0, 2, 4, 6, 8, 10]) and 3 <= len(ticks(0.93, 1.07, 5)) <= 8


@pytest.mark.parametrize("traffic", ["home", "home_device_dedup", "home_node_dedup", "stay"])
def test_odd_shapes_are_drawn(tmp_path, traffic):
    """One device; one layer; uneven nodes behind shared network ports; more devices than columns; replicas everywhere."""
    (tmp_path / "odd.yaml").write_text("devices_per_node: [3, 1, 2]\nnic_shared: true\nspeed: [1, 2, 1, 1, 1, 0.5]\n")
    for cluster, layers, redundant in (("1x1", 2, 0), ("2x1", 1, 2), (tmp_path / "odd.yaml", 3, 9), ("13x8", 2, 100)):
        trace = zipf_trace(
            num_tokens=64, num_layers=layers, num_experts=12, top_k=2, exponent=1.5, tokens_per_request=4
        )
        model = ModelSpec.generic(12, 2, trace.layer_ids) if layers > 1 else None
        result = poise.compare(trace, cluster, placements=["contiguous", "eplb-global"], redundant=redundant,
                               traffic=traffic, split="exact", model=model)  # fmt: skip
        page = render(result, MADE)
        assert "nan" not in re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
        view = View.of(result)
        assert ('id="flow"' in page) == (layers > 1)
        assert ("earned back after" in page) == (
            len(view.pictured) == 2 and not result.verdict().startswith(("Not worth", "No verdict"))
        )
        assert page.count('<figure class="panel picked matrix">') == (5 if len(view.pictured) == 2 else 2)
