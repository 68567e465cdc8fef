"""Homes measured on emulated links: steps of requests never seen, by which rank serves which request.

    python benchmarks/measured_homes.py [--repeats 10] [--keep FOLDER] [--only TEXT]

Needs root, ip and tc (docs/emulation.md). Homes and placements are planned on every second request, as benchmarks/homes.py
does, by the rates that the links are set to. All rows run in one process group, in every repeat, in an order that turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import table, write
from measured import Emulation, told_apart, workplace, write_curve
from measured_serve import SHARE, WIDTH, Scene, curve_knots, links, model_of
from static_near import some_layers

from poise.cost.pricing import Pricing
from poise.cost.split import Split
from poise.lab.emulate import EmulatedCluster
from poise.machine.cluster import Cluster
from poise.machine.curve import MeasuredCurve
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.engine_rules import NONE
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, deal_slots
from poise.planning.solve.with_homes import plan_homes
from poise.replay.breakeven import contiguous_blocks
from poise.replay.homes import active_experts
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.routing.synthetic import kinds_trace
from poise.routing.trace import RoutingTrace
from poise.simulate.serving import ServingMark

TRAFFIC = "home_node_dedup"
LAYERS, TOKENS, STEPS, PLANNED_STEPS, WORK = 3, 256, 4, 8, 160.0


class Row(NamedTuple):
    """Homes and a placement, on requests never seen."""

    name: str
    batch: RoutingBatch
    placement: Placement


@dataclass(frozen=True, slots=True)
class Case:
    """Traffic, and how replicas share tokens."""

    name: str
    trace: RoutingTrace
    split: Split


def cases() -> Iterator[Case]:
    """Requests of planted kinds, and the demo's five domains."""
    demo = read(str(files("poise") / "data" / "demo_trace.npz"))
    assert isinstance(demo, RoutingTrace)
    traces = {
        f"8 planted kinds, purity {purity}": kinds_trace(kinds=8, num_requests=400, num_layers=LAYERS, num_experts=32,
                                                        top_k=4, purity=purity)
        for purity in (0.5, 0.9)
    } | {"demo, five domains": some_layers(demo, LAYERS)}  # fmt: skip
    for name, trace in traces.items():
        for split in ("even", "near"):
            yield Case(f"{name}, {split}", trace, split)


def planned(case: Case, scene: Scene, slots_D: np.ndarray) -> tuple[list[Row], Cluster, ModelSpec]:
    """Every row, the links, and the sizes."""
    fit, later = case.trace.every_second_request()

    def batched(part: RoutingTrace, steps: int = PLANNED_STEPS) -> RoutingBatch:
        return make_batch(part, tokens_per_step=scene.tokens_per_device * scene.world, steps=steps)

    seen = batched(fit)
    model = model_of(seen)
    curve = MeasuredCurve(*curve_knots(seen, scene), model.expert_parameters)
    blocks = contiguous_blocks(seen, Cluster.uniform(scene.nodes, scene.devices))
    cluster = links(scene, seen, model, curve, blocks)
    problem = PlacementProblem(seen, cluster, model, slots_D, TRAFFIC, case.split, engine=NONE)
    plans = plan_homes(problem, fit, batched, Budget(1.0, work=WORK))
    judged = batched(later, STEPS)
    in_turn = replace(judged, homes="by-request")
    rows = [Row("equal", judged.at_home(scene.world), plans.equal),
            Row("given: requests in turn", in_turn.at_home(scene.world), plans.equal)]  # fmt: skip
    for made, words in ((plans.alone, ""), (plans.best, ", re-planned")):
        for policy, plan in made.items():
            homed = batched(plan.table.home(later), STEPS).evened(scene.world)
            rows.append(Row(f"{policy}{words}", homed, plan.placement))
    return rows, cluster, model


def measured(case: Case, repeats: int, folder: Path) -> list[list[object]]:
    """A row of the table for each."""
    scene = Scene("homes", 2, 4, TRAFFIC, TOKENS, LAYERS, STEPS, ())
    slots_D = deal_slots(case.trace.num_experts, scene.world, scene.world)
    rows, cluster, model = planned(case, scene, slots_D)
    emulation = Emulation(EmulatedCluster(scene.nodes, scene.devices, cluster.intra_bytes_per_s, cluster.inter_bytes_per_s),
                          folder, folder / "curve.csv")  # fmt: skip
    write_curve(emulation.curve, *(list(each) for each in curve_knots(rows[0].batch, scene)))
    job: dict[str, Any] = {
        "cluster": f"{scene.nodes}x{scene.devices}", "traffic": TRAFFIC, "width": WIDTH, "expert_bytes": int(model.expert_bytes),
        "curve": str(emulation.curve), "window_s": scene.unit_s, "repeats": repeats, "warm_up": 0, "steps": STEPS, "rows": [],
    }  # fmt: skip
    arrays: dict[str, Any] = {}
    for number, row in enumerate(rows):
        path = folder / f"row{number}.npz"
        row.placement.save(path)
        job["rows"].append({"placement": str(path), "fast": "", "split": case.split, "routing": f"row{number}."})
        for name, array in (
            ("experts", row.batch.experts_TLK),
            ("home", row.batch.home_T),
            ("start", row.batch.start_B),
        ):
            arrays[f"row{number}.{name}"] = array
    got = emulation.measure("serve_rank.py", job, arrays, timeout=3600)
    if not got["shaped"]:
        raise SystemExit("the links were not shaped: nothing was measured (root, ip and tc are needed)")
    marks = got["marks"]  # [rows, repeats, steps, L, D, 6]
    step = (marks[..., -1, :, ServingMark.COMBINED].max(-1) - marks[..., 0, :, ServingMark.START].min(-1)).mean(axis=2)
    out: list[list[object]] = []
    for row, seconds, over in zip(rows, step, got["overruns"].sum(axis=0), strict=True):
        pricing, count_LED = Pricing(cluster, model, TRAFFIC, case.split), row.placement.count_LED()
        cost = pricing.cost(row.batch, count_LED)
        modelled = float(cost.seconds_BL.sum(axis=1).mean()) + LAYERS * scene.unit_s
        first = out[0][-1] if out else modelled
        gains = 1 - seconds / step[0]
        out.append([
            case.name, row.name, f"{np.median(seconds):.3f}", compared(gains) if row is not rows[0] else "",
            f"{modelled:.3f}", f"{1 - modelled / float(first):+.1%}" if row is not rows[0] else "",
            f"{float(cost.cross_device_BL.sum() / cost.pairs_BL.sum()):.1%}", f"{float(cost.cross_node_BL.sum() / cost.pairs_BL.sum()):.1%}",
            f"{active_experts(row.batch, count_LED, pricing):.2f}", f"{float(np.nanmean(cost.imbalance_BL())):.2f}", f"{int(over)}", modelled,
        ])  # fmt: skip
    return [line[:-1] for line in out]


def compared(gains: np.ndarray) -> str:
    """Median and quartiles of the repeats' savings; a sign test over them that does not reach 5 % is inconclusive."""
    low, middle, high = np.percentile(gains, [25, 50, 75])
    return f"{middle:+.1%} ({low:+.1%} to {high:+.1%}){'' if told_apart(gains) <= 0.05 else ': inconclusive'}"


def main() -> None:
    """Plan, run, report."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--only", default="", help="cases whose name has this")
    options.add_argument("--keep", type=Path, help="folder for what is measured")
    given = options.parse_args()
    out: list[list[object]] = []
    for number, case in enumerate(each for each in cases() if given.only in each.name):
        with workplace(None if given.keep is None else given.keep / str(number)) as folder:
            for line in measured(case, given.repeats, folder):
                out.append(line)
                print(*line, sep=" | ", flush=True)
    head = ["case", "homes", "step s", "saved, paired", "modelled s", "saved", "off device", "off node", "active experts", "imbalance", "overruns"]  # fmt: skip
    words = (
        f"2 nodes of 4 ranks, {TOKENS} rows a rank and step, {LAYERS} layers of 32 experts, top-4, one redundant slot a rank, tokens once a node. "
        f"Every second request is planned on, the others are measured: {STEPS} steps, {given.repeats} repeats. Links are set so that blocks of experts "
        f"spend {SHARE:.1%} of their time in exchanges (modelled); a mean device's experts take a layer as long as its attention, both slept. Saved: over "
        "equal homes in the same repeat, median and quartiles; inconclusive where a sign test does not reach 5 %. `given` deals requests in turn, "
        "however long they are. Modelled: one term after the other, by the rates that are set."
    )
    write("Which rank serves which request, emulated", [words, table(head, out)])


if __name__ == "__main__":
    main()
