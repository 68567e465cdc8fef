"""How far plans are from the bounds that hold for them: per term, and jointly in more and more time.

python benchmarks/bounds.py DATA [--only WORDS] [--no-report]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from common import DEMO_SIZES, problem, table, write

from poise import api
from poise.planning.budget import UNIT, UPDATES_PER_SECOND, Budget
from poise.planning.problem import MethodResult, PlacementProblem
from poise.planning.solve.solve import evaluate, solve
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.routing.trace import RoutingTrace

WORK = 150.0
OTHER = "python"
"""The demo trace's domain that these plans are not made for."""
SECONDS = (3.0, 12.0)
"""Nominal, for all layers: a plan of 20 s has the first."""


def cases(data: Path) -> list[tuple[str, PlacementProblem]]:
    """The demo trace, recorded loads of all workloads as steps, Llama-4 on two and four nodes."""
    trace = read(str(files("poise") / "data" / "demo_trace.npz"))
    assert isinstance(trace, RoutingTrace)
    seen, _ = trace.select(domains=[name for name in trace.domain_names if name != OTHER]).split_requests()
    demo = make_batch(seen, tokens_per_step=2048)
    out = []
    for flow, redundant in (("home_node_dedup", 8), ("home_node_dedup", 0), ("home_device_dedup", 8), ("home", 8)):
        case = replace(problem(demo, "2x4:h100", redundant, traffic=flow), model=DEMO_SIZES)
        out.append((f"demo, 2x4:h100, {flow}, R = {redundant}", case))
    loads = sorted((data / "deepseek-r1").glob("*.json"))
    for tokens in (None, 8192):
        batch = make_batch(api.load(loads), tokens_per_step=tokens)
        words = "as recorded" if tokens is None else f"N = {tokens:,}"
        out += [(f"deepseek joined, 8x8:h100, {words}, R = {redundant}",
                 problem(batch, "8x8:h100", redundant, model="deepseek-r1")) for redundant in (64, 0)]  # fmt: skip
    llama = read(sorted((data / "llama4-maverick").glob("*.npz"))[0])
    for cluster, redundant in (("2x8:h100", 16), ("4x8:h100", 32)):
        batch = make_batch(llama, tokens_per_step=2048)
        out.append((f"llama-4, {cluster}, N = 2,048, R = {redundant}",
                    problem(batch, cluster, redundant, model="llama-4-maverick")))  # fmt: skip
    return out


def run(name: str, case: PlacementProblem, work: float = WORK) -> list[object]:
    """A row: the plan, its gap to the bounds per term, and to the joint one by its nominal seconds."""
    plan = solve(case, work=work)
    began = time.monotonic()
    closed = evaluate(case, MethodResult(plan.placement), method="poise")
    row: list[object] = [name, f"{1e6 * plan.objective:.1f}", f"{closed.gap:.1%}", f"{time.monotonic() - began:.1f}"]
    for seconds in SECONDS:
        began, before = time.process_time(), closed.lower_bound
        budget = Budget(1.0, work=seconds * UPDATES_PER_SECOND / UNIT)
        found = evaluate(case, MethodResult(plan.placement), method="poise", joint=budget)
        assert found.lower_bound >= before * (1 - 1e-12), (name, seconds)
        words = found.details.get("bound")
        row += ["" if words is None else f"{found.gap:.1%}" + ("" if words == "joint" else f" ({words})"),
                "" if words is None else f"{time.process_time() - began:.1f}"]  # fmt: skip
    return row


def section(data: Path, only: str = "", work: float = WORK) -> list[str]:
    """The parts of a report; ``only``: cases whose name has this."""
    rows = []
    for name, case in cases(data):
        if only in name:
            rows.append(run(name, case, work))
            print(*rows[-1], sep=" | ", flush=True)
    head = ["case", "plan us", "gap, per term", "s"]
    for seconds in SECONDS:
        head += [f"gap, joint, {seconds:g} nominal s", "CPU s"]
    words = (
        f"Modelled microseconds of one MoE layer and step of poise's plan (work {work:g}), in-sample, even split, and how "
        "far it can be from the best plan: (plan - bound) / plan. Seconds are of bound and price together; nominal ones "
        "are shared out over layers and decide how many rounds of cuts each has. No joint bound where only loads are known."
    )
    return ["## Bounds", words, table(head, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    found = section(options.data, options.only)
    if not options.no_report:
        write("Bounds", found[1:])


if __name__ == "__main__":
    main()
