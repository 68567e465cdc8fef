"""Loads of the last iterations, the same on all ranks: what predictions and owners are planned from."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.sharding import MEAN_STEPS


class LoadHistory:
    """Pairs by expert of every layer, one entry an iteration: the mean over its forward passes (micro-batches).

    Passes without gradient (evaluation) are not recorded: they do not belong to the iterations that are predicted.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.recent = [deque[NDArray[np.float64]](maxlen=MEAN_STEPS) for _ in range(layers)]
        self._passes_each = [deque[int](maxlen=MEAN_STEPS) for _ in range(layers)]
        self.seen_L = np.zeros(layers, np.int64)
        self.pairs_L = np.ones(layers)
        self._open_LE, self._passes_L = np.zeros((layers, experts)), np.zeros(layers, np.int64)

    def record(self, layer: int, load_E: NDArray[np.int64]) -> None:
        """A forward pass of a layer; it belongs to the iteration that is open."""
        self._open_LE[layer] += load_E
        self._passes_L[layer] += 1
        self.pairs_L[layer] = load_E.sum()

    def close(self) -> list[int]:
        """The iteration has had its last forward pass; the layers that ran more than once in it."""
        ran = np.flatnonzero(self._passes_L)
        several = np.flatnonzero(self._passes_L > 1).tolist()
        for layer in ran:
            self.recent[layer].append(self._open_LE[layer] / self._passes_L[layer])
            self._passes_each[layer].append(int(self._passes_L[layer]))
        self.seen_L[ran] += 1
        self._open_LE[:], self._passes_L[:] = 0, 0
        return several

    def passes(self, layer: int) -> int:
        """Forward passes of a layer in the open iteration."""
        return int(self._passes_L[layer])

    def seen(self, layer: int) -> int:
        """Iterations of a layer, the open one included."""
        return int(self.seen_L[layer]) + (self._passes_L[layer] > 0)

    def of(self, layer: int) -> NDArray[np.float64]:
        """Entries of a layer, oldest first, float64 [n, E]; the last one is the open iteration's so far."""
        rows = list(self.recent[layer])
        if self._passes_L[layer]:
            rows.append(self._open_LE[layer] / self._passes_L[layer])
        return np.array(rows).reshape(-1, self._open_LE.shape[1])

    def micro_batches(self) -> int:
        """Forward passes of an iteration: mean over the entries of the layer that ran most, rounded; 1 without any."""
        return max([1, *(round(sum(passes) / len(passes)) for passes in self._passes_each if passes)])

    def mean_LE(self) -> NDArray[np.float64]:
        """Mean of all entries; zeros for a layer that never ran."""
        return np.stack([rows.mean(axis=0) if len(rows) else np.zeros(self._open_LE.shape[1])
                         for rows in map(self.of, range(len(self.recent)))])  # fmt: skip
