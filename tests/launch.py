"""Run a script on several processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from tests.forked import ROOT, Forked


def torchrun(world: int, script: str, *arguments: str, timeout: float = 300.0, check: bool = True) -> str:
    """Output of ``torchrun --nproc-per-node world script``; the tail of it if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
               str(ROOT / script), *arguments]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=timeout)  # fmt: skip
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


class Ranks:
    """Ranks of one launch, started without an agent that would end the others when one dies; ended at the latest here.

    Parameters
    ----------
    world, script, arguments : as for torchrun.
    folder : what each says goes to ``rank-N.out`` there.
    env : beside this process's.
    """

    def __init__(
        self, world: int, script: str, *arguments: str, folder: Path, env: Mapping[str, str] | None = None
    ) -> None:
        # the store lives here, as with torchrun: no port that another could take meanwhile, and no rank that must be first
        self.store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
        self.outputs = [folder / f"rank-{rank}.out" for rank in range(world)]
        self.running: list[Forked] = []
        for rank, output in enumerate(self.outputs):
            own = {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world,
                   "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port,
                   "TORCHELASTIC_USE_AGENT_STORE": True}  # fmt: skip
            with output.open("wb") as said:
                whole = {**os.environ, **(env or {}), **{k: str(v) for k, v in own.items()}}
                self.running.append(Forked(ROOT / script, arguments, whole, said, rank))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()

    def codes(self) -> list[int | None]:
        """Exit code of each, None while it runs."""
        return [process.poll() for process in self.running]

    def waiting(self) -> bool:
        """Whether no thread of those that run has anything to do: on a busy machine a rank may be slow, and not wait.

        One that has ended and is not told of yet (its threads are gone, or wait for who forked it) does not wait either.
        """
        states = []
        for process in self.running:
            if process.returncode is not None:
                continue
            mine = []
            for stat in Path(f"/proc/{process.pid}/task").glob("*/stat"):
                try:
                    mine.append(stat.read_text().rpartition(") ")[2][0])
                except OSError:
                    pass
            states += mine or ["X"]
        return not {"R", "D", "Z", "X"} & set(states)

    def stacks(self, files: list[Path], wait_s: float = 15.0) -> None:
        """Ask those that run for the stacks of all their threads (:func:`tests.journal.keep`), and wait for them."""
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)
        until = time.monotonic() + wait_s
        while time.monotonic() < until and any(
            process.poll() is None and not (file.exists() and file.stat().st_size)
            for process, file in zip(self.running, files, strict=True)
        ):
            time.sleep(0.1)
        time.sleep(0.2)  # the rest of what was begun

    def said(self, rank: int) -> str:
        """What a rank has printed."""
        return self.outputs[rank].read_text(errors="replace")


def ranks(world: int, script: str, *arguments: str, folder: Path, timeout: float = 300.0) -> list[str]:
    """What every rank has printed, all of which must end well; the tail of it if one fails."""
    ended = processes(world, script, *arguments, folder=folder, timeout=timeout)
    assert not any(code for code, _ in ended), "\n".join(f"exit code {code}: {said[-3000:]}" for code, said in ended)
    return [said for _, said in ended]


def processes(world: int, script: str, *arguments: str, folder: Path, timeout: float = 120.0) -> list[tuple[int, str]]:
    """Exit code and output of every rank."""
    with Ranks(world, script, *arguments, folder=folder) as ranks:
        for process in ranks.running:
            process.wait(timeout)
        return [(process.returncode, ranks.said(rank)) for rank, process in enumerate(ranks.running)]


def leave() -> None:
    """End a rank that has done its work, without what gloo's threads may do when the interpreter ends."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
