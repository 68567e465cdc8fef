"""Training on rollouts, measured: routing known ahead against the best history policy, at equal memory, on emulated nodes.

    python benchmarks/measured_foresight.py DATA [--cluster 2x4] [--repeats 10] [--micro 4] [--layers 2] [--rows NAME,NAME] [--dry]

DATA holds olmoe/expert_counts/*.npz. Emulation, model and constants are those of measured_train.py; a step here is an optimizer
step of several micro-batches. Writes reports/DATE-measured_foresight-CLUSTER.md.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import table, write
from measured import parser, workplace
from measured_train import (
    FORCED,
    SEQUENCE,
    SLOTS,
    TERMS,
    TOKENS,
    TOP_K,
    WARM_UP,
    WINDOW_S,
    Bench,
    Row,
    added_seconds,
    measured_row,
    quartiles,
)
from train_cases import shares

from poise.replay.training import SourceLoads
from poise.stepwise.dealing import Deal, Requests, near, priced_owners
from poise.stepwise.owners import LoadSamples, OwnerSeconds, decided
from poise.stepwise.registry import as_policy
from poise.stepwise.regroup import even_out
from poise.stepwise.sharding import Balanced, even_sharding, owned_ED
from poise.stepwise.step_seconds import reshard_seconds

SEED, SPREAD = 29, 100
"""Of the requests; optimizer steps over which the move of owners is spread."""
HISTORY = ("llep", "moon-ep", "ultra-ep", "hecate", "hecate, t=8", "hecate-calibrated", "poise")
AHEAD = "fore-moe", "recorded"


class Step:
    """An optimizer step's requests, each of one domain, and the micro-batches before it that policies know."""

    def __init__(self, data: Path, bench: Bench, micro: int) -> None:
        rng = np.random.default_rng(SEED)
        share_GlE = shares(data)
        pick = [rng.permutation(share_GlE.shape[2])[: bench.experts] for _ in range(bench.layers)]
        share_LGE = np.stack([share_GlE[:, layer * 3 // bench.layers][:, pick[layer]] for layer in range(bench.layers)])
        share_LGE /= share_LGE.sum(axis=2, keepdims=True)
        cells, each = bench.devices, TOKENS // SEQUENCE
        domains = rng.choice(len(share_GlE), 4, replace=False)  # those of the prompts that are trained on
        loads = []
        for _ in range(WARM_UP + micro):
            domain_Q = rng.choice(domains, cells * each)
            loads.append(np.stack([rng.multinomial(SEQUENCE * TOP_K, share_LGE[layer, domain_Q])
                                   for layer in range(bench.layers)], axis=1))  # fmt: skip
        self.bench, self.micro = bench, micro
        rank_Q, self.before = np.repeat(np.arange(cells), each), np.array(loads[:WARM_UP], np.int32)
        load_QLE = np.concatenate(loads[WARM_UP:]).astype(np.int32)
        self.requests = Requests(load_QLE, np.full(len(load_QLE), SEQUENCE, np.int64))
        even = even_sharding(bench.layers, bench.experts, bench.devices)
        self.given = Deal("given", np.tile(rank_Q, micro), np.repeat(np.arange(micro), len(rank_Q)), even)
        warm = Deal("", rank_Q, np.zeros(len(rank_Q), np.int64), even)
        self.warm_up = [
            warm.sources(Requests(one, np.full(len(one), SEQUENCE)), bench.devices)[0] for one in self.before
        ]

    def traffic(self, deal: Deal) -> SourceLoads:
        """Micro-batches before, and those of the step as they are dealt."""
        judged = deal.sources(self.requests, self.bench.devices)
        return SourceLoads(np.concatenate([np.array(self.warm_up), judged]), TOP_K)

    def owners(self) -> np.ndarray:
        """By price, from the loads before the step, [L, E]: what a run has that knows no more."""
        history = np.array([one.sum(axis=1) for one in self.warm_up]).astype(float)
        samples = LoadSamples.of_history(list(history.swapaxes(0, 1)), self.bench.devices)
        seconds = OwnerSeconds(as_policy("poise"), SLOTS, self.bench.price(Row("", "")), samples)
        return decided(Balanced(), history[-5:].mean(axis=0), self.given.owner_LE, seconds)

    def deals(self) -> dict[str, Deal]:
        """As given, evened out over micro-batches, near even owners, and near owners that move."""
        owned_LED = np.stack([owned_ED(owner_E, self.bench.devices) for owner_E in self.given.owner_LE])
        load_QX = np.einsum("qle,led->qld", self.requests.load_QLE, owned_LED).reshape(len(self.requests.size_Q), -1)
        anew = even_out(load_QX.astype(float), self.requests.size_Q, self.given.rank_Q, self.given.micro_Q)
        price, ranks = self.bench.price(Row("", "")), self.bench.devices

        def seconds_for(load_BLSE: np.ndarray) -> OwnerSeconds:
            return OwnerSeconds(as_policy("recorded"), SLOTS, price, LoadSamples.of_record(load_BLSE, True), self.micro)

        out = {"load": self.given, "anew": replace(self.given, micro_Q=anew)}
        for name, move in (("near", False), ("owners", True)):
            out[name] = near(self.requests, self.given, self.bench.cluster, owners_move=move)
        for name in ("load", "owners"):
            out[f"{name}, priced"] = priced_owners(
                out[name], self.requests, ranks, Balanced(interval=SPREAD), seconds_for, [self.owners()]
            )
        return out


def rows_of(bench: Bench, step: Step, deals: dict[str, Deal]) -> list[Row]:
    """All with the same slots; each history policy at its published setting, Hecate also at t = 8, poise with owners by price."""
    rows = [Row(FORCED, "expert-parallelism", 0, forced=True), Row("expert-parallelism", "expert-parallelism", 0),
            Row("llep", "llep"), Row("moon-ep", "moon-ep"), Row("ultra-ep", "ultra-ep"), Row("hecate", "hecate"),
            Row("hecate, t=8", "hecate:overlap=8"), Row("hecate-calibrated", "hecate-calibrated"), Row("poise", "poise", SLOTS, step.owners()),
            Row("poise, loads known", "poise", foresee=True), Row("fore-moe", "fore-moe", foresee=True),
            Row("recorded", "recorded", foresee=True)]  # fmt: skip
    for name, words in (
        ("load, priced", "owners by price"),
        ("anew", "dealt to micro-batches"),
        ("near", "dealt to ranks"),
        ("owners", "dealt to ranks, owners too"),
        ("owners, priced", "dealt to ranks, owners by price"),
    ):
        for policy in AHEAD:
            rows.append(Row(f"{policy}, {words}", policy, SLOTS, deals[name].owner_LE, traffic=name, foresee=True))
    return rows


def report(bench: Bench, step: Step, rows: list[Row], got: dict[str, np.ndarray], deals: dict[str, Deal]) -> list[str]:
    """A line a row; seconds of an optimizer step, the owners' move spread over some added."""
    price, totals, lines = bench.price(Row("", "")), {}, []
    found = [measured_row(bench, step.traffic(deals[row.traffic]), row, got, which) for which, row in enumerate(rows)]
    for one in found:
        owner_LE = one.row.owners
        moved_s = 0.0 if owner_LE is None else reshard_seconds(step.given.owner_LE, owner_LE, price) / SPREAD
        totals[one.row.name] = one.total * step.micro + moved_s
    rival = min((name for name in totals if name in HISTORY), key=lambda name: np.median(totals[name]))
    for one in found:
        replay, total = one.replay, totals[one.row.name]
        below = 1.0 - total / totals[rival]
        spread = np.percentile(below, [25, 75])
        lines.append([one.row.name, f"{replay.imbalance:.3f}", f"{replay.moved_BL.sum() / 1e6:.1f}", f"{replay.exposed_BL.sum() / 1e6:.1f}",
                      f"{np.median(total):.3f}", quartiles(total),
                      f"{np.median(below):+.1%} ({spread[0]:+.1%} to {spread[1]:+.1%})", f"{added_seconds(replay) * step.micro:.3f}",
                      one.plan, *(f"{value:.3f}" for value in one.medians * step.micro)])  # fmt: skip
    head = ["policy", "max/mean", "MB moved", "MB shown", "step s", "quartiles", f"below the best history policy ({rival}), paired",
            "modelled s", "same plan", *TERMS]  # fmt: skip
    return [table(head, lines)]


def about(bench: Bench, step: Step, repeats: int) -> str:
    load = step.requests.load_QLE.sum(axis=0)
    return (
        f"Emulated {bench.spec.nodes} x {bench.spec.devices_per_node} devices with the links, the model and the clock of measured_train "
        f"({bench.layers} layers, {bench.experts} experts); attention and compute are slept: no evidence. An optimizer step is {step.micro} "
        f"micro-batches of {TOKENS} tokens a device: sequences of {SEQUENCE} tokens, each of one of four of OLMoE's recorded domains, shuffled "
        f"over ranks and micro-batches; expert max / mean of the step {(load.max(axis=1) / load.mean(axis=1)).mean():.2f}. {SLOTS} step slots "
        f"a device and layer in every row but expert parallelism: equal memory. History policies know the {WARM_UP} micro-batches before, and of "
        "the step those that are over. Foreseen rows replay the record (`run.foresee`) and are planned before the first micro-batch, as history rows are for "
        "theirs. `dealt`: requests of the step swapped between its micro-batches, or between ranks, too, to where their experts' owners are; "
        f"`owners too`: owners planned with them, the modelled seconds of their move over {SPREAD} steps in the row. MB are of all devices, modelled. "
        f"{repeats} repeats, all rows in each, the order turns; medians."
    )  # fmt: skip


def main() -> None:
    options = parser(str(__doc__))
    options.add_argument("--cluster", default="2x4")
    options.add_argument("--rows", default="")
    options.add_argument("--micro", type=int, default=4)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--window-ms", type=float, default=1e3 * WINDOW_S)
    options.add_argument("--experts-a-device", type=int, default=4)
    options.add_argument("--calibrate-seconds", type=float, default=90.0)
    options.add_argument("--calibrated", type=Path, help="folder that --keep left: nothing is calibrated")
    options.add_argument("--dry", action="store_true", help="print the report, write nothing")
    asked = options.parse_args()
    started = time.time()
    with workplace(asked.keep) as folder:
        bench = Bench(asked.cluster, asked.layers, True, folder, window_s=asked.window_ms / 1e3,
                      experts_a_device=asked.experts_a_device)  # fmt: skip
        if asked.calibrated:
            bench.take(asked.calibrated)
        else:
            bench.calibrate(asked.calibrate_seconds)
        step = Step(asked.data, bench, asked.micro)
        deals = step.deals()
        chosen = asked.rows.split(";") if asked.rows else None
        rows = [row for row in rows_of(bench, step, deals) if chosen is None or row.name in chosen]
        more = {name: step.traffic(deal) for name, deal in deals.items()}
        got = bench.measure(more["load"], rows, asked.micro, asked.repeats, more)
        text = [about(bench, step, asked.repeats), *report(bench, step, rows, got, deals)]
    text.append(f"Gradients within {got['gaps'].max():.1e} of a dense run; clock overruns {int(got['overruns'].sum())}, sleeps late by at most "
                f"{1e3 * got['late_p99_s'].max():.2f} ms (p99); links shaped: {bool(got['shaped'])}. Run time {time.time() - started:.0f} s.")  # fmt: skip
    if asked.dry:
        print("\n\n".join(text))
    else:
        write("Foresight, measured on emulated nodes", text, f"-{asked.cluster}")


if __name__ == "__main__":
    sys.exit(main())
