"""What each rank does in a layer of a training step, as a replay leaves it to the simulation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rounds = tuple[NDArray[np.float64], ...]
"""Bytes from rank to rank [D, D] of each round of a sparse collective."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerWork:
    """What one layer does in one step.

    Parameters
    ----------
    bytes_DD : float64 [D, D], tokens from rank to rank, one way.
    compute_D : float64 [D], seconds of the forward pass's experts.
    early, late : gathers of weights before and after the gate.
    back : reduction of gradients.
    again : replicas are freed after the forward pass and gathered again.
    """

    bytes_DD: NDArray[np.float64]
    compute_D: NDArray[np.float64]
    early: Rounds = ()
    late: Rounds = ()
    back: Rounds = ()
    again: bool = False
