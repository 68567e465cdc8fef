"""What every rank of the self-test runs: all-to-alls over gloo inside nodes, between nodes, and both at once.

A script, started by :mod:`poise.lab.emulate.selftest`, never imported. Rank 0 prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from poise.lab.emulate.clock import DeviceClock
from poise.runtime.collectives import point_to_point

ExchangeFunction = Callable[[torch.Tensor, torch.Tensor, list[int], list[int]], object]
SKIP = 2
"""Rounds before the ones that count: connections are made and TCP's windows open."""
ROUNDS = 30
"""Of exchanges of 4 bytes."""


def main() -> None:
    """Measure every asked size in every mode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=lambda text: [int(float(part)) for part in text.split(",")], default=[])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["intra", "inter", "both"])
    parser.add_argument("--intra", type=float, required=True, help="set rate, bytes/s; 0 is none")
    parser.add_argument("--inter", type=float, required=True, help="set rate a device, bytes/s; 0 is none")
    parser.add_argument("--single", type=int, default=0, help="this size also by all_to_all_single")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", action="store_true", help="also 4 bytes to 1, 2, 4, ... peers")
    parser.add_argument("--sleep", action="store_true", help="also the device clock, on all ranks at once")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rows = []
    for mode in options.modes:
        rows += [bandwidth(mode, size, options, receives_first) for size in options.sizes]
        if options.single:
            rows.append(bandwidth(mode, options.single, options, dist.all_to_all_single))
    latency = [one_float(peers) for peers in peer_counts()] if options.latency else []
    late: list[list[float] | None] = [None] * dist.get_world_size()
    if options.sleep:
        dist.all_gather_object(late, oversleep())
    if dist.get_rank() == 0:
        found = sorted(seconds for rank in late for seconds in rank or [])
        print(json.dumps({"bandwidth": rows, "latency": latency, "late_s": found}))
    dist.destroy_process_group()


def bandwidth(mode: str, size: int, options: argparse.Namespace, exchange: ExchangeFunction) -> dict[str, object]:
    """Seconds of an all-to-all in which every device sends ``size`` bytes through its busiest port.

    With both ports busy each gets bytes in proportion to its rate, so that both should end together.
    """
    own, local = int(os.environ["RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    world = dist.get_world_size()
    near, far = local - 1, world - local
    rates = {"intra": options.intra or options.inter, "inter": options.inter or options.intra}
    fastest = max(rates.values()) or 1.0
    through = {name: size if mode == name else 0 for name in rates}
    if mode == "both":
        through = {name: int(size * (rate or 1.0) / fastest) for name, rate in rates.items()}
    each_near = through["intra"] // near if near else 0
    each_far = through["inter"] // far if far else 0
    splits = [0 if peer == own else each_near if peer // local == own // local else each_far for peer in range(world)]
    seconds = timed(splits, options.rounds, exchange)
    return {
        "how": exchange.__name__,
        "mode": mode,
        "size_bytes": size,
        "seconds": seconds,
        "intra_bytes": each_near * near,
        "inter_bytes": each_far * far,
        "median_s": statistics.median(seconds),
    }


def timed(splits: list[int], rounds: int, exchange: ExchangeFunction) -> list[float]:
    """Seconds of each round on the rank that took longest; splits are bytes to each peer, alike both ways."""
    sent = torch.zeros(sum(splits), dtype=torch.uint8)
    got = torch.empty_like(sent)
    seconds = []
    for index in range(SKIP + rounds):
        dist.barrier()
        start = time.perf_counter()
        exchange(got, sent, splits, splits)
        took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        if index >= SKIP:
            seconds.append(float(took))
    return seconds


def receives_first(got: torch.Tensor, sent: torch.Tensor, back: list[int], to: list[int]) -> None:
    """What the runtime does on gloo."""
    point_to_point(got.split(back), sent.split(to), dist.group.WORLD)


def peer_counts() -> list[int]:
    """1, 2, 4, ... and all other ranks."""
    world = dist.get_world_size()
    return sorted({count for count in (1, 2, 4, 8, 16, 32) if count < world - 1} | {world - 1}) if world > 1 else []


def one_float(peers: int) -> dict[str, float]:
    """Seconds of an all-to-all of 4 bytes with each of the next ``peers`` ranks (and the same many before)."""
    own, world = dist.get_rank(), dist.get_world_size()
    to = [4 if 0 < (peer - own) % world <= peers else 0 for peer in range(world)]
    back = [4 if 0 < (own - peer) % world <= peers else 0 for peer in range(world)]
    sent, got = torch.zeros(sum(to), dtype=torch.uint8), torch.zeros(sum(back), dtype=torch.uint8)
    seconds = []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(got, sent, back, to)
        took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        seconds.append(float(took))
    return {"peers": peers, "p50_s": statistics.median(seconds), "p95_s": sorted(seconds)[int(0.95 * ROUNDS)]}


def oversleep() -> list[float]:
    """By how much each of 100 slept computations of 5 ms was too long."""
    clock = DeviceClock(lambda _: 0.005)
    return [clock.compute([1]).late_s for _ in range(100)]


if __name__ == "__main__":
    main()
