"""Timelines of steps, measured or simulated, in the Chrome trace format that Perfetto opens (ui.perfetto.dev)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from poise.cost.step import BatchCost


@dataclass(frozen=True, slots=True)
class Event:
    """Something a device did.

    Parameters
    ----------
    name : what; events of one name share a colour.
    lane : the device.
    start_s, seconds : when and how long.
    """

    name: str
    lane: int
    start_s: float
    seconds: float


def simulated_step(
    cost: BatchCost, step: int, compute_LD: NDArray[np.float64], *, window_s: float = 0.0
) -> list[Event]:
    """One step as the cost model sees it: every layer's terms one after the other, waiting where a device is idle.

    Parameters
    ----------
    cost, step : modelled terms, and which step of them.
    compute_LD : float64 [L, D], modelled compute of every device.
    window_s : attention of every layer.
    """
    events: list[Event] = []
    now = 0.0
    for layer, compute_D in enumerate(compute_LD):
        weights = 0.0 if cost.weights_BL is None else float(cost.weights_BL[step, layer])
        control = 0.0 if cost.control_BL is None else float(cost.control_BL[step, layer])
        for name, seconds in (
            ("attention", window_s),
            ("weights", weights),
            ("control", control),
            ("dispatch", float(cost.dispatch_BL[step, layer])),
            ("experts", float(cost.compute_BL[step, layer])),
            ("combine", float(cost.combine_BL[step, layer] + cost.kv_BL[step, layer])),
        ):
            for device, own in enumerate(compute_D.tolist()):
                took = min(own, seconds) if name == "experts" else seconds
                if took > 0:
                    events.append(Event(name, device, now, took))
                if name == "experts" and seconds > took:
                    events.append(Event("wait", device, now + took, seconds - took))
            now += seconds
    return events


def write_perfetto(path: str | Path, groups: Mapping[str, Sequence[Event]]) -> None:
    """Write groups of events, each a process with a thread a device, every group from its own first event on."""
    out: list[dict[str, object]] = []
    for number, (group, events) in enumerate(groups.items(), 1):
        out.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": group}})
        first = min((event.start_s for event in events), default=0.0)
        for lane in sorted({event.lane for event in events}):
            named = {"ph": "M", "name": "thread_name", "pid": number, "tid": lane, "args": {"name": f"device {lane}"}}
            out.append(named)
        out += [
            {
                "ph": "X",
                "name": event.name,
                "pid": number,
                "tid": event.lane,
                "ts": round(1e6 * (event.start_s - first), 3),
                "dur": round(1e6 * event.seconds, 3),
            }
            for event in events
        ]
    Path(path).write_text(json.dumps({"traceEvents": out, "displayTimeUnit": "ms"}), encoding="utf-8")
