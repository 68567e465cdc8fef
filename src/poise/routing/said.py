"""What a load profile's file says of its numbers where these look like something else, so that nobody asks again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poise.util.errors import TraceError

COUNTED, AXES = "counters", "axes"
SAID = {COUNTED: "steps", AXES: "layers, experts"}
"""Keys beside the loads, and all that they can say: records are steps, though no count falls from one to the next; rows
are layers and columns experts, though every expert has as many tokens."""


def said_in(name: str, values: Mapping[str, Any], given: frozenset[str] = frozenset()) -> frozenset[str]:
    """Which keys of :data:`SAID` a file has; what the user said of those in ``given`` goes first.

    Raises
    ------
    TraceError : one of them says something else.
    """
    found = {key for key in SAID if values.get(key) is not None and key not in given}
    for key in sorted(found):
        if str(values[key]) != SAID[key]:
            way = "; 'poise convert --counters running' takes differences of running totals" if key == COUNTED else ""
            raise TraceError(
                f"{name}: {key!r} can say {SAID[key]!r}, it says {str(values[key])[:40]!r}",
                hint=f"leave it out{way}",
            )
    return frozenset(found)
