"""What measured benchmarks share: an emulated cluster and its constants, ranks that run a job on it, repeats, timelines.

:class:`Emulation` is outside the ranks; :func:`on_ranks` and :func:`in_turn` are on each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.stats import binomtest

from poise.cost.exchange import ExchangeModel
from poise.lab.emulate import EmulatedCluster, run
from poise.machine.cluster import Cluster
from poise.simulate.perfetto import Event

HERE = Path(__file__).parent


def parser(words: str) -> argparse.ArgumentParser:
    """The options that all have."""
    out = argparse.ArgumentParser(description=words.split("\n")[0])
    out.add_argument("data", type=Path)
    out.add_argument("--repeats", type=int, default=20)
    out.add_argument(
        "--keep",
        type=Path,
        help="folder for what is measured; a calibration that lies there is used, of serving measurements too",
    )
    return out


@contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """The folder to keep, or one that is gone afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def write_curve(path: Path, tokens: Sequence[float], seconds: Sequence[float]) -> None:
    """What one expert takes: the device clock's curve and the cost model's."""
    rows = (f"{n:g},1,{float(s)!r}\n" for n, s in zip(tokens, seconds, strict=True))
    path.write_text("tokens,active_experts,seconds\n" + "".join(rows))


@dataclass(frozen=True)
class Emulation:
    """An emulated cluster, a folder for what is known of it, and its experts' curve."""

    spec: EmulatedCluster
    folder: Path
    curve: Path

    def calibrate(self, hidden: int, inner: int, seconds: float) -> None:
        """``poise calibrate`` on it, as a user runs it; not again where the folder holds its answer."""
        path = self.folder / "cluster.yaml"
        if path.exists():
            return
        words = ["poise.cli", "calibrate", "-o", str(path), "--hidden", str(hidden), "--inner", str(inner), "--matrices",
                 "2", "--curve", str(self.curve), "--seconds", f"{seconds:g}", "--json"]  # fmt: skip
        with open(self.folder / "calibrate.out", "w") as said:
            done = run(self.spec, "-m", words, timeout=20 * seconds + 120, out=said)
        (self.folder / "calibration.json").write_text(done.ranks[0].stdout)

    def measure(
        self, script: str, job: dict[str, Any], arrays: dict[str, Any], *, timeout: float, again: bool = True
    ) -> dict[str, np.ndarray]:
        """What a script of this folder saves that every rank runs, and ``shaped``, whether links had their rates."""
        paths = [self.folder / name for name in ("job.json", "in.npz", "out.npz")]
        if again or not paths[2].exists():
            paths[0].write_text(json.dumps(job))
            np.savez(paths[1], **arrays)
            done = run(self.spec, HERE / script, [str(path) for path in paths], timeout=timeout)
            (self.folder / "shaped").write_text(str(int(done.shaped)))
        with np.load(paths[2], allow_pickle=False) as z:
            out = {name: z[name] for name in z.files}
        return {**out, "shaped": np.array(bool(int((self.folder / "shaped").read_text())))}


def calibration(folder: Path) -> tuple[Cluster, ExchangeModel, dict[str, Any]]:
    """What :meth:`Emulation.calibrate` left: the cluster, the finer model of exchanges, all that it said."""
    said = json.loads((folder / "calibration.json").read_text())
    constants = {field.name: said["exchange"][field.name] for field in fields(ExchangeModel)}
    return Cluster.parse(folder / "cluster.yaml"), ExchangeModel(**constants), said


def by_term(fronts_M: np.ndarray, terms: Sequence[str]) -> dict[str, np.ndarray]:
    """Seconds from each moment on the last axis to the next, added up by the term that each is of.

    Moments at which the last rank had done a part: so terms add up to the whole.
    """
    out: dict[str, np.ndarray] = {}
    for term, seconds in zip(terms, np.moveaxis(np.diff(fronts_M, axis=-1), -1, 0), strict=True):
        out[term] = out.get(term, 0.0) + seconds
    return out


def part_events(marks_DM: np.ndarray, names: Sequence[str]) -> list[Event]:
    """What each rank did between two marks, those parts left out that took no time."""
    return [Event(name, rank, float(a), float(b - a)) for rank, at in enumerate(marks_DM)
            for name, a, b in zip(names, at, at[1:], strict=False) if b > a]  # fmt: skip


def told_apart(differences: np.ndarray) -> float:
    """The p of a sign test over paired repeats: how often equal ways differ as one-sidedly."""
    return float(binomtest(int((differences > 0).sum()), len(differences)).pvalue)


class MeasuredRow(Protocol):
    """A row of the table on one rank."""

    def reset(self, warm_up: int) -> None:
        """As it is after the warm-up steps."""

    def rehearse(self, step: int) -> None:
        """A step that is not timed: connections, pages, and whether the numbers are right."""


def in_turn(rows: Sequence[MeasuredRow], job: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Row, repeat and step that are to be measured now: all rows in every repeat, in an order that turns."""
    import torch.distributed as dist

    warm_up, steps = job["warm_up"], job["steps"]
    for repeat in range(job["repeats"]):
        for turn in range(len(rows)):
            which = (turn + repeat) % len(rows)
            rows[which].reset(warm_up)
            if repeat == 0:
                rows[which].rehearse(warm_up)
                rows[which].reset(warm_up)
            for step in range(steps):
                yield which, repeat, step
        if dist.get_rank() == 0:
            print(f"repeat {repeat + 1}/{job['repeats']}", file=sys.stderr, flush=True)


def on_ranks(
    work: Callable[[dict[str, Any], dict[str, np.ndarray]], dict[str, Any]],
    together: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> None:
    """A rank's whole life, JOB.json IN.npz OUT.npz: ``work`` on each, and what is made ``together`` of their answers."""
    import torch
    import torch.distributed as dist

    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    with np.load(sys.argv[2], allow_pickle=False) as z:
        arrays = {name: z[name] for name in z.files}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, work(job, arrays))
    if dist.get_rank() == 0:
        np.savez(sys.argv[3], **together(every))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort a finished process while the interpreter ends


def until(when: float) -> None:
    """Sleep to a moment of the monotonic clock."""
    while (left := when - time.monotonic()) > 0:
        time.sleep(left)
