"""Random problems with S from E to E on every device: no expert twice on a device, no slot empty, every invariant.

Usage: python benchmarks/engine_rules.py [problems, default 10000] [number of the first, default 0]

Each problem is planned by one quick method in turn, every fiftieth also by ``poise``; exits with 1 if any invariant
fails. Problems come from tests/planning/test_engine_rules.py.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.planning.test_engine_rules import QUICK, check, random_problem

from poise.planning.solve.solve import solve
from poise.util.errors import NoResultError

EVERY, LIMIT_S = 50, 0.05


def main() -> None:
    problems = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    planned: Counter[str] = Counter()
    began, full = time.monotonic(), 0
    for seed in range(first, first + problems):
        problem = random_problem(seed)
        full += int(problem.slots_D.sum()) == problem.batch.num_experts * problem.num_devices
        for method in (QUICK[seed % len(QUICK)], *(("poise",) if seed % EVERY == 0 else ())):
            try:
                found = solve(problem, method=method, time_limit_s=LIMIT_S, seed=seed)
            except NoResultError:
                planned["no result"] += 1
                continue
            check(problem, found.placement)
            assert found.lower_bound <= found.objective * (1 + 1e-9), (seed, method)
            planned[method] += 1
    print(
        f"{problems} problems, {full} of them fully replicated, in {time.monotonic() - began:.0f} s: every slot filled,"
    )
    print("no expert twice on a device, every expert somewhere, no plan below its bound.")
    print(", ".join(f"{name} {count}" for name, count in planned.items()))


if __name__ == "__main__":
    main()
