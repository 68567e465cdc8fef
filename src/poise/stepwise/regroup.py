"""Which cell (rank and micro-batch) of an optimizer step a request runs in, so that all of them load the devices alike.

Gradient accumulation is a sum, so any dealing of a step's requests to its micro-batches, and to data-parallel ranks,
gives the same step. Where routing is known ahead, the loads of each request are.

Step 1  Start: as given.
Step 2  Swap two requests of one pool (a rank, or all ranks of a node) between two cells where that lowers the sum of
        squares of what is to be alike: pairs on every owner in every layer and micro-batch, and tokens of every rank in
        every micro-batch, each over its mean.
Step 3  Until a sweep over all requests swaps nothing, or a number of sweeps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.util.errors import OptionError

SWEEPS = 8
TRIED = 256
"""Most requests that one is tried against, spaced evenly among those of its pool."""


def even_out(
    load_QX: NDArray[np.float64], size_Q: NDArray[np.int64], rank_Q: NDArray[np.int64], micro_Q: NDArray[np.int64]
) -> NDArray[np.int64]:
    """:func:`even_cells` where every request stays on its rank: micro-batch of each, int64 [Q]."""
    return even_cells(load_QX, size_Q, rank_Q, micro_Q, rank_Q)[1]


def even_cells(
    load_QX: NDArray[np.float64], size_Q: NDArray[np.int64], rank_Q: NDArray[np.int64], micro_Q: NDArray[np.int64],
    pool_Q: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Rank and micro-batch of every request, int64 [Q] each: as many requests in each cell as before.

    Parameters
    ----------
    load_QX : float64 [Q, X], pairs of each request on each of X things to be alike (owners of all layers, or experts).
    size_Q : int64 [Q], tokens.
    rank_Q, micro_Q : int64 [Q], where each request runs now.
    pool_Q : int64 [Q], requests of one pool may be swapped.

    Raises
    ------
    OptionError : sizes that disagree.
    """
    count = len(load_QX)
    for what, array in (("sizes", size_Q), ("ranks", rank_Q), ("micro-batches", micro_Q), ("pools", pool_Q)):
        if array.shape != (count,):
            raise OptionError(f"{len(array)} {what} of {count} requests")
    if not count:
        return rank_Q.copy(), micro_Q.copy()
    micros, ranks = int(micro_Q.max()) + 1, int(rank_Q.max()) + 1
    mean_X = load_QX.sum(axis=0) / micros
    # a thing that few pairs go to is none the more important for it
    weigh_X = np.sqrt(ranks * mean_X / np.maximum(mean_X.sum(), 1e-300))
    x_QX = load_QX / np.maximum(mean_X, 1e-300) * weigh_X
    cell = size_Q.sum() / (micros * ranks)
    size_of = size_Q / max(float(cell), 1e-300)
    at, on = micro_Q.copy(), rank_Q.copy()
    sum_MX, sum_MD = np.zeros((micros, x_QX.shape[1])), np.zeros((micros, ranks))
    np.add.at(sum_MX, at, x_QX)
    np.add.at(sum_MD, (at, on), size_of)
    pools = {pool: np.flatnonzero(pool_Q == pool) for pool in np.unique(pool_Q).tolist()}
    order = np.argsort(-size_Q, kind="stable")
    for _ in range(SWEEPS):
        swapped = False
        for q in order:
            pool, m, d = pools[int(pool_Q[q])], at[q], on[q]
            others = pool[(at[pool] != m) | (on[pool] != d)]
            if not len(others):
                continue
            stride = -(-len(others) // TRIED)
            others = others[q % stride :: stride]
            n_R, e_R = at[others], on[others]
            gain_RX, gain_R = x_QX[others] - x_QX[q], size_of[others] - size_of[q]
            change_R = np.where(n_R == m, 0.0, np.einsum("rx,rx->r", gain_RX, sum_MX[m] - sum_MX[n_R] + gain_RX))
            change_R += gain_R * (sum_MD[m, d] - sum_MD[n_R, e_R] + gain_R)
            best = int(np.argmin(change_R))
            if change_R[best] >= -1e-9:
                continue
            r, n, e = others[best], n_R[best], e_R[best]
            sum_MX[m] += gain_RX[best]
            sum_MX[n] -= gain_RX[best]
            sum_MD[m, d] += gain_R[best]
            sum_MD[n, e] -= gain_R[best]
            at[q], on[q], at[r], on[r] = n, e, m, d
            swapped = True
        if not swapped:
            break
    return on, at
