"""The traces that ship with the package: real routing, recorded once, with cards that say of what."""

from __future__ import annotations

import re
from importlib.resources import as_file, files
from typing import Literal

from poise.routing.files import read
from poise.routing.trace import RoutingTrace

Shipped = Literal["demo_skewed", "demo_trace"]
"""Of a model whose experts could specialise, as those of real models do, and of one that was trained to be even."""
FOLDER = files("poise") / "data"
WEIGHT = re.compile(r"balance loss per layer, weight ([\d.]+\d)(?: at first, ([\d.]+\d) at the end)?")


def shipped(name: Shipped) -> RoutingTrace:
    """The trace of that name."""
    with as_file(FOLDER / f"{name}.npz") as path:
        trace = read(path)
    assert isinstance(trace, RoutingTrace)
    return trace


def balance(name: Shipped) -> str:
    """Weight of the loss by which its model was trained to be even, at last, as the card has it; else ``""``."""
    found = WEIGHT.search((FOLDER / f"{name}.md").read_text("utf-8"))
    return (found[2] or found[1]) if found else ""
