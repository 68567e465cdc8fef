"""A plugin of SGLang that stands in, in tests, for what its CPU platform lacks: kernels that PyPI does not have.

Expert locations, their dispatch, the recorder, the balancer's manager and the mover of weights stay SGLang's own.
:mod:`missing` has the modules that cannot be installed, :mod:`gaps` a function for each thing that does not work without
them; :mod:`witness` notes the maps that run.
"""

from __future__ import annotations

import cpu_stand_in

KNOWN = ("0.5.23",)


def register() -> None:
    """Entry point; a second call changes nothing."""
    if (fill := cpu_stand_in.begin("sglang", KNOWN)) is None:
        return
    from sglang_cpu_stand_in import gaps, witness

    if path := fill(gaps.ALL):
        witness.watch(path)
