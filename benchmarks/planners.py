"""Every method on every file of a data folder, in-sample, on one objective: is poise ever worse, how far is the bound?

python benchmarks/planners.py DATA
"""

from __future__ import annotations

import argparse
import time
from importlib.resources import files
from pathlib import Path

from common import problem, table, write

from poise import api
from poise.planning.budget import Budget
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import METHODS, solve
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.util.errors import NoResultError

ROWS = [name for name in METHODS if not METHODS[name].pooled and name != "poise"]
WORK, WORK_64 = 120.0, 600.0
"""Units for each plan, a thirtieth of a nominal second each; the second on 64 devices."""


def cases(data: Path) -> list[tuple[str, PlacementProblem]]:
    out = []
    demo = make_batch(read(str(files("poise") / "data" / "demo_trace.npz")), tokens_per_step=2048)
    sources = [("demo trace", demo, "2x4", (0, 8), None)]
    for path in sorted((data / "llama4-maverick").glob("*.npz")):
        sources.append((f"llama4 {path.stem}", make_batch(read(path)), "1x8", (0, 8), "llama-4-maverick"))
        sources.append((f"llama4 {path.stem}", make_batch(read(path)), "2x8", (0, 16), "llama-4-maverick"))
    deepseek = sorted((data / "deepseek-r1").glob("*.json"))
    for path in deepseek:
        sources.append((f"deepseek {path.stem}", make_batch(read(path)), "8x8", (0, 64), "deepseek-r1"))
    if deepseek:
        sources.append(("deepseek all", make_batch(api.load(deepseek)), "8x8", (0, 64), "deepseek-r1"))
    for family, cluster, extra in (("olmoe", "1x8", 8), ("mixtral", "1x4", 4)):
        for path in sorted((data / family).glob("*/*.npz")):
            name = f"{family} {path.parent.name.removeprefix('expert_counts') or 'counts'} {path.stem}".replace("_", "")
            sources.append((name, make_batch(read(path)), cluster, (0, extra), None))
    for name, batch, cluster, redundant, model in sources:
        out += [(f"{name}, {cluster}, R = {r}", problem(batch, cluster, r, model=model)) for r in redundant]
    out.append(("demo trace, stay, 2x4, R = 0", problem(demo, "2x4", 0, traffic="stay")))
    out.append(("demo trace, stay, 2x4, R = 8", problem(demo, "2x4", 8, traffic="stay")))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    rows, worse = [], []
    for name, case in cases(data):
        work = WORK_64 if case.num_devices == 64 else WORK
        began = time.monotonic()
        mine = solve(case, method="poise", time_limit_s=Budget(work / 30.0, work=work))
        seconds = time.monotonic() - began
        ratios = []
        for method in ROWS:
            try:
                other = solve(case, method=method, time_limit_s=Budget(WORK / 30.0, work=WORK))
            except NoResultError:
                ratios.append("")
                continue
            ratios.append(f"{other.objective / mine.objective:.4f}")
            if mine.objective > other.objective * (1 + 1e-9):
                worse.append(f"{name}: {method}")
        rows.append(
            [name, f"{1e6 * mine.objective:.2f}", f"{mine.gap:.1%}", f"{mine.imbalance:.3f}", f"{seconds:.1f}", *ratios]
        )
        print(rows[-1], flush=True)
    verdict = f"poise is worse in {len(worse)} of {len(rows)} cases" + (": " + "; ".join(worse) if worse else ".")
    write(
        "Planners, in-sample, on their own objective",
        [
            f"Objective: modelled microseconds of one MoE layer and step (in-sample). Gap: to poise's proven bound. The "
            f"other columns are a method's objective / poise's: above 1 poise is better. {WORK:g} units of work a plan, "
            f"poise {WORK_64:g} on 64 devices; no clock, so that all but the seconds is the same on a busy machine. "
            f"{verdict}",
            table(["case", "poise us", "gap", "imbalance", "seconds", *ROWS], rows),
        ],
    )


if __name__ == "__main__":
    main()
