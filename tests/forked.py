"""Processes that import once what ranks need, and fork ranks from it: imports would cost each rank five seconds.

Ranks of even and of odd numbers come from two such processes, so that hashes of strings differ between them: what
follows the order of a set is not the same on all ranks, as between any interpreters.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import hashlib
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tests import kernels

ROOT = Path(__file__).parents[1]
JOB_BYTES = 1 << 20
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
LOADED = (
    "tests.serve.run_cases", "tests.train.support", "tests.train.run_cases", *(f"transformers.models.{name}.modeling_{name}" for name in FAMILIES)
)  # fmt: skip
KNOWN = {"tests/serve/": "tests.serve.harness"}
"""Folders of scripts, and who remembers what all ranks of these compute alike; without a backward pass, after which none may be
forked that has one."""
_servers: list[socket.socket] = []
_started: list[subprocess.Popen[bytes]] = []


class Forked:
    """A script that runs in a forked process; what it has of :class:`subprocess.Popen` behaves alike.

    Parameters
    ----------
    script, arguments : as for ``python script arguments``.
    env : all of its environment; what libraries read of it when they are imported is this process's, with one thread.
    said : takes what it prints.
    number : of the rank; even and odd ones come from different interpreters.
    """

    def __init__(
        self, script: Path, arguments: Sequence[str], env: Mapping[str, str], said: BinaryIO, number: int
    ) -> None:
        self.args, self.returncode = [str(script), *arguments], None
        self._told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            job = json.dumps({"words": self.args, "env": dict(env)}).encode()
            socket.send_fds(_server(number % 2), [job], [theirs.fileno(), said.fileno()])
        pid = self._told.recv(64)
        assert pid, "what ranks are forked from has ended"
        self.pid = int(pid)

    def poll(self) -> int | None:
        """Exit code, minus the signal that ended it, or None while it runs."""
        return self._end(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Exit code once it has ended."""
        code = self._end(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Unless it has ended; how is told a moment after it is gone."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def _end(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], timeout)[0]:
            self.returncode = int(self._told.recv(64) or 255)
            self._told.close()
        return self.returncode


def _server(number: int) -> socket.socket:
    """Where to ask one of the two for a process; both are started, and waited for, when one is asked for first.

    Workers of one run share them.
    """
    if not _servers:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
        name = hashlib.sha256(f"{run} {ROOT}".encode()).hexdigest()[:16]
        _servers.extend(_connected(Path(tempfile.gettempdir()) / f"poise-ranks-{name}-{one}") for one in range(2))
        atexit.register(_close)
        for asked in _servers:  # a rank that began long before another would wait too long for it
            assert asked.recv(64), "what ranks are forked from cannot be imported"
    return _servers[number]


def _connected(path: Path) -> socket.socket:
    """A connection to the process that listens there, which is started if there is none."""
    mine = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            mine.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(str(path))
                listener.listen()
                mine.connect(str(path))
                command = [sys.executable, "-m", "tests.forked", str(listener.fileno()), str(path)]
                env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                _started.append(subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[listener.fileno()]))
    return mine


def _close() -> None:
    for asked in _servers:
        asked.close()
    _servers.clear()


# ---- the process that forks ----------------------------------------------------------------------------------------


def main() -> None:
    """Import, then fork for all who ask, until nobody is left who does."""
    listener, path = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    for name in LOADED:
        importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernels.loops()
    gc.collect()
    gc.freeze()  # what all have is nothing that a rank's collections must go through
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    asking: list[socket.socket] = []
    while True:
        for one in select.select([listener, *asking], [], [])[0]:
            if one is listener:
                asking.append(listener.accept()[0])
                asking[-1].send(b"ready")
                continue
            job, files, _, _ = socket.recv_fds(one, JOB_BYTES, 2)
            if not job:
                one.close()
                asking.remove(one)
                if not asking:
                    for left in (path, path.with_suffix(".lock")):
                        left.unlink(missing_ok=True)
                    os._exit(0)
                continue
            _remember(json.loads(job)["words"][0])
            if not os.fork():
                for other in (listener, *asking):
                    other.close()
                _watch(json.loads(job), *files)
                return
            for file in files:
                os.close(file)


def _remember(script: str) -> None:
    """What is known before ranks of this script are forked."""
    for folder in [folder for folder in KNOWN if script.startswith(str(ROOT / folder))]:
        importlib.import_module(KNOWN.pop(folder)).remember()
        gc.freeze()


def _watch(job: dict[str, Any], told: int, said: int) -> None:
    """Fork the process that was asked for, tell its number, and how it ended; the forked one returns from here."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        os.close(said)
        with socket.socket(fileno=told) as answer:
            answer.send(str(pid).encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            try:
                answer.send(str(code).encode())
            except OSError:  # nobody waits any more
                pass
        os._exit(0)
    os.close(told)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.close(said)
    os.environ.clear()
    os.environ.update(job["env"])
    random.seed()
    np.random.seed()  # noqa: NPY002
    sys.argv = job["words"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
