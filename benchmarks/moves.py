"""Moving to another placement while tokens are served, on emulated links: in rounds in which a rank talks to one peer,
and all at once.

    python benchmarks/moves.py [--repeats 12] [--minutes 15] [--keep FOLDER]

Needs root, ip and tc (docs/emulation.md). All ways run in one process group, in every repeat, in an order that turns; so
what others do on the machine meets all of them. Ways are compared repeat by repeat. A difference whose sign test over the
repeats does not reach 5 % is called inconclusive.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import table, write
from measured import Emulation, told_apart, workplace

from poise.control.moves import move_list
from poise.control.payback import Migration, migration
from poise.control.peers import fewest_rounds
from poise.control.price import PortTraffic
from poise.lab.emulate import EmulatedCluster
from poise.machine.cluster import Cluster
from poise.machine.curve import MeasuredCurve
from poise.machine.model import ModelSpec
from poise.planning.engine_rules import NONE
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import solve
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.serve.swap import fetches

NODES, DEVICES, LAYERS, EXPERTS, SLOTS = 2, 2, 2, 16, 5
WIDTH, TOKENS, EXPERT_BYTES = 512, 256, 768 * 1024
INTRA, INTER = 40e6, 10e6
"""Ports, bytes a second of this machine's clock."""
WINDOW_S, TOKEN_S = 0.04, 0.0002
"""Attention of a layer; an expert's seconds a token."""
BEFORE, STEPS, BATCH_STEPS = 4, 22, 4
PARTS = 3


def world() -> int:
    """Ranks."""
    return NODES * DEVICES


def traffic_of() -> RoutingBatch:
    """Skewed top-1 tokens, the same number on each rank."""
    trace = zipf_trace(num_tokens=world() * TOKENS * BATCH_STEPS, num_layers=LAYERS, num_experts=EXPERTS, top_k=1,
                       exponent=0.9, stickiness=0.2)  # fmt: skip
    batch = make_batch(trace, tokens_per_step=TOKENS * world(), steps=BATCH_STEPS, seed=1)
    assert batch.experts_TLK is not None
    return replace(batch, home_T=(np.arange(len(batch.experts_TLK)) % world()).astype(np.int32))


def planned(batch: RoutingBatch) -> tuple[PlacementProblem, Migration]:
    """The problem with the emulated links' rates, and the way from contiguous blocks to a balanced placement."""
    curve = MeasuredCurve(np.array([1.0, 1000.0]), np.array([TOKEN_S, 1000 * TOKEN_S]), 2.0 * WIDTH * 384)
    cluster = replace(Cluster.uniform(NODES, DEVICES), intra_bytes_per_s=INTRA, inter_bytes_per_s=INTER,
                      intra_latency_s=0.0, inter_latency_s=0.0, expert_curve=curve)  # fmt: skip
    ids = tuple(int(i) for i in batch.layer_ids_L)
    model = ModelSpec("replayed", LAYERS, ids, EXPERTS, 1, WIDTH, 384, 2, 2.0, 2.0 + 8.0 / WIDTH, 2.0, 512.0)
    problem = PlacementProblem(batch, cluster, model, np.full(world(), SLOTS), "home", engine=NONE)
    before, after = (solve(problem, method=name, time_limit_s=4).placement for name in ("contiguous", "lpt"))
    return problem, migration(before, after, problem)


def stages(made: Migration) -> list[int]:
    """Legs after which the parts of the way end: equal numbers of fetches, the most gain first."""
    goal = made.fetched_K[-1] * np.arange(1, PARTS + 1) / PARTS
    ends = [int(np.searchsorted(made.fetched_K, each - 1e-9)) for each in goal]
    return sorted({*ends[:-1], len(made.legs)})


def paired(one: np.ndarray, other: np.ndarray) -> str:
    """Medians of the repeats' differences, and whether a sign test tells them from none."""
    differences = one - other
    p = told_apart(differences)
    low, middle, high = np.percentile(differences, [25, 50, 75]) * 1e3
    said = f"{middle:+.0f} ms ({low:+.0f} to {high:+.0f}), p {p:.3f}"
    return said if p <= 0.05 else f"{said}: inconclusive"


def main() -> None:
    """Plan, run, report."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--repeats", type=int, default=12)
    options.add_argument("--minutes", type=float, default=15.0, help="after which no repeat begins")
    options.add_argument("--keep", type=Path, help="folder for what is measured")
    given = options.parse_args()
    batch = traffic_of()
    problem, made = planned(batch)
    ends = stages(made)
    with workplace(given.keep) as folder:
        places = [made.before, *(made.placement(count) for count in ends)]
        for number, each in enumerate(places):
            each.save(folder / f"place{number}.npz")
        last = len(ends)
        ways = [
            {"name": "no move", "goals": [], "at_once": ""},
            {"name": "all at once, steps wait", "goals": [last], "at_once": "waits"},
            {"name": "all at once, in the background", "goals": [last], "at_once": "background"},
            {"name": "rounds", "goals": [last], "at_once": ""},
            {"name": f"rounds, {last} parts by pay-back", "goals": list(range(1, last + 1)), "at_once": ""},
        ]
        job = {
            "shape": [NODES, DEVICES], "width": WIDTH, "expert_bytes": EXPERT_BYTES, "token_s": TOKEN_S,
            "window_s": WINDOW_S, "steps": STEPS, "before": BEFORE, "batch_steps": BATCH_STEPS, "repeats": given.repeats, "minutes": given.minutes,
            "placements": [str(folder / f"place{number}.npz") for number in range(len(places))], "ways": ways,
        }  # fmt: skip
        emulation = Emulation(EmulatedCluster(NODES, DEVICES, INTRA, INTER), folder, folder / "curve.csv")
        arrays = {"experts": batch.experts_TLK, "home": batch.home_T, "start": batch.start_B}
        got = emulation.measure("moves_rank.py", job, arrays, timeout=1800, again=False)
    if not got["shaped"]:
        raise SystemExit("the links were not shaped: nothing was measured (root, ip and tc are needed)")
    write("Moves while tokens are served, emulated", report(got, ways, problem, made, ends))


def report(got: dict[str, Any], ways: list[dict[str, Any]], problem: PlacementProblem, made: Migration, ends: list[int]) -> list[str]:  # fmt: skip
    """Tables."""
    seconds, state = got["steps"][..., 0], got["steps"][..., 1]
    quiet = np.median(seconds[0], axis=1)  # of the same repeat
    rows, worst, waits = [], [], []
    for number, each in enumerate(ways):
        during = [row[mark == 1] if number else row for row, mark in zip(seconds[number], state[number], strict=True)]
        worst.append(np.array([part.max() for part in during]))
        waits.append(np.array([(part - base).sum() for part, base in zip(during, quiet, strict=True)]))
        after = [row[mark == 2] for row, mark in zip(seconds[number], state[number], strict=True)] if number else during
        pool = np.concatenate(during)
        whole = seconds[number][:, BEFORE:].sum(axis=1)
        rows.append([each["name"], f"{np.mean([len(part) for part in during]):.1f}" if number else "0",
                     *(f"{1e3 * np.percentile(pool, q):.0f}" for q in (50, 99)), f"{1e3 * np.median(worst[-1]):.0f}",
                     f"{1e3 * np.median(waits[-1]):+.0f}" if number else "0",
                     f"{1e3 * np.median(np.concatenate(after)):.0f}", f"{np.median(whole):.2f}"])  # fmt: skip
    pairs = [(move.source, move.target) for move in fetches(made.before, made.after, problem.cluster.node_D)]
    price = PortTraffic.of(problem.batch, made.before, problem.pricing)
    lists = []
    for staging in (1, 2):
        for ordered in (made, None):
            moves = move_list(made.before, made.after, expert_bytes=float(EXPERT_BYTES), staging=staging,
                              node_D=problem.cluster.node_D, migration=ordered)  # fmt: skip
            lists.append([f"{staging}, {'by pay-back' if ordered else 'fewest rounds'}", len(moves.rounds), moves.turns,
                          moves.fewest_turns, f"{1e3 * moves.delay_R(price).sum():.0f}"])  # fmt: skip
    delay = made.delay_K(price, float(EXPERT_BYTES))[-1]
    share = [f"{made.gain_K[end] / made.gain_K[-1]:.0%} of the gain with {made.fetched_K[end]} fetches" for end in ends]
    several = len(ways) - 2
    compared = [
        [ways[one]["name"], ways[other]["name"], paired(worst[one], worst[other]), paired(waits[one], waits[other])]
        for one, other in ((several, 1), (several, 2), (several + 1, 2), (several + 1, several))
    ]
    return [
        f"{NODES} nodes of {DEVICES} ranks, ports {INTRA / 1e6:g} and {INTER / 1e6:g} MB/s, {LAYERS} layers of {EXPERTS} experts "
        f"of {EXPERT_BYTES / 2**20:.2f} MiB, {TOKENS} tokens a rank and step. {len(pairs)} fetches, in {fewest_rounds(pairs, world())} "
        f"rounds of a swap (the fewest for these senders), {STEPS} steps a run, the move begins with step {BEFORE + 1}; {seconds.shape[1]} repeats. "
        f"Arithmetic that took longer than its device: {int(got['overruns'])} times.",
        f"Load average {os.getloadavg()[1]:.0f} on {os.cpu_count()} cores at the end.",
        "Milliseconds of steps with weights on their way (of the slowest rank, waiting and the switch included); their worst, "
        "the median of the repeats; what they took beyond as many steps without a move in the same repeat; the median step "
        "afterwards; seconds of all steps from the beginning of the move on.",
        table(["way", "steps", "p50", "p99", "worst", "waited", "after", "all, s"], rows),
        "Differences of the two in each repeat: median, quartiles, sign test.",
        table(["way", "against", "worst step", "waited in all"], compared),
        f"Modelled beforehand, before starts: the moves make steps longer by {1e3 * delay:.0f} ms in all, "
        f"and save {1e3 * made.gain_K[-1]:.0f} ms a step. By pay-back: {'; '.join(share)}.",
        "Lists of moves for an engine with so many buffers a rank: rounds, turns in which a rank talks to one peer, turns that "
        "enough buffers would leave, modelled wait.",
        table(["buffers, order", "rounds", "turns", "fewest turns", "waits, ms"], lists),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
