"""A replay server that speaks SGLang's recorder endpoints drives ``poise watch``, both real processes, through a drift."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from urllib.request import Request, urlopen

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from prometheus_client.parser import text_string_to_metric_families
from tests.report.test_report import ARGUMENTS
from tests.watch import replay_server
from tests.watch.replay_server import RANKS, STEPS, Traffic, balance

CLUSTER = "nodes: 2\ndevices_per_node: 4\nflops_per_s: 1e9\nintra_latency_s: 0.0\ninter_latency_s: 0.0\n"
KEY, PATIENCE_S = "secret", 300.0


def until(condition, what):
    """What the condition comes to, once it is true."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    pytest.fail(f"waited for {what}")


def get(url, method="GET"):
    with urlopen(Request(url, method=method), timeout=PATIENCE_S) as answer:
        return answer.read().decode()


class Watch:
    """The process, and the lines it printed."""

    def __init__(self, words, folder):
        self.errors = folder / "errors"
        environ = {**os.environ, "SGLANG_API_KEY": KEY}
        with self.errors.open("w") as stream:
            self.process = subprocess.Popen([sys.executable, "-m", "poise.cli", "watch", *words, "--json"], env=environ,
                                            stdout=subprocess.PIPE, stderr=stream, text=True)  # fmt: skip
        self.lines = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        with self.process.stdout as stream:
            for line in stream:
                self.lines.append(json.loads(line))

    def of(self, event):
        assert self.process.poll() is None, self.errors.read_text()
        return [line for line in list(self.lines) if line["event"] == event]


@contextmanager
def ended(process):
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_drift_behind_sglangs_recorder_is_met_and_shown(tmp_path):
    dumps, maps = tmp_path / "dumps", tmp_path / "map.json"
    (tmp_path / "slow.yaml").write_text(CLUSTER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    server = [sys.executable, replay_server.__file__, "--dump-dir", dumps, "--map", maps, "--key", KEY]
    words = ["--sglang", url, "--dump-dir", str(dumps), "-c", str(tmp_path / "slow.yaml"), "--method", "lpt", "--window", str(STEPS),
             "--every", str(STEPS // 2), "--interval", "0.05", "--export", f"sglang:{maps}", "--listen", "127.0.0.1:0", "--delete-dumps"]  # fmt: skip
    watch = Watch(words, tmp_path)  # before the engine: it waits
    with (
        ended(watch.process),
        ended(subprocess.Popen([*map(str, server), "--port", url.rpartition(":")[2]], stdout=subprocess.DEVNULL)),
    ):
        page = until(lambda: watch.of("listening"), "the page")[0]["url"]
        until(lambda: [p for p in watch.of("plan") if p["accepted"]], "a first plan")
        old = np.array(json.loads(maps.read_text())["physical_to_logical_map"])
        until(lambda: sum(look["p_value"] is not None for look in watch.of("look")) >= 2, "tests of the drift")

        get(f"{url}/replay/domain?name=python", "POST")
        before = watch.of("look")[-1]["step"]
        plans = until(
            lambda: [p for p in watch.of("plan") if p["step"] > before and p["reason"] == "settled"], "a plan"
        )
        assert any(look["alarm"] and look["step"] > before for look in watch.of("look"))
        assert any(p["accepted"] and p["step"] > before for p in watch.of("plan")) and plans
        new = np.array(json.loads(maps.read_text())["physical_to_logical_map"])
        fresh = Traffic(seed=99)
        count = np.sum([fresh.step("python") for _ in range(60)], axis=0)
        assert balance(new, count) < 0.85 * balance(old, count)

        def over_start():
            """How much better the placement decided on is than what the engine runs."""
            value = imbalances(page)
            return value["running"] / value["after_restart"]

        until(lambda: over_start() > 1 / 0.9, "a restart that would pay")
        get(f"{url}/replay/restart", "POST")

        def history():
            return json.loads(get(f"{url}/replay"))["history"]

        until(lambda: sum(generation == 1 for generation, _, _ in history()) >= 2 * STEPS, "traffic on the new map")
        measured = {
            g: np.mean([x for generation, name, x in history() if (generation, name) == (g, "python")]) for g in (0, 1)
        }
        assert measured[1] < 0.85 * measured[0]

        until(lambda: json.loads(get(page + "state.json"))["up"], "the engine to be back")
        until(lambda: over_start() < 1.05, "the restart to be taken in")
        assert any("started anew" in note["message"] for note in watch.of("note"))
        check_scrape(page)
        assert get(page + "healthz") == "ok\n" and len(list(dumps.iterdir())) <= 2
        check_page(page)

        watch.process.send_signal(signal.SIGTERM)
        assert watch.process.wait(PATIENCE_S) == 0, watch.errors.read_text()
        watch.reader.join(PATIENCE_S)
        watch.process.stdout.close()
        assert not json.loads(get(f"{url}/replay"))["recording"]


def imbalances(page):
    families = text_string_to_metric_families(get(page + "metrics"))
    samples = next(family for family in families if family.name == "poise_imbalance").samples
    return {sample.labels.get("map", ""): sample.value for sample in samples}


def check_scrape(page):
    families = {family.name: family for family in text_string_to_metric_families(get(page + "metrics"))}
    value = {name: family.samples[0].value for name, family in families.items()}
    state = json.loads(get(page + "state.json"))
    taken = [plan for plan in state["plans"] if plan["accepted"]]
    assert value["poise_up"] == 1 and value["poise_dumps"] >= 10 and value["poise_dump_errors"] == 0
    assert {s.labels["accepted"]: s.value for s in families["poise_plans"].samples if s.name == "poise_plans_total"} == {
        "true": len(taken), "false": len(state["plans"]) - len(taken)
    }  # fmt: skip
    assert value["poise_imbalance_predicted"] == taken[-1]["predicted"] and value["poise_last_plan_gap"] > 0
    assert value["poise_imbalance"] >= 1
    assert len(families["poise_layer_imbalance"].samples) == 8


def check_page(url):
    path = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no browser: the CI script installs chromium")
        pytest.skip("no chromium installed: the page is not opened")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=ARGUMENTS)
        page, problems = browser.new_page(), []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(url) or problems.append(request.url))
        page.goto(url)
        until(lambda: page.locator("#plans tr").count() > 1, "the plans on the page")
        rows = page.locator("#plans tr").all_inner_texts()
        assert (
            len(rows) >= 3
            and any("drift" in row and "taken" in row for row in rows)
            and any("first" in row for row in rows)
        )

        def accepted():
            return sum(plan["accepted"] for plan in json.loads(get(url + "state.json"))["plans"])

        marks = page.locator("#chart-imbalance .plan-mark")
        until(lambda: marks.count() == accepted(), "a mark for each accepted plan")  # the watch goes on meanwhile
        assert page.locator("#chart-drift .alarm-mark").count() >= 1 and page.locator("polyline").count() == 2
        assert float(page.locator("#imbalance").inner_text()) >= 1 and "%" in page.locator("#gap").inner_text()
        size = page.locator("#heat").evaluate("c => [c.width, c.height]")
        assert all(size) and [size[0] % RANKS, size[1] % 8] == [0, 0] and "layer" in page.locator("#worst").inner_text()
        dumps = int(page.locator("#dumps").inner_text())
        until(lambda: int(page.locator("#dumps").inner_text()) > dumps, "a page that is live")
        assert problems == []
        if shown := os.environ.get("POISE_WATCH_PICTURE"):
            page.screenshot(path=shown, full_page=True)
        browser.close()
