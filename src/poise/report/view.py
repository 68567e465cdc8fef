"""What all sections of a report look at: the baseline, the best placement, and devices as columns."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.machine.cluster import Cluster
from poise.replay.compare import Comparison, Entry
from poise.replay.static import Replay
from poise.routing.batch import RoutingBatch

MOST_COLUMNS = 96
"""Devices drawn one by one; of larger clusters neighbours share a column."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A comparison and the entries that pictures show.

    Parameters
    ----------
    comparison : what is reported.
    base, best : the first entry, and the one with the least mean step time on the judged traffic.
    fixed : the best one without a fast loop. Maps of a fast loop change every step; pictures of links, flow, lanes and
        moves show this one.
    """

    comparison: Comparison
    base: Entry
    best: Entry
    fixed: Entry

    @classmethod
    def of(cls, comparison: Comparison) -> View:
        """The view of a comparison."""

        def seconds(entry: Entry) -> float:
            return float(comparison.replays[entry.name, comparison.judged_on].step_seconds_B.mean())

        base, fixed = comparison.entries[0], [entry for entry in comparison.entries if entry.fast is None]
        return cls(comparison, base, min(comparison.entries, key=seconds), min(fixed, key=seconds, default=base))

    @property
    def judged(self) -> str:
        """The part of the traffic that is shown."""
        return self.comparison.judged_on

    def where(self, entry: Entry) -> str:
        """What an entry is shown on, in a sentence."""
        return self.comparison.where(entry.name, self.judged)

    @property
    def batch(self) -> RoutingBatch:
        """Its steps."""
        return self.comparison.batches[self.judged]

    def replay(self, entry: Entry) -> Replay:
        """An entry's replay on that traffic."""
        return self.comparison.replays[entry.name, self.judged]

    @property
    def pictured(self) -> tuple[Entry, ...]:
        """The baseline, and the best fixed placement if that is another."""
        return (self.base,) if self.fixed is self.base else (self.base, self.fixed)

    @property
    def layer_names(self) -> list[str]:
        """Number of each MoE layer among the decoder layers."""
        return [str(number) for number in self.batch.layer_ids_L.tolist()]


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Devices as columns of a picture; where there are too many, neighbours share one.

    Parameters
    ----------
    first_G : int64 [G], first device of each column.
    names : of the columns.
    breaks : columns where a node begins, the first left out.
    many : columns hold several devices.
    """

    first_G: NDArray[np.int64]
    names: tuple[str, ...]
    breaks: tuple[int, ...]
    many: bool

    @classmethod
    def of(cls, cluster: Cluster) -> Columns:
        """One device a column up to :data:`MOST_COLUMNS`, else several of one node, or whole nodes."""
        devices, size = cluster.num_devices, -(-cluster.num_devices // MOST_COLUMNS)
        node_first = cluster.first_N
        if int(cluster.devices_per_node_N.max()) <= size:
            first = node_first[:: -(-len(node_first) // MOST_COLUMNS)]
        else:
            ends = np.append(node_first[1:], devices)
            first = np.concatenate([np.arange(a, b, size) for a, b in zip(node_first, ends, strict=True)])
        last = np.append(first[1:], devices) - 1
        names = tuple(str(a) if a == b else f"{a}-{b}" for a, b in zip(first.tolist(), last.tolist(), strict=True))
        begins = np.flatnonzero(np.isin(first, node_first))[1:]
        breaks = begins.tolist() if len(begins) + 1 < len(first) else []
        return cls(first, names, tuple(breaks), len(first) < devices)

    @property
    def word(self) -> str:
        """What a column is."""
        return "devices" if self.many else "device"

    def sum(self, values: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        """Sum over the devices of each column."""
        out: NDArray[Any] = np.add.reduceat(values, self.first_G, axis=axis)
        return out

    def max(self, values: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        """Largest over the devices of each column."""
        out: NDArray[Any] = np.maximum.reduceat(values, self.first_G, axis=axis)
        return out


@dataclass(frozen=True, slots=True)
class Made:
    """Where a report comes from: its footer.

    Parameters
    ----------
    date : when it was made.
    versions : of what made it.
    command : command line, or None if it was made from Python.
    """

    date: str
    versions: str
    command: str | None = None

    @classmethod
    def now(cls, command: str | None = None) -> Made:
        """Now, here."""
        try:
            own = version("poise-moe")
        except PackageNotFoundError:
            own = "(not installed)"
        versions = f"poise {own}, numpy {np.__version__}, Python {python_version()}"
        return cls(datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"), versions, command)
