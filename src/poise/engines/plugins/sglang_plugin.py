"""SGLang plugin (entry point ``sglang.srt.plugins``): poise's planner behind ``--enable-eplb``.

Only if ``POISE_EPLB`` is set: installing poise changes nothing, and imports nothing else. A static map needs no plugin:
``poise export --to sglang``.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from poise.engines.plugins import switch


def register() -> None:
    """Entry point.

    Raises
    ------
    SystemExit : a ``POISE_*`` variable is wrong, this SGLang takes no hooks, or anything else. SGLang logs a plugin's
        exceptions and starts this rank without it, while others may plan; this ends the start.
    """
    if not switch.planning(switch.of_phase(os.environ)):
        return
    try:
        import_module("poise.engines.plugins.sglang_hook").install(os.environ)
    except Exception as error:
        raise SystemExit(f"poise: {error}; unset POISE_EPLB to start without poise") from error


def __getattr__(name: str) -> Any:
    """``around`` of 0.1, which lies where what it needs is imported."""
    if name == "around":
        return import_module("poise.engines.plugins.sglang_hook").around
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
