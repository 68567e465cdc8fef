"""compare: every placement on every part of the traffic, in one table, with the bound beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from poise.cluster import Cluster
from poise.cost.bound import bound_terms
from poise.cost.split import Split
from poise.cost.traffic import Traffic
from poise.errors import OptionError
from poise.evaluate.replay import Replay, replay
from poise.evaluate.stepwise import WARM_UP, FastLoop, replay_steps
from poise.modelspec import ModelSpec
from poise.observe.batch import RoutingBatch
from poise.planning.placement import Placement

IN_SAMPLE = "in-sample"
NOT_WORTH = 0.01
"""A gain below this share of a step is called not worth it."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A placement in a comparison.

    Parameters
    ----------
    name : its row.
    placement : what is replayed.
    pooled : its memory is counted over all layers together.
    seconds : planning time, or None if it came from a file.
    fast : a fast loop over the placement, or None: the engine's own split.
    prior_LE : float64 [L, E], loads a fast loop knows before the first step, or None.
    made_for : the placement as it was given, where it is for another number of devices than the cluster has, or None.
    """

    name: str
    placement: Placement
    pooled: bool = False
    seconds: float | None = None
    fast: FastLoop | None = None
    prior_LE: NDArray[np.float64] | None = None
    made_for: Placement | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Replays of all entries on all parts of the traffic.

    Parameters
    ----------
    entries : what was compared, in order; the first is the baseline.
    batches : the traffic of each part; :data:`IN_SAMPLE` is what the methods were fitted on.
    replays : (entry name, part) -> replay.
    bounds_B : part -> least seconds of each step for any placement with the slots of the problem.
    cluster, model, traffic, split, slots_D : what was priced, and how.
    notes : what the reader must know, one sentence each.
    warm_up : steps at the start of each part that ran but are not judged.
    """

    entries: tuple[Entry, ...]
    batches: Mapping[str, RoutingBatch]
    replays: Mapping[tuple[str, str], Replay]
    bounds_B: Mapping[str, NDArray[np.float64]]
    cluster: Cluster
    model: ModelSpec
    traffic: Traffic
    split: Split
    slots_D: NDArray[np.int64]
    notes: tuple[str, ...] = ()
    warm_up: int = 0

    @property
    def judged_on(self) -> str:
        """The part that the verdict is about: the first held-out one, else the in-sample one."""
        return next((part for part in self.batches if part != IN_SAMPLE), IN_SAMPLE)

    def rows(self) -> list[dict[str, Any]]:
        """One row an entry and part, plus the bound; JSON values."""
        out = []
        for part in self.batches:
            base = float(self.replays[self.entries[0].name, part].step_seconds_B.mean())
            for entry in self.entries:
                got = self.replays[entry.name, part]
                seconds = got.step_seconds_B
                out.append(
                    {
                        "name": entry.name,
                        "judged_on": part,
                        "imbalance": got.imbalance,
                        "imbalance_p99": got.imbalance_p99,
                        "cross_device_share": got.cross_device_share,
                        "cross_node_share": got.cross_node_share,
                        "step_seconds": _spread(seconds),
                        "efficiency": got.efficiency,
                        "moved_bytes_per_step": got.moved_bytes_per_step,
                        "speedup": base / float(seconds.mean()),
                        "planning_seconds": entry.seconds,
                    }
                )
            bound = self.bounds_B[part]
            out.append(
                {
                    "name": "bound",
                    "judged_on": part,
                    "imbalance": 1.0,
                    "imbalance_p99": 1.0,
                    "cross_device_share": None,
                    "cross_node_share": None,
                    "step_seconds": _spread(bound),
                    "efficiency": 1.0,
                    "moved_bytes_per_step": 0.0,
                    "speedup": base / float(bound.mean()),
                    "planning_seconds": None,
                }
            )
        return out

    def gain(self, name: str, over: str, part: str | None = None) -> tuple[float, float, float]:
        """Share of step time that ``name`` saves over ``over``: mean and a 95 % interval (bootstrap over steps)."""
        part = part or self.judged_on
        new, old = (self.replays[which, part].step_seconds_B for which in (name, over))
        rng = np.random.default_rng(0)
        pick = rng.integers(len(new), size=(2000, len(new)))
        boot = 1.0 - new[pick].mean(axis=1) / old[pick].mean(axis=1)
        low, high = np.percentile(boot, [2.5, 97.5])
        return float(1.0 - new.mean() / old.mean()), float(low), float(high)

    def verdict(self) -> str:
        """One sentence: what the best placement gains on the judged traffic, or that it is not worth it."""
        part, base = self.judged_on, self.entries[0].name
        if len(self.entries) < 2:
            return f"{base}: nothing to compare with."
        mean = {entry.name: float(self.replays[entry.name, part].step_seconds_B.mean()) for entry in self.entries}
        best = min(mean, key=mean.__getitem__)
        steps = len(self.bounds_B[part])
        if best == base:
            return f"Not worth it: on {part} traffic no method beats {base}."
        share, low, high = self.gain(best, base)
        text = f"{share:.1%} less modelled MoE time than {base} on {part} traffic"
        text += f" (95 % interval over {steps} steps: {low:.1%} to {high:.1%})" if steps > 1 else " (one step)"
        if share < NOT_WORTH or low <= 0:
            return f"Not worth it: {best} is best, {text}."
        return f"{best} is best: {text}."

    def to_json(self) -> dict[str, Any]:
        """Everything that the table shows."""
        return {
            "rows": self.rows(),
            "verdict": self.verdict(),
            "judged": {
                part: {"order": batch.order, "steps": batch.num_steps, "warmup_steps_left_out": self.warm_up}
                for part, batch in self.batches.items()
            },
            "cluster": repr(self.cluster),
            "model": self.model.name,
            "traffic": self.traffic,
            "split": self.split,
            "slots": self.slots_D.tolist(),
            "notes": list(self.notes),
        }

    def table(self, console: Console) -> None:
        """Print one table a part, best values bold, and the notes."""
        rows = self.rows()
        for part, batch in self.batches.items():
            mine = [row for row in rows if row["judged_on"] == part]
            left_out = f", {self.warm_up} warm-up steps left out" if self.warm_up else ""
            table = Table(title=f"{part}: {batch.order}{left_out}", title_justify="left", header_style="bold")
            table.add_column("placement")
            for head in ("imbalance", "p99", "off device", "off node", "step ms", "p99 ms", "efficiency", "speedup"):
                table.add_column(head, justify="right")
            best = min(row["step_seconds"]["mean"] for row in mine[:-1])
            for row in mine:
                style = "dim" if row["name"] == "bound" else "bold" if row["step_seconds"]["mean"] == best else None
                table.add_row(*_cells(row), style=style)
            console.print(table)
        console.print(
            f"{self.cluster!r}; model {self.model.name}; traffic {self.traffic}; split {self.split}; "
            f"{int(self.slots_D.sum())} slots a layer. Step time is modelled: all MoE layers of one forward pass."
        )
        for note in self.notes:
            console.print(f"note: {note}")
        console.print(self.verdict())


def _spread(seconds_B: NDArray[np.float64]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds_B, [50, 99])
    return {"mean": float(seconds_B.mean()), "p50": float(p50), "p99": float(p99)}


def _cells(row: dict[str, Any]) -> list[str]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    seconds = row["step_seconds"]
    return [
        row["name"], f"{row['imbalance']:.3f}", f"{row['imbalance_p99']:.2f}", share(row["cross_device_share"]),
        share(row["cross_node_share"]), f"{1e3 * seconds['mean']:.3f}", f"{1e3 * seconds['p99']:.3f}",
        f"{row['efficiency']:.3f}", f"{row['speedup']:.3f}",
    ]  # fmt: skip


def compare(
    batches: Mapping[str, RoutingBatch],
    entries: Sequence[Entry],
    *,
    cluster: Cluster,
    model: ModelSpec,
    traffic: Traffic,
    split: Split,
    slots_D: NDArray[np.int64],
    notes: Sequence[str] = (),
    warm_up: int | None = None,
) -> Comparison:
    """Replay every entry on every part of the traffic.

    Parameters
    ----------
    batches : part -> traffic; the key :data:`IN_SAMPLE` marks what the entries were fitted on.
    entries : at least one; names must differ.
    slots_D : int [D], the memory that the bound row is given.
    warm_up : steps that run but are not judged; default 5 where an entry has a fast loop, else none.

    Raises
    ------
    OptionError : no entry, a name twice, or a placement that does not fit the traffic and cluster.
    """
    names = [entry.name for entry in entries]
    if not names or len(set(names)) < len(names) or not batches:
        raise OptionError(f"a comparison needs traffic and placements with different names, got {names}")
    loops = [entry.fast for entry in entries if entry.fast is not None]
    skip = (WARM_UP if loops else 0) if warm_up is None else warm_up
    room_D = np.minimum(
        slots_D + max((loop.step_slots for loop in loops), default=0), next(iter(batches.values())).num_experts
    )
    replays, bounds, judged = {}, {}, {}
    for part, batch in batches.items():
        if skip >= batch.num_steps:
            raise OptionError(
                f"{part} has {batch.num_steps} steps, {skip} of them warm-up",
                hint="lower --tokens-per-step, or --steps",
            )
        judged[part] = batch.steps_from(skip)
        for entry in entries:
            if entry.fast is not None:
                replays[entry.name, part] = replay_steps(
                    batch, entry.placement, entry.fast, cluster, model, traffic=traffic, warm_up=skip,
                    prior_LE=entry.prior_LE,
                )  # fmt: skip
                continue
            replays[entry.name, part] = replay(
                judged[part], entry.placement, cluster, model, traffic=traffic, split=split, pooled=entry.pooled
            )
        terms = bound_terms(judged[part], cluster, model, traffic=traffic, slots_D=room_D)
        bounds[part] = terms.seconds_BL.sum(axis=1)
    return Comparison(
        tuple(entries), judged, replays, bounds, cluster, model, traffic, split, slots_D, tuple(notes), skip
    )
