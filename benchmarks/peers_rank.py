"""A rank of benchmarks/peers.py, in the environment of a peer: parity with one dense process, then steps in turn.

    peers_rank.py JOB.json IN.npz OUT.npz

JOB names the peer's adapter and poise's rows. A row whose losses differ from the dense run's is not timed. Every step of
a row is a repeat of all rows, in an order that turns, on the same tokens and with the same routing biases.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]  # this checkout's poise, whatever the environment has
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from peer import model as shared  # noqa: E402
from peer import ours, usage  # noqa: E402
from peer.clock import Device  # noqa: E402
from peer.protocol import Settings  # noqa: E402

from poise.machine.cluster import Cluster  # noqa: E402


def say(*words: Any) -> None:
    if dist.get_rank() == 0:
        print(*words, file=sys.stderr, flush=True)


def mean(value: float) -> float:
    """Over ranks."""
    one = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(one)
    return one.item() / dist.get_world_size()


def gathered(value: float) -> list[float]:
    """Of every rank."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, float(value))
    return every


def from_first(value: Any) -> Any:
    """What rank 0 has."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


class Bench:
    """All rows of one peer's processes."""

    def __init__(self, job: dict[str, Any], shares: dict[str, np.ndarray]) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.job, self.shape = job, shared.Shape(**job["shape"])
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.clock = Device(**job["clock"])
        self.settings = Settings(self.shape, init_device_mesh("cpu", (self.ranks,)), self.clock, job["rate"])
        self.cluster = Cluster.parse(Path(job["cluster"]))
        self.biases = from_first(self.fit(shares) if self.rank == 0 else None)
        self.rows: dict[str, Any] = {}

    def fit(self, shares: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Biases [knots, L, E] of each routing."""
        model = shared.build(self.shape)
        return {
            kind: np.stack([shared.fitted(model, self.shape, one, self.ranks) for one in shares[kind]])
            for kind in shares
        }

    def bias(self, kind: str, step: int, of: int) -> np.ndarray:
        """[L, E]: of several knots, on the line between two of them."""
        knots = self.biases[kind]
        at = (len(knots) - 1) * step / max(1, of - 1)
        low = min(int(at), len(knots) - 1)
        high = min(low + 1, len(knots) - 1)
        return knots[low] + (at - low) * (knots[high] - knots[low])

    def dense_losses(self, steps: int) -> list[float]:
        """Of one process on the tokens of all ranks; the others wait."""
        losses = []
        if self.rank == 0:
            model = shared.build(self.shape)
            optimizer = torch.optim.AdamW(model.parameters(), lr=self.settings.rate)
            for step in range(steps):
                shared.set_biases(
                    [layer.mlp.gate.weight for layer in model.model.layers], self.bias("skewed", step, steps)
                )
                optimizer.zero_grad()
                loss = shared.loss_of(model, shared.tokens(self.shape, step, self.ranks))
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return from_first(losses)

    def step(self, name: str, number: int, bias_LE: np.ndarray) -> float:
        """One step of a row on the tokens of a number; its loss on this rank."""
        row = self.rows[name]
        shared.set_biases(row.gates(), bias_LE)
        return row.step(shared.tokens(self.shape, number, self.ranks, self.rank))

    def build(self, name: str) -> None:
        """A row, of poise's or the peer's own."""
        if name in ours.ROWS:
            self.rows[name] = ours.PoiseTrainer(self.settings, ours.ROWS[name], self.cluster)
        else:
            self.rows[name] = importlib.import_module(f"peer.{self.job['module']}").build(self.settings)

    def parity(self, steps: int) -> dict[str, dict[str, float]]:
        """Of every row: largest relative error of a loss, bytes held, largest growth within one more step."""
        wanted, found = self.dense_losses(steps), {}
        say("dense losses", " ".join(f"{loss:.7f}" for loss in wanted))
        for name in [self.job["peer"], *self.job["rows"]]:
            began = time.monotonic()
            self.build(name)
            losses = [mean(self.step(name, step, self.bias("skewed", step, steps))) for step in range(steps)]
            error = max(abs(got - want) / abs(want) for got, want in zip(losses, wanted, strict=True))
            grown: list[int] = []
            with usage.peak_memory(grown):
                self.step(name, steps, self.bias("skewed", 0, 1))
            found[name] = {
                "error": error,
                "held": max(gathered(self.rows[name].held())),
                "grown": max(gathered(grown[0])),
            }
            say(f"{name}: losses within {error:.1e} of the dense run's, {time.monotonic() - began:.1f} s")
            dist.barrier()
        return found

    def timed(self, names: list[str], kind: str, warm_up: int, repeats: int, first: int) -> dict[str, np.ndarray]:
        """Seconds [row, repeat], processor seconds of a rank in the mean, bytes sent by all ranks, loss, and max / mean
        pairs over ranks, in turn.
        """
        keys = ("seconds", "processor", "sent", "loss", "overload", "owners")
        out = {key: np.full((len(names), repeats), np.nan) for key in keys}
        for repeat in range(-warm_up, repeats):
            bias_LE = self.bias(kind, max(0, repeat), repeats)
            for turn in range(len(names)):
                which = (turn + repeat) % len(names)
                dist.barrier()
                sent, began, worked = usage.sent_bytes(), time.monotonic(), time.process_time()
                loss = self.step(names[which], first + warm_up + repeat, bias_LE)
                worked = time.process_time() - worked
                dist.barrier()
                seconds, sent = time.monotonic() - began, usage.sent_bytes() - sent
                total, worked = sum(gathered(sent)), mean(worked)
                loss = mean(loss)
                if repeat >= 0:
                    out["seconds"][which, repeat], out["sent"][which, repeat] = seconds, total
                    out["processor"][which, repeat] = worked
                    out["loss"][which, repeat] = loss
                    if hasattr(self.rows[names[which]], "overload"):
                        overload, owners = self.rows[names[which]].overload()
                        out["overload"][which, repeat], out["owners"][which, repeat] = overload, owners
            if repeat % 5 == 4:
                say(f"{kind}: repeat {repeat + 1}/{repeats}")
        return out


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    with np.load(sys.argv[2], allow_pickle=False) as z:
        shares = {name: z[name] for name in z.files}
    torch.set_num_threads(1)
    importlib.import_module(f"peer.{job['module']}").start()
    bench = Bench(job, shares)
    found = bench.parity(job["parity_steps"])
    answer: dict[str, Any] = {"parity": np.array(json.dumps(found))}
    names = [name for name, one in found.items() if one["error"] <= job["limit"] or name in job["not_compared"]]
    answer["names"] = np.array(names)
    first, bench.clock.on = job["parity_steps"] + 1, True
    for kind in job["kinds"] if job["repeats"] else ():
        got = bench.timed(names, kind, job["warm_up"], job["repeats"], first)
        first += job["warm_up"] + job["repeats"]
        answer |= {f"{kind} {key}": value for key, value in got.items()}
    report = bench.clock.clock.report()
    answer["overruns"] = np.array(sum(gathered(report["overruns"])) / max(1.0, sum(gathered(report["count"]))))
    if bench.rank == 0:
        np.savez(sys.argv[3], **answer)
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort a finished process while the interpreter ends


if __name__ == "__main__":
    main()
