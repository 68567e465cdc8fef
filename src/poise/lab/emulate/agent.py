"""The first process of an emulated cluster: builds the network, starts the ranks, ends with its launcher.

Run as a script by :mod:`poise.lab.emulate.launch` and free of imports beyond the standard library, so that it starts at
once. It knows nothing of clusters: its job, one line of JSON on stdin, says which namespaces, commands and processes
there are. In a private PID namespace it is process 1, so when it ends, everything it started ends, namespaces and
interfaces with it. It ends when stdin does, which the kernel sees to if the launcher is killed.

Answers are lines of JSON on stdout: ``{"output": text, "to": "stdout" | "stderr"}`` of rank 0 as it comes, and last
``{"ranks": [...], "failed": rank or null, "timed_out": bool, "seconds": float}`` or ``{"error": text}``.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

CLONE_NEWNET = 0x40000000
KEEP_BYTES = 2**24
"""Of each stream of each rank the last 16 MiB are kept."""
GRACE_SECONDS = 1.0
"""After a failure the other ranks get this long to say something before they are ended."""
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the job, run it, answer."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        os._exit(1)
    job = json.loads(line)
    ranks: list[Rank] = []
    threading.Thread(target=_end_with_stdin, args=(ranks,), daemon=True).start()
    try:
        namespaces = build(job["namespaces"], job["sysctls"], job["batches"])
        answer = run(job, namespaces, ranks)
    except (OSError, subprocess.SubprocessError) as error:
        answer = {"error": str(error)}
    end(ranks)
    say(answer)


def say(message: dict[str, Any]) -> None:
    """One line to the launcher."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _end_with_stdin(ranks: list[Rank]) -> None:
    while os.read(sys.stdin.fileno(), 65_536):  # not sys.stdin.read: its lock would be held when main ends
        pass
    end(ranks)
    os._exit(1)


# --- namespaces


def build(count: int, sysctls: dict[str, str], batches: list[dict[str, Any]]) -> list[int]:
    """Make ``count`` network namespaces and run the batches; open handles of the namespaces.

    Raises
    ------
    OSError : the kernel refuses a namespace, or a command fails; the text names it.
    """
    if not count:
        return []
    handles = [new_namespace() for _ in range(count)]
    for handle in (-1, *handles):
        with inside(handle):
            for name, value in sysctls.items():
                with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/{name}", "w") as file:
                    file.write(value)
    names = {f"ns{i}": f"/proc/{os.getpid()}/fd/{handle}" for i, handle in enumerate(handles)}
    for batch in batches:
        if not batch["lines"]:
            continue
        text = "\n".join(batch["lines"]).format_map(names) + "\n"
        with inside(-1 if batch["namespace"] < 0 else handles[batch["namespace"]]):
            done = subprocess.run(
                [batch["tool"], "-batch", "-"], input=text, capture_output=True, text=True, timeout=60
            )
        if done.returncode:
            raise OSError(f"{batch['tool']} failed in namespace {batch['namespace']}: {done.stderr.strip()[:500]}")
    return handles


def new_namespace() -> int:
    """A handle of a new network namespace; this thread stays where it is."""
    with open("/proc/thread-self/ns/net") as home:
        if _libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare refuses a network namespace")
        handle = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        _enter(home.fileno())
    return handle


@contextlib.contextmanager
def inside(handle: int) -> Iterator[None]:
    """Processes started by this thread in the block live in that network namespace (-1: this one)."""
    if handle < 0:
        yield
        return
    with open("/proc/thread-self/ns/net") as home:
        _enter(handle)
        try:
            yield
        finally:
            _enter(home.fileno())


def _enter(handle: int) -> None:
    if _libc.setns(handle, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns refuses a network namespace")


# --- ranks


class Rank:
    """A running process and what it has written."""

    def __init__(self, number: int, argv: list[str], env: dict[str, str], namespace: int) -> None:
        self.number = number
        with inside(namespace):
            self.process = subprocess.Popen(
                argv,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        assert self.process.stdout and self.process.stderr
        self.pipes = {"stdout": self.process.stdout, "stderr": self.process.stderr}
        self.written = {name: bytearray() for name in self.pipes}
        self.decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in self.pipes}

    def read(self, name: str) -> bool:
        """Take what is there; False at the end of the stream."""
        data = os.read(self.pipes[name].fileno(), 65_536)
        kept = self.written[name]
        kept += data
        if len(kept) > KEEP_BYTES:
            del kept[: len(kept) - KEEP_BYTES]
        if self.number == 0 and (text := self.decoders[name].decode(data, final=not data)):
            say({"output": text, "to": name})
        return bool(data)

    def kill(self) -> None:
        """End it and the processes it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def result(self) -> dict[str, Any]:
        """Exit code (negative: the signal) and text."""
        texts = {name: bytes(kept).decode("utf-8", "replace") for name, kept in self.written.items()}
        return {"rank": self.number, "exit_code": self.process.wait(), **texts}


def end(ranks: list[Rank]) -> None:
    """Kill what still runs."""
    for rank in ranks:
        rank.kill()


def run(job: dict[str, Any], namespaces: list[int], ranks: list[Rank]) -> dict[str, Any]:
    """Start every process of the job and wait: until all have ended well, one has not, or time is up.

    Ranks of ``may_die`` may end as they like, and the others go on.
    """
    started = time.monotonic()
    deadline: float = started + job["timeout"]
    failed: int | None = None
    timed_out = False
    with selectors.DefaultSelector() as events:
        for number, process in enumerate(job["processes"]):
            rank = Rank(number, process["argv"], process["env"], namespaces[number] if namespaces else -1)
            ranks.append(rank)
            events.register(os.pidfd_open(rank.process.pid), selectors.EVENT_READ, (rank, "end"))
            for name, pipe in rank.pipes.items():
                events.register(pipe, selectors.EVENT_READ, (rank, name))
        alive = len(ranks)
        while events.get_map():
            for key, _ in events.select(max(0.0, deadline - time.monotonic())):
                rank, what = key.data
                if what == "end":
                    events.unregister(key.fd)
                    os.close(key.fd)
                    alive -= 1
                    code = rank.process.wait()
                    if code and rank.number not in job["may_die"] and failed is None and not timed_out:
                        failed = rank.number
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                elif not rank.read(what):
                    events.unregister(key.fd)
            if time.monotonic() >= deadline:
                if failed is None and alive:
                    timed_out = True
                if alive:
                    end(ranks)
                    deadline = time.monotonic() + GRACE_SECONDS
                else:  # all have ended, a pipe is held open by something they left behind
                    break
    seconds = time.monotonic() - started
    return {"ranks": [r.result() for r in ranks], "failed": failed, "timed_out": timed_out, "seconds": seconds}


if __name__ == "__main__":
    main()
