"""Homes: which rank serves which request, planned on half of the requests and judged on the others.

python benchmarks/homes.py DATA [--layers 6] [--work 160] [--steps 8] [--only TEXT] [--no-report]

Homes are equal (a request has no rank of its own), grouped (like requests together, as ELDR does), or affine (to the rank
from which their experts are cheapest), each with the placement for equal homes and with one of its own. Llama-4's traces, the
demo's, and synthetic ones whose requests are of as many kinds as there are ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import product
from pathlib import Path

from common import DEMO_SIZES, table, write
from static_near import some_layers

from poise.cost.exchange import ExchangeModel
from poise.cost.split import Split
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.homes import BAND
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, deal_slots
from poise.replay.homes import HomeStudy, study_homes
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.routing.synthetic import kinds_trace
from poise.routing.trace import RoutingTrace
from poise.simulate.serving import serve_step, served_work

HEAD = ["case", "homes", "step ms", "over equal", "all-to-all ms", "off device", "off node", "active experts", "imbalance", "on its rank",
        "fullest", "simulated ms"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A trace on a machine."""

    name: str
    trace: RoutingTrace
    cluster: str
    model: ModelSpec
    tokens: int
    redundant: int
    split: Split


def cases(data: Path, layers: int) -> Iterator[Case]:
    """All of them."""
    splits: tuple[Split, ...] = ("even", "near")
    llama = ModelSpec.parse("llama-4-maverick")
    for path, (cluster, devices), split in product(
        sorted((data / "llama4-maverick").glob("*.npz")), (("2x8:h200", 16), ("4x8:h200", 32)), splits
    ):
        trace = some_layers(read(path), layers)
        yield Case(f"Llama-4 {path.stem}, {cluster}, {split}", trace, cluster, llama, 128 * devices, devices, split)
    demo = read(str(files("poise") / "data" / "demo_trace.npz"))
    for split in splits:
        yield Case(f"demo, five domains, 2x4:h200, {split}", demo, "2x4:h200", DEMO_SIZES, 1024, 8, split)
    for purity, split in product((0.5, 0.9), splits):
        made = kinds_trace(kinds=8, num_requests=400, num_layers=4, num_experts=32, top_k=4, purity=purity)
        sizes = replace(DEMO_SIZES, name="planted", num_hidden_layers=4, moe_layer_ids=tuple(range(4)))
        yield Case(f"8 planted kinds, purity {purity}, 2x4:h200, {split}", made, "2x4:h200", sizes, 1024, 8, split)


def rows(case: Case, work: float, steps: int) -> Iterator[list[object]]:
    """A row for each way to choose homes."""
    scale = case.model.num_moe_layers / case.trace.num_layers
    cluster = Cluster.parse(case.cluster)

    def batched(part: RoutingTrace) -> RoutingBatch:
        return make_batch(part, tokens_per_step=case.tokens, steps=steps)

    def problem_of(batch: RoutingBatch) -> PlacementProblem:
        slots_D = deal_slots(batch.num_experts, case.redundant, cluster.num_devices)
        return PlacementProblem(batch, cluster, case.model, slots_D, "home_node_dedup", case.split)

    fit, later = case.trace.every_second_request()
    study = study_homes(fit, later, batched, problem_of, Budget(1.0, work=work), band=BAND)
    machine = problem_of(batched(fit)).cluster
    homed = batched(study.table.home(later)).evened(machine.num_devices)
    for row in study.rows:
        runs = {"equal": (batched(later), study.equal)} | (
            {study.policy: (homed, study.placement)} if row.replanned else {}
        )
        simulated = f"{1e3 * scale * _simulated(*runs[row.homes], machine, case):.2f}" if row.homes in runs else ""
        yield [case.name, row.name, f"{1e3 * scale * row.step_s:.2f}", f"{1 - row.step_s / study.rows[0].step_s:+.1%}",
               f"{1e3 * scale * row.exchange_s:.2f}", f"{row.off_device:.1%}", f"{row.off_node:.1%}", f"{row.active:.2f}",
               f"{row.imbalance:.3f}", "" if row.kept is None else f"{row.kept:.1%}", f"{row.fullest:.2f}", simulated]  # fmt: skip
    yield [case.name, _words(study), *[""] * (len(HEAD) - 2)]


def _words(study: HomeStudy) -> str:
    return f"*{study.sentence().split('; pairs')[0]}*"


def _simulated(batch: RoutingBatch, placement: Placement, cluster: Cluster, case: Case) -> float:
    """Mean seconds of a step rank by rank, where nobody waits for all: token by token, once a device."""
    exchange = ExchangeModel(cluster.dispatch_wire.start_s, 0.0, *cluster.dispatch_wire[1:])
    work = served_work(batch, placement, cluster, case.model, traffic="home_device_dedup", split=case.split)
    ends = [serve_step(one, cluster.node_D, exchange, window_s=0.0).max() for one in work]
    return float(sum(ends)) / len(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--work", type=float, default=160.0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    out = []
    for case in cases(options.data, options.layers):
        if options.only not in case.name:
            continue
        began = time.monotonic()
        for row in rows(case, options.work, options.steps):
            out.append(row)
            print(*row, sep=" | ", flush=True)
        print(f"{time.monotonic() - began:.0f} s", flush=True)
    words = (
        f"Every second request is planned on, the others are judged: {options.steps} steps each, requests drawn again where they are "
        f"too few. Of Llama-4 {options.layers} MoE layers, evenly spaced, stand for all. 128 tokens a rank and step; one redundant slot "
        f"a rank; work {options.work:g} a case, for all its placements; band {BAND:g}. Every rank has as many tokens in every step: what "
        "has no room where its request was sent runs elsewhere (on its rank: how many are not sent away). Simulated: rank by rank, copies once a "
        "device, by constants of the dispatch both ways."
    )
    if not options.no_report and not options.only:
        write("homes", ["## Which rank serves which request", words, table(HEAD, out)])


if __name__ == "__main__":
    main()
