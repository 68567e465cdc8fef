"""vLLM's rule after a loss (pull requests #38862 and #46370, ``reassign_missing_experts``), which knows no loads.

Per layer: slots that are left, of experts with more than one, by how many their expert has, most first, of equals the
last slot first. Experts that no slot holds, ascending, take one after the other, where its expert has another by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from poise.planning.losses import Loss
from poise.planning.placement import EMPTY, Placement
from poise.util.errors import InfeasibleError


def reassigned(before: Placement, lost: Sequence[int]) -> Loss:
    """What follows the loss of some devices; nothing is copied.

    Raises
    ------
    InfeasibleError : no slot is left to take for an expert.
    """
    table = before.slot_expert_LS.copy()
    table[:, np.isin(before.slot_device_S, list(lost))] = EMPTY
    for row in table:
        count_E = np.bincount(row[row != EMPTY], minlength=before.num_experts)
        donors = sorted(((int(count_E[e]), slot) for slot, e in enumerate(row) if e != EMPTY and count_E[e] > 1))
        for expert in np.flatnonzero(count_E == 0):
            while donors and count_E[row[donors[-1][1]]] < 2:
                donors.pop()
            if not donors:
                raise InfeasibleError(f"no slot is left to take for expert {expert} when {len(lost)} devices are lost")
            slot = donors.pop()[1]
            count_E[row[slot]] -= 1
            row[slot] = expert
    only = replace(before, slot_expert_LS=table, fitted=None)
    return Loss(tuple(sorted(lost)), only, only)
