"""What a second core gives a plan: serial against two threads, side by side, and large machines.

    python benchmarks/cores.py [--repeats 3] [--work 300] [--cases NAME ...] [--report]

Loads are made of a seed (heavy tails, 16 steps, DeepSeek-V3's 58 layers of 256 experts). A pair is one plan of each kind, in
turn, after one that compiles; with ``--work`` both must be the same plan. Wall seconds say something only on a machine
that nobody else uses: where the two kinds' ranges overlap, or a kind's own are far apart, the report says inconclusive.
Processor seconds say what was done, over wall seconds how many cores it had; those that the main thread did not take can
be shared, so main + others / 2 is what two free cores would need.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
from common import table, write

from poise import api
from poise.planning.budget import Budget
from poise.planning.problem import Solution
from poise.routing.trace import LoadProfile
from poise.util.executors import Serial

CASES = {"64 devices": ("8x8:h200", 64), "256 devices": ("32x8:h200", 256), "2,048 devices": ("256x8:h200", 1792)}
LAYERS, EXPERTS, STEPS, TOKENS = 58, 256, 16, 8192
ALONE = 0.9
"""Cores that serial plans must have had for wall seconds to say something."""
WIDE = 1.25
"""Slowest over fastest run of a kind from which on its runs are too far apart."""


def loads() -> LoadProfile:
    rng = np.random.RandomState(0)  # its streams are frozen
    base_E = 200_000 // (10 + np.arange(EXPERTS))
    rows = [base_E[rng.permutation(EXPERTS)] for _ in range(LAYERS)]
    return LoadProfile(
        np.array([[row * rng.randint(60, 141, EXPERTS) // 100 for row in rows] for _ in range(STEPS)]), top_k=8
    )


def timed(profile: LoadProfile, case: str, work: float, executor: Executor) -> tuple[Solution, float, float, float]:
    """The plan, wall and processor seconds, and those of them on the main thread."""
    cluster, redundant = CASES[case]
    before, began, main_began = time.process_time(), time.perf_counter(), time.thread_time()
    found = api.plan(profile, cluster, redundant=redundant, engine="sglang", tokens_per_step=TOKENS,
                     time_limit_s=Budget(1.0, work=work, executor=executor))  # fmt: skip
    wall = time.perf_counter() - began
    return found, wall, time.process_time() - before, time.thread_time() - main_began


def verdict(serial: list[float], threads: list[float], had: float) -> str:
    if had < ALONE:
        return f"inconclusive: {had:.2f} cores had"
    if (
        max(serial) > WIDE * min(serial)
        or max(threads) > WIDE * min(threads)
        or max(threads) > min(serial) > min(threads)
    ):
        return "inconclusive"
    return f"{np.median(serial) / np.median(threads):.2f} times as fast"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=float, default=300.0)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    profile, rows = loads(), []
    began = os.getloadavg()[0]
    with ThreadPoolExecutor(2) as pool:
        for case in args.cases:
            timed(profile, case, 1.0, pool)
            timed(profile, case, args.work, Serial())
            walls: dict[str, list[float]] = {"serial": [], "two threads": []}
            busy: dict[str, list[float]] = {kind: [] for kind in walls}
            mains: dict[str, list[float]] = {kind: [] for kind in walls}
            plans = []
            for _ in range(args.repeats):
                for kind, executor in (("serial", Serial()), ("two threads", pool)):
                    found, wall, processor, main = timed(profile, case, args.work, executor)
                    walls[kind].append(wall)
                    busy[kind].append(processor)
                    mains[kind].append(main)
                    plans.append(found.placement.slot_expert_LS.tobytes())
            for kind in walls:
                rows.append([case, kind, " ".join(f"{w:.1f}" for w in walls[kind]), f"{np.median(busy[kind]):.1f}",
                             f"{np.median(mains[kind]) + (np.median(busy[kind]) - np.median(mains[kind])) / 2:.1f}",
                             f"{np.sum(busy[kind]) / np.sum(walls[kind]):.2f}", f"{1e6 * found.objective:.1f}",
                             "yes" if len(set(plans)) == 1 else "NO",
                             verdict(walls["serial"], walls["two threads"], np.sum(busy["serial"]) / np.sum(walls["serial"])) if kind != "serial" else ""])  # fmt: skip
                print(rows[-1], flush=True)
    head = ["case", "kind", "wall s", "processor s", "two free cores, s", "cores had", "us a layer", "one plan", "wall"]
    words = (
        f"{LAYERS} layers of {EXPERTS} experts, {STEPS} steps of {TOKENS} tokens, work {args.work:g}, {args.repeats} pairs in turn in "
        f"one process; load of the machine before and after {began:.1f} and {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores. "
        "One plan: all runs gave the same map."
    )
    if args.report:
        write("Plans on two cores", [words, table(head, rows)])


if __name__ == "__main__":
    main()
