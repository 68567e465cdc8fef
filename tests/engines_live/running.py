"""Start an engine on one process or several, wait for it with a limit, and read what it did."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from tests.engines_live.environment import Engine

HERE = Path(__file__).parent
SITE = HERE / "site"
"""Has the stand-ins for what engines lack on CPU."""
LIMIT_S = 900.0
MOST_LIMITS = 8
"""A run may be silent for a limit, and last for so many, whatever it says."""
"""Of silence: a run whose ranks neither say nor answer anything for so long hangs. How long it takes is the machine's."""
GRACE_S = 45.0
"""How long other ranks may go on when one has ended: longer than an engine takes to notice."""
SETTINGS = {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True)
class Asked:
    """A run to make.

    Parameters
    ----------
    model : folder of a checkpoint.
    rounds : prompts (token ids) of each round.
    phases : which of them are served until what came (serving.py); none: each once.
    ranks : processes, with expert parallelism if more than one.
    eplb : vLLM's ``--eplb-config``; None: no load balancer.
    max_tokens : of an answer.
    environ, environ_of : variables of all ranks, and of one rank beside.
    poise : whether it is installed.
    stand_in : whether what the CPU platform lacks is put in.
    forked : from a process that has imported the engine; else every rank is a Python of its own.
    program : what each rank runs, beside this file.
    more : what else its file of the run holds.
    """

    model: Path
    rounds: Sequence[Sequence[Sequence[int]]]
    phases: Sequence[Mapping[str, Any]] = ()
    ranks: int = 2
    eplb: Mapping[str, Any] | None = None
    max_tokens: int = 16
    environ: Mapping[str, str] = field(default_factory=dict)
    environ_of: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    poise: bool = True
    stand_in: bool = True
    forked: bool = True
    program: str = "one_run.py"
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ran:
    """What came of it.

    Parameters
    ----------
    codes : exit code of each rank, negative for a signal; None: it did not end by itself.
    logs : what each rank said.
    rounds : of each rank the rounds that it ended, answers in the order of prompts.
    numbers : which rounds these are.
    phases : of each rank what it counted in each phase (serving.py).
    maps : of each rank the maps that ran [L][S], in order, the first at the start.
    seconds : of the whole run.
    """

    codes: tuple[int | None, ...]
    logs: tuple[Path, ...]
    rounds: tuple[tuple[Any, ...], ...]
    numbers: tuple[tuple[int, ...], ...]
    phases: tuple[tuple[Any, ...], ...]
    maps: tuple[tuple[Any, ...], ...]
    seconds: float

    def said(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(errors="replace")

    def tail(self, characters: int = 3000) -> str:
        """Of all ranks, with how they ended."""
        return "\n".join(
            f"--- rank {rank}, exit code {code}\n{self.said(rank)[-characters:]}"
            for rank, code in enumerate(self.codes)
        )

    @property
    def fine(self) -> bool:
        return not any(code != 0 for code in self.codes)

    def tokens(self, rank: int = 0) -> list[list[list[int]]]:
        """Of each round that it ended, of each prompt."""
        return [[answer["tokens"] for answer in answers] for answers in self.rounds[rank]]

    def planned(self, rank: int) -> list[str]:
        """What poise said of each of its maps."""
        return [line.partition("poise: ")[2] for line in self.said(rank).splitlines() if "poise: map " in line]


def run(engine: Engine, asked: Asked, folder: Path, *, limit_s: float = LIMIT_S) -> Ran:
    """All ranks, ended when one has ended badly and the others have had time to notice, or when all are silent.

    Those that did not end by themselves are asked for the stacks of their threads, which are in their logs, and killed.

    Parameters
    ----------
    limit_s : seconds without a word of any rank.
    """
    folder.mkdir(parents=True)
    given = folder / "run.json"
    given.write_text(json.dumps({
        "model": str(asked.model), "ranks": asked.ranks, "eplb": asked.eplb, "rounds": asked.rounds, "phases": asked.phases,
        "max_tokens": asked.max_tokens, "out": str(folder / "answers"), **asked.more,
    }))  # fmt: skip
    logs = tuple(folder / f"rank-{rank}.log" for rank in range(asked.ranks))
    began = time.monotonic()
    port, processes = free_port(), list[Process]()
    try:
        for rank, log in enumerate(logs):
            log.touch()
            words = [str(HERE / asked.program), str(given)]
            start = server(engine).start if asked.forked else Popened
            processes.append(
                start([str(engine.python), *words], environment(engine, asked, folder, rank, port), folder, log)
            )
        codes = _wait(processes, folder, limit_s)
    finally:
        for process in processes:
            process.kill()
        forget_shared_memory(port)
    (folder / "ended.json").write_text(json.dumps({"codes": codes, "seconds": time.monotonic() - began}))
    return read(folder)


def read(folder: Path) -> Ran:
    """A run that is over."""
    ended = json.loads((folder / "ended.json").read_text())
    ranks = range(len(ended["codes"]))
    return Ran(
        tuple(ended["codes"]), tuple(folder / f"rank-{rank}.log" for rank in ranks),
        *(
            tuple(lines(folder / file.format(rank), key) for rank in ranks)
            for file, key in (("answers.rank-{}", "answers"), ("answers.rank-{}", "round"), ("answers.phases.rank-{}", "phase"))
        ),
        tuple(lines(folder / f"maps.rank-{rank}", "map") for rank in ranks), ended["seconds"],
    )  # fmt: skip


class Process(Protocol):
    """A rank that was started."""

    def poll(self) -> int | None: ...
    def signal(self, number: int) -> None: ...
    def kill(self) -> None: ...


class Popened:
    """A Python of its own."""

    def __init__(self, words: list[str], env: Mapping[str, str], cwd: Path, log: Path) -> None:
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                words, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.poll = self._process.poll

    def signal(self, number: int) -> None:
        if self.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """With all that it started."""
        _kill_group(self._process.pid)
        self._process.wait()


class Forked:
    """A process of a :class:`Server`."""

    def __init__(self, parent: Server, pid: int) -> None:
        self._parent, self.pid = parent, pid

    def poll(self) -> int | None:
        self._parent.hear(0.0)
        return self._parent.ended.get(self.pid)

    def signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """With all that it started."""
        _kill_group(self.pid)
        while self.poll() is None:
            time.sleep(0.1)


class Server:
    """A process that has imported the engine (forker.py), for this session."""

    def __init__(self, engine: Engine) -> None:
        self._process = subprocess.Popen(
            [str(engine.python), str(HERE / "forker.py"), *engine.loads],
            env=plain_environment(engine) | {"PYTHONPATH": str(SITE)}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.ended: dict[int, int] = {}
        self._started: list[int] = []
        atexit.register(self.close)
        until = time.monotonic() + LIMIT_S
        while not self.hear(1.0):
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the engine cannot be imported")

    def start(self, words: list[str], env: Mapping[str, str], cwd: Path, log: Path) -> Forked:
        """``words`` begin with the Python that it is anyway."""
        job = {"words": words[1:], "env": dict(env), "cwd": str(cwd), "log": str(log)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        while not self._started:
            self.hear(1.0)
        return Forked(self, self._started.pop())

    def hear(self, wait_s: float) -> bool:
        """What it has said meanwhile; whether that was anything."""
        stream = self._process.stdout
        assert stream is not None
        heard = False
        while select.select([stream], [], [], wait_s)[0]:
            line = os.read(stream.fileno(), 1 << 16)
            if not line:
                raise RuntimeError("the process that others are forked from has ended")
            for one in line.splitlines():  # far less than a pipe takes at once
                said = json.loads(one)
                if "started" in said:
                    self._started.append(said["started"])
                if "ended" in said:
                    self.ended[said["ended"]] = said["code"]
            heard, wait_s = True, 0.0
        return heard

    def close(self) -> None:
        _kill_group(self._process.pid)
        self._process.wait()


@cache
def server(engine: Engine) -> Server:
    """Of this session."""
    return Server(engine)


def plain_environment(engine: Engine) -> dict[str, str]:
    """This process's, but for what bears on what an engine runs."""
    out = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("POISE_", "VLLM_", "SGLANG_", "PYTEST_", "PYTHON"))
    }
    return {**out, **SETTINGS, **dict(engine.environ), "VLLM_CACHE_ROOT": str(engine.folder / "cache")}


def environment(engine: Engine, asked: Asked, folder: Path, rank: int, port: int) -> dict[str, str]:
    """Variables of a rank."""
    out = plain_environment(engine)
    path = [str(engine.installed())] if asked.poise else []
    if asked.stand_in:
        path.append(str(SITE))
        out["STAND_IN_MAPS"] = str(folder / f"maps.rank-{rank}")
    out |= {"PYTHONPATH": os.pathsep.join(path)}
    if asked.ranks > 1:
        out |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(asked.ranks),
                "LOCAL_WORLD_SIZE": str(asked.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    return {**out, **asked.environ, **asked.environ_of.get(rank, {})}


def _wait(processes: Sequence[Process], folder: Path, limit_s: float) -> tuple[int | None, ...]:
    """Exit codes, when all have ended or there is nothing to wait for."""
    trouble, said, since = 0.0, 0, time.monotonic()
    ends = since + MOST_LIMITS * limit_s
    while None in (codes := tuple(process.poll() for process in processes)):
        now = time.monotonic()
        if (written := sum(one.stat().st_size for one in folder.iterdir() if one.is_file())) != said:
            said, since = written, now
        if any(codes):
            trouble = trouble or now
        if now > ends or now - since > limit_s or (trouble and now - trouble > GRACE_S):
            for process in processes:
                process.signal(signal.SIGUSR1)
            time.sleep(3.0)
            break
        time.sleep(0.2)
    return codes


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def forget_shared_memory(port: int) -> None:
    """Blocks that vLLM's ranks on CPU share, where they were killed before they could."""
    for left in Path("/dev/shm").glob(f"poise-test-{port}-*"):
        left.unlink(missing_ok=True)


def free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def lines(path: Path, key: str) -> tuple[Any, ...]:
    """What each whole line of JSON has under a key."""
    if not path.exists():
        return ()
    return tuple(json.loads(line)[key] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
