"""Who in vLLM asks its policy: for which model, whether serving waits for the answer, and what the loads are of.

Releases tell a policy nothing of it. The frames above the call do: vLLM's modules for its load balancer have the
model's record under one of two names, and the module of its asynchronous worker is there if, and only if, the call is
made beside serving. A thread says nothing: an engine may serve on any.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

BALANCER = "vllm.distributed.eplb."
WORKER = BALANCER + "async_worker"
RECORDS = ("eplb_model_state", "model_state")
STATES = ("self", "eplb_state", "state")
WINDOW, INTERVAL = "expert_load_window_size", "expert_rearrangement_step_interval"
"""Of the load balancer's state, which the frames have under one of these names."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Parameters
    ----------
    model : number of the model's record in this process; 0: it cannot be told.
    beside : the call is made beside serving.
    settles : rearrangements from a change of the map until all steps that the loads are of ran under it.
    """

    model: int = 0
    beside: bool = False
    settles: int = 1


def caller() -> Caller:
    """Whoever is above in this thread."""
    model, beside, settles = 0, False, 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if name.startswith(BALANCER):
            beside = beside or name == WORKER
            if not model:
                records = [frame.f_locals[one] for one in RECORDS if one in frame.f_locals]
                model = id(records[0]) if records else 0
            for one in STATES:
                window, interval = (getattr(frame.f_locals.get(one), name, 0) for name in (WINDOW, INTERVAL))
                if window and interval:
                    settles = -(-window // interval)
        frame = frame.f_back
    return Caller(model, beside, settles + (beside and settles > 1))  # beside serving layers move one after another
