"""Training on rollouts whose routing is known: plans made ahead against plans from history, at equal memory. Modelled times.

    python benchmarks/foresight.py DATA [CASE ...] [--quick]

DATA holds olmoe/expert_counts/*.npz and llama4-maverick/*.npz. Writes reports/DATE-foresight.md; --quick prints, one step judged.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from common import table, write
from grids import grid_of
from train_cases import REACHED, shares

from poise.cost.weights import StepPrice, training_price
from poise.machine.cluster import Cluster, from_preset
from poise.machine.model import ModelSpec
from poise.replay.serving import FastLoop
from poise.replay.training import Foresight, SourceLoads, TrainingReplay, replay_training
from poise.routing.predict import SlidingMean
from poise.routing.trace import RoutingTrace
from poise.stepwise import dealing
from poise.stepwise.dealing import near
from poise.stepwise.least_seconds import least_layer_seconds
from poise.stepwise.protocol import StepPolicy
from poise.stepwise.registry import FORESIGHT, POLICIES
from poise.stepwise.regroup import even_out
from poise.stepwise.sharding import Balanced, Even, ShardingPolicy, even_sharding, owned_ED

QUICK = "--quick" in sys.argv
MICRO, STEPS, SEED = 8, 2 if QUICK else 3, 17
"""Micro-batches of an optimizer step; optimizer steps, of which the first is warm-up."""
SLOTS, LAYERS = 4, 6
WINDOWS = (1, 5, 5 * MICRO)
EXACT_AFTER = ("llep", "moon-ep", "ultra-ep")
ADAM_BYTES = 28.0
OWN = Balanced(interval=100 * MICRO)
"""Owners by price, planned every 100 optimizer steps as on ranks; the replay counts micro-batches."""


@dataclass(frozen=True)
class Case:
    """A model on a cluster, and requests of every rank and micro-batch."""

    name: str
    model: ModelSpec
    cluster: Cluster
    each: int
    kind: str

    def price(self, tokens: float) -> StepPrice:
        """Of a micro-batch of so many tokens over all devices."""
        return training_price(tokens, self.model.num_experts, self.cluster, self.model, sequence_length=1024)

    def rest_seconds(self, tokens: float) -> float:
        """Of an optimizer step: output head (three passes) on so many tokens, Adam on owned and dense weights."""
        model, cluster = self.model, self.cluster
        head = 6.0 * model.hidden_size * model.vocab_size * tokens / cluster.num_devices / cluster.flops_per_s
        owned = model.num_moe_layers * model.num_experts * model.expert_parameters / cluster.num_devices
        dense = model.num_hidden_layers * float(model.attention_parameters) + model.hidden_size * model.vocab_size
        return head + ADAM_BYTES * (owned + dense) / cluster.memory_bytes_per_s


def cases() -> dict[str, Case]:
    def h100(nodes: int) -> Cluster:
        made = from_preset([8] * nodes, "h100", name=f"{nodes}x8 h100")
        return replace(made, flops_per_s=989e12 * REACHED)

    olmoe, qwen, llama = (ModelSpec.parse(name) for name in ("olmoe-1b-7b", "qwen3-30b-a3b", "llama-4-maverick"))
    layers = {"num_hidden_layers": LAYERS, "moe_layer_ids": tuple(range(LAYERS))}
    small = replace(olmoe, name=f"olmoe-1b-7b, {LAYERS} layers", **layers)
    like_qwen = replace(qwen, name=f"experts of qwen3-30b-a3b, top-1, {LAYERS} layers", top_k=1, **layers)
    every_other = tuple(range(1, 2 * LAYERS, 2))
    found = [
        Case("olmoe-1x8", small, h100(1), 4, "domains"),
        Case("olmoe-2x8", small, h100(2), 4, "domains"),
        Case("olmoe-4x8", small, h100(4), 4, "domains"),
        Case("olmoe-2x8-tiny", small, h100(2), 1, "domains"),
        Case("requests-1x8", like_qwen, h100(1), 32, "requests"),
        Case("requests-2x8", like_qwen, h100(2), 32, "requests"),
        Case("maverick-2x8", replace(llama, name=f"llama-4-maverick, {LAYERS} MoE layers", num_hidden_layers=2 * LAYERS,
                                     moe_layer_ids=every_other), h100(2), 32, "requests"),
    ]  # fmt: skip
    return {case.name: case for case in found}


@dataclass(frozen=True)
class Requests:
    """Requests of an optimizer step, by cell: loads int32 [Q, L, E], tokens, rank and micro-batch, int64 [Q]."""

    load_QLE: np.ndarray
    size_Q: np.ndarray
    rank_Q: np.ndarray
    micro_Q: np.ndarray

    def sources(self, ranks: int) -> np.ndarray:
        """Loads of every micro-batch, int32 [M, L, D, E]."""
        out = np.zeros((MICRO, self.load_QLE.shape[1], ranks, self.load_QLE.shape[2]), np.int32)
        for load_LE, rank, micro in zip(self.load_QLE, self.rank_Q, self.micro_Q, strict=True):
            out[micro, :, rank] += load_LE
        return out


def drawn(data: Path, case: Case) -> Iterator[Requests]:
    """Optimizer steps. ``domains``: eight answers a prompt, each prompt of one domain, answers of 512 to 1536 tokens drawn from
    OLMoE's counts; ``requests``: recorded requests of Llama-4 Maverick, of two subjects. Shuffled over ranks and micro-batches.
    """
    rng, ranks = np.random.default_rng(SEED), case.cluster.num_devices
    count, layers, experts = MICRO * ranks * case.each, case.model.num_moe_layers, case.model.num_experts
    micro_Q, rank_Q = (part.repeat(case.each) for part in np.divmod(np.arange(MICRO * ranks), ranks))
    if case.kind == "domains":
        share_GlE = shares(data)
        pick = [rng.permutation(experts) for _ in range(layers)]
        share_LGE = np.stack([share_GlE[:, layer * 3 // layers][:, pick[layer]] for layer in range(layers)])
        share_LGE /= share_LGE.sum(axis=2, keepdims=True)
        for _ in range(STEPS):
            domain_Q = rng.permutation(np.repeat(rng.integers(0, len(share_GlE), -(-count // 8)), 8)[:count])
            size_Q = rng.integers(512, 1537, count)
            load = np.stack(
                [rng.multinomial(size_Q * case.model.top_k, share_LGE[layer, domain_Q]) for layer in range(layers)]
            )
            yield Requests(load.transpose(1, 0, 2).astype(np.int32), size_Q, rank_Q, micro_Q)
        return
    known, sizes = recorded(data, layers)
    for _ in range(STEPS):
        which = rng.integers(0, len(known), count)
        yield Requests(known[which], sizes[which], rank_Q, micro_Q)


def recorded(data: Path, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Loads of every recorded request in the first layers, int32 [R, L, E], and its tokens."""
    loads, sizes = [], []
    for file in sorted((data / "llama4-maverick").glob("*.npz")):
        raw = np.load(file)
        trace = RoutingTrace(
            raw["experts"][:, :layers].astype(np.int16), int(raw["num_experts"]), request=raw["request"]
        )
        for request in trace.requests():
            experts_TL = trace.experts[trace.request == request, :, 0]
            loads.append([np.bincount(experts_T, minlength=trace.num_experts) for experts_T in experts_TL.T])
            sizes.append(len(experts_TL))
    return np.array(loads, np.int32), np.array(sizes)


def traffic(case: Case, steps: list[Requests]) -> SourceLoads:
    """All micro-batches in order."""
    return SourceLoads(np.concatenate([one.sources(case.cluster.num_devices) for one in steps]), case.model.top_k)


def dealt_anew(case: Case, steps: list[Requests]) -> list[Requests]:
    """The same requests, by what even owners get."""
    ranks = case.cluster.num_devices
    owner_LE = even_sharding(case.model.num_moe_layers, case.model.num_experts, ranks)
    owned_LED = np.stack([owned_ED(owner_E, ranks) for owner_E in owner_LE]).astype(float)
    out = []
    for one in steps:
        load_QX = np.einsum("qle,led->qld", one.load_QLE.astype(float), owned_LED).reshape(len(one.size_Q), -1)
        out.append(replace(one, micro_Q=even_out(load_QX, one.size_Q, one.rank_Q, one.micro_Q)))
    return out


def dealt_to_ranks(case: Case, steps: list[Requests], *, owners_move: bool) -> tuple[list[Requests], np.ndarray]:
    """The same requests near their experts' owners: even ones, or those that are planned with the first step. And the owners."""
    owner_LE = even_sharding(case.model.num_moe_layers, case.model.num_experts, case.cluster.num_devices)
    out = []
    for number, one in enumerate(steps):
        deal = near(dealing.Requests(one.load_QLE, one.size_Q), dealing.Deal("", one.rank_Q, one.micro_Q, owner_LE),
                    case.cluster, owners_move=owners_move and not number)  # fmt: skip
        owner_LE = deal.owner_LE
        out.append(replace(one, rank_Q=deal.rank_Q, micro_Q=deal.micro_Q))
    return out, owner_LE


@dataclass(frozen=True)
class Given:
    """Owners that are given, from the first micro-batch on."""

    owner_LE: np.ndarray
    interval: int = OWN.interval
    by_price = False
    gain = 0.0
    name = "given"

    def plan(self, load_LE: np.ndarray, current_LE: np.ndarray, price: StepPrice) -> np.ndarray:
        """They."""
        return self.owner_LE


@dataclass(frozen=True)
class Row:
    """A policy's replay; seconds of an optimizer step, all of its micro-batches."""

    name: str
    setting: str
    got: TrainingReplay
    rest_s: float
    least_B: np.ndarray

    @property
    def steps_s(self) -> np.ndarray:
        """Of every optimizer step."""
        return self.got.step_seconds_B.reshape(-1, MICRO).sum(axis=1) + self.rest_s

    @property
    def ms(self) -> float:
        """Median."""
        return 1e3 * float(np.median(self.steps_s))

    @property
    def bound_ms(self) -> float:
        """Median of what no plan of replicas can be below, of the same requests with the owners at the end."""
        steps_s = self.least_B.reshape(-1, MICRO).sum(axis=1) + MICRO * self.got.attention_s + self.rest_s
        return 1e3 * float(np.median(steps_s))


def best(rows: list[Row], name: str | None = None) -> Row:
    row = min(rows, key=lambda one: one.ms)
    return row if name is None else replace(row, name=name)


class Table:
    """Rows of one case, all on the same requests, with the same slots."""

    def __init__(self, data: Path, case: Case) -> None:
        self.case, self.steps = case, list(drawn(data, case))
        self._least: dict[tuple[bytes, bytes, int], float] = {}
        self.loads = traffic(case, self.steps)
        anew = dealt_anew(case, self.steps)
        self.anew = traffic(case, anew)
        self.near = {}
        for move in (False, True):
            steps, owner_LE = dealt_to_ranks(case, self.steps, owners_move=move)
            self.near["and owners that move" if move else "near even owners"] = traffic(case, steps), Given(owner_LE)
        tokens = sum(float(one.size_Q.sum()) for one in self.steps) / len(self.steps)
        self.price, self.rest_s = case.price(tokens / MICRO), case.rest_seconds(tokens)
        self.tokens = tokens / MICRO / case.cluster.num_devices

    def run(
        self, policy: StepPolicy, *, slots: int = SLOTS, sharding: ShardingPolicy | None = None, window: int = 5,
        loads: SourceLoads | None = None, known: str = "",
    ) -> TrainingReplay:  # fmt: skip
        """A replay of all micro-batches; ``known``: the routing is "replayed", or a "forecast"."""
        loads = self.loads if loads is None else loads
        foresight = Foresight(loads, replayed=known == "replayed") if known else None
        return replay_training(loads, FastLoop(policy, slots, SlidingMean(window)), self.price, sharding=sharding,
                               first_reshard=0 if known else MICRO, warm_up=MICRO, foresight=foresight)  # fmt: skip

    def row(self, name: str, setting: str, policy: StepPolicy, **options) -> Row:
        """One of :meth:`run`, and what it cannot be below."""
        got, loads = self.run(policy, **options), options.get("loads") or self.loads
        slots = options.get("slots", SLOTS)
        least_B = np.array([sum(self.least(load_SE, owner_E, slots) for load_SE, owner_E in zip(load_LSE, got.owner_LE, strict=True))
                            for load_LSE in loads.load_BLSE[MICRO:]])  # fmt: skip
        return Row(name, setting, got, self.rest_s, least_B)

    def least(self, load_SE: np.ndarray, owner_E: np.ndarray, slots: int) -> float:
        """Of a layer, in seconds; each is looked for once."""
        key = load_SE.tobytes(), owner_E.tobytes(), slots
        if key not in self._least:
            self._least[key] = least_layer_seconds(load_SE.astype(np.int64), owner_E, self.price, slots)
        return self._least[key]

    def history(self, name: str, policy: StepPolicy, owners: tuple[ShardingPolicy, ...]) -> Row:
        """The best of several windows and owners."""
        return best([self.row(name, f"window {window}, owners {own.name}", policy, sharding=own, window=window)
                     for window in WINDOWS for own in owners])  # fmt: skip

    def rows(self) -> list[Row]:
        """All of them, each at its best setting."""
        ep, poise, own = POLICIES["expert-parallelism"], POLICIES["poise"], (Even(), OWN)
        flat = self.row("force-balanced router, EP", "", ep, slots=0, loads=self.loads.force_balanced())
        out = [flat, self.row("expert-parallelism", "even owners", ep, slots=0)]
        for name in EXACT_AFTER:
            policy = POLICIES[name]
            settings = grid_of(policy)[:4]
            out.append(best([self.row(name, words(one), replace(policy, **one)) for one in settings]))
        hecate = POLICIES["hecate"]
        out.append(best([self.row("hecate", f"t={t or 'window'}, window {window}", replace(hecate, overlap=t), window=window)
                         for t in (0, 8) for window in WINDOWS]))  # fmt: skip
        out.append(self.history("poise", poise, own))
        for known in ("replayed", "forecast"):
            out.append(best([self.row(f"poise, loads {known}", f"owners {one.name}", poise, sharding=one, known=known)
                             for one in own]))  # fmt: skip
        fore = FORESIGHT["fore-moe"]
        out.append(
            best([self.row("fore-moe", words(one), replace(fore, **one), known="replayed") for one in grid_of(fore)])
        )
        ahead = FORESIGHT["recorded"]
        for known in ("forecast", "replayed"):
            out.append(self.row(f"recorded, {known}", "even owners", ahead, known=known))
        out.append(self.row("recorded, replayed", "owners ahead", ahead, known="replayed", sharding=OWN))
        for name, policy in (("poise", poise), ("fore-moe", fore), ("recorded, replayed", ahead)):
            known = "" if name == "poise" else "replayed"
            out.append(self.row(f"{name}, requests dealt anew", "even owners", policy, loads=self.anew, known=known))
        for setting, (loads, owners) in self.near.items():
            for name, policy in (("poise, loads replayed", poise), ("fore-moe", fore), ("recorded, replayed", ahead)):
                out.append(
                    self.row(f"{name}, dealt to ranks", setting, policy, loads=loads, known="replayed", sharding=owners)
                )
        return out


def words(setting: dict) -> str:
    return ", ".join(f"{key}={value}" for key, value in setting.items()) or "as published"


HISTORY = ("llep", "moon-ep", "ultra-ep", "hecate", "poise")
HEAD = [
    "policy",
    "setting",
    "max/mean",
    "MB moved",
    "MB shown",
    "control ms",
    "ms a step",
    "bound",
    "over EP",
    "below best history",
]


def report(table_of: Table) -> tuple[str, list[object]]:
    case, rows = table_of.case, table_of.rows()
    ep = next(row for row in rows if row.name == "expert-parallelism")
    rival = best([row for row in rows if row.name in HISTORY])
    fore = best([row for row in rows if row.name.startswith("fore-moe")])
    ours = best([row for row in rows if row.name.startswith("recorded")])
    plain = next(row for row in rows if row.name == "recorded, replayed")
    lines = [[row.name, row.setting, f"{row.got.imbalance:.3f}", f"{MICRO * row.got.moved_BL.sum(axis=1).mean() / 1e6:.0f}",
              f"{MICRO * row.got.exposed_BL.sum(axis=1).mean() / 1e6:.0f}",
              f"{MICRO * 1e3 * row.got.control_BL.sum(axis=1).mean():.2f}", f"{row.ms:.2f}", f"{row.bound_ms:.2f}", f"{ep.ms / row.ms:.2f}",
              f"{1.0 - row.ms / rival.ms:+.1%}"] for row in rows]  # fmt: skip
    text = (
        f"## {case.name}: {case.model.name} on {case.cluster.name}, {case.kind}\n\n{table_of.tokens:.0f} tokens a device and "
        f"micro-batch on average; window {1e3 * table_of.price.window_s:.3f} ms = {table_of.price.hidden_experts()} experts.\n\n"
        + table(HEAD, lines)
    )
    summary = [case.name, f"{ep.ms:.1f}", f"{rival.ms:.1f} ({rival.name})", f"{fore.ms:.1f}", f"{plain.ms:.1f}", f"{ours.ms:.1f}",
               f"{1.0 - fore.ms / rival.ms:+.1%}", f"{1.0 - plain.ms / rival.ms:+.1%}", f"{1.0 - ours.ms / rival.ms:+.1%}"]  # fmt: skip
    return text, summary


SUMMARY = ["case", "EP ms", "best history ms", "fore-moe ms, best", "recorded ms, even owners", "recorded ms, best",
           "fore-moe below history", "recorded below", "best below"]  # fmt: skip


def intro() -> str:
    return (
        f"**All times are modelled** (training price; attention, exchanges, compute, exposed weights, control; no hardware ran). An optimizer "
        f"step is {MICRO} micro-batches; medians over {STEPS - 1} of them after one of warm-up. Every row but EP has {SLOTS} step slots a "
        "device and layer, freed after each micro-batch: equal memory. `history` policies see the micro-batches before (mean of the "
        f"last {', '.join(map(str, WINDOWS))}: the best is shown; llep, moon-ep and ultra-ep plan after the gate from exact loads) at the "
        "best of the first four settings of their published grids, hecate at t from its window and 8. `loads replayed` / `forecast`: poise itself, told the true loads before the gate. `recorded` "
        "plans from the tokens of every source; replayed, no counts are exchanged in the model (on ranks they still are, as a check). "
        "`owners ahead` moves owners by price on the known loads, their move spread over 100 optimizer steps. `dealt anew`: requests swapped between the micro-batches of a step "
        "on the same rank; `dealt to ranks`: to those ranks whose node owns what they use, with even owners or with owners that are planned with the first "
        f"step's requests and stay, their move spread over 100 steps. `fore-moe` is our rebuild from an abstract, without its second hardware path. MB are of all devices and layers, a step; shown: exposed. "
        "`bound`: what no plan of replicas can be below, with the row's requests, owners and slots (`poise.stepwise.least_seconds`: "
        "compute spread evenly, the least exchange and weights of the node with most, and attention, head and Adam, which no plan changes)."
    )  # fmt: skip


def main() -> None:
    data = Path(sys.argv[1])
    known = cases()
    names = [word for word in sys.argv[2:] if not word.startswith("--")] or list(known)
    texts, totals = [], []
    for name in names:
        start = time.time()
        text, summary = report(Table(data, known[name]))
        texts.append(text)
        totals.append(summary)
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
        if QUICK:
            print(text, flush=True)
        else:
            write("foresight", [intro(), table(SUMMARY, totals), *texts])


if __name__ == "__main__":
    main()
