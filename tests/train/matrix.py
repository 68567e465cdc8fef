"""The parity matrix: policy x re-materialisation x top-k x workload x optimizer x data flow, one launch per world size.

    torchrun --standalone --nproc-per-node 4 tests/train/matrix.py --out cells.json [--pairwise] [--flows | --policies] [--mutate NAMES] [--dtype TYPES]

Each cell trains 3 steps (5 with POISE_MANY=1) sharded and compares losses, all gradients, the gradient norm and the weights with one dense
process on all tokens: the largest ||a - b|| / ||b|| of any tensor. In every other cell the experts start on random
owners and the form of the sparse collectives changes, and in every third tokens go by messages of their own, so that
these are covered too. In float32 and bfloat16 ``dense`` is
the most by which dense runs differ that add up in 4 other orders (16 with POISE_MANY=1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import proven
from tests.helpers import few_or
from tests.launch import leave
from tests.ranks import everywhere
from tests.train import harness as h

from poise.machine.cluster import Cluster
from poise.runtime import collectives

POLICIES = {
    "smart-moe": "smart-moe:interval=1,threshold=0.0",
    "flex-moe": "flex-moe:trigger=1.0",
    "llep": "llep",
    "poise": "poise",
}
ORDERS = range(1, few_or(16, 4) + 1)
FLOWS = ("home", "home_device_dedup")
FORMS = ("auto", "direct", "node", "tree")


def machine(world: int) -> Cluster:
    """A slow computer on fast wires, so that weights are worth moving even for these few tokens."""
    nodes = np.arange(world) // max(1, world // 2)
    return Cluster(nodes.astype(np.int32), np.ones(world), 1e6, 1e6, 1e9, 1e12, 1e12,
                   intra_latency_s=1e-9, inter_latency_s=1e-9)  # fmt: skip


def all_cells() -> list[tuple[str, bool, int, str, str, str]]:
    factors = h.policies(), (False, True), (1, 2, 8), h.WORKLOADS, ("sgd", "adamw"), FLOWS
    return list(itertools.product(*factors))


EVERY_PAIR = tuple(itertools.combinations(range(6), 2))
OF_FLOWS = tuple((factor, 5) for factor in range(5))
"""Every value of another factor with either data flow."""
OF_POLICIES = ((0, 0),)
"""Every policy."""


def covering(
    cells: list[tuple], pairs: Sequence[tuple[int, int]] = EVERY_PAIR, have: Sequence[tuple] = ()
) -> list[tuple]:
    """A sample in which every pair of values of these factors occurs, greedily; it begins with those at hand."""

    def met(cell: tuple) -> set[tuple]:
        return {((i, cell[i]), (j, cell[j])) for i, j in pairs}

    todo = set().union(*map(met, cells)) - set().union(*map(met, have))
    out = list(have)
    rng = np.random.default_rng(0)
    while todo:
        some = [cells[i] for i in rng.choice(len(cells), 60)]
        best = max(some, key=lambda cell: len(met(cell) & todo))
        if met(best) & todo:
            out.append(best)
            todo -= met(best)
    return out


def dense_runs(cells: list[tuple], dtype: torch.dtype, gather: str) -> dict[tuple, h.RunRecord]:
    """The dense runs that cells are compared with, by workload, top-k and optimizer: every rank makes some of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    keys = list(dict.fromkeys((workload, top_k, optimizer) for _, _, top_k, workload, optimizer, _ in cells))
    mine = {key: h.dense(*key, world, dtype=dtype, gather=gather) for key in keys[rank::world]}
    return {key: run for part in everywhere(mine) for key, run in part.items()}


def run_cells(cells: list[tuple], mutate: str, dtype: torch.dtype, gather: str = "") -> list[dict]:
    """A row for each cell."""
    rank, world = dist.get_rank(), dist.get_world_size()
    references = dense_runs(cells, dtype, gather)
    bounds: dict[tuple, float] = {}
    rows, start = [], time.time()
    for number, (policy, again, top_k, workload, optimizer, traffic) in enumerate(cells):
        key = (workload, top_k, optimizer)
        if key not in bounds and dtype != torch.float64:
            others = [
                h.dense(workload, top_k, optimizer, world, dtype=dtype, order=order) for order in ORDERS[rank::world]
            ]
            apart = torch.tensor(
                [max((h.apart(other, references[key]) for other in others), default=0.0)], dtype=torch.float64
            )
            dist.all_reduce(apart, op=dist.ReduceOp.MAX)
            bounds[key] = apart.item()
        owners = None
        if number % 2:
            owners = np.random.default_rng(number).integers(0, world, (h.LAYERS, h.EXPERTS))
        with h.messages(-1 if number % 3 == 1 else collectives.SHORT):
            error, gathered, lost = h.sharded_run(
                workload, top_k, optimizer, POLICIES.get(policy, policy), references[key], rematerialise=again,
                owners=owners, form=FORMS[number % 4], cluster=machine(world), traffic=traffic, mutate=mutate, dtype=dtype, gather=gather,
            )  # fmt: skip
        rows.append({"mutate": mutate, "dtype": str(dtype).removeprefix("torch."), "gather": gather, "policy": policy,
                     "rematerialise": again, "traffic": traffic, "top_k": top_k, "workload": workload, "optimizer": optimizer,
                     "error": error, "dense": bounds.get(key), "gathered": gathered, "lost": lost})  # fmt: skip
        if rank == 0 and number % 50 == 49:
            worst = max(row["error"] for row in rows)
            print(f"{number + 1}/{len(cells)} cells, worst {worst:.1e}, {time.time() - start:.0f} s", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--pairwise", action="store_true", help="a sample with every pair of values of two factors")
    parser.add_argument("--flows", action="store_true", help="and what they lack of every value under either data flow")
    parser.add_argument("--policies", action="store_true", help="and what they lack of every policy")
    parser.add_argument("--every", type=int, default=1, help="only every n-th cell")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--mutate", default="", help="one mutation, or several separated by commas")
    parser.add_argument("--dtype", default="float64", help="float64, float32, bfloat16, or several separated by commas")
    parser.add_argument("--gather", default="", help="gather_dtype of float64 runs: a type, or several by commas")
    options = parser.parse_args()
    warnings.simplefilter("error", UserWarning)
    proven.remember()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    everything = all_cells()
    cells = (covering(everything) if options.pairwise else everything)[options.first :: options.every]
    if options.flows:
        cells = covering(everything, OF_FLOWS, cells)
    if options.policies:
        cells = covering(everything, OF_POLICIES, cells)
    if options.mutate:
        cells = [cell for cell in cells if cell[4] == "sgd"]
    rows, start = [], time.time()
    several = (options.mutate.split(","), options.dtype.split(","), options.gather.split(","))
    for mutate, dtype, gather in itertools.product(*several):
        rows += run_cells(cells, mutate, getattr(torch, dtype), gather)
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        Path(options.out).write_text(json.dumps({"world": world, "seconds": time.time() - start, "cells": rows}))
    leave()


if __name__ == "__main__":
    main()
