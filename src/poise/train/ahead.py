"""Plans of the next forward pass are made by a thread as soon as a layer's loads are known, while the step goes on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from poise.cost.transfers import TransferPlan

Plan = tuple[NDArray[np.bool_], TransferPlan]
"""Holders before the gate, bool [E, D], and how they get their experts."""


class PlanAhead:
    """The plan of each layer, or of what else names a plan, while it is made and after.

    A plan is a pure function of what its view holds, so that every rank finds the same, however long its thread takes.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._found: dict[Hashable, tuple[int, Future[Plan]]] = {}

    def start(self, layer: Hashable, version: int, plan: Callable[[], Plan]) -> None:
        """Begin to plan; ``version`` names what the plan is made from."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "poise-plan")
        if layer in self._found:
            self._found[layer][1].cancel()  # an older one, if it has not begun
        self._found[layer] = version, self._pool.submit(plan)

    def get(self, layer: Hashable, version: int) -> Plan | None:
        """The plan of a layer, waited for; None if there is none of this version."""
        found = self._found.get(layer)
        return found[1].result() if found is not None and found[0] == version else None

    def forget(self, layer: Hashable) -> None:
        """The plan of a layer will not be asked for again."""
        found = self._found.pop(layer, None)
        if found is not None:
            found[1].cancel()
