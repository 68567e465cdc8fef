"""A stranger's first minutes: a fresh clone, the demo, a dump of their own, a verdict, a map in the engine's format.

Usage: python benchmarks/stranger.py [--python PATH]

Clones the commit of this checkout into an empty folder and runs there what README and docs/start.md say, one command after
the other, timed, with what each puts on the screen. ``make demo`` makes an environment of its own, so the first one needs a
package index; with ``--python`` an environment that is there stands in for it, and the report says so. The dump is of a made
up server: what SGLang answers with ``--enable-return-routed-experts``, of a router with hot experts by topic.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np

ROOT = Path(__file__).parents[1]
MODEL, LAYERS, EXPERTS, TOP_K, CLUSTER = "gpt-oss-20b", 24, 32, 4, "1x8:h100"
REQUESTS, PROMPT, ANSWER, TOPICS = 160, 96, 32, 3
MOST_LINES = 60
"""Of a screen, as a terminal of this height shows the end of it."""


@dataclass(frozen=True)
class Step:
    """A command, what it took and showed."""

    name: str
    command: str
    wall_s: float
    cpu_s: float
    status: int
    screen: str


def write_dump(path: Path, seed: int = 0) -> None:
    """Answers of a server, one a line: each request of one topic, whose experts its router likes."""
    rng = np.random.default_rng(seed)
    liked_TLE = rng.gamma(0.5, size=(TOPICS, LAYERS, EXPERTS))
    with path.open("w", encoding="utf-8") as stream:
        for number in range(REQUESTS):
            rows = PROMPT + ANSWER - 1
            drawn = np.log(liked_TLE[rng.integers(TOPICS)]) + rng.gumbel(size=(rows, LAYERS, EXPERTS))
            chosen = np.argsort(-drawn, axis=2)[..., :TOP_K].astype("<i4")
            meta = {"id": f"request-{number}", "prompt_tokens": PROMPT, "completion_tokens": ANSWER,
                    "routed_experts": base64.b64encode(chosen.tobytes()).decode()}  # fmt: skip
            stream.write(json.dumps({"text": "...", "meta_info": meta}) + "\n")


def ran(name: str, command: str, folder: Path, environment: dict[str, str]) -> Step:
    """Run a command of a shell in a folder."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = done.stdout.replace(str(folder), ".").rstrip().splitlines()
    lines = [line for line in lines if "file://" not in line]  # where this machine keeps its packages
    if len(lines) > MOST_LINES:
        lines = [f"({len(lines) - MOST_LINES} lines above)", *lines[-MOST_LINES:]]
    print(f"{name}: {wall:.1f} s, exit code {done.returncode}", flush=True)
    return Step(name, command, wall, cpu, done.returncode, "\n".join(lines))


def path_of(python: str | None) -> list[tuple[str, str]]:
    """(name, command) of every step behind the clone."""
    demo = "make demo" if python is None else "poise demo"
    dump = "answers.jsonl"
    asked = f"--cluster {CLUSTER} --model {MODEL} --engine sglang"
    return [
        ("demo, first time", demo),
        ("demo, once set up", demo),
        ("own dump: what it holds", f"poise convert {dump} --model {MODEL} -o trace.npz"),
        ("verdict", f"poise verdict trace.npz {asked}"),
        ("plan", f"poise plan trace.npz {asked} --redundant 8 -o placement.npz"),
        ("export", f"poise export placement.npz --to sglang --model {MODEL} -o experts.json"),
    ]


def environment_of(clone: Path, python: str | None) -> dict[str, str]:
    """Of the commands: nothing of this checkout; ``poise`` is that of the clone."""
    own = ("PYTHON", "POISE", "VIRTUAL_ENV", "NUMBA")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    if python is None:
        return {**kept, "PATH": f"{clone / '.venv' / 'bin'}:{kept['PATH']}"}
    place = clone / "command"
    place.mkdir()
    (place / "poise").write_text(f'#!/bin/sh\nPYTHONPATH={clone / "src"} exec {python} -m poise "$@"\n')
    (place / "poise").chmod(0o755)
    return {**kept, "PATH": f"{place}:{kept['PATH']}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="an interpreter with all that poise needs, in place of a new environment")
    python = parser.parse_args().python
    python = None if python is None else os.path.abspath(python)  # a link into an environment stays one
    with tempfile.TemporaryDirectory() as made:
        clone = Path(made) / "poise"
        steps = [ran("clone", f"git clone --quiet {ROOT} poise", Path(made), dict(os.environ))]
        environment = environment_of(clone, python)
        write_dump(clone / "answers.jsonl")
        for name, command in path_of(python):
            steps.append(ran(name, command, clone, environment))
            if steps[-1].status:
                break
    rows = [[one.name, f"`{shown(one)}`", f"{one.wall_s:.1f}", f"{one.cpu_s:.1f}", one.status] for one in steps]
    said = (
        "A fresh clone of this commit in an empty folder, one command after the other, as README and docs/start.md have them; no "
        "compiled function is kept before the first one. "
        + ("`make demo` makes its environment from a package index." if python is None else
           "An environment that was there stands in for the one that `make demo` would make (`--python`).")
        + f" Load average {os.getloadavg()[1]:.0f} on {os.cpu_count()} cores at the end."
        + f" The dump: {REQUESTS} answers of SGLang's form, {PROMPT} + {ANSWER} tokens each, of a router with hot experts by topic, drawn."
    )  # fmt: skip
    screens = [f"## {one.name}\n\n```\n$ {shown(one)}\n{one.screen}\n```" for one in steps]
    sys.argv = [sys.argv[0], *(["--python", "PYTHON"] if python else [])]
    common.write(
        "A stranger's path", [said, common.table(["step", "command", "wall s", "CPU s", "exit"], rows), *screens]
    )
    raise SystemExit(max(one.status for one in steps))


def shown(step: Step) -> str:
    """The command as a reader types it."""
    return step.command.replace(str(ROOT), "URL")


if __name__ == "__main__":
    main()
