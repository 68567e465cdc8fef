"""vLLM plugin (entry point ``vllm.general_plugins``): poise's planner, or a static map, behind vLLM's load balancer.

Only if ``POISE_EPLB`` or ``POISE_STATIC_MAP`` is set: installing poise changes nothing, and imports nothing else.
"""

from __future__ import annotations

import os
from importlib import import_module

from poise.engines.plugins import switch


def register() -> None:
    """Entry point; may be called again in the same process.

    Raises
    ------
    InputError : a ``POISE_*`` variable is wrong, or this vLLM's load balancer has another interface.
    """
    environ = switch.of_phase(os.environ)
    if switch.planning(environ) or switch.static_map(environ):
        import_module("poise.engines.plugins.vllm_policy").install(os.environ)
