"""Which layers' replicas stay between a forward pass and its backward, in place of being gathered again."""

from __future__ import annotations

import numpy as np

from poise.stepwise.rematerialise import layers_to_keep
from poise.train.materialize import Materialised


class ReplicaBudget:
    """All replicas stay, those of the last layer only, or those that save most time and fit.

    Parameters
    ----------
    rematerialise : False: all stay; True: the last layer's, whose backward comes at once; a number: bytes that replicas
        of the other layers may take as well, on the rank that has most of them.
    layers : how many there are.
    """

    def __init__(self, rematerialise: bool | float, layers: int) -> None:
        self.rematerialise, self.layers = rematerialise, layers
        self.used_bytes = 0.0
        self._chosen_L = np.zeros(layers, bool)
        self._bytes_L, self._saved_s_L = np.zeros(layers), np.zeros(layers)

    @property
    def limited(self) -> bool:
        """Whether there is a number of bytes to spend."""
        return not isinstance(self.rematerialise, bool)

    def learn(self, layer: int, nbytes: float, saved_s: float) -> None:
        """What a layer's replicas took in a training pass, and the seconds that keeping them saves."""
        self._bytes_L[layer], self._saved_s_L[layer] = nbytes, saved_s

    def choose(self) -> None:
        """A forward pass begins: choose layers by what was learnt in the last training pass."""
        self._chosen_L = np.zeros(self.layers, bool)
        if self.limited and self._bytes_L.any():
            self._chosen_L = layers_to_keep(self._bytes_L, self._saved_s_L, float(self.rematerialise))

    def take(self, weights: Materialised) -> float | None:
        """Bytes that are taken from the budget for a layer's replicas that stay; None: they do not stay.

        They must fit as they are in this pass, in which there may be more of them than in the last.
        """
        layer = weights.experts.number
        if self.rematerialise is False or layer == self.layers - 1:
            return 0.0
        if not self._chosen_L[layer] or self.used_bytes + (nbytes := weights.fullest_bytes) > self.rematerialise:
            return None
        self.used_bytes += nbytes
        return nbytes

    def give_back(self, nbytes: float) -> None:
        """The backward of a layer is over."""
        self.used_bytes -= nbytes

    def clear(self) -> None:
        """An iteration is over, or a backward pass has failed: nothing is kept any more."""
        self.used_bytes = 0.0
