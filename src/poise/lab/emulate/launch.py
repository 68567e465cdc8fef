"""Run a script on every device of an emulated cluster."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from poise.lab.emulate import network
from poise.lab.emulate.spec import EmulatedCluster
from poise.util.errors import CommunicationError, OptionError

PORT = 29_555
TAIL_CHARACTERS = 4_000
"""Of a failed rank's output, this much is in the error."""


@dataclass(frozen=True, slots=True)
class RankResult:
    """How one rank ended. ``exit_code`` is negative if a signal ended it; of each text the last 16 MiB are kept."""

    rank: int
    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class EmulatedRun:
    """A finished run. ``shaped`` is False if the links had no limits: then no time of it says anything of a cluster."""

    ranks: tuple[RankResult, ...]
    shaped: bool
    seconds: float


class RankError(CommunicationError):
    """A rank failed, or time ran out. ``ranks`` holds what every rank had written by then."""

    def __init__(self, message: str, ranks: tuple[RankResult, ...], *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.ranks = ranks


def run(
    spec: EmulatedCluster,
    script: str | Path,
    args: Sequence[str] = (),
    *,
    python: str | Path = sys.executable,
    timeout: float = 600.0,
    may_die: Sequence[int] = (),
    out: TextIO | None = None,
    err: TextIO | None = None,
) -> EmulatedRun:
    """Run a Python script as one process a device and wait for all.

    Every process gets what torchrun would give it (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), GLOO_SOCKET_IFNAME and OMP_NUM_THREADS=1. What rank 0 writes is passed on to ``out`` and ``err``
    (default: this process's) as it comes. Without root, ``ip`` or ``tc`` the ranks share the loopback interface; a
    notice on stderr says so and the result's ``shaped`` is False.

    Parameters
    ----------
    spec : the cluster.
    script, args : what every rank runs in this folder; as script ``-m``, args begin with a module's name.
    python : the interpreter of the ranks: one of another environment sees the same links.
    timeout : seconds from the first rank's start.
    may_die : ranks whose end, however it comes, fails no run: the others go on (:mod:`poise.serve.recover`).

    Raises
    ------
    OptionError : there is no such script, the timeout is not above 0, or there is no such rank.
    RankError : a rank ended with a code other than 0 (all others are ended), or time ran out. Its text has the
        output of the rank that failed first.
    CommunicationError : the network could not be built.
    """
    if script != "-m" and not Path(script).is_file():
        raise OptionError(f"no script {str(script)!r}", hint="a path to a Python file, or -m and a module")
    if not timeout > 0:
        raise OptionError(f"timeout must be above 0 seconds, got {timeout!r}")
    if none := [rank for rank in may_die if not 0 <= rank < spec.num_devices]:
        raise OptionError(f"no rank {none[0]}: there are {spec.num_devices}, from 0")
    reason = network.why_not()
    if reason:
        print(f"emulation: links are NOT shaped ({reason}); ranks share the loopback interface", file=sys.stderr)
    job = _job(spec, [str(python), str(script), *args], timeout, shaped=not reason) | {"may_die": list(may_die)}
    answer = _talk([] if reason else network.ISOLATE, job, out or sys.stdout, err or sys.stderr)
    if "error" in answer:
        raise CommunicationError(f"the emulated network could not be built: {answer['error']}")
    ranks = tuple(RankResult(**rank) for rank in answer["ranks"])
    _judge(ranks, answer, timeout)
    return EmulatedRun(ranks=ranks, shaped=not reason, seconds=answer["seconds"])


def _job(spec: EmulatedCluster, argv: list[str], timeout: float, *, shaped: bool) -> dict[str, Any]:
    common = {
        "WORLD_SIZE": str(spec.num_devices),
        "LOCAL_WORLD_SIZE": str(spec.devices_per_node),
        "MASTER_ADDR": network.address(spec, 0) if shaped else "127.0.0.1",
        "MASTER_PORT": str(PORT if shaped else _free_port()),
        "GLOO_SOCKET_IFNAME": "fab0" if shaped else "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    processes = []
    for rank in range(spec.num_devices):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % spec.devices_per_node),
            "GROUP_RANK": str(spec.node_of(rank)),
        }
        processes.append({"argv": argv, "env": {**os.environ, **common, **own}})
    return {
        "namespaces": spec.num_devices if shaped else 0,
        "sysctls": network.sysctls(spec),
        "batches": [dataclasses.asdict(batch) for batch in network.batches(spec)] if shaped else [],
        "processes": processes,
        "timeout": timeout,
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _talk(isolate: list[str], job: dict[str, Any], out: TextIO, err: TextIO) -> dict[str, Any]:
    """Start the agent, pass rank 0's output on, return the agent's last answer."""
    agent = subprocess.Popen(
        [*isolate, sys.executable, "-I", str(Path(__file__).with_name("agent.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which then closes stdin
    )
    assert agent.stdin and agent.stdout
    answer: dict[str, Any] = {}
    try:
        agent.stdin.write(json.dumps(job).encode() + b"\n")
        agent.stdin.flush()
        for line in agent.stdout:
            answer = json.loads(line)
            if "output" in answer:
                stream = err if answer["to"] == "stderr" else out
                stream.write(answer["output"])
                stream.flush()
    except BrokenPipeError:
        pass
    finally:
        agent.stdin.close()
        code = agent.wait()
        agent.stdout.close()
    if "ranks" not in answer and "error" not in answer:
        return {"error": f"the agent ended with code {code}"}
    return answer


def _judge(ranks: tuple[RankResult, ...], answer: dict[str, Any], timeout: float) -> None:
    world, failed = len(ranks), answer["failed"]
    if failed is not None:
        code = ranks[failed].exit_code
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        raise RankError(f"rank {failed} of {world} {how}; the others were ended\n{_tail(ranks[failed])}", ranks)
    if answer["timed_out"]:
        late = [rank for rank in ranks if rank.exit_code]
        tails = "\n".join(f"--- rank {rank.rank}\n{_tail(rank, TAIL_CHARACTERS // len(late))}" for rank in late)
        raise RankError(
            f"{len(late)} of {world} ranks still ran after {timeout:g} seconds and were ended\n{tails}",
            ranks,
            hint="a longer timeout, or look where they wait",
        )


def _tail(rank: RankResult, characters: int = TAIL_CHARACTERS) -> str:
    return "\n".join(text[-characters:].rstrip() for text in (rank.stdout, rank.stderr) if text.strip())
