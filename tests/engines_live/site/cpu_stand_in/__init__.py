"""What the stand-ins of all engines share: a start that knows its release, the maps that ran, and counts of what came."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.metadata import version

_filled: list[str] = []


def begin(package: str, known: Sequence[str]) -> Callable[[Sequence[Callable[[], None]]], str] | None:
    """What fills gaps, once in a process, and tells where maps are to be written (``""``: nowhere); None: it was done.

    Raises
    ------
    SystemExit : a release that nobody has read: a gap may be elsewhere, or filled. Engines go on after other errors.
    """
    if _filled:
        return None
    found = version(package)
    if found not in known:
        raise SystemExit(f"the stand-in knows the gaps of {package} {', '.join(known)}, this is {found}")
    return _fill


def _fill(gaps: Sequence[Callable[[], None]]) -> str:
    for fill in gaps:
        fill()
        _filled.append(fill.__name__)
    return os.environ.get("STAND_IN_MAPS", "")
