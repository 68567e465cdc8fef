"""Does ``poise plan`` keep its time limit at any size, and what does a short one cost?

python benchmarks/time_limit.py [--against SRC] [--limits 1 5 20] [--cases NAME ...] [--report]

Each run is a process of its own: traffic is made in memory, then what ``poise plan`` does after reading is measured
(plan, second plan, price, bound, verdict). Batching and the fingerprint count as reading; compiling, and loading what
was compiled, stand in a column of their own. Under a loaded machine processor seconds show what was done. ``--against`` is the ``src`` folder of another checkout, measured beside this
one at the same limit. Both plans are priced by this checkout on all steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SRC = Path(__file__).parent.parent / "src"
CASES: dict[str, dict[str, Any]] = {
    "16x64 cold start": {"shape": (16, 64, 64), "cluster": "1x8", "redundant": 8, "cold": True},
    "16x64": {"shape": (16, 64, 64), "cluster": "1x8", "redundant": 8},
    "48x512, 200 steps": {"shape": (48, 512, 200), "cluster": "8x8", "redundant": 64},
    "61x256, 1,000 steps": {"shape": (61, 256, 1000), "cluster": "8x8", "redundant": 32},
    "61x256, 20,000 steps": {"shape": (61, 256, 20_000), "cluster": "8x8", "redundant": 32, "alone": True},
    "58x256, 16,000 tokens": {"shape": (58, 256, 16_000), "cluster": "4x8", "redundant": 32, "tokens": True},
}

RUN = """
import inspect, json, sys, time
import numpy as np
from poise import api
from poise.routing.synthetic import zipf_trace
from poise.routing.trace import LoadProfile

case, limit, out = json.loads(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
layers, experts, many = case["shape"]
rng = np.random.default_rng(0)
if case.get("tokens"):
    traffic = zipf_trace(num_tokens=many, num_layers=layers, num_experts=experts, top_k=8, stickiness=0.3)
else:
    load = np.empty((many, layers, experts), np.uint16)
    for layer in range(layers):
        drift = np.zeros(experts, np.float32)
        share = rng.permutation(-0.6 * np.log(np.arange(1, experts + 1))).astype(np.float32)
        for first in range(0, many, 500):
            rows = min(500, many - first)
            steps = np.cumsum(0.01 * rng.standard_normal((rows, experts), np.float32), axis=0) + drift
            drift = steps[-1]
            part = np.exp(share + steps + 0.2 * rng.standard_normal((rows, experts), np.float32))
            load[first : first + rows, layer] = np.rint(part / part.sum(axis=1, keepdims=True) * 32768)
    traffic = LoadProfile(load, top_k=8)
options = {"redundant": case["redundant"], "seed": 0}
try:
    from poise.util.compilation import COMPILATION
    spent = COMPILATION.spent
except (ImportError, AttributeError):
    spent = lambda: 0.0
whole = None
began, worked, before = time.monotonic(), time.process_time(), spent()
try:
    from poise.planning.budget import Budget
    from poise.cli.plan import VERDICT_SHARE
    whole = Budget(limit)
    plan = api.plan(traffic, case["cluster"], time_limit_s=whole.part(1 - VERDICT_SHARE), **options)
    said = api.planning_verdict(traffic, case["cluster"], time_limit_s=whole.part(VERDICT_SHARE, until=1.0), **options)
except ImportError:
    plan = api.plan(traffic, case["cluster"], time_limit_s=limit, **options)
    said = api.planning_verdict(traffic, case["cluster"], time_limit_s=limit / 2, **options)
took, cpu, compiled = time.monotonic() - began, time.process_time() - worked, spent() - before
reading = whole._held[0] if whole else 0.0
plan.placement.save(out)
if not case.get("against"):
    from poise.cost.step import batch_cost
    from poise.machine.cluster import Cluster
    from poise.machine.model import ModelSpec
    from poise.machine.settle import settle
    from poise.routing.batching import make_batch
    from poise.planning.placement import Placement
    batch = make_batch(traffic)
    sizes = ModelSpec.generic(experts, 8, batch.layer_ids_L)
    machine = settle(Cluster.parse(case["cluster"]), sizes, batch.mean_tokens())
    flow = "home_node_dedup" if batch.has_tokens else "home"
    objective = {}
    for name in [out, *([case["other"]] if case.get("other") else [])]:
        count = Placement.load(name).count_LED()
        cost = batch_cost(batch, count, machine, sizes, traffic=flow, split="even")
        objective[name] = float((batch.weight_B @ cost.seconds_BL).mean())
else:
    objective = {}
print(json.dumps({"seconds": took - compiled - reading, "reading": reading, "cpu": cpu, "compiled": compiled, "objective": objective,
                  "cut": plan.details.get("cut_by_clock", []), "verdict": bool(said),
                  "searched": plan.details.get("searched_on", "all"), "priced": plan.details.get("priced_on", "all"),
                  "left_out": plan.details.get("starts_left_out", [])}))
"""


def measure(case: dict[str, Any], limit: float, src: Path, out: str, timeout_s: float) -> dict[str, Any] | None:
    """One run in a process of its own; None where it took too long."""
    env = {**os.environ, "PYTHONPATH": str(src)}
    with tempfile.TemporaryDirectory() as cold:
        if case.get("cold"):
            env["NUMBA_CACHE_DIR"] = cold
        try:
            done = subprocess.run([sys.executable, "-c", RUN, json.dumps(case), str(limit), out], env=env, text=True,
                                  stdout=subprocess.PIPE, timeout=timeout_s, check=True)  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=Path)
    parser.add_argument("--limits", type=float, nargs="+", default=[1.0, 5.0, 20.0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.cases:
            for limit in given.limits:
                case, mine, theirs = dict(CASES[name]), f"{folder}/mine.npz", f"{folder}/theirs.npz"
                other = None
                if given.against and not case.get("alone"):
                    other = measure({**case, "against": True}, limit, given.against, theirs, given.timeout)
                    case["other"] = theirs if other else None
                got = measure(case, limit, SRC, mine, given.timeout)
                if got is None:
                    rows.append([name, f"{limit:g}", "over the timeout"])
                    print(rows[-1], flush=True)
                    continue
                worse = got["objective"][mine] / got["objective"][theirs] - 1 if other else None
                rows.append([
                    name, f"{limit:g}", f"{got['seconds']:.1f}", f"{got['seconds'] / limit:.2f}", f"{got['cpu']:.1f}",
                    f"{got['reading']:.1f}", f"{got['compiled']:.1f}", "" if not given.against or case.get("alone") else f"{other['seconds']:.1f}" if other else
                    f"above {given.timeout:g}", f"{1e6 * got['objective'][mine]:.2f}",
                    "" if worse is None else f"{worse:+.2%}", got["searched"], got["priced"],
                    ", ".join(got["cut"]) or "no", ", ".join(got["left_out"]) or "none", "yes" if got["verdict"] else "no",
                ])  # fmt: skip
                print(rows[-1], flush=True)
    if given.report:
        from common import table, write

        head = ["case", "limit s", "took s", "took / limit", "CPU s of all", "reading s", "compiling, loading s", "before s", "us", "than before",
                "searched on", "priced on", "cut by the clock", "starts left out", "verdict"]  # fmt: skip
        write("Time limit of a whole plan", [__doc__ or "", f"Load average at the end: {os.getloadavg()[0]:.1f}.",
                                             table(head, rows)])  # fmt: skip


if __name__ == "__main__":
    main()
