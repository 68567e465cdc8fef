"""Which start the search's answer descends from, and what is lost without those that it never does.

    python benchmarks/starts.py DATA [--work 2] [--layers 6]

Every file of DATA that has loads or tokens, on 1, 2 and 4 nodes of 8, with several numbers of redundant slots. Layers are
counted: the search begins each one from the start that is best there. Writes reports/DATE-starts.md.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from common import problem, table, write

from poise.cost.traffic import DataFlow
from poise.planning.problem import PlacementProblem, Solution
from poise.planning.solve import search, solve
from poise.planning.solve.state import layer_seconds
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.util.errors import PoiseError

CLUSTERS = ("1x8", "2x8", "4x8")
REDUNDANT = (0, 1, 4)
"""Redundant slots a device."""
STEPS = 32
EVERY = (*solve.STARTS, *solve.STAY_STARTS)
OWN_SEARCH = "search"


def sources(data: Path, layers: int) -> Iterator[tuple[str, str, RoutingBatch, tuple[DataFlow, ...]]]:
    """Family, file, traffic, flows."""
    demo = Path(str(files("poise") / "data" / "demo_trace.npz"))
    paths = [("demo", demo), *(("llama4", path) for path in sorted((data / "llama4-maverick").glob("*.npz")))]
    paths += [("deepseek", path) for path in sorted((data / "deepseek-r1").glob("*.json"))]
    paths += [
        (name, path) for name in ("olmoe", "mixtral") for path in sorted((data / name / "expert_counts").glob("*.npz"))
    ]
    paths += [("qwen3", path) for path in sorted((data / "qwen3-30b-a3b").glob("loads.json"))]
    for family, path in paths:
        batch = make_batch(read(path), steps=STEPS) if path.suffix == ".npz" else make_batch(read(path))
        flows: tuple[DataFlow, ...] = ("home_node_dedup", "stay") if batch.has_tokens else ("home",)
        yield family, path.stem, some_layers(batch, layers), flows


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
        begin, merge, best = search._best_start, search._merge, search._best_layers

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

        search._best_start, search._merge, search._best_layers = best_start, merged, best_layers
        try:
            yield
        finally:
            search._best_start, search._merge, search._best_layers = begin, merge, best


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=float, default=2.0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--files", type=int, default=99, help="of each family")
    asked = parser.parse_args()
    began, seen = time.time(), Counter[str]()
    counts: dict[tuple[str, str, int], Counter[str]] = {}
    cases: list[tuple[str, PlacementProblem, float]] = []
    left_out: Counter[str] = Counter()
    for family, name, batch, flows in sources(asked.data, asked.layers):
        seen[family] += 1
        if seen[family] > asked.files:
            continue
        for cluster in CLUSTERS:
            devices = 8 * int(cluster[0])
            for each in REDUNDANT:
                for flow in flows:
                    try:
                        case = problem(batch, f"{cluster}:h100", each * devices, traffic=flow)
                        got, found = counted(case, asked.work)
                    except PoiseError as error:
                        print(family, name, cluster, each, flow, "left out:", error, flush=True)
                        continue
                    label = f"{family}, stay" if flow == "stay" else family
                    counts.setdefault((label, cluster, each), Counter()).update(got)
                    left_out.update(found.details.get("starts_left_out", ()))
                    cases.append((f"{label} {name}, {cluster}, {each} a device", case, found.objective))
                    print(label, name, cluster, each, dict(got), f"{time.time() - began:.0f} s", flush=True)
    total = sum(counts.values(), Counter())
    never = [name for name in EVERY if not total[name]]
    worse = without(cases, never, asked.work) if never else []
    names = [name for name, _ in total.most_common()]
    write("Starts of the search", [
        f"Layers of plans whose descent began from a start (`poise`, work {asked.work:g}, {asked.layers} neighbouring layers "
        f"of each file, h100 nodes, generic sizes, even split). {len(cases)} plans. Starts that planning time left out: {dict(left_out) or 'none'}.",
        table(["traffic", "cluster", "redundant a device", *names],
              [[*key, *(got[name] or "" for name in names)] for key, got in counts.items()]
              + [["all", "", "", *(total[name] for name in names)]]),
        f"Never: {', '.join(never) or 'none'}.",
        f"The same plans without those starts: {len(worse)} of {len(cases)} cost more."
        + ("\n\n" + table(["case", "cost over before"], worse) if worse else ""),
        f"Run time {time.time() - began:.0f} s.",
    ])  # fmt: skip


def without(cases: list[tuple[str, PlacementProblem, float]], never: list[str], work: float) -> list[list[object]]:
    """Plans that cost more without these starts, the worst first."""
    out: list[tuple[float, str]] = []
    with starts_are(tuple(name for name in EVERY if name not in never)):
        for name, case, before in cases:
            ratio = solve.solve(case, work=work).objective / before
            if ratio > 1 + 1e-9:
                out.append((ratio, name))
    return [[name, f"{ratio - 1:.2%}"] for ratio, name in sorted(out, reverse=True)]


if __name__ == "__main__":
    main()
