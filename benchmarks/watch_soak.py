"""``poise watch`` for an hour at ten looks a second, beside an engine that misbehaves: does its memory stay flat?

python benchmarks/watch_soak.py [--minutes 60]

The engine is the replay server of the tests; it answers as slowly as ten looks a second need. Its traffic changes every minute. Of its dumps one in twelve is broken
(cut short, of another shape, NaN, empty, no dump at all), of its answers some are errors of the server, cut
connections, or drip; it is started anew now and then. Of the plans one in three fails (memory, recursion, a compiler's
error ...). A scraper reads the page once a second, and a client that says nothing holds a connection.

Rule. Resident memory (VmRSS) is read every few seconds. It is flat if after the first sixth of the time, at most ten
minutes, (1) no reading lies more than 5 % or 16 MiB, whichever is more, above the median of the next twentieth, and
(2) neither does a line through all later readings rise by more in that time. Open files and threads: the most of the
last half must not exceed the most of what came before by more than 4. Runs under five minutes cannot tell: they say
"inconclusive" where they are not flat. Exit status 1: not flat, or the watch ended by itself.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from common import table, write

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.watch.replay_server import Engine, Handler

CLUSTER = "nodes: 2\ndevices_per_node: 4\nflops_per_s: 1.0e9\nintra_latency_s: 0.0\ninter_latency_s: 0.0\n"
SAMPLE_S, SETTLE_S, SHORT_S = 5.0, 600.0, 300.0
SHARE, LEAST_MIB, MORE = 0.05, 16.0, 4
BROKEN = ("cut short", "another shape", "NaN", "empty", "no dump")
ANSWERS = {"500": 0.006, "reset": 0.003, "drips for 2 s": 0.001}


class Faulty(Engine):
    """The replay engine, whose dumps are broken at times."""

    def __init__(self, folder: Path, maps: Path, seed: int) -> None:
        super().__init__(folder, maps, "")
        self.rng, self.did, self.endless = np.random.default_rng(seed), Counter[str](), False
        self.next_s = 0.0

    def pace(self) -> None:
        """Wait so that no more than ten looks a second come to an end."""
        time.sleep(max(0.0, self.next_s - time.monotonic()))
        self.next_s = max(self.next_s, time.monotonic() - 0.1) + 0.1

    def dump(self) -> str:
        """A dump, broken one time in twelve."""
        import torch

        said = super().dump()
        del self.history[:-1000]
        self.did["dumps"] += 1
        if self.rng.random() < 1 / 12:
            kind = str(self.rng.choice(BROKEN))
            path = max(self.dump_dir.iterdir(), key=lambda one: one.stat().st_mtime_ns)
            if kind == "cut short":
                path.write_bytes(path.read_bytes()[: int(self.rng.integers(1, path.stat().st_size))])
            elif kind == "empty":
                path.write_bytes(b"")
            elif kind == "no dump":
                path.write_bytes(b"\x1b[31mnot a dump\n" * 50)
            else:
                data = torch.load(path, weights_only=True)
                count = data["logical_count"].double()
                data["logical_count"] = count[:, :-1] if kind == "another shape" else count * float("nan")
                torch.save(data, path)
            self.did[f"dump: {kind}"] += 1
        return said

    def fault(self) -> str:
        """How the next answer fails; "": not."""
        draw = self.rng.random()
        if self.endless:
            self.endless = False
            return "drips without end"
        for kind, share in ANSWERS.items():
            if (draw := draw - share) < 0:
                return kind
        return ""


class FaultyHandler(Handler):
    """Answers, but at times."""

    def do_GET(self) -> None:
        """As the engine does, or as one that fails."""
        engine: Faulty = self.server.engine  # type: ignore[attr-defined]
        with engine.lock:
            kind = engine.fault()
            if kind:
                engine.did[f"answer: {kind}"] += 1
        if not kind:
            if self.path.startswith("/dump"):
                engine.pace()
            return super().do_GET()
        self.close_connection = True
        try:
            if kind == "500":
                self.wfile.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 12\r\n\r\n\x1b[31mbroken\r")
            elif kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                end = time.monotonic() + (2 if kind == "drips for 2 s" else 100)
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for byte in itertools.cycle(b"X-Slow: yes\r\n"):
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.2)
                    if time.monotonic() > end:
                        return
        except OSError:  # the watch had enough of it
            return


class Server(ThreadingHTTPServer):
    """Quiet about clients that go."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing."""


def planner_that_fails() -> None:
    """In the process of the watch: one plan in three fails."""
    from numba.core.errors import TypingError

    from poise.cli.main import main
    from poise.control import controller
    from poise.util.errors import InfeasibleError

    def deep(level: int) -> int:
        return deep(level + 1) + 1

    kinds = itertools.cycle((MemoryError, "deep", ValueError, TypingError, InfeasibleError, SystemError, OSError))
    plan, numbers = controller.solve, itertools.count(1)

    def solve(*words: Any, **options: Any) -> Any:
        if next(numbers) % 3 == 0:
            kind = next(kinds)
            if kind == "deep":
                deep(0)
            raise kind("made to fail")  # type: ignore[operator]
        return plan(*words, **options)

    controller.solve = solve
    main()


def memory(pid: int) -> tuple[float, int, int]:
    """Resident MiB, threads and open files of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024, int(lines["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def judged(samples: list[tuple[float, float, int, int]], whole_s: float) -> tuple[str, list[str]]:
    """The verdict, and its reasons in words."""
    data = np.array(samples, dtype=float)
    begin = min(SETTLE_S, whole_s / 6)
    later = data[data[:, 0] >= begin]
    base = float(np.median(later[later[:, 0] <= begin + max(whole_s / 20, 3 * SAMPLE_S), 1]))
    room = max(SHARE * base, LEAST_MIB)
    most = float(later[:, 1].max()) - base
    rise = float(np.polyfit(later[:, 0], later[:, 1], 1)[0] * (later[-1, 0] - later[0, 0]))
    half = later[:, 0] >= (begin + whole_s) / 2
    ups = [later[half, i].max() - later[~half, i].max() for i in (2, 3)]
    good = most <= room and rise <= room and max(ups) <= MORE
    reasons = [
        f"median from minute {begin / 60:.1f} on: {base:.1f} MiB; room {room:.1f} MiB",
        f"most above it later: {most:.1f} MiB; a line through the later readings rises by {rise:.1f} MiB",
        f"threads: the last half has {ups[0]:+.0f} at most, open files {ups[1]:+.0f}; room {MORE}",
    ]
    return "flat" if good else "NOT flat" if whole_s >= SHORT_S else "inconclusive (too short to tell)", reasons


def soak(minutes: float, seed: int) -> tuple[str, list[str]]:
    """Run it; verdict and the parts of a report."""
    folder = Path(tempfile.mkdtemp(prefix="poise-soak-"))
    dumps, maps, errors = folder / "dumps", folder / "map.json", folder / "errors"
    (folder / "slow.yaml").write_text(CLUSTER)
    server = Server(("127.0.0.1", 0), FaultyHandler)
    engine = server.engine = Faulty(dumps, maps, seed)  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = ["watch", "--sglang", f"http://127.0.0.1:{server.server_port}", "--dump-dir", dumps, "-c", folder / "slow.yaml",
             "--method", "lpt", "--window", 12, "--every", 6, "--interval", 0.001, "--export", f"sglang:{maps}",
             "--listen", "127.0.0.1:0", "--delete-dumps", "--json"]  # fmt: skip
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import watch_soak; watch_soak.planner_that_fails()"
    with errors.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent), *map(str, words)], stdout=subprocess.PIPE,
            stderr=stream, text=True,
        )  # fmt: skip
    events, pages = Counter[str](), []

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            event = json.loads(line)
            events[event["event"] + (" accepted" if event.get("accepted") else "")] += 1
            events["alarm"] += bool(event.get("alarm"))
            events["no plan"] += event.get("message", "").startswith("no plan")
            pages.extend([event["url"]] if event["event"] == "listening" else [])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    scraped, held = Counter[str](), []
    begin, samples, whole_s = time.monotonic(), [], 60 * minutes
    names, at = itertools.cycle(("python", "english")), {"sample": 0.0, "drift": 60.0, "scrape": 20.0}
    at |= {"restart": 150.0, "drip": min(120.0, whole_s / 2), "hold": 30.0}
    every = {"sample": SAMPLE_S, "drift": 60.0, "scrape": 1.0, "restart": 290.0, "drip": 600.0, "hold": 60.0}
    while (now := time.monotonic() - begin) < whole_s and child.poll() is None:
        for what in [what for what in at if now >= at[what]]:
            at[what] = now + every[what]
            if what == "sample":
                samples.append((now, *memory(child.pid)))
                if len(samples) % 12 == 1:
                    rss, threads, opened = samples[-1][1:]
                    line = f"{now / 60:5.1f} min {rss:6.1f} MiB {threads} threads {opened} files {engine.did['dumps']} dumps"
                    print(line, file=sys.stderr, flush=True)
            elif what == "drift":
                with engine.lock:
                    engine.domain = next(names)
            elif what == "restart" and maps.is_file():
                with engine.lock:
                    engine.restart()
                    engine.did["started anew"] += 1
            elif what == "drip" and whole_s >= SHORT_S:
                engine.endless = True
            elif what == "hold" and pages:
                host = pages[0].removeprefix("http://").rstrip("/").split(":")
                held = [*held[-20:], socket.create_connection((host[0], int(host[1])), timeout=5)]
                held[-1].sendall(b"GET / HT")
            elif what == "scrape" and pages:
                try:
                    for path in ("metrics", "state.json", "healthz"):
                        with urlopen(pages[0] + path, timeout=10) as answer:
                            answer.read()
                    scraped["answered"] += 1
                except OSError:
                    scraped["failed"] += 1
        time.sleep(0.2)
    ended, stop = child.poll(), time.monotonic()
    lasted = stop - begin
    if ended is None:
        child.send_signal(signal.SIGTERM)
    try:
        status = child.wait(30)
    except subprocess.TimeoutExpired:
        child.kill()
        status = child.wait()
    left_s = time.monotonic() - stop
    reader.join(10)
    server.shutdown()
    remains = [path.name for path in folder.iterdir() if path.name.startswith(".poise")]
    verdict, reasons = judged(samples, lasted)
    if ended is not None:
        verdict = f"the watch ended by itself after {lasted:.0f} s with status {ended}"
    bins = np.arange(0, lasted, max(SAMPLE_S, lasted / 12))
    data = np.array(samples)
    number = np.digitize(data[:, 0], bins)
    rows: list[list[object]] = []
    for b in sorted(set(number.tolist())):
        part = data[number == b]
        most = [f"{part[:, 2].max():.0f}", f"{part[:, 3].max():.0f}"]
        rows.append([f"{bins[b - 1] / 60:.1f}", *(f"{f(part[:, 1]):.1f}" for f in (np.min, np.median, np.max)), *most])
    looks = engine.did["dumps"] / lasted
    parts = [
        f"Verdict: resident memory is **{verdict}**.",
        "\n".join(f"- {reason}" for reason in reasons),
        f"{lasted / 60:.1f} minutes, {engine.did['dumps']} looks that dumped, {looks:.1f} a second of the ten that the "
        "engine allows (fewer where the machine is busy). "
        f"SIGTERM: status {status} after {left_s:.1f} s; temporary folders left: {remains or 'none'}.",
        table(["from minute", "least MiB", "median MiB", "most MiB", "threads", "open files"], rows),
        "What was told: " + ", ".join(f"{name} {count}" for name, count in sorted(events.items())) + ".",
        "What was done to it: " + ", ".join(f"{name} {count}" for name, count in sorted(engine.did.items())) + ".",
        f"The page, once a second: {scraped['answered']} answered, {scraped['failed']} failed; one client a minute "
        "began a request and held it.",
    ]
    said = errors.read_text(errors="backslashreplace")
    if "Traceback" in said or ended is not None:
        parts.append("Its stderr ends with:\n\n```\n" + ascii(said[-2000:]) + "\n```")
    return verdict, parts


def main() -> None:
    """Run, write the report, say how it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-report", action="store_true", help="print only")
    words = parser.parse_args()
    print(f"began {datetime.datetime.now():%H:%M}", file=sys.stderr)
    verdict, parts = soak(words.minutes, words.seed)
    rule = (__doc__ or "").split("Rule. ")[1].strip()
    if words.no_report:
        print("\n\n".join(parts))
    else:
        write("watch_soak", [*parts, f"Rule: {rule}"])
    sys.exit(0 if verdict == "flat" or verdict.startswith("inconclusive") else 1)


if __name__ == "__main__":
    main()
