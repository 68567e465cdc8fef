"""A plugin of SGLang that stands in, in tests, for what its CPU platform lacks: kernels that PyPI does not have.

Expert locations, their dispatch, the recorder, the balancer's manager and the mover of weights stay SGLang's own.
:mod:`missing` has the modules that cannot be installed, :mod:`gaps` a function for each thing that does not work without
them; :mod:`witness` writes down the maps that run. A release that nobody has read is refused: a gap may be elsewhere.
"""

from __future__ import annotations

import os
from importlib.metadata import version

KNOWN = ("0.5.23",)
_filled: list[str] = []


def register() -> None:
    """Entry point; a second call changes nothing.

    Raises
    ------
    SystemExit : another release; SGLang goes on after any other error of a plugin.
    """
    if _filled:
        return
    found = version("sglang")
    if found not in KNOWN:
        raise SystemExit(f"the stand-in knows the gaps of sglang {', '.join(KNOWN)}, this is {found}")
    from sglang_cpu_stand_in import gaps, witness

    for fill in gaps.ALL:
        fill()
        _filled.append(fill.__name__)
    if path := os.environ.get("STAND_IN_MAPS"):
        witness.write_maps(path)
