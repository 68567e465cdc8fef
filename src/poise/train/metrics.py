"""What one layer did in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.protocol import LayerView, StepPolicy
from poise.stepwise.why_none import why_none


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """One layer in one forward pass, the same on all ranks.

    Parameters
    ----------
    layer : number among the MoE layers.
    tokens_D : pairs computed on each rank.
    owner_tokens_D : pairs each rank would have computed without replicas (plain expert parallelism on these owners).
    replicas : experts gathered, over all ranks.
    gathered_bytes : bytes of these; re-gathering for the backward costs the same again.
    policy, view : who planned, and what it saw before the gate.
    """

    layer: int
    tokens_D: NDArray[np.int64]
    owner_tokens_D: NDArray[np.int64]
    replicas: int
    gathered_bytes: int
    policy: StepPolicy = field(repr=False)
    view: LayerView = field(repr=False)

    @property
    def why(self) -> str:
        """Why there are no replicas (:mod:`poise.stepwise.why_none`), "" where there are; found when asked."""
        return "" if self.replicas else why_none(self.policy, self.view)

    @property
    def overload(self) -> float:
        """Max / mean pairs over the ranks."""
        return float(self.tokens_D.max() / max(1e-9, self.tokens_D.mean()))

    @property
    def owner_overload(self) -> float:
        """The same without replicas."""
        return float(self.owner_tokens_D.max() / max(1e-9, self.owner_tokens_D.mean()))
