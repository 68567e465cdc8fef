"""Imports an engine once, with its Python, and forks from it whoever is asked for: an import takes longer than a run.

Usage: python forker.py MODULE ..., those to import.

A line of JSON on stdin asks for a process (``words``, ``env``, ``cwd``, ``log``); lines of JSON on stdout tell its
number, and how each ended. What a library reads of the environment while it is imported is this process's.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
from pathlib import Path
from typing import Any

told = sys.stdout
"""Where answers go."""


def main() -> None:
    global told
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print while they are imported is no answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    assert "numba" not in sys.modules or "vllm" not in sys.modules, (
        "vLLM's CPU build would not start beside it: its own imports should not have it"
    )
    gc.collect()
    gc.freeze()
    tell(ready=True)
    running = set[int]()
    while True:
        if select.select([sys.stdin], [], [], 0.2)[0]:
            line = sys.stdin.readline()
            if not line:
                for pid in running:  # each leads a group of its own
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                os._exit(0)
            pid = os.fork()
            if not pid:
                become(json.loads(line))
                return
            running.add(pid)
            tell(started=pid)
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.remove(pid)
                tell(ended=pid, code=os.waitstatus_to_exitcode(status))


def tell(**what: Any) -> None:
    print(json.dumps(what), file=told, flush=True)


def become(job: dict[str, Any]) -> None:
    """The process that was asked for."""
    os.setsid()
    os.close(told.fileno())
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, log, log)):
        os.dup2(file, number)
    os.chdir(job["cwd"])
    here = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[0] = str(Path(job["words"][0]).parent)
    sys.path[1:] = [*job["env"].get("PYTHONPATH", "").split(os.pathsep), *(p for p in sys.path[1:] if p not in here)]
    importlib.invalidate_caches()
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = job["words"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
