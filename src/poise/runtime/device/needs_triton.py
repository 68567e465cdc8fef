"""The modules here that import Triton, where it is installed; one place that says why they are not there."""

from __future__ import annotations

from importlib import import_module
from typing import Any

PLANNER: Any
GEMM: Any
"""Modules of these names; None: they cannot be loaded, and :data:`WHY_NONE` says why."""
try:
    PLANNER = import_module("poise.runtime.device.planner")
    GEMM = import_module("poise.runtime.device.gemm")
    WHY_NONE = ""
except ImportError as error:
    PLANNER = GEMM = None
    WHY_NONE = f"no Triton: {error}"
HINT = "pip install 'poise-moe[device]'"
