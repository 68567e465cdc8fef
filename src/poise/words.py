"""How numbers are written for people."""

from __future__ import annotations


def percent(share: float, digits: int = 1) -> str:
    """A share as percent, without the minus sign of what rounds to nothing."""
    text = f"{share:.{digits}%}"
    return text.removeprefix("-") if float(text.rstrip("%")) == 0 else text
