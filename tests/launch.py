"""Run a script on several processes of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
EXIT_CRASH = "terminate called without an active exception"
"""What a gloo process with a second group sometimes says when it ends, without poise as well: 3 of 30 launches."""


def torchrun(world: int, script: str, *arguments: str, timeout: float = 300.0, check: bool = True) -> str:
    """Output of ``torchrun --nproc-per-node world script``; the tail of it if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
               str(ROOT / script), *arguments]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                              capture_output=True, timeout=timeout)  # fmt: skip
        if not done.returncode or EXIT_CRASH not in done.stderr:
            break
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def processes(world: int, script: str, *arguments: str, timeout: float = 120.0) -> list[tuple[int, str]]:
    """Exit code and output of every rank, started without an agent that would end the others when one dies."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    running = []
    for rank in range(world):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
               "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        running.append(subprocess.Popen([sys.executable, str(ROOT / script), *arguments], cwd=ROOT, env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    try:
        return [(process.wait(), out) for process in running for out in (process.communicate(timeout=timeout)[0],)]
    finally:
        for process in running:
            process.kill()


def leave() -> None:
    """End a rank that has done its work, without what gloo's threads may do when the interpreter ends."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
