"""Training, measured: every policy on emulated nodes, beside what the calibrated cost model says of the same steps.

    python benchmarks/measured_train.py DATA [--cluster 2x4] [--rows main|all|NAME,NAME] [--repeats 20] [--steps 2]
        [--layers 2] [--no-stream] [--note TEXT]

DATA holds olmoe/expert_counts/*.npz. Calibrates the emulated cluster, measures control and overheads on other traffic
than the table's, then the table. Writes reports/DATE-measured_train-CLUSTER.md and a timeline beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import REPORTS, table, write
from train_cases import shares

from poise.cluster import Cluster
from poise.cost.weights import StepPrice, training_price
from poise.emulate import EmulatedCluster, run
from poise.emulate.spec import parse_shape
from poise.evaluate.stepwise import FastLoop
from poise.evaluate.timeline import Event, write_perfetto
from poise.evaluate.training import SourceLoads, TrainingReplay, replay_training
from poise.modelspec import ModelSpec
from poise.observe.predict import SlidingMean
from poise.policies.registry import parse_policy
from poise.policies.sharding import Balanced, Heterogeneous, even_sharding

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
MAIN = (FORCED, "expert-parallelism", "full-replication (FSDP)", "hecate", "hecate, best setting", "hecate-RM", "hecate-calibrated", "poise",
        "poise-RM", "llep", "moon-ep", "ultra-ep")  # fmt: skip


@dataclass(frozen=True)
class Fixed:
    """Owners that are given."""

    owner_LE: np.ndarray
    interval: int = 10**9

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


def model_of(layers: int, experts: int) -> ModelSpec:
    """Sizes as fully_shard_experts sees them."""
    return ModelSpec(
        "training", layers, tuple(range(layers)), experts, TOP_K, WIDTH, ROWS, 1, 4.0, 4.0, 4.0, 2.0 * WIDTH
    )


def traffic(data: Path, steps: int, layers: int, devices: int, experts: int, seed: int) -> SourceLoads:
    """Real shares of experts: a sequence is of one domain, the mixture drifts; as in benchmarks/train_cases.py."""
    rng = np.random.default_rng(seed)
    share = shares(data)
    pick = [rng.permutation(64)[:experts] for _ in range(layers)]
    share_lGE = np.stack([share[:, layer * 3 // layers][:, pick[layer]] for layer in range(layers)])
    share_lGE /= share_lGE.sum(axis=2, keepdims=True)
    out = np.zeros((steps, layers, devices, experts), np.int32)
    z = rng.normal(size=len(share))
    for step in range(steps):
        z = 0.97 * z + np.sqrt(1 - 0.97**2) * rng.normal(size=len(share))
        weight = np.exp(4 * z) / np.exp(4 * z).sum()
        count_DG = rng.multinomial(TOKENS // SEQUENCE, weight, size=devices)
        for layer in range(layers):
            for g in range(len(share)):
                out[step, layer] += rng.multinomial(count_DG[:, g] * SEQUENCE * TOP_K, share_lGE[layer, g])
    return SourceLoads(out, TOP_K)


class Bench:
    """The emulated cluster, its calibration, and runs on it."""

    def __init__(self, shape: str, layers: int, stream: bool, folder: Path) -> None:
        nodes, devices = parse_shape(shape)
        self.spec = EmulatedCluster(nodes, devices, INTRA, INTER, dilation=DILATION)
        self.layers, self.stream, self.folder = layers, stream, folder
        self.devices, self.experts = nodes * devices, EXPERTS_A_DEVICE * nodes * devices
        self.model = model_of(layers, self.experts)
        self.curve = folder / "curve.csv"
        knots = [1, 16, 128, 1024, 2048]
        self.curve.write_text("tokens,active_experts,seconds\n" + "".join(
            f"{n},1,{LAUNCH_S + n * TOKEN_S!r}\n" for n in knots))  # fmt: skip
        self.cluster, self.calibration, self.counts_s = Cluster.uniform(nodes, devices), {}, 0.0

    def calibrate(self, seconds: float) -> None:
        """``poise calibrate`` on the emulated cluster: no traffic or placement of the table is in it.

        It books half of the exchange of counts on each exchange. Here counts are a part of their own, so they come off.
        """
        path = self.folder / "cluster.yaml"
        words = ["poise.cli", "calibrate", "-o", str(path), "--hidden", str(WIDTH), "--inner", str(ROWS // 2), "--matrices",
                 "2", "--curve", str(self.curve), "--seconds", f"{seconds:g}", "--json"]  # fmt: skip
        done = run(self.spec, "-m", words, timeout=20 * seconds + 120, out=open(self.folder / "calibrate.out", "w"))
        self.calibration = json.loads(done.ranks[0].stdout)
        found = Cluster.parse(path)
        counts_s = float(np.median([row["counts_s"] for row in self.calibration["links"]["rows"]])) / 2
        self.counts_s = min(counts_s, found.intra_latency_s)
        self.cluster = replace(found, intra_latency_s=found.intra_latency_s - self.counts_s)

    def price(self, row: Row) -> StepPrice:
        """What the runtime's policies and the replay reckon with."""
        return training_price(TOKENS * self.devices, self.experts, self.cluster, self.model, window_s=WINDOW_S,
                              rematerialise=row.rematerialise)  # fmt: skip

    def replay(self, loads: SourceLoads, row: Row, *, thin: bool = False) -> TrainingReplay:
        """The same steps by the cost model."""
        loads = loads.force_balanced() if row.forced else loads
        owners = even_sharding(self.layers, self.experts, self.devices) if row.owners is None else row.owners
        return replay_training(loads, FastLoop(parse_policy(row.policy), row.slots, SlidingMean(5)), self.price(row),
                               sharding=Fixed(owners), first_reshard=0, warm_up=WARM_UP)  # fmt: skip

    def measure(self, loads: SourceLoads, rows: list[Row], steps: int, repeats: int) -> dict[str, np.ndarray]:
        """Marks of all rows; raises if experts were not computed as in a dense run, or the clock was overrun."""
        even = even_sharding(self.layers, self.experts, self.devices)
        job = {"cluster": str(self.folder / "cluster.yaml"), "curve": str(self.curve), "window_s": WINDOW_S, "layers": self.layers,
               "experts": self.experts, "top_k": TOP_K, "width": WIDTH, "rows_per_expert": ROWS, "warm_up": WARM_UP,
               "steps": steps, "repeats": repeats, "stream": self.stream,
               "table": [{"name": row.name, "policy": row.policy, "step_slots": row.slots, "rematerialise": row.rematerialise,
                          "owners": (even if row.owners is None else row.owners).tolist(),
                          "traffic": "forced" if row.forced else "load"} for row in rows]}  # fmt: skip
        paths = [self.folder / name for name in ("job.json", "counts.npz", "out.npz")]
        (self.folder / "cluster.yaml").write_text(self.cluster.to_yaml())
        paths[0].write_text(json.dumps(job))
        np.savez(paths[1], load=loads.load_BLSE, forced=loads.force_balanced().load_BLSE)
        done = run(self.spec, Path(__file__).with_name("train_rank.py"), [str(path) for path in paths],
                   timeout=300 + 20.0 * len(rows) * (repeats + 1) * (steps + 1))  # fmt: skip
        with np.load(paths[2], allow_pickle=False) as z:
            out = {name: z[name] for name in z.files}
        out["shaped"] = np.array(done.shaped)
        assert out["gaps"].max() < 1e-4, f"gradients differ from a dense run by {out['gaps'].max():.2g}"
        return out


def fronts(marks_LXDM: np.ndarray, ends_DX: np.ndarray) -> dict[str, float]:
    """Seconds of a step by term: between the moments at which the last rank had done a part; they add up to the step.

    marks [L, 2, D, 8], ends [D, 2].
    """
    out = dict.fromkeys(TERMS, 0.0)
    now = float(ends_DX[:, 0].max())
    waits = "weights, counts"
    forward = ("other", "attention", waits, "planning", "all-to-all", waits, "compute", "all-to-all")
    backward = ("other", waits, "all-to-all", "compute", "other", "all-to-all", "attention")
    front_LXM = marks_LXDM.max(axis=2)
    order = [(layer, 0) for layer in range(len(front_LXM))]
    order += [(layer, 1) for layer in reversed(range(len(front_LXM)))]
    for layer, way in order:
        for term, at in zip(backward if way else forward, front_LXM[layer, way], strict=False):
            out[term] += float(at) - now
            now = float(at)
    out[waits] += float(ends_DX[:, 1].max()) - now
    return out


def measured_terms(got: dict[str, np.ndarray], which: int) -> np.ndarray:
    """Seconds of a row by repeat and term, mean over its steps, float64 [R, terms]."""
    marks, ends = got["marks"][which], got["ends"][which]  # [R, B, L, D, 2, 8] and [R, B, D, 2]
    return np.array([
        np.mean([[*fronts(marks[r, b].swapaxes(1, 2), ends[r, b]).values()] for b in range(marks.shape[1])], axis=0)
        for r in range(len(marks))])  # fmt: skip


def predicted_terms(replay: TrainingReplay, counts_s: float, planning_s: float, other_s: float) -> np.ndarray:
    """The same of the model, float64 [terms]: counts (a layer), planning and other (a step) come from other traffic."""
    layers = replay.compute_BL.shape[1]
    weights = (replay.weights_BL - replay.switch_BL).sum(axis=1).mean()
    return np.array([replay.attention_s, replay.compute_BL.sum(axis=1).mean(), replay.exchange_BL.sum(axis=1).mean(),
                     weights + counts_s * layers, planning_s, other_s])  # fmt: skip


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
    ours = Balanced().plan(mean_LE, even, price)
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
        replay = bench.replay(loads, row)
        terms = measured_terms(got, which)
        found[row.name] = {
            "row": row, "replay": replay, "measured": terms, "same": bool((replay.tokens_BLD == got["tokens"][which]).all()),
            "predicted": predicted_terms(replay, counts_s, *constants[4:]),
        }  # fmt: skip
    step = {name: float(np.median(one["measured"].sum(axis=1))) for name, one in found.items()}
    ep, flat = step.get("expert-parallelism", np.nan), step.get(FORCED, np.nan)
    hecates = [step[name] for name in step if name.startswith("hecate") and "RM" not in name]
    head = ["policy", "setting", "max/mean", "step s", "quartiles", "over EP", "over EP, paired", "share of forced",
            "gap to forced closed", "modelled s", "error"]  # fmt: skip
    lines, errors = [], []
    for name, one in found.items():
        row, total = one["row"], one["measured"].sum(axis=1)
        low, high = np.percentile(total, [25, 75])
        paired = (
            np.median(found["expert-parallelism"]["measured"].sum(axis=1) / total)
            if "expert-parallelism" in found
            else 0
        )
        modelled = one["predicted"].sum()
        closed = (
            "" if not hecates or min(hecates) <= flat else f"{(min(hecates) - step[name]) / (min(hecates) - flat):.0%}"
        )
        lines.append([name, f"{row.policy}, M={row.slots}", f"{one['replay'].imbalance:.2f}", f"{step[name]:.3f}",
                      f"{low:.3f}-{high:.3f}", f"{ep / step[name]:.2f}", f"{paired:.2f}", f"{flat / step[name]:.1%}", closed,
                      f"{modelled:.3f}", f"{modelled / step[name] - 1:+.1%}"])  # fmt: skip
        medians = np.median(one["measured"], axis=0)
        cells = [f"{m:.3f} / {p:.3f} ({_off(p, m)})" for m, p in zip(medians, one["predicted"], strict=True)]
        errors.append([name, "yes" if one["same"] else "NO", *cells])
    parts = [
        table(head, lines),
        "### By term: measured / modelled seconds (error)\n\nA step is cut where the last rank is done with a part. Of the model, "
        "counts (expert parallelism's), planning and other are measured on other traffic; attention and compute are slept: no evidence. "
        "Weights that a window does not hide delay the counts, which share the ports: one column.",
        table(["policy", "same plan", *TERMS], errors),
    ]  # fmt: skip
    return parts, found


def _off(modelled: float, measured: float) -> str:
    return f"{modelled / measured - 1:+.1%}" if measured > 1e-4 else "-"


def timeline(bench: Bench, got: dict[str, np.ndarray], rows: list[Row], found: dict[str, Any], path: Path) -> None:
    """One measured and one simulated step of poise (or the last row)."""
    which = next((i for i, row in enumerate(rows) if row.name == "poise"), len(rows) - 1)
    row = rows[which]
    events: list[Event] = []
    names = (("", "attention", "counts", "planning", "dispatch", "weights", "experts", "combine"),
             ("", "weights", "combine, backward", "experts, backward", "weights posted", "dispatch, backward",
              "attention, backward"))  # fmt: skip
    marks = got["marks"][which, 0, -1]
    for rank in range(bench.devices):
        for layer in range(bench.layers):
            for way in (0, 1):
                at = marks[layer, rank, way]
                events += [
                    Event(names[way][i], rank, float(at[i - 1]), float(at[i] - at[i - 1]))
                    for i in range(1, len(names[way]))
                ]
        events += [Event(kind, bench.devices + rank, begin, end - begin)
                   for kind, begin, end in json.loads(str(got["spans"]))[rank][row.name]]  # fmt: skip
    write_perfetto(
        path, {f"measured: {row.name}": events, f"simulated: {row.name}": simulated(bench, found[row.name], row)}
    )


def simulated(bench: Bench, one: dict[str, Any], row: Row) -> list[Event]:
    """The modelled step: every term one after the other, waiting where a device is idle."""
    replay: TrainingReplay = one["replay"]
    control = one["predicted"][4] / bench.layers  # planning; counts are booked with weights
    step, now = -1, 0.0
    events: list[Event] = []
    order = [(layer, 0) for layer in range(bench.layers)] + [(layer, 1) for layer in reversed(range(bench.layers))]
    for layer, way in order:
        share = replay.tokens_BLD[step, layer] / max(1, replay.tokens_BLD[step, layer].max())
        compute, exchange = replay.compute_BL[step, layer], replay.exchange_BL[step, layer] / 4
        parts = [("attention", WINDOW_S), ("control", control), ("dispatch", exchange), ("experts", compute / 3),
                 ("combine", exchange)]  # fmt: skip
        if way:
            parts = [("combine, backward", exchange), ("experts, backward", compute * 2 / 3), ("dispatch, backward", exchange),
                     ("weights", replay.weights_BL[step, layer]), ("attention, backward", 2 * WINDOW_S)]  # fmt: skip
        for name, seconds in parts:
            for device in range(bench.devices):
                took = seconds * share[device] if name.startswith("experts") else seconds
                events.append(Event(name, device, now, float(took)))
            now += float(seconds)
    return events


def about(bench: Bench, loads: SourceLoads, steps: int, repeats: int) -> str:
    judged = loads.load_BLSE[WARM_UP : WARM_UP + steps].sum(axis=2)
    skew = (judged.max(axis=2) / judged.mean(axis=2)).mean()
    c = bench.cluster
    links = bench.calibration.get("links") or {"worst_residual": np.nan, "median_residual": np.nan}
    return (
        f"Emulated {bench.spec.nodes} x {bench.spec.devices_per_node} devices, {INTRA / 1e6:g} MB/s a device inside a node, {INTER / 1e6:g} MB/s "
        f"a device between nodes. It stands for GPT-MoE-S on V100s (45 % of peak, 8192 tokens a device, top-2) with a 100 Gb/s "
        f"port a device (and a fabric {INTRA / INTER:g} times as fast, where theirs is 12), {DILATION:g} times slower, and with {INTER * DILATION / 12.5e9:.3f} of the bytes, since this machine carries no more: "
        f"bytes over rate are as there. {bench.experts} experts of {ROWS * WIDTH * 4 / 1e3:.0f} kB, {bench.layers} layers, {TOKENS} tokens "
        f"of {WIDTH * 4} bytes a device, M = {SLOTS}. Expert {LAUNCH_S * 1e3:.2f} ms + {TOKEN_S * 1e6:.1f} us a token forward, twice "
        f"backward; attention {WINDOW_S * 1e3:.1f} ms forward, twice backward. Traffic: OLMoE shares, expert max / mean {skew:.2f} in the "
        f"{steps} judged steps after {WARM_UP} that policies know the counts of. {repeats} repeats, all rows in each, the order "
        f"turns. Sparse collectives {'on a thread, as on a stream' if bench.stream else 'as gloo runs them: later rounds in wait'}.\n\n"
        f"`poise calibrate`: intra {c.intra_bytes_per_s / 1e6:.2f}, inter {c.inter_bytes_per_s / 1e6:.3f} MB/s; start-up "
        f"{1e3 * (c.intra_latency_s + c.inter_latency_s):.2f} ms (without {1e3 * bench.counts_s:.2f} ms of counts) + {1e3 * c.peer_latency_s:.2f} ms a peer; residual of its link rows at most "
        f"{links['worst_residual']:.1%}, median {links['median_residual']:.1%}."
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--cluster", default="2x4")
    parser.add_argument("--rows", default="main")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--other-repeats", type=int, default=3)
    parser.add_argument("--calibrate-seconds", type=float, default=90.0)
    parser.add_argument("--calibrated", type=Path, help="a cluster file from before; nothing is calibrated")
    parser.add_argument("--no-stream", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print the report, write nothing")
    parser.add_argument("--keep", type=Path, help="folder for what was measured")
    asked = parser.parse_args()
    started = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(asked.cluster, asked.layers, not asked.no_stream, folder)
        if asked.calibrated:
            bench.cluster = Cluster.parse(asked.calibrated)
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
        if not asked.dry:
            timeline(bench, got, rows, found, REPORTS / f"measured_train-{asked.cluster}.perfetto.json")
    text = [about(bench, loads, asked.steps, asked.repeats), *parts]
    text.append(f"Clock overruns {int(got['overruns'].sum())}, sleeps late by at most {1e3 * got['late_p99_s'].max():.2f} ms (p99); gradients "
                f"within {got['gaps'].max():.1e} of a dense run; links shaped: {bool(got['shaped'])}. Run time {time.time() - started:.0f} s.")  # fmt: skip
    if asked.dry:
        print("\n\n".join(text))
    else:
        write("Training, measured on emulated nodes", text, f"-{asked.cluster}")


if __name__ == "__main__":
    sys.exit(main())
