"""Which layers keep their replicas from the forward to the backward pass, under a memory budget.

Hecate (arXiv 2502.02581, section 3.2) either keeps the replicas of every layer or frees them all after the forward pass
and gathers them again (re-materialisation). Here each layer is asked: keeping it saves the seconds of its second gather
that would show. The best choice under a budget is a 0/1 knapsack, solved exactly:

Step 1  The last layer is kept: its backward pass comes at once. It lies in the buffer that a layer in flight has anyway
        and takes nothing from the budget.
Step 2  Of the other layers, those that fit alone and save something, by seconds a byte, highest first.
Step 3  Branch and bound, depth first, keeping tried before freeing: a branch ends where the fractional knapsack of what
        is left cannot beat the best choice so far. Of equally good choices the first found stays, so the answer is the
        same on every rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.util.errors import OptionError

MAX_NODES = 200_000
"""Branches after which the best choice so far is taken: below it the choice is exact."""


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
    with np.errstate(divide="ignore"):
        density = value[rest] / size[rest]
    order = rest[np.lexsort((rest, -density))]
    keep[order[_knapsack(size[order], value[order], float(budget_bytes))]] = True
    return keep


def _knapsack(size_X: NDArray[np.float64], value_X: NDArray[np.float64], budget: float) -> NDArray[np.int64]:
    """Step 3 for items by falling value a byte: positions of the best choice."""
    if size_X.sum() <= budget:
        return np.arange(size_X.size)
    size, value, count = size_X.tolist(), value_X.tolist(), size_X.size
    best, best_value, visited = list[int](), 0.0, 0
    chosen: list[int] = []

    def bound(i: int, room: float) -> float:
        total = 0.0
        for j in range(i, count):
            if size[j] > room:
                return total + value[j] * room / size[j]
            total += value[j]
            room -= size[j]
        return total

    stack: list[tuple[int, float, float, bool]] = [(0, budget, 0.0, False)]
    while stack and visited < MAX_NODES:
        i, room, got, leave = stack.pop()
        visited += 1
        if leave:  # back from the branch that kept item i - 1
            chosen.pop()
        if got > best_value:
            best, best_value = list(chosen), got
        if i == count or got + bound(i, room) <= best_value * (1.0 + 1e-12):
            continue
        if size[i] <= room:
            stack.append((i + 1, room, got, True))
            chosen.append(i)
            stack.append((i + 1, room - size[i], got + value[i], False))
        else:
            stack.append((i + 1, room, got, False))
    return np.array(best, np.int64)
