"""Timelines of steps, measured or simulated, in the Chrome trace format that Perfetto opens (ui.perfetto.dev)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from poise.util.errors import OptionError
from poise.util.files import write_whole


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


def write_perfetto(path: str | Path, groups: Mapping[str, Sequence[Event]]) -> None:
    """Write groups of events, each a process with a thread a device, every group from its own first event on.

    Raises
    ------
    OptionError : as :func:`poise.util.files.write_whole`.
    """
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
    write_whole(path, json.dumps({"traceEvents": out, "displayTimeUnit": "ms"}), OptionError)
