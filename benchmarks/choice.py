"""Is poise beaten on traffic that it has not seen, on measured machines? Cases are frozen: see the commit that adds them.

python benchmarks/choice.py DATA [--only TEXT] [--no-report]

Every method is fitted on one part of the traffic and judged on another (other requests of the same subject, another
subject, a workload that was left out), by the kernel and the all-to-alls measured for the machine, homes equal, every
map priced as an engine holds it. Lost: cases in which the step of the best of all rivals, chosen when the result is known,
is more than 0.5 % shorter. Nobody can choose so: a second table says of every method how often, and by how much, the
best of all others beats it. Beside it the least that poise gains over the best rival within the errors of constants
(poise.cost.perturb).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path

import numpy as np
from common import problem, table, write

from poise import api
from poise.cost.perturb import gain_range
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import METHODS, solve
from poise.replay.static import replay
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import NoResultError

RIVALS = [name for name in METHODS if not METHODS[name].pooled and not name.startswith(("poise", "exact", "surplus"))]
WORK, RIVAL_WORK = 600.0, 150.0
LOST = 0.005


@dataclass(frozen=True, slots=True)
class Case:
    """One fit and one judgement."""

    name: str
    fit: RoutingTrace | LoadProfile
    judge: RoutingTrace | LoadProfile
    cluster: str
    model: str | None
    tokens: int | None
    redundant: int


def halves(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """Every second request, and the others."""
    assert trace.request is not None
    first = np.isin(trace.request, trace.requests()[::2])
    return trace.rows(first), trace.rows(~first)


def cases(data: Path) -> list[Case]:
    """All of them; only appended to."""
    out: list[Case] = []
    subjects = {path.stem: read(path) for path in sorted((data / "llama4-maverick").glob("*.npz"))}
    pairs = [(f"{a} -> {b}", subjects[a], subjects[b]) for a, b in product(subjects, repeat=2) if a != b]
    pairs += [(f"{name}, other requests", *halves(trace)) for name, trace in subjects.items()]
    for (name, fit, judge), (cluster, devices), tokens, each in product(
        pairs, (("1x8:h200", 8), ("2x4:h200", 8), ("2x8:h100", 16)), (512, 4096), (0, 1)
    ):
        where = f"llama-4 {name}, {cluster}, N = {tokens}, R = {each * devices}"
        out.append(Case(where, fit, judge, cluster, "llama-4-maverick", tokens, each * devices))
    loads = {path.stem: path for path in sorted((data / "deepseek-r1").glob("*.json"))}
    for name, each in product(loads, (0, 1)):
        others = api.load([path for other, path in loads.items() if other != name])
        for cluster, tokens in (("8x8:h200", 8192), ("4x8:b200", 65536)):
            redundant = each * (64 if cluster.startswith("8") else 32)
            where = f"deepseek, {name} left out, {cluster}, N = {tokens}, R = {redundant}"
            out.append(Case(where, others, read(loads[name]), cluster, "deepseek-r1", tokens, redundant))
    demo = read(str(files("poise") / "data" / "demo_trace.npz"))
    for cluster, tokens, redundant in product(("2x4:h100", "1x8:a100"), (1024, 8192), (0, 8)):
        where = f"demo, other requests, {cluster}, N = {tokens}, R = {redundant}"
        out.append(Case(where, *halves(demo), cluster, None, tokens, redundant))
    return out


def run(case: Case) -> tuple[list[object], dict[str, float]]:
    """A row (the case, poise, the best rival, and what lies between), and seconds of a step under every method."""
    fit, judge = (make_batch(part, tokens_per_step=case.tokens) for part in (case.fit, case.judge))
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
    """Of each method: cases it has a map for, those lost by more than :data:`LOST`, mean and worst lead."""
    rows = []
    for name in ("poise", *RIVALS):
        leads = np.array(
            [1 - one[name] / min(one[other] for other in one if other != name) for one in times if name in one]
        )
        if leads.size:
            lost = int((leads < -LOST).sum())
            rows.append([name, leads.size, lost, f"{leads.mean():+.2%}", f"{leads.min():+.2%}"])
    return sorted(rows, key=lambda row: (row[2], -float(row[3].rstrip("%"))))


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
    for case in cases(options.data):
        if options.only in case.name:
            row, seconds = run(case)
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
