"""Routing groups whole: planned so, against a free plan repaired afterwards, on recorded loads and on drawn tokens.

    python benchmarks/groups.py DATA [--work 10] [--layers 6] [--no-report]

Ids: groups whole in blocks of new expert ids (``--engine checkpoint``). *Repaired* is the plan without the rule, then the
nearest placement that keeps groups (``keep_groups``), priced the same. Nodes: the same on nodes, beside hierarchical
EPLB. Tokens: no trace of a model with routing groups is public, so tokens are drawn by DeepSeek-V3's router (4 of 8
groups, 8 experts) from scores whose noise is independent and whose means are moved until loads are the recorded ones;
plans are made on one half of them and judged on the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import table, write
from group_trace import grouped_trace
from numpy.typing import NDArray

from poise import api
from poise.engines.checkpoints.permutation import keep_groups
from poise.machine.model import ModelSpec
from poise.planning.groups import WholeGroups
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, deal_slots
from poise.planning.solve.complete import as_held
from poise.planning.solve.solve import solve
from poise.routing.batching import make_batch
from poise.routing.trace import LoadProfile, RoutingTrace

MODEL = ModelSpec.parse("deepseek-r1")
GROUPS, TOKENS = MODEL.num_expert_groups, {"prefill": 16384, "decode": 4096}
IDS = ("1x4", "1x8", "4x8", "8x8")
NODES = (("4x8", 0), ("4x8", 32))


def files(data: Path) -> list[Path]:
    return sorted((data / "deepseek-r1").glob("*.json"))


def thinned(path: Path, layers: int) -> LoadProfile:
    """Some layers of a file, evenly spaced among the MoE layers."""
    found = api.load(path)
    assert isinstance(found, LoadProfile)
    kept = np.flatnonzero(found.load_BLE.sum(axis=(0, 2)) > 0)
    at = kept[np.linspace(0, len(kept) - 1, min(layers, len(kept))).round().astype(int)]
    return LoadProfile(found.load_BLE[:, at], np.asarray(found.layer_ids)[at], top_k=MODEL.top_k, name=path.stem)


def problem(
    traffic: LoadProfile | RoutingTrace, cluster: str, redundant: int, tokens: int, **more: object
) -> PlacementProblem:
    batch, machine = make_batch(traffic, tokens_per_step=tokens), api.Cluster.parse(f"{cluster}:h100")
    flow = "home_node_dedup" if batch.has_tokens else "home"
    slots = deal_slots(batch.num_experts, redundant, machine.num_devices)
    return PlacementProblem(batch, machine, MODEL, slots, flow, **more)  # type: ignore[arg-type]


def judged(some: PlacementProblem, placement: Placement) -> tuple[float, float]:
    """Microseconds of a layer, and imbalance."""
    cost = some.pricing.cost(some.batch, placement.count_LED())
    return 1e6 * float(some.batch.weight_B @ cost.seconds_BL.mean(axis=1)), float(np.nanmean(cost.imbalance_BL()))


def in_ids(paths: list[Path], layers: int, work: float) -> str:
    rows: list[list[object]] = []
    for path in paths:
        traffic, tokens = thinned(path, layers), TOKENS[path.stem.split("_")[0]]
        for cluster in IDS:
            free = problem(traffic, cluster, 0, tokens)
            devices = free.num_devices
            plan = solve(free, work=work).placement
            under = problem(traffic, cluster, 0, tokens, whole=WholeGroups.in_ids(256, GROUPS, devices))
            new, old = solve(under, work=work).placement, keep_groups(plan, GROUPS)
            (old_us, old_i), (new_us, new_i), (free_us, _) = judged(free, old), judged(free, new), judged(free, plan)
            rows.append([path.stem, cluster, f"{free_us:.0f}", f"{old_us:.0f}", f"{new_us:.0f}",
                         f"{100 * (1 - new_us / old_us):.1f} %", f"{old_i:.3f}", f"{new_i:.3f}"])  # fmt: skip
            print(*rows[-1], flush=True)
    head = ["file", "GPUs", "without the rule us", "repaired us", "planned us", "less", "imbalance repaired", "planned"]
    return "## New expert ids, no redundant slots\n\n" + table(head, rows)


def on_nodes(paths: list[Path], layers: int, work: float) -> str:
    rows: list[list[object]] = []
    for path in paths:
        traffic, tokens = thinned(path, layers), TOKENS[path.stem.split("_")[0]]
        for cluster, redundant in NODES:
            free = problem(traffic, cluster, redundant, tokens)
            whole = WholeGroups.on_nodes(256, GROUPS, free.cluster.node_D)
            under = problem(traffic, cluster, redundant, tokens, whole=whole)
            soft = problem(traffic, cluster, redundant, tokens, whole=WholeGroups.on_nodes(
                256, GROUPS, free.cluster.node_D, must=False))  # fmt: skip
            plan, kept = solve(free, work=work).placement, solve(under, work=work).placement
            pays = solve(soft, work=work)
            eplb, old = solve(under, method="eplb", work=work).placement, as_held(under, plan)
            us = [judged(free, one)[0] for one in (plan, old, eplb, kept, pays.placement)]
            rows.append([path.stem, cluster, redundant, *(f"{value:.0f}" for value in us),
                         f"{pays.details['groups']['whole_layers']} of {pays.placement.num_layers}"])  # fmt: skip
            print(*rows[-1], flush=True)
    head = ["file", "GPUs", "redundant", "without the rule us", "repaired us", "EPLB us", "whole us", "pays us",
            "whole layers of pays"]  # fmt: skip
    return "## On nodes, of loads: a copy for each expert of a token\n\n" + table(head, rows)


def drawn(path: Path, layers: int, tokens: int) -> tuple[RoutingTrace, float]:
    """Tokens whose loads are the recorded ones, and the largest difference of a share."""
    load_LE = thinned(path, layers).load_BLE.mean(axis=0)
    want_LE = load_LE / load_LE.sum(axis=1, keepdims=True)
    share_LE: NDArray[np.float64] = np.log(np.maximum(want_LE, 1e-6))

    def draw(seed: int) -> RoutingTrace:
        return grouped_trace(num_tokens=tokens, num_groups=GROUPS, groups_per_token=MODEL.groups_per_token,
                             top_k=MODEL.top_k, log_share_LE=share_LE, seed=seed)  # fmt: skip

    for turn in range(20):
        got = draw(turn)
        seen_LE = np.stack([np.bincount(got.experts[:, layer].ravel(), minlength=256) for layer in range(len(want_LE))])
        share_LE = share_LE + 0.7 * np.log((want_LE + 1e-4) / (seen_LE / seen_LE.sum(axis=1, keepdims=True) + 1e-4))
    out = draw(99)
    seen_LE = np.stack([np.bincount(out.experts[:, layer].ravel(), minlength=256) for layer in range(len(want_LE))])
    return out, float(np.abs(seen_LE / seen_LE.sum(axis=1, keepdims=True) - want_LE).sum(axis=1).max() / 2)


def of_tokens(paths: list[Path], layers: int, work: float, tokens: int) -> str:
    rows: list[list[object]] = []
    for path in paths:
        trace, off = drawn(path, layers, 2 * tokens)
        first = np.arange(trace.num_tokens) < tokens
        fit, other = trace.rows(first), trace.rows(~first)
        for cluster, redundant in NODES:
            step, row = tokens // 2, []
            there = problem(other, cluster, redundant, step)
            for must in (None, True, False):
                free = problem(fit, cluster, redundant, step)
                whole = None if must is None else WholeGroups.on_nodes(256, GROUPS, free.cluster.node_D, must=must)
                found = solve(problem(fit, cluster, redundant, step, whole=whole), work=work)
                row += [f"{1e6 * found.objective:.0f}", f"{judged(there, found.placement)[0]:.0f}"]
            kept = found.details["groups"]["whole_layers"]
            rows.append([path.stem, cluster, redundant, *row, f"{kept} of {layers}", f"{100 * off:.1f} %"])
            print(*rows[-1], flush=True)
    head = ["file", "GPUs", "redundant", "without the rule us", "others", "whole us", "others", "pays us", "others",
            "whole layers of pays", "loads off"]  # fmt: skip
    said = f"## Tokens drawn by the router's rule, steps of {tokens // 2}; others: tokens that no plan was made on\n\n"
    return said + table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=float, default=10)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--drawn-layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="Tokens that plans of drawn tokens are made on.")
    parser.add_argument("--no-report", action="store_true")
    given = parser.parse_args()
    paths = files(given.data)
    parts = [
        in_ids(paths, given.layers, given.work), on_nodes(paths, given.layers, given.work),
        of_tokens(paths[-1:], given.drawn_layers, given.work, given.tokens),
    ]  # fmt: skip
    print("\n\n".join(parts)) if given.no_report else write("groups", parts)


if __name__ == "__main__":
    main()
