"""Trainers that others wrote beside poise's sharded training, on CPU: parity with dense first, then steps in turn.

    python benchmarks/peers.py [DATA] [--peers deepspeed,nemo-automodel,torchtitan] [--cluster 2x4] [--repeats 20]
        [--kinds balanced,skewed,drifting] [--experts 16 --top-k 2] [--once] [--parity-only] [--make-only] [--note TEXT] [--dry]

Each peer runs in an environment of its own (made at the first run, of the size that is said before), with poise's rows in
the same processes: same model, tokens, seeds and routing, emulated links, and a device clock in everyone's experts.
DATA holds olmoe/expert_counts/*.npz, whose shares are the skew; without it, shares fall as 1 / rank. Writes
reports/DATE-peers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import table, write
from measured import workplace
from peer import deepspeed_autoep, environments, nemo, titan
from peer.model import Shape
from peer.ours import ROWS
from peer.protocol import Peer
from train_cases import shares

from poise.lab.emulate import EmulatedCluster, run
from poise.lab.emulate.quiet import Meter, settle, why_not
from poise.lab.emulate.spec import parse_shape
from poise.machine.cluster import Cluster
from poise.machine.curve import MeasuredCurve

PEERS = {module.PEER.name: module.PEER for module in (deepspeed_autoep, nemo, titan)}
KINDS = ("balanced", "skewed", "drifting")
INTRA, INTER, DILATION = 100e6, 20e6, 100.0
"""Bytes a second of a device's ports, as in benchmarks/measured_train.py."""
START_S, TOKEN_S, ATTENTION_S = 1e-3, 60e-6, 30e-3
"""The device clock: a start of an expert and seconds a token, forward; attention of a layer."""
LATENCY_S = 4e-3
"""Start of an exchange here (docs/emulation.md), for policies that reckon with it."""
RATE, LIMIT, PARITY_STEPS, WARM_UP, SEED, KNOTS = 1e-4, 1e-6, 4, 5, 11, 4
MOST = ("expert-parallelism", "hecate", "llep", "poise", "force-balanced")
FEW = ("expert-parallelism", "poise")
ONCE = ("expert-parallelism, once", "poise, once")
NOT_COMPARED = ("force-balanced",)
"""Computes something else, to see what balance would cost."""


@dataclass(frozen=True)
class Result:
    """What was measured beside one peer."""

    peer: Peer
    got: dict[str, Any]
    others: float | None
    shaped: bool

    @property
    def parity(self) -> dict[str, dict[str, float]]:
        """Of every row: error, held and grown (benchmarks/peers_rank.py)."""
        return json.loads(str(self.got["parity"]))

    @property
    def names(self) -> list[str]:
        """Rows that were timed."""
        return [str(name) for name in self.got["names"]]

    def ratios(self, kind: str, name: str) -> np.ndarray:
        """Seconds of the peer over those of a row, repeat by repeat: above 1 the row is faster."""
        seconds = self.got[f"{kind} seconds"]
        return seconds[self.names.index(self.peer.name)] / seconds[self.names.index(name)]


def targets(shape: Shape, data: Path | None) -> dict[str, np.ndarray]:
    """Shares of experts that routing is fitted to, [knots, L, E], of each kind."""
    rng = np.random.default_rng(SEED)
    if data is None:
        falling = 1.0 / np.arange(1, shape.experts + 1)
        pick = [[rng.permutation(falling) for _ in range(shape.layers)] for _ in range(KNOTS)]
        known = np.array(pick)
    else:
        share = shares(data)
        experts = [rng.permutation(share.shape[2])[: shape.experts] for _ in range(shape.layers)]
        domains = rng.permutation(len(share))[:KNOTS]
        known = np.stack([[share[domain, layer * 3 // shape.layers][experts[layer]] for layer in range(shape.layers)]
                          for domain in domains])  # fmt: skip
    known = known / known.sum(axis=2, keepdims=True)
    even = np.full((1, shape.layers, shape.experts), 1.0 / shape.experts)
    return {"balanced": even, "skewed": known[:1], "drifting": known}


def shape_of(asked: argparse.Namespace) -> Shape:
    """Sizes of the model."""
    return Shape(experts=asked.experts, top_k=asked.top_k)


def device_cluster(spec: EmulatedCluster, shape: Shape) -> Cluster:
    """The emulated machine as poise's policies reckon with it."""
    knots = np.array([1.0, 4096.0])
    curve = MeasuredCurve(knots, START_S + knots * TOKEN_S, 3.0 * shape.hidden * shape.inner, 4.0)
    return replace(
        Cluster.uniform(spec.nodes, spec.devices_per_node, "a100"), name="emulated", preset="", open=(),
        expert_curve=curve, intra_bytes_per_s=INTRA, inter_bytes_per_s=INTER, intra_latency_s=LATENCY_S,
        inter_latency_s=LATENCY_S,
    )  # fmt: skip


def measure(peer: Peer, asked: argparse.Namespace, folder: Path) -> Result:
    """One launch in the peer's environment."""
    nodes, devices = parse_shape(asked.cluster)
    spec = EmulatedCluster(nodes, devices, INTRA, INTER, dilation=DILATION)
    shape = shape_of(asked)
    (folder / "cluster.yaml").write_text(device_cluster(spec, shape).to_yaml())
    rows = MOST if peer is next(iter(PEERS.values())) or asked.all_rows else FEW
    rows = (*rows, *(ONCE if asked.once else ()))
    job = {"peer": peer.name, "module": peer.module, "rows": [name for name in ROWS if name in rows], "shape": asdict(shape),
           "clock": {"start_s": START_S, "token_s": TOKEN_S, "attention_s": ATTENTION_S}, "rate": RATE,
           "cluster": str(folder / "cluster.yaml"), "ranks": asked.cluster, "parity_steps": PARITY_STEPS, "limit": LIMIT, "not_compared": NOT_COMPARED,
           "kinds": asked.kinds.split(","), "warm_up": asked.warm_up, "repeats": 0 if asked.parity_only else asked.repeats}  # fmt: skip
    paths = [folder / name for name in (f"{peer.name}.json", f"{peer.name}-in.npz", f"{peer.name}-out.npz")]
    kept = folder / f"{peer.name}-about.json"
    if kept.exists() and paths[2].exists():  # of an earlier run that --keep named
        before = json.loads(paths[0].read_text())
        if other := sorted(key for key in job if before.get(key) != json.loads(json.dumps(job[key]))):
            raise SystemExit(f"{folder} holds {peer.name} measured with other {', '.join(other)}: name another folder")
        with np.load(paths[2], allow_pickle=False) as z:
            return Result(peer, {name: z[name] for name in z.files}, **json.loads(kept.read_text()))
    paths[0].write_text(json.dumps(job))
    wanted = {"skewed"} | set(() if asked.parity_only else job["kinds"])  # parity is under skew
    np.savez(paths[1], **{kind: share for kind, share in targets(shape, asked.data).items() if kind in wanted})
    meter = Meter()
    done = run(spec, Path(__file__).with_name("peers_rank.py"), [str(path) for path in paths],
               python=environments.python(peer), timeout=asked.timeout)  # fmt: skip
    kept.write_text(json.dumps({"others": meter.others(), "shaped": done.shaped}))
    with np.load(paths[2], allow_pickle=False) as z:
        return Result(peer, {name: z[name] for name in z.files}, **json.loads(kept.read_text()))


def middle(values: np.ndarray, digits: int = 2) -> str:
    """Median, and the quartiles."""
    low, half, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{half:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def step_table(one: Result, kind: str) -> str:
    """The rows beside one peer under one routing."""
    lines = []
    for at, name in enumerate(one.names):
        seconds, sent = one.got[f"{kind} seconds"][at], one.got[f"{kind} sent"][at]
        overload, owners = (np.nanmean(values) if np.isfinite(values := one.got[f"{kind} {key}"][at]).any() else np.nan
                            for key in ("overload", "owners"))  # fmt: skip
        worked = one.got.get(f"{kind} processor")
        lines.append([f"**{name}**" if name == one.peer.name else name, middle(seconds, 3),
                      "1" if name == one.peer.name else middle(one.ratios(kind, name)),
                      "-" if worked is None else middle(1e3 * worked[at], 1),
                      f"{np.median(sent) / 1e6:.2f}" if one.shaped else "-",
                      "-" if np.isnan(overload) else f"{overload:.2f} ({owners:.2f})"])  # fmt: skip
    head = [
        "row",
        "step s",
        f"{one.peer.name} over it, paired",
        "processor ms of a rank",
        "MB sent, all ranks",
        "max/mean (of owners)",
    ]
    return table(head, lines)


def parity_table(results: list[Result]) -> str:
    lines = []
    for one in results:
        for name, found in one.parity.items():
            compared = name not in NOT_COMPARED
            lines.append([one.peer.name, name, f"{found['error']:.1e}" if compared else "not compared",
                          ("yes" if found["error"] <= LIMIT else "**no: not timed**") if compared else "",
                          f"{found['held'] / 1e6:.1f}", f"{found['grown'] / 1e6:.1f}"])  # fmt: skip
    return table(
        ["beside", "row", "largest error of a loss", f"within {LIMIT:g}", "held MB", "growth in a step MB"], lines
    )


def summary(results: list[Result], kinds: list[str]) -> str:
    """How many times faster poise is than each peer; a line under it if it loses."""
    lines = []
    for one in results:
        if one.peer.name in one.names and "poise" in one.names:
            lines.append([one.peer.name, *(middle(one.ratios(kind, "poise")) for kind in kinds)])
    return table(["peer over poise, paired", *kinds], lines) if lines else "No peer was timed."


def doubts(results: list[Result], kinds: list[str]) -> str:
    """Why the times cannot be trusted, or nothing."""
    out = []
    for one in results:
        if one.peer.name not in one.names:
            continue
        names = [name for name in one.names if name != one.peer.name]
        steady = [
            settle(list(one.ratios(kind, name)), [0.0] * len(one.ratios(kind, name)))[1]
            for kind in kinds
            for name in names
        ]
        if why := why_not(steady, one.others):
            out.append(f"beside {one.peer.name}, {why}")
        if not one.shaped:
            out.append(f"beside {one.peer.name}, links were not shaped")
        if one.others is not None and one.others > 0.1 and not why:
            out.append(f"beside {one.peer.name}, others took {one.others:.0%} of the cores, which no row shows")
    return "; ".join(out)


def about(asked: argparse.Namespace, results: list[Result]) -> str:
    shape = shape_of(asked)
    skew = "shares of OLMoE's experts on one domain (drifting: four domains, one after the other)" if asked.data else (
        "shares that fall as 1 / rank (drifting: four orders, one after the other)")  # fmt: skip
    return (
        f"A Mixtral of Hugging Face with {shape.layers} layers of {shape.experts} experts ({shape.hidden} x {shape.inner}, top-{shape.top_k}), "
        f"{shape.tokens} tokens a rank, float32, AdamW. Emulated {asked.cluster} devices, {INTRA / 1e6:g} MB/s a device inside a node, "
        f"{INTER / 1e6:g} MB/s between nodes; an expert takes {START_S * 1e3:g} ms and {TOKEN_S * 1e6:g} us a token forward, twice that backward, attention "
        f"of a layer {ATTENTION_S * 1e3:g} ms: slept, no evidence of computing. All rows of a table run in the same processes, a step of each in every repeat, in "
        f"an order that turns; {asked.repeats} repeats after {asked.warm_up} that are not counted. Routing: the first column of every router is a bias on its experts, since "
        f"coordinate 0 of the residual stream is the same for all tokens; biases are fitted to {skew} on tokens of no step, and set alike in all rows before a "
        "step. poise's rows: M = 2, owners even. Bytes are those of the devices' interfaces, with headers.\n\n"
        + table(["peer", "installed", "GB on disk", "what of it runs on CPU"],
                [[one.peer.name, environments.versions(one.peer), f"{environments.gigabytes(one.peer):.1f}", one.peer.runs] for one in results])
        + "\n\nmegatron-core is not here: docs/training.md says what stops it."
    )  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    options.add_argument("data", type=Path, nargs="?")
    options.add_argument("--peers", default=",".join(PEERS))
    options.add_argument("--cluster", default="2x4")
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--warm-up", type=int, default=WARM_UP, help="steps of each row that are not counted")
    options.add_argument("--kinds", default=",".join(KINDS))
    options.add_argument(
        "--all-rows", action="store_true", help="all of poise's rows beside every peer, not the first alone"
    )
    options.add_argument("--experts", type=int, default=Shape.experts)
    options.add_argument("--top-k", type=int, default=Shape.top_k)
    options.add_argument("--once", action="store_true", help="poise's rows also with a token to a device once")
    options.add_argument("--parity-only", action="store_true")
    options.add_argument("--make-only", action="store_true", help="make the environments and end")
    options.add_argument("--timeout", type=float, default=1500.0, help="seconds for one peer")
    options.add_argument("--note", default="", help="a sentence for the head of the report")
    options.add_argument(
        "--keep", type=Path, help="folder for what is measured; a peer whose results lie there is not run again"
    )
    options.add_argument("--dry", action="store_true", help="print the report, write nothing")
    asked = options.parse_args()
    chosen = [PEERS[name] for name in asked.peers.split(",")]
    for peer in chosen:
        environments.make(peer)
    if asked.make_only:
        return
    began, kinds = time.monotonic(), asked.kinds.split(",")
    with workplace(asked.keep) as folder:
        results = [measure(peer, asked, folder.resolve()) for peer in chosen]
    why = doubts(results, kinds) if not asked.parity_only else ""
    parts = [asked.note] if asked.note else []
    if why:
        parts.append(f"**INCONCLUSIVE**: no time below says who is faster ({why}).")
    parts += [about(asked, results), "## Parity with one dense process, and memory", parity_table(results)]
    if not asked.parity_only:
        parts += ["## Steps", summary(results, kinds)]
        for one in results:
            for kind in kinds if one.peer.name in one.names else ():
                parts += [f"### Beside {one.peer.name}, {kind}", step_table(one, kind)]
    ends = ", ".join(f"{one.peer.name} {float(one.got['overruns']):.1%}" for one in results)
    parts.append(f"Computations that the real arithmetic overran: {ends}. Run time {time.monotonic() - began:.0f} s.")
    if asked.dry:
        print("\n\n".join(parts))
    else:
        write("Training beside peers", parts)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
