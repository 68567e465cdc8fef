"""Which micro-batch of an optimizer step a request runs in, so that all of them load the devices alike.

Gradient accumulation is a sum, so any dealing of a step's requests to its micro-batches gives the same step. Where
routing is known ahead, the loads of each request are.

Step 1  Start: as given.
Step 2  Swap two requests of one rank between two micro-batches where that lowers the sum of squares of what is to be
        alike: pairs on every owner in every layer and micro-batch, and tokens of every rank in every micro-batch, each
        over its mean.
Step 3  Until a sweep over all requests swaps nothing, or a number of sweeps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.util.errors import OptionError

SWEEPS = 8


def even_out(
    load_QX: NDArray[np.float64], size_Q: NDArray[np.int64], rank_Q: NDArray[np.int64], micro_Q: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Micro-batch of every request, int64 [Q]: as many requests of each rank in each micro-batch as in ``micro_Q``.

    Parameters
    ----------
    load_QX : float64 [Q, X], pairs of each request on each of X things to be alike (owners of all layers, or experts).
    size_Q : int64 [Q], tokens.
    rank_Q, micro_Q : int64 [Q], where each request runs, and its micro-batch now.

    Raises
    ------
    OptionError : sizes that disagree.
    """
    count = len(load_QX)
    for what, array in (("sizes", size_Q), ("ranks", rank_Q), ("micro-batches", micro_Q)):
        if array.shape != (count,):
            raise OptionError(f"{len(array)} {what} of {count} requests")
    if not count:
        return micro_Q.copy()
    micros, ranks = int(micro_Q.max()) + 1, int(rank_Q.max()) + 1
    mean_X = load_QX.sum(axis=0) / micros
    # a thing that few pairs go to is none the more important for it
    weigh_X = np.sqrt(ranks * mean_X / np.maximum(mean_X.sum(), 1e-300))
    x_QX = load_QX / np.maximum(mean_X, 1e-300) * weigh_X
    cell = size_Q.sum() / (micros * ranks)
    size_of = size_Q / max(float(cell), 1e-300)
    out = micro_Q.copy()
    sum_MX, sum_MD = np.zeros((micros, x_QX.shape[1])), np.zeros((micros, ranks))
    np.add.at(sum_MX, out, x_QX)
    np.add.at(sum_MD, (out, rank_Q), size_of)
    order = np.argsort(-size_Q, kind="stable")
    for _ in range(SWEEPS):
        swapped = False
        for q in order:
            others = np.flatnonzero((rank_Q == rank_Q[q]) & (out != out[q]))
            if not len(others):
                continue
            m, d = out[q], rank_Q[q]
            gain_RX, gain_R = x_QX[others] - x_QX[q], size_of[others] - size_of[q]
            change_R = np.einsum("rx,rx->r", gain_RX, sum_MX[m] - sum_MX[out[others]] + gain_RX)
            change_R += gain_R * (sum_MD[m, d] - sum_MD[out[others], d] + gain_R)
            best = int(np.argmin(change_R))
            if change_R[best] >= -1e-9:
                continue
            r, n = others[best], out[others[best]]
            for sums, step in ((sum_MX, gain_RX[best]), (sum_MD[:, d], gain_R[best])):
                sums[m] += step
                sums[n] -= step
            out[q], out[r] = n, m
            swapped = True
        if not swapped:
            break
    return out
