"""What :mod:`poise.planning.solve.state` keeps, for compiled code: the problem, and a placement with its sums."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine


class Rows(NamedTuple):
    """Distinct token rows of all layers, back to back; equal tokens of a step are one row with a weight.

    Layer l owns rows ``start_L[l]:start_L[l + 1]``. ``by_expert`` lists, from ``by_expert_ptr[l, e]`` on, the rows
    of layer l that use expert e; ``by_source`` the rows of later layers whose token came from expert e of layer l
    (``stay``). A row came from expert ``source_M`` of layer ``from_M``, or from device ``source_M`` where that is -1.
    Picks that compute nothing are -1, at the end of ``experts_MK``.
    """

    start_L: NDArray[np.int64]
    experts_MK: NDArray[np.int16]
    step_M: NDArray[np.int32]
    source_M: NDArray[np.int32]
    from_M: NDArray[np.int64]
    layer_M: NDArray[np.int64]
    weight_M: NDArray[np.float64]
    by_expert: NDArray[np.int64]
    by_expert_ptr: NDArray[np.int64]
    by_source: NDArray[np.int64]
    by_source_ptr: NDArray[np.int64]


class Sources(NamedTuple):
    """Where tokens come from: entries ``ptr_LX[l, e * B + b]`` to the next are of expert e of layer l in step b, and
    their weights sum to its load.
    """

    ptr_LX: NDArray[np.int64]
    device_Y: NDArray[np.int64]
    weight_Y: NDArray[np.float64]


class Data(NamedTuple):
    """Constants of a problem in the form compiled code reads. ``reach_L``: last layer that a change in one alters;
    ``keep_full``: no change may leave a slot empty; ``place_D``: places, of which no change takes an expert to another;
    ``near``: the split, else ``even``; ``stop`` [1]: not 0 once the clock has run out.
    """

    rows: Rows
    load_LBE: NDArray[np.float64]
    weight_B: NDArray[np.float64]
    reach_L: NDArray[np.int64]
    machine: Machine
    landing_DN: NDArray[np.int64]
    flow: int
    has_tokens: bool
    keep_full: bool
    place_D: NDArray[np.int64]
    near: bool
    sources: Sources
    stop: NDArray[np.int64]


class State(NamedTuple):
    """A placement without duplicates and its running sums. ``room_GD``: free slots, per layer or (pooled) in all;
    ``near_D``: working memory of :func:`poise.planning.solve.sources.takers`.
    """

    hold_LED: NDArray[np.int16]
    copies_LE: NDArray[np.int64]
    held_LED: NDArray[np.bool_]
    used_LD: NDArray[np.int64]
    room_GD: NDArray[np.int64]
    compute_LBD: NDArray[np.float64]
    tokens_LBD: NDArray[np.float64]
    port_LFBPD: NDArray[np.float64]
    stamp_M: NDArray[np.int64]
    near_D: NDArray[np.int16]
    work: NDArray[np.int64]
