"""The core behind the engine plugins against the engines' own algorithm (EPLB), on recorded loads of DeepSeek-R1.

    python benchmarks/engine_policy.py DATA

A map is made for one workload, and then anew for another one, from the map in use: imbalance (max / mean tokens over
ranks, mean over layers, in sample) and the share of slots whose expert a rank must fetch. Seconds are of this thread on
one core (CPU time), the median and the largest of some plans.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from common import table, write

from poise.engines.plugins.policy import PolicySettings, rebalance, warm_up
from poise.planning.methods import eplb

CASES = ((8, 288, 1), (16, 288, 2), (64, 320, 8))  # ranks, slots, nodes; the model has 8 expert groups
OURS = {"groups whole": {}, "global": {"strategy": "global"}, "global, near": {"strategy": "global", "split": "near"}}
"""Settings beside the defaults; of one node they are all the same."""
REPEATS = 5
FIRST, NEXT = "prefill_in1000out1000", "prefill_in4096"


def loads(folder: Path, name: str) -> np.ndarray:
    """Loads of the MoE layers, int [58, 256]."""
    count = np.array(json.loads((folder / "deepseek-r1" / f"{name}.json").read_text())["logical_count"])
    return count.reshape(-1, *count.shape[-2:]).sum(axis=0)[3:]


def imbalance(load: np.ndarray, table: np.ndarray, ranks: int) -> float:
    """Max over mean tokens of ranks, mean over layers."""
    replicas = np.stack([np.bincount(row, minlength=load.shape[1]) for row in table])
    tokens = np.take_along_axis(load / replicas, table, axis=1).reshape(len(table), ranks, -1).sum(axis=2)
    return float((tokens.max(axis=1) / tokens.mean(axis=1)).mean())


def fetched(old: np.ndarray, new: np.ndarray, ranks: int) -> float:
    """Share of slots whose expert a rank must fetch."""
    pairs = zip(old.reshape(len(old) * ranks, -1).tolist(), new.reshape(len(new) * ranks, -1).tolist(), strict=True)
    return sum(len(set(b) - set(a)) for a, b in pairs) / old.size


def main() -> None:
    first, later = (loads(Path(sys.argv[1]), name) for name in (FIRST, NEXT))
    warm_up()
    head = ["ranks, slots, nodes", "map", "imbalance, first", "old map, next", "new map, next", "fetched", "seconds",
            "at most"]  # fmt: skip
    rows = []
    for ranks, slots, nodes in CASES:
        shape = (slots, 8, nodes, ranks)
        makers = {
            name: partial(rebalance, settings=replace(PolicySettings(), **more))
            for name, more in (OURS if nodes > 1 else {"groups whole": {}}).items()
        }
        makers["EPLB"] = lambda load, *rest, **_: eplb.rebalance_experts(load, *rest[:4], sums="double")[0]
        for name, make in makers.items():
            old = make(first, *shape)
            took = []
            for _ in range(REPEATS):
                began = time.thread_time()
                new = make(later, *shape, old)
                took.append(time.thread_time() - began)
            cells = (imbalance(first, old, ranks), imbalance(later, old, ranks), imbalance(later, new, ranks))
            told = name if name == "EPLB" else f"poise, {name}" if nodes > 1 else "poise"
            rows.append([f"{ranks}, {slots}, {nodes}", told, *(f"{cell:.4f}" for cell in cells),
                         f"{fetched(old, new, ranks):.0%}", f"{np.median(took):.2f}", f"{max(took):.2f}"])  # fmt: skip
    words = (
        f"DeepSeek-R1, 58 layers, 256 experts in 8 groups. First: {FIRST}; next: {NEXT}. Seconds of one plan on one core, "
        f"median and largest of {REPEATS}, after compilation. Imbalance counts tokens under an even split, on every row."
    )
    write("Planner behind engines' load balancers", [words, table(head, rows)])


if __name__ == "__main__":
    main()
