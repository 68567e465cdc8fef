"""Where ``poise`` in serving works: holders, the machine and memory of one layer, as compiled code reads them.

Nothing allocates inside a step: a :class:`Workspace` is made once for a shape and a thread.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine
from poise.cost.quota import Holders, Scratch, compile_holders, holders_room, make_scratch
from poise.cost.weights import compiled_price
from poise.stepwise.protocol import LayerView

UNITS = 64
"""Work is balanced in whole units: the mean work of a device is about this many times the number of experts."""


class Workspace(NamedTuple):
    """Working memory for one shape."""

    room: Holders
    scratch: Scratch
    units_E: NDArray[np.int64]
    quota_H: NDArray[np.int64]
    tokens_H: NDArray[np.float64]
    best_H: NDArray[np.float64]
    local_H: NDArray[np.int64]
    base_D: NDArray[np.int64]
    load_E: NDArray[np.float64]
    sum_E: NDArray[np.float64]
    seconds_D: NDArray[np.float64]
    sum_D: NDArray[np.float64]
    have_E: NDArray[np.float64]
    away_D2: NDArray[np.float64]


class HeldLayer(NamedTuple):
    """The holders of one layer's experts, and what their tokens are split with.

    Parameters
    ----------
    holders : views into the memory: they hold until the next placement is put there (:meth:`Desk.put`).
    machine, space : rates, and working memory.
    """

    holders: Holders
    machine: Machine
    space: Workspace


class Desk(NamedTuple):
    """Machine and working memory: what does not change while a layer's plans are compared."""

    machine: Machine
    space: Workspace

    def put(self, holds_ED: NDArray[np.bool_]) -> HeldLayer:
        """A placement, bool [E, D], into the memory."""
        holds = holds_ED.copy()  # to numba an array that may not be written is another type
        return HeldLayer(compile_holders(holds, self.space.room), self.machine, self.space)


def make_workspace(num_experts: int, num_devices: int, num_entries: int) -> Workspace:
    """Memory for E experts, D devices and at most ``num_entries`` holders in all."""
    whole, more = np.zeros((2, num_entries), np.int64), np.zeros((2, num_entries))
    real_D, real_E = np.zeros((2, num_devices)), np.zeros((3, num_experts))
    return Workspace(
        holders_room(num_experts, num_devices, num_entries), make_scratch(num_experts, num_devices),
        np.zeros(num_experts, np.int64), whole[0], more[0], more[1], whole[1], np.zeros(num_devices, np.int64),
        real_E[0], real_E[2], real_D[0], real_D[1], real_E[1], np.zeros((num_devices, 2)),
    )  # fmt: skip


def desk_of(view: LayerView) -> Desk:
    """The desk of a layer's shape and price; each thread has memory of its own."""
    experts, devices = view.static_ED.shape
    entries = int(view.slots_D.sum()) + experts
    return Desk(compiled_price(view.price).machine, _workspace(experts, devices, entries, threading.get_ident()))


@lru_cache(maxsize=32)
def _workspace(num_experts: int, num_devices: int, num_entries: int, thread: int) -> Workspace:
    return make_workspace(num_experts, num_devices, num_entries)
