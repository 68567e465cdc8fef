"""A planner beside the steps, as a layer sees it: looks at loads that are in force some steps later."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.protocol import Looks

GOLDEN = 0.6180339887498949
"""Layers begin apart by this part of a turn of all, so that few look at once however many there are."""


class BesidePlanner:
    """Looks of one layer; the same on every rank.

    Parameters
    ----------
    layer, num_experts : whose looks they are.

    Attributes
    ----------
    seen_HE : float64 [H, E], loads known when the look in force began; no step before the first one.
    """

    def __init__(self, layer: int, num_experts: int) -> None:
        self.seen_HE = np.zeros((0, num_experts))
        self._part = (layer + 1) * GOLDEN % 1.0
        self._began: int | None = None
        self._next: int | None = None
        self._held_ED: NDArray[np.bool_] | None = None
        self._pending: tuple[int, NDArray[np.float64], NDArray[np.bool_]] | None = None

    def passes(self, step: int, looks: Looks, loads_HE: NDArray[np.float64], held_ED: NDArray[np.bool_]) -> None:
        """A step begins, its loads unknown: what is ready comes into force, and a look begins where it is time for one.

        Asked twice of one step, nothing changes. ``loads_HE`` float64 [H, E], the newest last; ``held_ED`` bool [E, D].
        """
        if self._next is None or self._began is None:
            self._began, self._next = step, step + int(self._part * looks.soonest)
        if self._pending is not None and step >= self._pending[0]:
            _, self.seen_HE, self._held_ED = self._pending
            self._pending = None
        if self._pending is None and step >= self._next and len(loads_HE):
            self._pending = step + looks.late, loads_HE.copy(), held_ED.copy()
            self._next = step + (looks.every if step - self._began >= looks.every else looks.soonest)

    def settled(self, held_ED: NDArray[np.bool_]) -> bool:
        """Whether the look in force saw these holders, bool [E, D]."""
        return self._held_ED is not None and bool((self._held_ED == held_ED).all())
