"""The server: its paths, and nothing else."""

import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from poise.errors import NoResultError, OptionError
from poise.watch import metrics as metrics_module
from poise.watch.board import Board
from poise.watch.metrics import Metrics
from poise.watch.page import Page, answers, listen_address
from poise.watch.service import Trouble
from poise.watch.sources import Polled

EVIL = "<script>window.hacked = 1</script>"


@pytest.fixture
def served():
    times = [1000.0]
    board = Board({"source": EVIL}, window=4, clock=lambda: 1000.0, ticks=lambda: times[0])
    metrics = Metrics()
    page = Page(("127.0.0.1", 0), answers(board, metrics, stale_s=60.0))
    page.start()
    yield page.url, board, metrics, times
    page.close()


def get(url, method="GET"):
    try:
        with urlopen(Request(url, method=method), timeout=120) as answer:
            return answer.status, answer.headers, answer.read()
    except HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_what_is_there(served):
    url, board, metrics, _ = served
    for event in (Polled(dumps=2, problems=("a [b] c",)), Trouble("<b>")):
        board.note(event)
        metrics.note(event)
    for path, kind, part in (
        ("", "text/html", b"<title>poise watch</title>"), ("page.css", "text/css", b"--accent"),
        ("page.js", "text/javascript", b"use strict"), ("healthz", "text/plain", b"ok"),
        ("metrics", "text/plain", b"poise_dumps_total 2.0"), ("state.json", "application/json", b'"dumps": 2'),
    ):  # fmt: skip
        status, headers, body = get(url + path)
        assert status == 200 and headers["Content-Type"].startswith(kind) and part in body, path
        assert (
            headers["X-Content-Type-Options"] == "nosniff"
            and "default-src 'none'" in headers["Content-Security-Policy"]
        )
        status, headers, empty = get(url + path, "HEAD")
        assert status == 200 and int(headers["Content-Length"]) == len(body) and empty == b""
    state = json.loads(get(url + "state.json?after=5")[2])
    assert state["about"] == {"source": EVIL} and [p["message"] for p in state["problems"]] == ["a [b] c", "<b>"]
    assert EVIL.encode() not in get(url)[2]


def test_what_is_not(served):
    for path in ("none", "../../../etc/passwd", "%2e%2e/page.py", "page.py", "state.json/", "page.html"):
        status, _, body = get(served[0] + path)
        assert (status, body) == (404, b"not found\n"), path


def test_bad_requests(served):
    url = served[0]
    assert get(url + "state.json?after=x")[0] == 400 and get(url + "state.json?after=" + "9" * 5000)[0] == 400
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert get(url, method)[0] == 501


def test_health_follows_the_looks(served):
    url, board, _, times = served
    times[0] += 61
    status, _, body = get(url + "healthz")
    assert (status, body) == (503, b"no look for 61 s\n")
    board.note(Polled(up=False))
    assert get(url + "healthz")[0] == 200
    times[0] += 61
    board.note(Trouble("a dump out of many could not be used"))  # what one look brought takes its time
    assert get(url + "healthz")[0] == 200


def test_addresses():
    assert listen_address("9464") == ("127.0.0.1", 9464) and listen_address(":0") == ("127.0.0.1", 0)
    assert listen_address("0.0.0.0:80") == ("0.0.0.0", 80) and listen_address("[::1]:80") == ("::1", 80)
    for wrong in ("", "host", "host:", "host:http", "1:65536", "1:-1", "1:" + "9" * 5000, "1:²"):
        with pytest.raises(OptionError, match="cannot listen"):
            listen_address(wrong)


def test_a_port_in_use_is_said(served):
    port = int(served[0].rstrip("/").rpartition(":")[2])
    with pytest.raises(OptionError, match=f"cannot listen on 127.0.0.1:{port}"):
        Page(("127.0.0.1", port), lambda path: None)
    with pytest.raises(OptionError, match="cannot listen on"):
        Page(("no.such.host.invalid", 0), lambda path: None)


def test_metrics_need_their_library(monkeypatch):
    monkeypatch.setattr(metrics_module, "prometheus_client", None)
    with pytest.raises(NoResultError, match="prometheus-client"):
        Metrics()
