"""The server: its paths, and nothing else."""

import json
import socket
import threading
from http import HTTPStatus
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from poise.util.errors import NoResultError, OptionError
from poise.watch import metrics as metrics_module
from poise.watch.board import Board
from poise.watch.metrics import Metrics
from poise.watch.page import MOST_CLIENTS, Page, PageResponse, answers, listen_address
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


def ask(url, lines, wait=True):
    """Everything that is answered to these bytes, or the connection."""
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    client = socket.create_connection((host, int(port)), timeout=20)
    client.sendall(lines)
    if not wait:
        return client
    with client:
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST.:9464", 200), ("a.localhost:1", 200), ("127.0.0.1:9", 200), ("[::1]:9464", 200), ("10.1.2.3", 200),
     ("watch.internal:9464", 200), ("Watch.Internal", 200), ("evil.example", 421), ("evil.example:9464", 421), ("127.0.0.1.evil.example", 421),
     ("localhost.evil.example", 421), ("[::1", 421), ("", 421), ("watch.internal@evil.example", 421), ("\x1b[31m", 421), ("internal", 421)],
)  # fmt: skip
def test_only_its_own_names_are_answered(host, status):
    """A page elsewhere can make its name point here and would read what is served: DNS rebinding."""
    page = Page(
        ("127.0.0.1", 0), lambda path: PageResponse(HTTPStatus.OK, "text/plain", b"secret"), hosts=["watch.internal."]
    )
    page.start()
    try:
        for method in (b"GET", b"HEAD"):
            got = ask(page.url, method + b" / HTTP/1.1\r\nHost: " + host.encode() + b"\r\nConnection: close\r\n\r\n")
            assert got.startswith(b"HTTP/1.1 %d " % status) and (b"secret" in got) == (
                status == 200 and method == b"GET"
            )
            assert b"evil" not in got and b"\x1b" not in got
    finally:
        page.close()


def test_odd_requests_harm_nobody(served):
    url = served[0]
    two = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nGET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert ask(url, two).count(b"HTTP/1.1 ") == 1  # what is sent along is not the next request
    for lines, status in (
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nConnection: close\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"), (b"\x16\x03\x01\x00\r\n\r\n", b"Bad request"), (b"GET / HTTP/9.9\r\n\r\n", b"Invalid HTTP"),
        (b"IMG /\x1b[31m HTTP/1.1\r\nHost: localhost\r\n\r\n", b"501"),
    ):  # fmt: skip
        got = ask(url, lines)
        assert status in got[:20] and b"<img" not in got and b"\x1b" not in got, (lines[:40], got[:200])
    assert ask(url, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")  # knows no Host header


def test_a_burst_waits_in_line():
    page = Page(
        ("127.0.0.1", 0), lambda path: PageResponse(HTTPStatus.OK, "text/plain", b"ok")
    )  # not started: it accepts nobody yet
    clients = [ask(page.url, b"", wait=False) for _ in range(150)]
    page.start()
    try:
        assert get(page.url)[0] == 200
    finally:
        for client in clients:
            client.close()
        page.close()


def test_clients_that_say_nothing_take_no_place(served):
    url = served[0]
    before = threading.active_count()
    clients = [ask(url, b"GET / HTTP/1.1\r\nHo", wait=False) for _ in range(MOST_CLIENTS + 40)]
    try:
        for _ in range(3):
            assert get(url + "healthz")[0] == 200
        assert threading.active_count() - before <= MOST_CLIENTS + 2
        first = clients[0]
        assert first.recv(100) == b""  # the oldest went
    finally:
        for client in clients:
            client.close()


def test_it_closes_though_a_client_holds_on(served):
    page = Page(("127.0.0.1", 0), lambda path: PageResponse(HTTPStatus.OK, "text/plain", b"ok"))
    page.start()
    with ask(page.url, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /", wait=False) as client:
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        page.close()
        while client.recv(100):
            pass
