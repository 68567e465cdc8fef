"""What one layer did in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """One layer in one forward pass, the same on all ranks.

    Parameters
    ----------
    layer : number among the MoE layers.
    tokens_D : pairs computed on each rank.
    owner_tokens_D : pairs each rank would have computed without replicas (plain expert parallelism on these owners).
    replicas : experts gathered, over all ranks.
    gathered_bytes : they in bytes; re-gathering for the backward costs the same again.
    """

    layer: int
    tokens_D: NDArray[np.int64]
    owner_tokens_D: NDArray[np.int64]
    replicas: int
    gathered_bytes: int

    @property
    def overload(self) -> float:
        """Max / mean pairs over the ranks."""
        return float(self.tokens_D.max() / max(1e-9, self.tokens_D.mean()))

    @property
    def owner_overload(self) -> float:
        """The same without replicas."""
        return float(self.owner_tokens_D.max() / max(1e-9, self.owner_tokens_D.mean()))
