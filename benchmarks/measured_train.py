"""Training, measured: every policy on emulated nodes, beside what the calibrated cost model says of the same steps.

    python benchmarks/measured_train.py DATA [--cluster 2x4] [--rows main|all|NAME,NAME] [--repeats 20] [--steps 2]
        [--layers 2] [--no-stream] [--note TEXT]

DATA holds olmoe/expert_counts/*.npz. Calibrates the emulated cluster, measures control and overheads on other traffic
than the table's, then the table. Writes reports/DATE-measured_train-CLUSTER.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import table, write
from measured import Emulation, by_term, calibration, parser, part_events, workplace, write_curve
from train_cases import of_domains

from poise.cost.exchange import ExchangeModel
from poise.cost.weights import HIDDEN_SHARE, StepPrice, dense_gradient_seconds, training_price
from poise.lab.emulate import EmulatedCluster
from poise.lab.emulate.spec import parse_shape
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.replay.serving import FastLoop
from poise.replay.training import Foresight, SourceLoads, TrainingReplay, replay_training
from poise.routing.predict import SlidingMean
from poise.simulate.perfetto import Event, write_perfetto
from poise.simulate.training import Backward, Forward, RankStep, rank_step
from poise.stepwise.owners import LoadSamples, OwnerSeconds, decided
from poise.stepwise.registry import as_policy
from poise.stepwise.sharding import Balanced, Heterogeneous, even_sharding

INTRA, INTER, DILATION = 100e6, 20e6, 100.0
"""Bytes a second of a device's ports in the emulation; seconds are this many times longer than the real machine's."""
EXPERTS_A_DEVICE, TOP_K, TOKENS, STANDS_FOR, WIDTH, ROWS = 2, 2, 2048, 4, 246, 768
WINDOW_S = 1.15e-3 * DILATION
LAUNCH_S, TOKEN_S = 20e-6 * DILATION, STANDS_FOR * 4.72e6 / 56.25e12 * DILATION
"""An expert of GPT-MoE-S on a V100 at 45 % of its peak: a start, and seconds a token; a token here stands for four."""
SLOTS, WARM_UP, SEQUENCE = 4, 11, 512
OVERLAPS = (0, 2, 4, 8, 16)
TABLE_SEED, OTHER_SEED = 11, 1011
TERMS = ("attention", "compute", "all-to-all", "weights, counts", "planning", "other")
FORCED = "force-balanced router"
PARTS = {"counted": "counts", "planned": "planning", "dispatched": "dispatch", "ready": "weights", "computed": "experts",
         "posted": "gradients", "combined": "combine"}  # fmt: skip
MAIN = (FORCED, "expert-parallelism", "full-replication (FSDP)", "hecate", "hecate, best setting", "hecate-RM", "hecate-calibrated", "poise",
        "poise-RM", "llep", "moon-ep", "ultra-ep")  # fmt: skip


@dataclass(frozen=True)
class Fixed:
    """Owners that are given."""

    owner_LE: np.ndarray
    interval: int = 10**9
    by_price = False

    def plan(self, load_LE: Any, current_LE: Any, price: StepPrice) -> np.ndarray:
        """They."""
        return self.owner_LE


@dataclass
class Row:
    """A row of the table: what runs, and on which traffic."""

    name: str
    policy: str
    slots: int = SLOTS
    owners: np.ndarray | None = None
    rematerialise: bool = False
    forced: bool = False
    traffic: str = "load"
    foresee: bool = False


def model_of(layers: int, experts: int) -> ModelSpec:
    """Sizes as fully_shard_experts sees them."""
    return ModelSpec(
        "training", layers, tuple(range(layers)), experts, TOP_K, WIDTH, ROWS, 1, 4.0, 4.0, 4.0, 2.0 * WIDTH
    )


def traffic(data: Path, steps: int, layers: int, devices: int, experts: int, seed: int) -> SourceLoads:
    """Real shares of experts, as in the modelled table."""
    return of_domains(data, TOKENS, layers, experts, TOP_K, SEQUENCE, steps, devices, seed)


class Bench:
    """The emulated cluster, its calibration, and runs on it."""

    def __init__(
        self, shape: str, layers: int, stream: bool, folder: Path, *, window_s: float = WINDOW_S,
        experts_a_device: int = EXPERTS_A_DEVICE,
    ) -> None:  # fmt: skip
        nodes, devices = parse_shape(shape)
        self.spec = EmulatedCluster(nodes, devices, INTRA, INTER, dilation=DILATION)
        self.layers, self.stream, self.folder = layers, stream, folder
        self.devices, self.experts, self.window_s = nodes * devices, experts_a_device * nodes * devices, window_s
        self.model = model_of(layers, self.experts)
        self.emulation = Emulation(self.spec, folder, folder / "curve.csv")
        knots = [1, 16, 128, 1024, 2048]
        write_curve(self.emulation.curve, knots, [LAUNCH_S + n * TOKEN_S for n in knots])
        self.cluster, self.calibration = Cluster.uniform(nodes, devices), {}
        self.exchange = ExchangeModel.of(self.cluster)

    def calibrate(self, seconds: float) -> None:
        """``poise calibrate`` on the emulated cluster: no traffic or placement of the table is in it."""
        self.emulation.calibrate(WIDTH, ROWS // 2, seconds)
        self.take(self.folder)

    def take(self, folder: Path) -> None:
        """Constants of a calibration: those of the finer model of exchanges, for policies too."""
        cluster, m, self.calibration = calibration(folder)
        self.exchange = m
        self.cluster = replace(
            cluster, intra_latency_s=m.start_s, inter_latency_s=0.0, peer_latency_s=m.peer_s,
            intra_bytes_per_s=m.intra_bytes_per_s, inter_bytes_per_s=m.inter_bytes_per_s,
        )  # fmt: skip

    def price(self, row: Row) -> StepPrice:
        """What the runtime's policies and the replay reckon with."""
        return training_price(TOKENS * self.devices, self.experts, self.cluster, self.model, window_s=self.window_s,
                              rematerialise=row.rematerialise, hidden_share=HIDDEN_SHARE,
                              dense_s=dense_gradient_seconds(self.cluster, self.model, self.model.weight_bytes))  # fmt: skip

    def replay(self, loads: SourceLoads, row: Row) -> TrainingReplay:
        """The same steps by the cost model; ``loads`` are of the row's traffic."""
        loads = loads.force_balanced() if row.forced else loads
        owners = even_sharding(self.layers, self.experts, self.devices) if row.owners is None else row.owners
        return replay_training(loads, FastLoop(as_policy(row.policy), row.slots, SlidingMean(5)), self.price(row),
                               sharding=Fixed(owners), first_reshard=0, warm_up=WARM_UP, by_rank=True,
                               foresight=Foresight(loads) if row.foresee else None)  # fmt: skip

    def measure(
        self, loads: SourceLoads, rows: list[Row], steps: int, repeats: int, more: dict[str, SourceLoads] | None = None
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Marks of all rows; raises if experts were not computed as in a dense run, or the clock was overrun.

        ``more``: traffic that rows name, beside ``load``.
        """
        even = even_sharding(self.layers, self.experts, self.devices)
        job = {"cluster": str(self.folder / "policies.yaml"), "curve": str(self.emulation.curve), "window_s": self.window_s, "layers": self.layers,
               "experts": self.experts, "top_k": TOP_K, "width": WIDTH, "rows_per_expert": ROWS, "warm_up": WARM_UP,
               "steps": steps, "repeats": repeats, "stream": self.stream,
               "table": [{"name": row.name, "policy": row.policy, "step_slots": row.slots, "rematerialise": row.rematerialise,
                          "owners": (even if row.owners is None else row.owners).tolist(),
                          "traffic": "forced" if row.forced else row.traffic, "foresee": row.foresee} for row in rows]}  # fmt: skip
        (self.folder / "policies.yaml").write_text(self.cluster.to_yaml())
        arrays = {"load": loads.load_BLSE, "forced": loads.force_balanced().load_BLSE,
                  **{name: one.load_BLSE for name, one in (more or {}).items()}}  # fmt: skip
        out = self.emulation.measure("train_rank.py", job, arrays,
                                     timeout=300 + 20.0 * len(rows) * (repeats + 1) * (steps + 1))  # fmt: skip
        assert out["gaps"].max() < 1e-4, f"gradients differ from a dense run by {out['gaps'].max():.2g}"
        return out


WAITS = TERMS[3]
FORWARD = (
    "other",
    "attention",
    WAITS,
    "planning",
    "other",
    "all-to-all",
    "other",
    WAITS,
    "compute",
    "other",
    "all-to-all",
)
BACKWARD = ("other", WAITS, "other", "all-to-all", "other", "compute", "other", "other", "all-to-all", "attention")
"""Terms of what ends at each mark."""


def fronts(marks_LXDM: np.ndarray, ends_DX: np.ndarray) -> list[float]:
    """Seconds of a step by term; marks [L, 2, D, 11], ends [D, 2]."""
    front_LXM = marks_LXDM.max(axis=2)
    layers = len(front_LXM)
    ways = [*(front_LXM[:, 0]), *(one[: len(BACKWARD)] for one in front_LXM[::-1, 1])]
    moments = np.concatenate([ends_DX[:, 0].max(keepdims=True), *ways, ends_DX[:, 1].max(keepdims=True)])
    found = by_term(moments, [*FORWARD * layers, *BACKWARD * layers, WAITS])
    return [float(found[term]) for term in TERMS]


def measured_terms(got: dict[str, np.ndarray], which: int) -> np.ndarray:
    """Seconds of a row by repeat and term, mean over its steps, float64 [R, terms]."""
    marks, ends = got["marks"][which], got["ends"][which]  # [R, B, L, D, 2, 11] and [R, B, D, 2]
    return np.array([
        np.mean([fronts(marks[r, b].swapaxes(1, 2), ends[r, b]) for b in range(marks.shape[1])], axis=0)
        for r in range(len(marks))])  # fmt: skip


@dataclass(frozen=True, eq=False)
class MeasuredRow:
    """What was measured of a row, beside what the model says of it.

    Parameters
    ----------
    row, replay : it, and its replay on the same traffic.
    terms : seconds by repeat and term, float64 [R, terms].
    same : whether ranks computed the tokens that the replay has.
    """

    row: Row
    replay: TrainingReplay
    terms: np.ndarray
    same: bool

    @property
    def total(self) -> np.ndarray:
        """Seconds of a step by repeat, float64 [R]."""
        return self.terms.sum(axis=1)

    @property
    def medians(self) -> np.ndarray:
        """Of each term, float64 [terms]."""
        return np.median(self.terms, axis=0)

    @property
    def plan(self) -> str:
        """Whether the plan was the model's, as a table says it."""
        return "yes" if self.same else "NO"


def measured_row(bench: Bench, loads: SourceLoads, row: Row, got: dict[str, np.ndarray], which: int) -> MeasuredRow:
    """Row number ``which`` of a measurement on a traffic."""
    replay = bench.replay(loads, row)
    same = bool((replay.tokens_BLD == got["tokens"][which]).all())
    return MeasuredRow(row, replay, measured_terms(got, which), same)


def quartiles(seconds: np.ndarray) -> str:
    """The lower and the upper one."""
    low, high = np.percentile(seconds, [25, 75])
    return f"{low:.3f}-{high:.3f}"


def simulated_steps(bench: Bench, replay: TrainingReplay, counts_s: float, planning_s: float) -> list[RankStep]:
    """The judged steps by the cost model, rank by rank."""
    return [rank_step(work, bench.cluster.node_D, bench.exchange, window_s=bench.window_s, counts_s=counts_s,
                      planning_s=planning_s) for work in replay.work_BL]  # fmt: skip


def predicted_terms(steps: list[RankStep], other_s: float) -> np.ndarray:
    """Seconds of the model by term, cut as the measured ones are, mean over steps, float64 [terms]."""
    terms = [fronts(one.marks_LXDM, np.stack([0 * one.end_D, one.end_D], axis=1)) for one in steps]
    out: np.ndarray = np.mean(terms, axis=0)
    out[TERMS.index("other")] += other_s
    return out


def added_seconds(replay: TrainingReplay) -> float:
    """The step if every term waited for the slowest rank: what the replay adds up."""
    return float(
        (replay.layers_B - replay.switch_BL.sum(axis=1) - replay.control_BL.sum(axis=1)).mean() + replay.attention_s
    )


def choose_hecate(
    bench: Bench, loads: SourceLoads, policy: str, owners: Callable[[int], np.ndarray]
) -> tuple[int, int]:
    """T and m with the least modelled step on this traffic: its best setting."""
    found = []
    for t in OVERLAPS:
        for m in (SLOTS, SLOTS // 2, SLOTS // 4):
            got = bench.replay(loads, Row("", f"{policy}:overlap={t}", m, owners(t)))
            found.append((float(np.median(got.step_seconds_B)), t, m))
    return min(found)[1:]


def rows_of(bench: Bench, loads: SourceLoads, names: list[str] | None) -> list[Row]:
    """All rows; owners are planned from the steps before the first one that is judged."""
    price = bench.price(Row("", ""))
    mean_LE = loads.load_BLSE[WARM_UP - 5 : WARM_UP].sum(axis=2).mean(axis=0)
    even = even_sharding(bench.layers, bench.experts, bench.devices)

    def hecates(t: int) -> np.ndarray:
        return Heterogeneous(overlap=t).plan(mean_LE, even, price)

    t, m = choose_hecate(bench, loads, "hecate", hecates)
    tc, mc = choose_hecate(bench, loads, "hecate-calibrated", hecates)
    samples = LoadSamples.of_history(list(loads.load_BLSE[:WARM_UP].sum(axis=2).swapaxes(0, 1)), bench.devices)
    ours = decided(Balanced(), mean_LE, even, OwnerSeconds(as_policy("poise"), SLOTS, price, samples))
    rows = [
        Row(FORCED, "expert-parallelism", 0, forced=True), Row("expert-parallelism", "expert-parallelism", 0),
        Row("full-replication (FSDP)", "full-replication", bench.experts), Row("lplb", "lplb"), Row("faster-moe", "faster-moe"),
        Row("smart-moe", "smart-moe"), Row("flex-moe", "flex-moe"), Row("llep", "llep"), Row("ultra-ep", "ultra-ep"),
        Row("moon-ep", "moon-ep"), Row("hecate", "hecate", SLOTS, hecates(0)),
        Row("hecate, best setting", f"hecate:overlap={t}", m, hecates(t)),
        Row("hecate-RM", f"hecate:overlap={t}", m, hecates(t), rematerialise=True),
        Row("hecate-calibrated", f"hecate-calibrated:overlap={tc}", mc, hecates(tc)),
        Row("poise", "poise", SLOTS, ours), Row("poise-RM", "poise", SLOTS, ours, rematerialise=True),
    ]  # fmt: skip
    return [row for row in rows if names is None or row.name in names]


def compared(bench: Bench, loads: SourceLoads, rows: list[Row], got: dict[str, np.ndarray],
             other: dict[str, np.ndarray]) -> tuple[list[str], dict[str, Any]]:  # fmt: skip
    """The tables: steps and ratios; errors by term."""
    steps = got["marks"].shape[2]
    loads = SourceLoads(loads.load_BLSE[: WARM_UP + steps].copy(), loads.top_k)
    found: dict[str, Any] = {}
    without = [i for i, row in enumerate(rows) if row.policy == "expert-parallelism"]
    counts_s = float(np.median([measured_terms(other, i)[:, 3] for i in without or [0]])) / bench.layers
    for which, row in enumerate(rows):
        constants = np.median(measured_terms(other, which), axis=0)
        one = measured_row(bench, loads, row, got, which)
        ranks = simulated_steps(bench, one.replay, counts_s, constants[4] / bench.layers)
        overhead_s = counts_s * bench.layers + constants[4] + constants[5]
        found[row.name] = {
            "measured": one, "ranks": ranks, "predicted": predicted_terms(ranks, constants[5]),
            "added": added_seconds(one.replay) + overhead_s,
        }  # fmt: skip
    step = {name: float(np.median(one["measured"].total)) for name, one in found.items()}
    ep, flat = step.get("expert-parallelism", np.nan), step.get(FORCED, np.nan)
    hecates = [step[name] for name in step if name.startswith("hecate") and "RM" not in name]
    head = ["policy", "setting", "max/mean", "step s", "quartiles", "over EP", "over EP, paired", "share of forced",
            "gap to forced closed", "modelled s", "error", "terms added"]  # fmt: skip
    lines, errors = [], []
    for name, one in found.items():
        seen, row, total = one["measured"], one["measured"].row, one["measured"].total
        paired = (
            np.median(found["expert-parallelism"]["measured"].total / total) if "expert-parallelism" in found else 0
        )
        modelled = one["predicted"].sum()
        closed = (
            "" if not hecates or min(hecates) <= flat else f"{(min(hecates) - step[name]) / (min(hecates) - flat):.0%}"
        )
        lines.append([name, f"{row.policy}, M={row.slots}", f"{seen.replay.imbalance:.2f}", f"{step[name]:.3f}",
                      quartiles(total), f"{ep / step[name]:.2f}", f"{paired:.2f}", f"{flat / step[name]:.1%}", closed,
                      f"{modelled:.3f}", f"{modelled / step[name] - 1:+.1%}", f"{one['added'] / step[name] - 1:+.1%}"])  # fmt: skip
        cells = [f"{m:.3f} / {p:.3f} ({_off(p, m)})" for m, p in zip(seen.medians, one["predicted"], strict=True)]
        errors.append([name, seen.plan, *cells])
    parts = [
        table(head, lines),
        "### By term: measured / modelled seconds (error)\n\nA step is cut where the last rank is done with a part. Of the model, "
        "counts (expert parallelism's), planning and other are measured on other traffic; attention and compute are slept: no evidence. "
        "Weights that a window does not hide delay the counts, which share the ports: one column.",
        table(["policy", "same plan", *TERMS], errors),
        worst_errors(found),
    ]  # fmt: skip
    return parts, found


def worst_errors(found: dict[str, Any]) -> str:
    """Largest and median error over the rows; of an all-to-all where it takes a hundredth of the step or more."""
    out = []
    for name, at in (("compute", 1), ("all-to-all", 2), ("step", None)):
        off = []
        for one in found.values():
            seen = one["measured"]
            measured = seen.total if at is None else seen.terms[:, at]
            modelled = one["predicted"].sum() if at is None else one["predicted"][at]
            if np.median(measured) >= 0.01 * np.median(seen.total):
                off.append(abs(modelled / float(np.median(measured)) - 1))
        out.append(f"{name} {np.max(off):.1%} (median {np.median(off):.1%})")
    return "Largest error of a row, without sign: " + "; ".join(out) + "."


def _off(modelled: float, measured: float) -> str:
    return f"{modelled / measured - 1:+.1%}" if measured > 1e-4 else "-"


def timeline(bench: Bench, got: dict[str, np.ndarray], rows: list[Row], found: dict[str, Any], path: Path) -> None:
    """The same step of poise (or the last row), measured and simulated."""
    which = next((i for i, row in enumerate(rows) if row.name == "poise"), len(rows) - 1)
    name, ranks = rows[which].name, found[rows[which].name]["ranks"]
    measured = events_of(got["marks"][which, 0, -1].swapaxes(1, 2))
    for rank, one in enumerate(json.loads(str(got["spans"]))):
        measured += [Event(kind, bench.devices + rank, begin, end - begin) for kind, begin, end in one[name]]
    write_perfetto(path, {f"measured: {name}": measured, f"simulated: {name}": events_of(ranks[-1].marks_LXDM)})


def events_of(marks_LXDM: np.ndarray) -> list[Event]:
    """Parts of a step; a lane a device."""
    events = []
    for marks_XDM in marks_LXDM:
        for way, ends in enumerate((Forward, Backward)):
            names = [PARTS.get(end.name.lower(), end.name.lower()) + ", backward" * way for end in ends][1:]
            events += part_events(marks_XDM[way], names)
    return events


def about(bench: Bench, loads: SourceLoads, steps: int, repeats: int) -> str:
    judged = loads.load_BLSE[WARM_UP : WARM_UP + steps].sum(axis=2)
    skew = (judged.max(axis=2) / judged.mean(axis=2)).mean()
    m, links = bench.exchange, bench.calibration["exchange"]
    return (
        f"Emulated {bench.spec.nodes} x {bench.spec.devices_per_node} devices, {INTRA / 1e6:g} MB/s a device inside a node, {INTER / 1e6:g} MB/s "
        f"a device between nodes. It stands for GPT-MoE-S on V100s (45 % of peak, 8192 tokens a device, top-2) with a 100 Gb/s "
        f"port a device (and a fabric {INTRA / INTER:g} times as fast, where theirs is 12), {DILATION:g} times slower, and with {INTER * DILATION / 12.5e9:.3f} of the bytes, since this machine carries no more: "
        f"bytes over rate are as there. {bench.experts} experts of {ROWS * WIDTH * 4 / 1e3:.0f} kB, {bench.layers} layers, {TOKENS} tokens "
        f"of {WIDTH * 4} bytes a device, M = {SLOTS} (FSDP holds all experts). Expert {LAUNCH_S * 1e3:.2f} ms + {TOKEN_S * 1e6:.1f} us a token forward, twice "
        f"backward; attention {WINDOW_S * 1e3:.1f} ms forward, twice backward. Traffic: OLMoE shares, expert max / mean {skew:.2f} in the "
        f"{steps} judged steps after {WARM_UP} that policies know the counts of. {repeats} repeats, all rows in each, the order "
        f"turns. Sparse collectives {'on a thread, as on a stream' if bench.stream else 'as gloo runs them: later rounds in wait'}.\n\n"
        f"`poise calibrate`: intra {m.intra_bytes_per_s / 1e6:.2f}, inter {m.inter_bytes_per_s / 1e6:.3f} MB/s; start-up "
        f"{1e3 * m.start_s:.2f} ms, {1e3 * m.peer_s:.2f} ms a peer, at most {m.crowding_bytes / 1e3:.0f} kB lost to crowding; residual of its "
        f"link rows at most {links['worst_residual']:.1%}, median {links['median_residual']:.1%}."
    )  # fmt: skip


def main() -> None:
    options = parser(str(__doc__))
    options.add_argument("--cluster", default="2x4")
    options.add_argument("--rows", default="main")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--other-repeats", type=int, default=3)
    options.add_argument("--calibrate-seconds", type=float, default=90.0)
    options.add_argument("--calibrated", type=Path, help="folder that --keep left: nothing is calibrated")
    options.add_argument("--no-stream", action="store_true")
    options.add_argument("--dry", action="store_true", help="print the report, write nothing")
    options.add_argument("--timeline", type=Path, help="file for a step, measured and simulated (ui.perfetto.dev)")
    asked = options.parse_args()
    started = time.time()
    with workplace(asked.keep) as folder:
        bench = Bench(asked.cluster, asked.layers, not asked.no_stream, folder)
        if asked.calibrated:
            bench.take(asked.calibrated)
        else:
            bench.calibrate(asked.calibrate_seconds)
        names = {"main": list(MAIN), "all": None}.get(asked.rows, asked.rows.split(","))
        loads, others = (traffic(asked.data, WARM_UP + asked.steps, bench.layers, bench.devices, bench.experts, seed)
                         for seed in (TABLE_SEED, OTHER_SEED))  # fmt: skip
        rows = rows_of(bench, loads, names)
        other = bench.measure(others, rows_of(bench, others, names), asked.steps, asked.other_repeats)
        got = bench.measure(loads, rows, asked.steps, asked.repeats)
        np.savez(folder / "measured.npz", **got)
        np.savez(folder / "other.npz", **other)
        parts, found = compared(bench, loads, rows, got, other)
        if asked.timeline is not None:
            timeline(bench, got, rows, found, asked.timeline)
    text = [about(bench, loads, asked.steps, asked.repeats), *parts]
    text.append(f"Clock overruns {int(got['overruns'].sum())}, sleeps late by at most {1e3 * got['late_p99_s'].max():.2f} ms (p99); gradients "
                f"within {got['gaps'].max():.1e} of a dense run; links shaped: {bool(got['shaped'])}. Run time {time.time() - started:.0f} s.")  # fmt: skip
    if asked.dry:
        print("\n\n".join(text))
    else:
        write("Training, measured on emulated nodes", text, f"-{asked.cluster}")


if __name__ == "__main__":
    sys.exit(main())
