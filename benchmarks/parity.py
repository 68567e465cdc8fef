"""The whole parity matrix of sharded training: policy x re-materialisation x K x workload x optimizer, and many steps.

Usage: python benchmarks/parity.py [2 4 8 4:float32 4:bfloat16 4:gathered-bfloat16 4:gathered-float8_e4m3fn steady | 8/4+1 ...]
(8/4+1: on 8 ranks every fourth cell, from number 1 on; gathered-: float64, weights sent in that type)

One launch per part. ``steady``: 1,000 steps on 4 ranks with a new plan in each and new owners every 100.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch  # noqa: F401  (the report names its version)

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import table, write

ROOT = Path(__file__).parents[1]
LIMIT, TIMES = 1e-11, 4.0
STEPS = 1000
GATHERED = "gathered-"
WHOLE = ("2", "4", "8", "4:float32", "4:bfloat16", f"4:{GATHERED}bfloat16", f"4:{GATHERED}float8_e4m3fn", "steady")


def launch(world: int, script: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
               str(ROOT / script), *arguments]  # fmt: skip
    env = {**os.environ, "POISE_MANY": "1"}  # five steps, not the tests' three
    return subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True).stdout


def part(word: str) -> tuple[int, int, int, str]:
    """Ranks, every how many-th cell, the first of them, and the type of numbers."""
    place, _, dtype = word.partition(":")
    world, _, cells = place.partition("/")
    every, _, first = cells.partition("+")
    return int(world), int(every or 1), int(first or 0), dtype or "float64"


def matrix(word: str) -> tuple[str, int]:
    """One part of the report, and the cells that failed."""
    world, every, first, dtype = part(word)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cells.json"
        exact = dtype == "float64" or dtype.startswith(GATHERED)
        types = ("--gather", dtype.removeprefix(GATHERED)) if dtype.startswith(GATHERED) else ("--dtype", dtype)
        launch(world, "tests/train/matrix.py", "--out", str(out), "--every", str(every), "--first", str(first), *types)
        found = json.loads(out.read_text())
    cells = [{**cell, "value": cell["error"] if exact else cell["error"] / cell["dense"]} for cell in found["cells"]]
    failed = sum(not cell["value"] <= (LIMIT if exact else TIMES) for cell in cells)
    show = "{:.1e}" if exact else "{:.2f} times"
    rows = []
    for policy in dict.fromkeys(cell["policy"] for cell in cells):
        mine = [cell for cell in cells if cell["policy"] == policy]
        rows.append([policy, len(mine), sum(cell["gathered"] > 0 for cell in mine),
                     show.format(max(cell["value"] for cell in mine))])  # fmt: skip
    worst = max(cells, key=lambda cell: cell["value"])
    text = (
        f"## {world} ranks, {dtype}\n\n{len(cells)} cells in {found['seconds']:.0f} s, {failed} above the limit; worst "
        f"{show.format(worst['value'])} ({worst['policy']}, {worst['workload']}, top-{worst['top_k']}, {worst['optimizer']})\n\n"
        + table(["policy", "cells", "cells that moved weights", "worst"], rows)
    )
    return text, failed


def steady() -> tuple[str, int]:
    """Many steps against the reference."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        launch(4, "tests/train/run_cases.py", "--steps", str(STEPS), "--out", str(path), "steady")
        got = json.loads(path.read_text())["result"]
    text = (
        f"## {got['steps']} steps\n\n4 ranks, hecate, a new plan in every step, {got['owner plans']} sets of owners: relative error of "
        f"the weights against the dense run {got['error']:.1e}; live tensors after a quarter of the steps and at the end "
        f"{got['tensors']}; {time.time() - start:.0f} s."
    )
    return text, 0


INTRODUCTION = (
    f"float64: largest ||a - b|| / ||b|| of every loss, gradient, gradient norm and weight over 5 steps against one dense "
    f"process on all tokens, limit {LIMIT:g}; `gathered-`: the dense process rounds its experts' weights as they are rounded to be "
    f"sent. float32, bfloat16 (mixed precision, float32 weights): that error over the most by "
    f"which dense runs differ that add up in 16 other orders, limit {TIMES:g} times. Every other cell starts on random owners; the form "
    "of the sparse collectives changes from cell to cell, and in two of five cells a token goes to a device once (`home_device_dedup`)."
)


def main() -> None:
    parts, failed = [INTRODUCTION], 0
    for word in sys.argv[1:] or WHOLE:
        text, more = steady() if word == "steady" else matrix(word)
        parts.append(text)
        failed += more
        write("parity", parts)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
