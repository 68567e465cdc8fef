"""Token split: how the tokens of a replicated expert are divided over its replicas.

It lives below planning because the planner's objective is a split too (docs/decisions/0001-layers.md).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

Split = Literal["even", "exact"]
SPLITS: tuple[Split, ...] = ("even", "exact")


def even_share(count_LED: NDArray[Any]) -> NDArray[np.float64]:
    """Share of an expert's tokens that each device computes when every slot is as likely, float64 [..., E, D].

    The expectation of engines that pick a replica at random or in turn. ``count`` is int [..., E, D]; an expert without
    a slot gives zeros.
    """
    total = count_LED.sum(axis=-1, keepdims=True)
    share: NDArray[np.float64] = count_LED / np.maximum(total, 1)
    return share


@njit(cache=True)
def _balance(quota_ED, holds_ED, speed_D, load_D):  # type: ignore[no-untyped-def]
    """Augment until no path leads from a fullest device to one that could take a token and stay below it.

    That is the optimality condition of a min-max bipartite flow: each round does a breadth-first search over devices
    (d -> d2 if some expert held by both has tokens on d) and shifts tokens along the path found.
    """
    num_experts, num_devices = quota_ED.shape
    via = np.empty(num_devices, np.int64)
    prev = np.empty(num_devices, np.int64)
    queue = np.empty(num_devices, np.int64)
    while True:
        top = 0
        for d in range(1, num_devices):
            if load_D[d] / speed_D[d] > load_D[top] / speed_D[top]:
                top = d
        limit = load_D[top] / speed_D[top]
        prev[:] = -1
        prev[top] = top
        queue[0] = top
        head, tail, goal = 0, 1, -1
        while head < tail and goal < 0:
            d = queue[head]
            head += 1
            for e in range(num_experts):
                if quota_ED[e, d] == 0:
                    continue
                for d2 in range(num_devices):
                    if holds_ED[e, d2] and prev[d2] < 0:
                        prev[d2] = d
                        via[d2] = e
                        if (load_D[d2] + 1) / speed_D[d2] < limit:
                            goal = d2
                            break
                        queue[tail] = d2
                        tail += 1
                if goal >= 0:
                    break
        if goal < 0:
            return
        # as many tokens as the path carries without lifting its end above its start
        amount = np.int64(
            max(
                1.0,
                np.floor(
                    (limit - load_D[goal] / speed_D[goal])
                    * speed_D[top]
                    * speed_D[goal]
                    / (speed_D[top] + speed_D[goal])
                ),
            )
        )
        d = goal
        while d != top:
            amount = min(amount, quota_ED[via[d], prev[d]])
            d = prev[d]
        d = goal
        while d != top:
            quota_ED[via[d], prev[d]] -= amount
            quota_ED[via[d], d] += amount
            d = prev[d]
        load_D[top] -= amount
        load_D[goal] += amount


def exact_quota(load_E: NDArray[Any], count_ED: NDArray[Any], speed_D: NDArray[np.float64]) -> NDArray[np.int64]:
    """Integer tokens of each expert on each device that minimise the largest ``tokens / speed``, int64 [E, D].

    Parameters
    ----------
    load_E : int [E], tokens of each expert (fractions are rounded).
    count_ED : int [E, D], slots of each expert on each device; an expert with load has at least one.
    speed_D : float64 [D].

    Notes
    -----
    With equal speeds the optimum is the linear programme's rounded up (DESIGN 3.3). Exact in tokens; under the
    roofline a heuristic.
    """
    load = np.rint(np.asarray(load_E, dtype=np.float64)).astype(np.int64)
    holds = np.asarray(count_ED) > 0
    copies = holds.sum(axis=1)
    rank = np.cumsum(holds, axis=1) - 1
    base, rest = np.divmod(load, np.maximum(copies, 1))
    quota = np.where(holds, base[:, None] + (rank < rest[:, None]), 0).astype(np.int64)
    _balance(quota, holds, np.asarray(speed_D, dtype=np.float64), quota.sum(axis=0))
    return quota


def split_share_BED(
    load_BE: NDArray[np.float64], count_ED: NDArray[Any], speed_D: NDArray[np.float64], split: Split
) -> NDArray[np.float64]:
    """Share of each expert's tokens on each device in each step, float64 [B, E, D] (B = 1 for the even split)."""
    even = even_share(count_ED)
    if split == "even" or int(np.max(np.count_nonzero(count_ED, axis=1))) <= 1:
        return even[None]
    share = np.empty((load_BE.shape[0], *count_ED.shape))
    for b, load_E in enumerate(load_BE):
        quota = exact_quota(load_E, count_ED, speed_D)
        total = quota.sum(axis=1, keepdims=True)
        share[b] = np.where(total > 0, quota / np.maximum(total, 1), even)
    return share
