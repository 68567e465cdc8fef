"""What the load of the timed rank comes to in the model of a kernel: pairs, active experts, tokens, and excess.

The model needs ``sum over active experts of max(a, b * n)``. With ``excess(r) = sum of max(n - r, 0)`` that is
``a * active + b * excess(a / b)``: a mean over draws of the excess at a few knots r stands for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.lab.calibrate.tables import loads

KNOTS_X = np.array(
    [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096], float
)
"""Tokens of one expert at which the excess is kept; between them it is taken for straight."""
DRAWS = 5
"""As many as the collector took the mean of."""


class Workload(NamedTuple):
    """What a row of a table says of the load: the key under which drawn loads are kept.

    ``alpha`` is the exponent of the power law, 0 where loads are balanced. ``slots`` is 0 but for tables that were
    drawn by other rules (benchmarks/tables_wide.py): their loads must be known before.
    """

    tokens: int
    experts: int
    top_k: int
    ranks: int
    alpha: float
    slots: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class RankLoads:
    """Loads of the timed rank, a row each: all float.

    Parameters
    ----------
    pairs_R : token-expert pairs, S.
    active_R : experts with at least one token.
    tokens_R : different tokens, N.
    excess_RX : sum over experts of max(n - r, 0) at the knots r of :data:`KNOTS_X`.
    """

    pairs_R: NDArray[np.float64]
    active_R: NDArray[np.float64]
    tokens_R: NDArray[np.float64]
    excess_RX: NDArray[np.float64]

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> RankLoads:
        """These rows only."""
        return RankLoads(self.pairs_R[index], self.active_R[index], self.tokens_R[index], self.excess_RX[index])

    def excess(self, tokens_R: NDArray[np.float64]) -> NDArray[np.float64]:
        """Excess over that many tokens of an expert, by row."""
        at = np.clip(np.searchsorted(KNOTS_X, tokens_R) - 1, 0, len(KNOTS_X) - 2)
        part = np.clip((tokens_R - KNOTS_X[at]) / (KNOTS_X[at + 1] - KNOTS_X[at]), 0.0, 1.0)
        row = np.arange(len(tokens_R))
        return self.excess_RX[row, at] * (1.0 - part) + self.excess_RX[row, at + 1] * part


def load_vector(count_E: NDArray[np.int64], tokens: int) -> NDArray[np.float64]:
    """Pairs, active experts, tokens and excess of one draw of the timed rank, float [3 + X]."""
    excess = np.maximum(count_E[:, None] - KNOTS_X, 0.0).sum(axis=0)
    return np.concatenate([[count_E.sum(), (count_E > 0).sum(), tokens], excess])


def mean_vector(
    work: Workload, own: int, draws: int, draw: Callable[[np.random.Generator], NDArray[np.int64]]
) -> NDArray[np.float64]:
    """Of the first ``own`` experts (or slots) of several draws: the mean of :func:`load_vector`."""
    seed = [0, *work[:4], round(100 * work.alpha), work.slots + 1]
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        count = draw(rng)
        found.append(load_vector(count[:own], loads.different_tokens(count, own, work.tokens)))
    return np.mean(found, axis=0)


def rank_vector(work: Workload) -> NDArray[np.float64]:
    """Pairs, active experts, tokens and excess of one workload, float [3 + X]: the mean over draws."""
    if work.alpha == 0.0:
        return load_vector(*loads.balanced_load(*work[:4]))
    assert not work.slots, "drawn by another rule, and not known"
    own = work.experts // work.ranks
    return mean_vector(work, own, DRAWS, lambda rng: loads.power_law_load(*work[:5], rng))


KnownLoads = dict[Workload, NDArray[np.float64]]
"""Vectors that were drawn before: the same workload stands in the tables of many GPUs and engines."""


def rank_loads(work: Iterable[Workload], known: KnownLoads) -> RankLoads:
    """Loads of many rows; what is not in ``known`` is drawn and put there."""
    rows = []
    for one in work:
        if one not in known:
            known[one] = rank_vector(one)
        rows.append(known[one])
    all_RV = np.array(rows)
    return RankLoads(all_RV[:, 0], all_RV[:, 1], all_RV[:, 2], all_RV[:, 3:])
