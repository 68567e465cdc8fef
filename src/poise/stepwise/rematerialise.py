"""Which layers keep their replicas from the forward to the backward pass, under a memory budget.

Hecate (arXiv 2502.02581, section 3.2) either keeps the replicas of every layer or frees them all after the forward pass
and gathers them again (re-materialisation). Here each layer is asked: keeping it saves the seconds of its second gather
that would show. The best choice under a budget is a 0/1 knapsack, which HiGHS solves
(:mod:`poise.planning.solve.milp`): without a clock and on one thread, so that every rank finds the same. The last
layer is always kept: its backward pass comes at once, and its replicas lie in the buffer that a layer in flight has
anyway and take nothing from the budget.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.planning.budget import Budget
from poise.planning.solve.milp import INF, Milp
from poise.util.errors import OptionError

WORK = 300.0
"""Units of a :class:`~poise.planning.budget.Budget`: thousands of nodes, where a few dozen layers take one or none."""


def layers_to_keep(bytes_L: NDArray[Any], exposed_s_L: NDArray[Any], budget_bytes: float) -> NDArray[np.bool_]:
    """Layers that keep their replicas, bool [L]: most exposed seconds saved within the budget; the last one always.

    Parameters
    ----------
    bytes_L : float [L], bytes of the replicas of each layer on the fullest rank.
    exposed_s_L : float [L], seconds of a second gather that would show.
    budget_bytes : for all layers but the last.

    Raises
    ------
    OptionError : shapes that disagree, no layer, or a number that is negative or not finite (a budget may be infinite).
    """
    size, value = np.asarray(bytes_L, dtype=np.float64), np.asarray(exposed_s_L, dtype=np.float64)
    if size.ndim != 1 or size.size == 0 or size.shape != value.shape:
        raise OptionError(f"layers have {size.shape} sizes and {value.shape} seconds")
    if not (np.isfinite(size).all() and np.isfinite(value).all() and size.min() >= 0 and value.min() >= 0):
        raise OptionError(f"sizes and seconds must be finite and at least 0, got {size.min():g} and {value.min():g}")
    if not budget_bytes >= 0:
        raise OptionError(f"the budget must be at least 0 bytes, got {budget_bytes}")
    keep = np.zeros(size.size, np.bool_)
    keep[-1] = True
    rest = np.flatnonzero((size[:-1] <= budget_bytes) & (value[:-1] > 0))
    if size[rest].sum() <= budget_bytes:
        keep[rest] = True
        return keep
    knapsack = Milp()
    columns = knapsack.columns(-value[rest] / value[rest].max())
    knapsack.row(-INF, columns, size[rest] / budget_bytes, 1.0)
    chosen = knapsack.solve(budget=Budget(1.0, work=WORK), stage="rematerialise", needed=True).values > 0.5
    keep[rest[chosen]] = True
    return keep
