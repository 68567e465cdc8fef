"""A watch goes on whatever fails in it, and ends at once when it is told to, whatever holds it up."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from numba.core.errors import TypingError
from tests.helpers import few_or
from tests.watch.test_end_to_end import CLUSTER as SLOW
from tests.watch.test_end_to_end import until
from tests.watch.test_service import CLUSTER, STEPS, WINDOW, Script, dumps, of, run, settings
from typer.testing import CliRunner

from poise.cli.ending import WatchEnding
from poise.cli.main import app
from poise.cli.watch_output import Teller
from poise.control import controller as control_module
from poise.util.errors import CommunicationError, InfeasibleError, NoResultError, OptionError
from poise.watch import service as service_module
from poise.watch.asking import Asker
from poise.watch.board import Board
from poise.watch.metrics import Metrics
from poise.watch.service import Output, Planned, Seen, Service, Setup, Trouble
from poise.watch.sglang_recorder import SGLangRecorder
from poise.watch.sources import DumpFolder, Polled

__all__ = ["app", "dumps"]


def deep(level=0):
    return deep(level + 1) + 1


class Mute(Exception):
    def __str__(self):
        raise ValueError("not even that")


def raising(error):
    def plan(*words, **options):
        if error is RecursionError:
            deep()
        raise error

    return plan


FAILURES = [
    MemoryError(), RecursionError, ValueError("a\n\x1b[31mb"), TypingError("no such type"), SystemError("HiGHS"), OSError(28, "full"), Mute(),
    AssertionError(), InfeasibleError("9 in 8"), OptionError("odd"), StopIteration(),
]  # fmt: skip


def named(value):
    return str(value) if isinstance(value, bool) else getattr(value, "__name__", type(value).__name__)


@pytest.mark.parametrize(
    ("error", "background"),
    [*((error, True) for error in FAILURES), *((error, False) for error in few_or(FAILURES, FAILURES[:2]))],
    ids=named,
)
def test_whatever_a_planner_raises_the_watch_goes_on_and_tries_later(dumps, monkeypatch, error, background, capsys):
    monkeypatch.setattr(control_module, "solve", raising(error))
    looks = [Polled((each,), dumps=1) for each in (dumps * 3)[:40]]
    service = Service(Script(*looks), Setup(CLUSTER, settings(background=background), redundant=8))
    board, metrics, teller = Board({}, window=WINDOW), Metrics(), Teller(None, False, False)
    events, waits = run(service, times=40)
    for event in events:
        for listener in (board, metrics):
            listener.note(event)
        teller.say(event)
    failed = [event for event in of(events, Trouble) if event.failed_plan]
    assert 2 <= len(failed) <= 4 and len(waits) == 40 and len({event.message for event in failed}) == 1
    assert service.controller.step == 40 * STEPS and len(of(events, Seen)) >= 40 * STEPS // 6 - len(failed)
    lines = [line for line in board.state()["problems"] if line["message"].startswith("no plan")]
    assert [line["times"] for line in lines] == [len(failed)]
    assert f"poise_plan_failures_total {len(failed)}.0".encode() in metrics.text()
    err = capsys.readouterr().err
    assert err.count("no plan") == 1 and "\x1b" not in err and "Traceback" not in err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["KeyboardInterrupt", "SystemExit"])
def test_but_the_end_of_the_process_is_no_failure_of_a_plan(dumps, monkeypatch, error):
    monkeypatch.setattr(control_module, "solve", raising(error))
    service = Service(Script(Polled(tuple(dumps))), Setup(CLUSTER, settings(), redundant=8))
    with pytest.raises(type(error)):
        list(service.run(once=False, interval_s=1.0, wait=lambda seconds: None))
    assert service.source.closed == 1


def test_tries_come_less_and_less_often_and_a_plan_ends_that(dumps, monkeypatch):
    plan, calls = control_module.solve, []

    def solve(problem, **options):
        calls.append(problem.batch.num_steps)
        if len(calls) <= 4:
            raise MemoryError
        return plan(problem, **options)

    monkeypatch.setattr(control_module, "solve", solve)
    arrivals = itertools.islice(itertools.cycle(dumps[:8]), 100)
    service = Service(Script(*(Polled((each,)) for each in arrivals)), Setup(CLUSTER, settings(), redundant=8))
    steps, at = [], 0
    for event in service.run(once=False, interval_s=1.0, wait=lambda seconds: None):
        at = event.look.step if isinstance(event, Seen) else at
        if isinstance(event, Trouble):
            steps.append(at)
        if isinstance(event, Planned):
            break
    reference = 4 * WINDOW
    gaps = [later - before for before, later in itertools.pairwise(steps)]
    assert gaps == [reference, 2 * reference, 4 * reference] and event.decision.reason == "settled"
    assert service.controller._failures == 0


@pytest.mark.parametrize("name", ["judge", "bound_seconds", "join_steps"])
def test_what_cannot_be_measured_or_written_or_read_is_told(dumps, monkeypatch, tmp_path, name):
    def fail(*words, **options):
        raise MemoryError

    monkeypatch.setattr(service_module, name, fail)
    service = Service(Script(Polled(tuple(dumps[:6]))), Setup(CLUSTER, settings(), redundant=8), measured=True)
    events, _ = run(service)
    assert of(events, Seen) and of(events, Planned)[0].decision.accepted and of(events, Planned)[0].after is None
    assert any(event.message == "the window was not measured: MemoryError" for event in of(events, Trouble))


def test_a_source_and_an_output_that_fail_are_asked_again(dumps, monkeypatch, tmp_path):
    class Failing(Script):
        times = 0

        def poll(self, *, last=False):
            self.times += 1
            if self.times % 2:
                raise MemoryError
            return super().poll(last=last)

    events, waits = run(
        Service(Failing(*(Polled((each,)) for each in dumps[:9])), Setup(CLUSTER, settings(), redundant=8)), times=6
    )
    assert len(waits) == 6 and any(
        "could not be looked at: MemoryError" in p.problems[0] for p in of(events, Polled) if p.problems
    )
    tried = []

    def write(placement, path, options):
        tried.append(path)
        if len(tried) == 2:
            raise MemoryError
        return None

    target = type("Target", (), {"folder": False, "write": staticmethod(write)})
    monkeypatch.setitem(service_module.TARGETS, "npz", target)
    service = Service(
        Script(Polled(tuple(dumps[:6])), Polled()),
        Setup(CLUSTER, settings(), redundant=8),
        [Output("npz", tmp_path / "p.npz")],
    )
    events, _ = run(service, times=2)
    assert (
        any("cannot write" in event.message and "MemoryError" in event.message for event in of(events, Trouble))
        and len(tried) == 3
    )
    with pytest.raises(NoResultError, match="planning failed: MemoryError"):
        monkeypatch.setattr(control_module, "solve", raising(MemoryError()))
        service = Service(Script(Polled(tuple(dumps[:6]))), Setup(CLUSTER, settings(), placement=None, redundant=8))
        list(service.run(once=True, interval_s=1.0, wait=lambda seconds: None))


def test_a_reader_that_fails_on_one_dump_leaves_that_out(tmp_path):
    def read(path):
        raise RecursionError("too deep\n\x1b")

    (tmp_path / "evil\n[red]\x1b").write_text("x")
    folder = DumpFolder(tmp_path, read=read)
    got = [folder.poll(whole=True) for _ in range(4)]
    assert [each.errors for each in got] == [0, 0, 1, 0] and "RecursionError" in got[2].problems[0]


# --- an engine that drips ---


class Dripping:
    """Sends what it is told, then a byte every few milliseconds, for as long as one listens."""

    def __init__(self, head, drip=b"x"):
        self.head, self.drip, self.came = head, drip, threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._drip, args=(client,), daemon=True).start()

    def _drip(self, client):
        try:
            with client:
                client.recv(4096)
                client.sendall(self.head)
                self.came.set()
                for byte in itertools.cycle(self.drip):
                    client.sendall(bytes([byte]))
                    time.sleep(0.02)
        except OSError:
            return


HEADS = {
    "status line": b"H", "headers": b"HTTP/1.1 200 OK\r\nX: ", "body": b"HTTP/1.1 200 OK\r\n\r\n", "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n",
    "error": b"HTTP/1.1 500 Oops\r\nContent-Length: 100000\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("where", HEADS)
def test_one_deadline_holds_over_all_that_drips(tmp_path, where):
    engine = Dripping(HEADS[where])
    source = SGLangRecorder(engine.url, DumpFolder(tmp_path), num_devices=4, timeout_s=0.3)
    for _ in range(2):
        got = source.poll()
        assert not got.up and got.problems[0].startswith(("no answer from", "no time left"))
    engine.socket.close()
    until(lambda: not [t for t in threading.enumerate() if t.name == "poise-ask"], "the threads to end")


def test_an_answer_is_bounded():
    engine = Dripping(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000)
    with pytest.raises(CommunicationError, match="more than 4096 bytes"):
        Asker(engine.url, most=4096).ask("GET", "/", {}, until=time.monotonic() + 20)
    short = Dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}")
    assert Asker(short.url).ask("GET", "/", {}, until=time.monotonic() + 20).body == b"{}x"
    engine.socket.close()
    short.socket.close()


@pytest.mark.parametrize("key", ["a\nb", "secret\n", "a\r\nX: y", "ключ", "a\x00", "a\udcff"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(tmp_path, key):
    for options in ({"api_key": key}, {"admin_api_key": key}):
        with pytest.raises(OptionError, match="API key has a character") as caught:
            SGLangRecorder("http://127.0.0.1:1", DumpFolder(tmp_path), num_devices=4, **options)
        assert key not in str(caught.value) and "secret" not in str(caught.value)


# --- ended from outside ---

PLANNING = """
import sys, time
from poise.control import controller
def solve(*words, **options):
    sys.stdout.write('{"event": "planning"}\\n')  # one write: the watch prints from another thread
    sys.stdout.flush()
    time.sleep(1000)
controller.solve = solve
from poise.cli.main import main
main()
"""


@contextmanager
def watching(folder, words, code=None):
    command = [sys.executable, "-m", "poise.cli"] if code is None else [sys.executable, "-c", code]
    environ = {**os.environ, "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir(exist_ok=True)
    with (
        (folder / "err").open("wb") as stream,
        subprocess.Popen(
            [*command, "watch", *map(str, words)], stdout=subprocess.PIPE, stderr=stream, env=environ, text=True
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def line_of(process, event):
    for line in process.stdout:
        if json.loads(line)["event"] == event:
            return json.loads(line)
    raise AssertionError(event)


@pytest.mark.parametrize(
    "number",
    few_or([signal.SIGTERM, signal.SIGHUP, signal.SIGINT], [signal.SIGTERM]),
    ids=lambda number: number.name,
)
def test_a_signal_ends_it_while_an_engine_drips_and_a_client_holds_on(tmp_path, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored by whoever started this (nohup), and a watch keeps to that")
    engine = Dripping(HEADS["body"])
    words = ["--sglang", engine.url, "--dump-dir", tmp_path / "d", "-c", "1x4", "--listen", "127.0.0.1:0", "--json"]
    with watching(tmp_path, words) as process:
        url = line_of(process, "listening")["url"]
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        with socket.create_connection((host, int(port))) as held:
            held.sendall(b"GET / HTTP/1.1\r\nHo")
            assert engine.came.wait(60)
            process.send_signal(number)
            ended(process, tmp_path)
    engine.socket.close()


@pytest.mark.parametrize("more", [[], ["--once"]])
def test_a_signal_ends_it_while_a_plan_is_made(tmp_path, more):
    load = [[[int(t == e) + 1 for e in range(8)] for _ in range(2)] for t in range(8)] * 10
    (tmp_path / "l.json").write_text(json.dumps({"logical_count": load}))
    (tmp_path / "c.yaml").write_text(SLOW)
    words = [
        tmp_path / "l.json",
        "-c",
        tmp_path / "c.yaml",
        "--window",
        8,
        "--every",
        8,
        "--json",
        "-o",
        tmp_path / "p.npz",
        *more,
    ]
    with watching(tmp_path, words, PLANNING) as process:
        line_of(process, "planning")
        process.send_signal(signal.SIGTERM)
        ended(process, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "err", "l.json", "tmp"]


def ended(process, folder):
    """It ended by itself, and well: SIGALRM, which ends what hangs, would show as its status."""
    assert process.wait(60) == 0, (folder / "err").read_text()
    assert "Traceback" not in (folder / "err").read_text() and not list((folder / "tmp").iterdir())


@pytest.mark.parametrize("number", WatchEnding.SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_a_watch_that_waits(tmp_path, monkeypatch, number):
    """The process of the tests takes for the watch's own what the system sends one, as where a terminal goes."""

    def not_taken(number, frame):
        raise AssertionError(f"{number} was not taken")

    def wait(self, seconds):
        signal.raise_signal(number)
        raise AssertionError("it goes on")

    ends = []
    monkeypatch.setattr(WatchEnding, "wait", wait)
    monkeypatch.setattr(os, "_exit", ends.append)
    (tmp_path / "l.json").write_text(json.dumps({"logical_count": [[[3, 1, 2, 2], [1, 1, 1, 5]]] * 2}))
    before = signal.signal(number, not_taken)
    try:
        got = CliRunner().invoke(app, ["watch", str(tmp_path / "l.json"), "-c", "1x4", "--json"])
        assert signal.getsignal(number) is not_taken
    finally:
        signal.signal(number, before)
    assert got.exit_code == 0 and ends == [0], (got.output, got.exception)
    assert "2 steps watched" in got.stderr and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_file_is_written_to_its_end_before_a_signal_counts(dumps, tmp_path):
    ending, done = WatchEnding(), []
    with ending:
        with ending.later():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("written")
        done.append("not reached")
    assert done == ["written"] and ending.came and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
