"""Is poise beaten on traffic that it has not seen, on measured machines? Cases are frozen (poise.bench.cases).

python benchmarks/choice.py DATA [--only TEXT] [--no-report]

Every method is fitted on one part of the traffic and judged on another (other requests of the same subject, another
subject, a workload that was left out), by the kernel and the all-to-alls measured for the machine, homes equal, every
map priced as an engine holds it. Lost: cases in which the step of the best of all rivals, chosen when the result is known,
is more than 0.5 % shorter. Nobody can choose so: a second table says of every method how often, and by how much, the
best of all others beats it. Beside it the least that poise gains over the best rival within the errors of constants
(poise.cost.perturb). Loads whose file says no K take the model's, as ``poise bench`` has it (DeepSeek's cases).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import problem, table, write

from poise.bench.cases import FrozenCase, cases_of_files
from poise.bench.results import LOST, standings
from poise.cost.perturb import gain_range
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import METHODS, solve
from poise.replay.static import replay
from poise.replay.windows import with_top_k
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.util.errors import NoResultError

RIVALS = [name for name in METHODS if not METHODS[name].pooled and not name.startswith(("poise", "exact", "surplus"))]
WORK, RIVAL_WORK = 600.0, 150.0


def cases() -> list[FrozenCase]:
    """The first cases of ``poise bench``."""
    return list(cases_of_files())


def run(case: FrozenCase, data: Path) -> tuple[list[object], dict[str, float]]:
    """A row (the case, poise, the best rival, and what lies between), and seconds of a step under every method."""
    top_k = None if case.model is None else ModelSpec.parse(case.model).top_k
    parts = [part.load(data) for part in (case.fit, case.judge)]
    if top_k is not None:
        parts = [with_top_k(part, top_k) for part in parts]
    fit, judge = (make_batch(part, tokens_per_step=case.tokens) for part in parts)
    asked = problem(fit, case.cluster, case.redundant, model=case.model)
    began = time.monotonic()
    ours = solve(asked, method="poise", work=WORK).placement
    seconds = time.monotonic() - began
    found: dict[str, tuple[float, float, Placement]] = {}
    for name in RIVALS:
        try:
            made = solve(asked, method=name, work=RIVAL_WORK).placement
        except NoResultError:
            continue
        found[name] = (*judged(asked, judge, made), made)
    mine, imbalance = judged(asked, judge, ours)
    best = min(found, key=lambda name: found[name][0])
    gain = gain_range(judge, found[best][2].count_LED(), ours.count_LED(), asked.pricing)
    even = found["contiguous"][0]
    lead = 1 - mine / found[best][0]
    row = [case.name, f"{1e3 * even:.3f}", f"{1e3 * mine:.3f}", best, f"{1e3 * found[best][0]:.3f}", f"{lead:+.2%}",
            f"{gain.least_share:+.2%}", f"{imbalance:.3f}", f"{found[best][1]:.3f}", f"{seconds:.0f}",
            "LOST" if lead < -LOST else ""]  # fmt: skip
    return row, {"poise": mine} | {name: step for name, (step, _, _) in found.items()}


def by_method(times: list[dict[str, float]]) -> list[list[object]]:
    """Of each method: cases it has a map for, those lost, mean and worst lead."""
    return [[one.name, one.cases, one.lost, f"{one.lead:+.2%}", f"{one.worst:+.2%}"] for one in standings(times)]


def judged(asked: PlacementProblem, batch: RoutingBatch, placement: Placement) -> tuple[float, float]:
    """Seconds of a step and imbalance on the judged traffic."""
    got = replay(batch, placement, asked.cluster, asked.model, traffic=asked.traffic, split=asked.split)
    return float(got.step_seconds_B.mean()), got.imbalance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    rows, times = [], []
    for case in cases():
        if options.only in case.name:
            row, seconds = run(case, options.data)
            rows.append(row)
            times.append(seconds)
            print(*rows[-1], sep=" | ", flush=True)
    lost = sum(row[-1] != "" for row in rows)
    words = f"{len(rows)} cases, {lost} lost by more than {LOST:.1%}."
    print(words)
    methods = by_method(times)
    for row in methods:
        print(*row, sep=" | ")
    head = ["case", "contiguous ms", "poise ms", "best rival", "its ms", "poise's lead", "least within errors", "imbalance",
            "rival's", "planning s", ""]  # fmt: skip
    if not options.no_report and not options.only:
        names = ["method", "cases", "lost to the best of all others", "lead over it, mean", "worst"]
        write("choice", ["## poise against every rival on traffic it has not seen", words, table(head, rows),
                         "## Every method against the best of all others", table(names, methods)])  # fmt: skip


if __name__ == "__main__":
    main()
