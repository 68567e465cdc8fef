"""How numbers, and texts of others, are written for people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def close_to(word: str, known: Iterable[str]) -> str:
    """The hint on an unknown word: the known one that it is close to, or all of them."""
    every = list(known)
    close = closest(word, every)
    return f"did you mean {close}?" if close else f"one of {', '.join(every)}"


def closest(word: str, known: Iterable[str]) -> str:
    """The known word that one is close to, in letters of any case, or ``""``."""
    lower: dict[str, str] = {}
    for one in known:
        lower.setdefault(one.lower(), one)
    close = difflib.get_close_matches(word.lower(), lower, 1)
    return lower[close[0]] if close else ""


def percent(share: float) -> str:
    """A share as percent, without the minus sign of what rounds to nothing."""
    text = f"{share:.1%}"
    return text.removeprefix("-") if float(text.rstrip("%")) == 0 else text


_ACTS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""Control characters but tab and line feed, marks that turn the direction of writing, and lone surrogates, which
``os.fsdecode`` makes of bytes that are no UTF-8 and no encoding can say."""


def harmless(text: str) -> str:
    """A text with names of others in it, so that no terminal acts on it and every encoding can say it."""
    return _ACTS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def printable(text: str) -> str:
    """The same in one line: line feeds and tabs are written as escapes too."""
    return harmless(text).replace("\n", "\\n").replace("\t", "\\t")
