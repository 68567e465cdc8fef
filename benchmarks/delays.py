"""Every multi-rank case of the tests under delays by chance, beside busy processes: does any rank ever wait for ever?

Usage: python benchmarks/delays.py [--launches 200] [--first SEED] [--busy 2] [--log FILE] [--keep FOLDER] [--report]

A launch is four ranks and up to ``EACH`` cases of one script, drawn by its seed. Posts, waits, hooks, the planning
thread and gloo's threads are late by chance on each rank, and garbage is collected at odd moments (tests/journal.py).
Every launch is a line in the log; what fails is kept with what every rank did last. ``--report``: only report a log.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch  # noqa: F401  (the report names its version)

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import table, write
from tests.cases import DELAYS, verdicts
from tests.runtime import flow_cases
from tests.serve import run_cases as serve_cases
from tests.train import run_cases
from tests.train.support import MINE as CITIZENS

EACH = 8
SCRIPTS = {
    "tests/train/support_cases.py": list(CITIZENS),
    "tests/train/run_cases.py": list(run_cases.MINE),
    "tests/serve/run_cases.py": list(serve_cases.CASES),
    "tests/runtime/flow_cases.py": list(flow_cases.CASES),
}
SPIN = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"


def one(seed: int, keep: Path) -> dict[str, object]:
    """A launch: which cases, and what was wrong."""
    chance = random.Random(seed)
    script = chance.choices(list(SCRIPTS), [len(cases) for cases in SCRIPTS.values()])[0]
    cases = chance.sample(
        SCRIPTS[script], min(EACH, len(SCRIPTS[script]))
    )  # in any order: what one leaves meets another
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        found = verdicts(script, cases, Path(folder) / "run", limit_s=300.0, timeout=2400.0, env={DELAYS: str(seed)})
        wrong = {case: text for case, text in found.items() if text}
        if wrong:
            shutil.copytree(Path(folder) / "run", keep / str(seed), dirs_exist_ok=True)
            (keep / str(seed) / "wrong.json").write_text(json.dumps(wrong, indent=1))
    return {"seed": seed, "script": script, "cases": cases, "wrong": {case: text[:300] for case, text in wrong.items()},
            "seconds": round(time.time() - start)}  # fmt: skip


def report(log: Path, busy: int) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    runs = collections.Counter(case for row in rows for case in row["cases"])
    every = sum(len(cases) for cases in SCRIPTS.values())
    parts = [
        f"{len(rows)} launches of four ranks, up to {EACH} cases each in an order drawn by the seed, beside {busy} busy processes and "
        f"whatever else ran: {sum(runs.values())} runs of cases, {len(runs)} of the {every} cases at least once. Every post, "
        "wait and hook, the planning thread and gloo's threads were late by chance on each rank, garbage was collected at odd moments.",
        table(
            ["script", "launches", "runs of cases", "failed"],
            [[script, len(mine := [row for row in rows if row["script"] == script]), sum(len(row["cases"]) for row in mine),
              sum(len(row["wrong"]) for row in mine)] for script in SCRIPTS],
        ),
    ]  # fmt: skip
    parts += [f"Seed {row['seed']}, {case}: {text}" for row in rows for case, text in row["wrong"].items()] or [
        "None failed."
    ]
    write("Delays by chance", parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--launches", type=int, default=200)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--log", type=Path, default=Path("delays.jsonl"))
    parser.add_argument("--keep", type=Path, default=Path("delays-failed"))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        spin = [sys.executable, "-c", SPIN, str(os.getpid())]
        hogs = [subprocess.Popen(spin) for _ in range(options.busy)]
        try:
            for seed in range(options.first, options.first + options.launches):
                line = one(seed, options.keep)
                with options.log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line)[:300], flush=True)
        finally:
            for hog in hogs:
                hog.kill()
    report(options.log, options.busy)


if __name__ == "__main__":
    main()
