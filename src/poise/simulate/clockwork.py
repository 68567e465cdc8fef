"""What a rank does when: a simulated step is a list of acts, and this is when every rank is done with each.

All ranks go through the same acts in the same order, each at its own time: a rank begins the next one as soon as it is
done with the last. Only :class:`Meet` makes it wait for the others, and :class:`Wait` for what it posted before.
:mod:`poise.simulate.serving`, :mod:`poise.simulate.training` and :mod:`poise.simulate.lanes` say which acts a step has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.cost.exchange import ExchangeModel, exchange_ends
from poise.machine.cluster import same_node


@dataclass(frozen=True, slots=True, eq=False)
class Busy:
    """Each rank works on its own for ``seconds``: float64 [D], or as long on all."""

    seconds: float | NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Meet:
    """All wait for the last one, then take ``seconds`` together: an exchange of counts, or of sizes."""

    seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class AllToAll:
    """An all-to-all of ``bytes_DD`` float64 [D, D], from rank to rank, in which nobody waits for all.

    ``beside_DD`` leaves at the same times over the same ports (:func:`meanwhile`), and is not waited for.
    """

    bytes_DD: NDArray[np.float64]
    beside_DD: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Collective:
    """A sparse collective: the bytes [D, D] of one round after another, each of which is over on all ranks at once."""

    rounds: tuple[NDArray[np.float64], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Post:
    """Acts that begin now, go on beside what follows, and are over for those who wait for ``name``."""

    name: str
    acts: tuple[Act, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Wait:
    """Goes on once the post of each name has ended; one that was not posted is not waited for."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """Notes when each rank is here, at these places on the last axis of the marks."""

    places: tuple[int, ...]


Act = Busy | Meet | AllToAll | Collective | Post | Wait | Mark


class Clockwork:
    """The time of every rank.

    Parameters
    ----------
    node_D : int [D], node of each rank.
    model : constants of an exchange.
    """

    def __init__(self, node_D: NDArray[np.int32], model: ExchangeModel) -> None:
        self.node_D, self.model = node_D, model
        self.now_D = np.zeros(len(node_D))
        """Seconds since the beginning, float64 [D]."""
        self._ends: dict[str, NDArray[np.float64]] = {}

    def run(self, acts: Iterable[Act], marks_DM: NDArray[np.float64]) -> None:
        """Go through ``acts``; float64 ``marks_DM`` [D, places] is filled in. Posts outlast a run."""
        for act in acts:
            match act:
                case Mark(places):
                    for place in places:
                        marks_DM[:, place] = self.now_D
                case Post(name, inner):
                    began_D = self.now_D
                    self.run(inner, marks_DM)
                    self._ends[name], self.now_D = self.now_D, began_D
                case Wait(names):
                    for name in names:
                        self.now_D = np.maximum(self.now_D, self._ends.pop(name, self.now_D))
                case Busy(seconds):
                    self.now_D = self.now_D + seconds
                case Meet(seconds):
                    self.now_D = np.full(len(self.now_D), self.now_D.max()) + seconds
                case Collective(rounds):
                    self.now_D = self.now_D + sum(self._round_seconds(bytes_DD) for bytes_DD in rounds)
                case AllToAll(bytes_DD, beside_DD):
                    self.now_D = exchange_ends(bytes_DD, self.now_D, self.node_D, self.model, beside_DD)

    def _round_seconds(self, bytes_DD: NDArray[np.float64]) -> float:
        return float(exchange_ends(bytes_DD, np.zeros(len(self.node_D)), self.node_D, self.model).max())


def meanwhile(
    weights_DD: NDArray[np.float64], tokens_DD: NDArray[np.float64], node_D: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Bytes of weights that pass before tokens that share their ports are through: messages share a port evenly."""
    same_DD = same_node(node_D)
    out = np.zeros_like(weights_DD)
    for ports_DD in (same_DD & ~np.eye(len(node_D), dtype=bool), ~same_DD):
        sent_DD = tokens_DD * ports_DD
        longest_DD = np.maximum(sent_DD.max(axis=1)[:, None], sent_DD.max(axis=0)[None, :])
        out += np.minimum(weights_DD, longest_DD) * ports_DD
    return out
