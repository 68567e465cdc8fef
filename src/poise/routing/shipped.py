"""The traces that ship with the package: real routing, recorded once, each with a card that says of what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

SKEWED, EVEN = "skewed", "even"
NAMES = (SKEWED, EVEN)
BALANCE = re.compile(r"balance loss per layer, weight ([\d.]+\d)")


@dataclass(frozen=True, slots=True)
class ShippedTrace:
    """A trace of the package.

    Parameters
    ----------
    file : the trace (.npz). card : what it was recorded from (.md), beside it.
    """

    file: Traversable
    card: Traversable

    @property
    def balance(self) -> str:
        """Weight of the loss by which the recorded model was trained to be even, as its card has it; else ``""``."""
        found = BALANCE.search(self.card.read_text("utf-8"))
        return found[1] if found else ""


def shipped(name: str = SKEWED) -> ShippedTrace:
    """The trace of a name of :data:`NAMES`.

    Parameters
    ----------
    name : ``skewed``, the main example, or ``even``, of a model whose training evened its loads. While one trace ships
        it is both.
    """
    folder = files("poise") / "data"
    stem = "demo_trace_even" if name == EVEN and (folder / "demo_trace_even.npz").is_file() else "demo_trace"
    return ShippedTrace(folder / f"{stem}.npz", folder / f"{stem}.md")
