"""Loss of any one of 16 devices, and of one of 4 nodes, on random placements: imbalance and reads against bounds.

    python benchmarks/losses.py --placements 1000

Each placement is random: 64 experts once on 16 devices, 32 redundant slots (32 + 16 for nodes) of random experts, loads
drawn from three laws. Of every loss: the largest load after it over that of the best map found from scratch in the same
slots (many starts), and over a bound; reads over orphans; copies for each read; and vLLM's rule.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from poise.planning.exchange import make_layer, search
from poise.planning.losses import lost_together
from poise.planning.methods.lpt import pack_all
from poise.planning.methods.vllm_reassign import reassigned
from poise.planning.placement import Placement
from poise.planning.solve.anneal import anneal_slots, slot_table
from poise.planning.solve.repair import level_bound, repaired
from poise.replay.losses import imbalance
from poise.util.errors import InfeasibleError

EXPERTS, DEVICES, NODES = 64, 16, 4
SLOTS = {"device": 6, "node": 7}
LAWS = ("zipf", "dirichlet", "even")


def random_placement(rng: np.random.Generator, slots: int) -> Placement:
    held = np.zeros((1, EXPERTS, DEVICES), np.int32)
    held[0, rng.permutation(EXPERTS), np.arange(EXPERTS) % DEVICES] = 1
    for d in range(DEVICES):
        others = np.flatnonzero(held[0, :, d] == 0)
        held[0, rng.choice(others, slots - EXPERTS // DEVICES, replace=False), d] = 1
    return Placement.from_counts(held, method="random")


def loads(rng: np.random.Generator, law: str) -> np.ndarray:
    if law == "zipf":
        return rng.permutation(1.0 / np.arange(1, EXPERTS + 1) ** 0.8)
    return rng.dirichlet(np.full(EXPERTS, 0.5)) if law == "dirichlet" else rng.uniform(0.5, 1.5, EXPERTS)


def best_found(load_E: np.ndarray, devices: int, slots: int, bound: float, effort: int) -> float:
    """Largest level of the best map from scratch: LPT, descent with perturbations, annealing, from several seeds."""
    slots_D, speed_D = np.full(devices, slots), np.ones(devices)
    packed, best = pack_all(load_E, slots_D, speed_D) > 0, np.inf
    table = slot_table(packed, slots_D)
    device_S = np.repeat(np.arange(devices), slots)
    for seed in range(effort):
        here = table.copy()
        rate_D = np.full(devices, devices / load_E.sum())
        anneal_slots(
            np.append(load_E, 0.0)[None], np.ones(1), here, device_S, rate_D, 150_000, seed, np.zeros(1, np.int64)
        )
        held = np.zeros((EXPERTS, devices), bool)
        held[here[here >= 0], device_S[here >= 0]] = True
        one = make_layer(held, slots_D, load_E, speed_D)
        search(one, False, bound * 1.0005, 50, seed)
        best = min(best, float(one.level_D.max()))
        if best <= bound * 1.001:
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--placements", type=int, default=1000)
    parser.add_argument("--every", type=int, default=1, help="losses of a placement: one of so many, in turn")
    parser.add_argument("--effort", type=int, default=3)
    parser.add_argument("--unit", choices=sorted(SLOTS))
    given = parser.parse_args()
    node_D = np.arange(DEVICES, dtype=np.int32) // (DEVICES // NODES)
    for unit in [given.unit] if given.unit else SLOTS:
        began, rows = time.time(), []
        for number in range(given.placements):
            rng = np.random.default_rng(number)
            law, before = LAWS[number % len(LAWS)], random_placement(rng, SLOTS[unit])
            load_LE, speed_D = loads(rng, law)[None], np.ones(DEVICES)
            every = lost_together(unit, node_D)
            best = None  # the same for all losses: as many devices and slots are left
            for lost in every[number % given.every :: given.every]:
                left = DEVICES - len(lost)
                mean, rest_D = load_LE.sum() / left, np.ones(left)
                bound = level_bound(load_LE[0], np.full(left, SLOTS[unit]), rest_D)
                loss, strict = (repaired(before, lost, load_LE, speed_D, copies=copies) for copies in (None, 0.1))
                after = imbalance(loss.after_on_rest, load_LE, rest_D)
                if best is None:
                    best = best_found(load_LE[0], left, SLOTS[unit], bound, given.effort)
                try:
                    rival = imbalance(reassigned(before, lost).after_on_rest, load_LE, rest_D)
                except InfeasibleError:
                    rival = np.nan
                orphans = int((~np.delete(before.count_LED()[0] > 0, lost, axis=1).any(axis=1)).sum())
                least = min(best / mean, after)
                rows.append([
                    after / least, after / (bound / mean), len(loss.reads_R3(before)) - orphans, orphans, loss.copies,
                    imbalance(strict.after_on_rest, load_LE, rest_D) / least,
                    imbalance(loss.first_on_rest, load_LE, rest_D) / least, rival / least,
                ])  # fmt: skip
        table = np.array(rows)
        names = ("after/best", "after/bound", "reads-orphans", "orphans", "copies", "10% copies/best", "at once/best",
                 "vllm/best")  # fmt: skip
        said = {name: {"mean": round(float(np.nanmean(c)), 4), "p99": round(float(np.nanquantile(c, 0.99)), 4),
                       "max": round(float(np.nanmax(c)), 4)} for name, c in zip(names, table.T, strict=True)}  # fmt: skip
        within = {name: round(float((table[:, i] <= 1.03).mean()), 4) for i, name in enumerate(names) if "best" in name}
        print(json.dumps({"unit": unit, "losses": len(rows), "seconds": round(time.time() - began, 1),
                          "within 3 % of best": within, **said}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
