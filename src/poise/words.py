"""How numbers, and texts of others, are written for people."""

from __future__ import annotations


def percent(share: float) -> str:
    """A share as percent, without the minus sign of what rounds to nothing."""
    text = f"{share:.1%}"
    return text.removeprefix("-") if float(text.rstrip("%")) == 0 else text


def printable(text: str) -> str:
    """A text of others as one line that no terminal acts on and every encoding can say.

    Control characters, line ends, marks that turn the direction of writing and bytes that are no UTF-8 (as
    ``os.fsdecode`` gives them) become escapes; the rest stays.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
