"""Which start the search's answer descends from, and what is lost without those that it hardly ever does.

    python benchmarks/starts.py DATA [--work 20] [--layers 6] [--files 2] [--kinds "even split,pooled,exact split"]

Files of DATA that have loads or tokens, on 1, 2 and 4 nodes of 8, with several numbers of redundant slots; small synthetic
traces, which exact methods can solve; tokens that stay; slots counted over all layers; the exact split. Layers are counted:
the search begins each one from the start that is best there. Writes reports/DATE-starts.md.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from common import problem, table, write

from poise.cost.traffic import DataFlow
from poise.planning.problem import PlacementProblem, Solution
from poise.planning.solve import descent, search, solve
from poise.planning.solve.state import layer_seconds
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.routing.synthetic import zipf_trace
from poise.util.errors import PoiseError

CLUSTERS = ("1x8", "2x8", "4x8")
REDUNDANT = (0, 1, 4)
"""Redundant slots a device."""
TOKEN_FLOWS: tuple[DataFlow, ...] = ("home_node_dedup", "stay")
KINDS = ("even split", "pooled", "exact split")
STEPS = 32
EVERY = (*solve.STARTS, *solve.STAY_STARTS)
OWN_SEARCH = "search"
RARE = 0.02
"""Share of layers below which it is tried what plans cost without a start."""


@dataclass(frozen=True)
class Source:
    """Traffic, what it is of, and the flows it is planned for."""

    family: str
    name: str
    batch: RoutingBatch
    flows: tuple[DataFlow, ...]
    clusters: tuple[str, ...] = CLUSTERS


def sources(data: Path, layers: int) -> Iterator[Source]:
    """All traffic."""
    for seed in range(3):
        trace = zipf_trace(num_tokens=4000, num_layers=4, num_experts=8, top_k=2, stickiness=0.5, seed=seed)
        yield Source("8 experts", f"seed {seed}", make_batch(trace, tokens_per_step=500), TOKEN_FLOWS, ("1x4", "2x2"))
    demo = Path(str(files("poise") / "data" / "demo_trace.npz"))
    paths = [("demo", demo), *(("llama4", path) for path in sorted((data / "llama4-maverick").glob("*.npz")))]
    paths += [("deepseek", path) for path in sorted((data / "deepseek-r1").glob("*.json"))]
    paths += [
        (name, path) for name in ("olmoe", "mixtral") for path in sorted((data / name / "expert_counts").glob("*.npz"))
    ]
    paths += [("qwen3", path) for path in sorted((data / "qwen3-30b-a3b").glob("loads.json"))]
    for family, path in paths:
        batch = make_batch(read(path), steps=STEPS) if path.suffix == ".npz" else make_batch(read(path))
        flows: tuple[DataFlow, ...] = TOKEN_FLOWS if batch.has_tokens else ("home",)
        yield Source(family, path.stem, some_layers(batch, layers), flows)


def some_layers(batch: RoutingBatch, most: int) -> RoutingBatch:
    """Neighbouring layers from the middle, so that affinity between them is kept."""
    if batch.num_layers <= most:
        return batch
    part = slice((batch.num_layers - most) // 2, (batch.num_layers - most) // 2 + most)
    tokens = None if batch.experts_TLK is None else batch.experts_TLK[:, part].copy()
    return replace(batch, load_BLE=batch.load_BLE[:, part].copy(), experts_TLK=tokens,
                   layer_ids_L=batch.layer_ids_L[part].copy())  # fmt: skip


class Ancestry:
    """Looks into one search: from which start each layer of its states, and of its answer, came."""

    def __init__(self) -> None:
        self.layers: list[list[str]] = []
        """Of each state that descends, the start of every layer."""
        self.merged: list[str] = []
        self.mixed: list[int] | None = None
        """Of the best layers of all placements, which each is of; 0 is the search's own."""

    def answer(self, found: Solution, pool: list[str]) -> Counter[str]:
        """Starts of the answer's layers."""
        chosen = found.details["chosen"]
        if chosen == "best-layers" and self.mixed is not None:
            return Counter(self.merged[layer] if best == 0 else pool[best - 1] for layer, best in enumerate(self.mixed))
        return Counter(self.merged if chosen == OWN_SEARCH else [chosen] * found.placement.num_layers)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Stands between the stages of :mod:`poise.planning.solve.search`."""
        begin, merge, best = search._best_start, descent._merge, search._best_layers

        def best_start(data: Any, case: PlacementProblem, starts: list[Any], score_SL: np.ndarray) -> Any:
            whole = case.pooled or (data.flow == search.STAY and data.has_tokens)
            picks = np.full(score_SL.shape[1], score_SL.sum(axis=1).argmin()) if whole else score_SL.argmin(axis=0)
            self.layers.append([starts[pick].method for pick in picks])
            return begin(data, case, starts, score_SL)

        def merged(data: Any, case: PlacementProblem, states: list[Any], local: np.ndarray) -> Any:
            score_XL = np.array(
                [[layer_seconds(data, one, layer) for layer in range(case.batch.num_layers)] for one in states]
            )
            whole = case.pooled or (data.flow == search.STAY and data.has_tokens)
            picks = np.full(score_XL.shape[1], score_XL.sum(axis=1).argmin()) if whole else score_XL.argmin(axis=0)
            self.merged = [self.layers[pick][layer] for layer, pick in enumerate(picks)]
            return merge(data, case, states, local)

        def best_layers(case: PlacementProblem, options: list[Any], seconds_OL: np.ndarray) -> Any:
            self.mixed = seconds_OL.argmin(axis=0).tolist()
            return best(case, options, seconds_OL)

        search._best_start, descent._merge, search._best_layers = best_start, merged, best_layers
        try:
            yield
        finally:
            search._best_start, descent._merge, search._best_layers = begin, merge, best


@contextmanager
def starts_are(names: tuple[str, ...]) -> Iterator[None]:
    """Other methods' placements that the search begins from."""
    before = solve.STARTS, solve.STAY_STARTS
    solve.STARTS, solve.STAY_STARTS = (tuple(n for n in part if n in names) for part in before)
    try:
        yield
    finally:
        solve.STARTS, solve.STAY_STARTS = before


def counted(case: PlacementProblem, work: float) -> tuple[Counter[str], Solution]:
    """Layers by start, and the plan."""
    look = Ancestry()
    with look.watching():
        found = solve.solve(case, work=work)
    return look.answer(found, list(found.details["starts"])), found


@dataclass(frozen=True)
class Planned:
    """A plan, the starts it had, and those its layers descend from."""

    family: str
    label: str
    case: PlacementProblem
    objective: float
    had: frozenset[str]
    left_out: frozenset[str]
    layers: Counter[str]


def plans(data: Path, layers: int, files_each: int, work: float, kinds: list[str]) -> Iterator[Planned]:
    """All of them."""
    seen: Counter[str] = Counter()
    for source in sources(data, layers):
        seen[source.family] += 1
        if seen[source.family] > files_each:
            continue
        for cluster, each, flow, kind in product(source.clusters, REDUNDANT, source.flows, kinds):
            devices = int(cluster[0]) * int(cluster[2])
            if kind != KINDS[0] and (flow == "stay" or each == 0):
                continue
            try:
                case = problem(source.batch, f"{cluster}:h100", each * devices, traffic=flow, pooled=kind == "pooled")
                if kind == "exact split":
                    case = replace(case, split="exact")
                got, found = counted(case, work)
            except PoiseError as error:
                print(source.family, source.name, cluster, each, flow, "left out:", error, flush=True)
                continue
            family = ", ".join(
                [source.family, *(["stay"] if flow == "stay" else []), *([kind] if kind != KINDS[0] else [])]
            )
            label = f"{family}, {source.name}, {cluster}, {each} redundant a device"
            print(label, dict(got), flush=True)
            yield Planned(family, label, case, found.objective, frozenset(found.details["starts"]),
                          frozenset(found.details.get("starts_left_out", ())), got)  # fmt: skip


def without(found: list[Planned], name: str, work: float) -> list[float]:
    """Costs over before, less 1, of the plans that descend from a start, if they do not have it."""
    with starts_are(tuple(one for one in EVERY if one != name)):
        return [solve.solve(one.case, work=work).objective / one.objective - 1 for one in found if one.layers[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=float, default=20.0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--files", type=int, default=2, help="of each family")
    parser.add_argument("--kinds", default=",".join(KINDS))
    asked = parser.parse_args()
    began = time.time()
    found = list(plans(asked.data, asked.layers, asked.files, asked.work, asked.kinds.split(",")))
    total = sum((one.layers for one in found), Counter[str]())
    by_family: dict[str, Counter[str]] = {}
    for one in found:
        by_family.setdefault(one.family, Counter()).update(one.layers)
    names = sorted({*EVERY, *(name for one in found for name in one.had)}, key=lambda name: -total[name])
    lines: list[list[object]] = []
    for name in names:
        lost = (
            without(found, name, asked.work) if name in EVERY and 0 < total[name] <= RARE * sum(total.values()) else []
        )
        lines.append([
            name, sum(name in one.had for one in found), sum(name in one.left_out for one in found),
            sum(one.layers[name] > 0 for one in found), total[name],
            ", ".join(f"{ratio:+.2%}" for ratio in sorted(lost, reverse=True)),
        ])  # fmt: skip
        print(lines[-1], flush=True)
    write("Starts of the search", [
        f"Where the layers of plans descend from (`poise`, work {asked.work:g}, {asked.layers} neighbouring layers of at most "
        f"{asked.files} files of a family; H100 nodes, generic sizes; even split where no other is named): {len(found)} plans, {sum(total.values())} layers. "
        "Left out: planning time did not suffice. Without it: cost of the plans that descend from a rare start, over before.",
        table(["start", "plans that had it", "left out", "plans that descend from it", "layers", "without it"], lines),
        table(["layers", *(name for name in names if total[name])],
              [[key, *(got[name] or "" for name in names if total[name])] for key, got in by_family.items()]),
        f"Run time {time.time() - began:.0f} s.",
    ], "" if asked.kinds == ",".join(KINDS) else "-" + asked.kinds.replace(",", "-").replace(" ", "-"))  # fmt: skip


if __name__ == "__main__":
    main()
