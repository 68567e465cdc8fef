"""The trace that ships with the package: real routing, recorded once, with a card that says of what."""

from __future__ import annotations

import re
from importlib.resources import files

FOLDER = files("poise") / "data"
TRACE, CARD = FOLDER / "demo_trace.npz", FOLDER / "demo_trace.md"
BALANCE = re.compile(r"balance loss per layer, weight ([\d.]+\d)")


def balance() -> str:
    """Weight of the loss by which the recorded model was trained to be even, as the card has it; else ``""``."""
    found = BALANCE.search(CARD.read_text("utf-8"))
    return found[1] if found else ""
