"""How numbers are written for people."""

from __future__ import annotations


def percent(share: float) -> str:
    """A share as percent, without the minus sign of what rounds to nothing."""
    text = f"{share:.1%}"
    return text.removeprefix("-") if float(text.rstrip("%")) == 0 else text
