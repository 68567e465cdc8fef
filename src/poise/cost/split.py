"""Token split: how the tokens of a replicated expert are divided over its replicas.

``even``: every slot gets the same part; ``near``: own device, else own node, else anywhere (:mod:`poise.cost.near`);
``exact``: integer tokens that minimise the fullest device.

It lives below planning because the planner's objective is a split too (docs/decisions/0001-layers.md).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.cost.quota import QuotaProblem, balance, make_holders, make_scratch
from poise.util.errors import OptionError

Split = Literal["even", "near", "exact"]
SPLITS: tuple[Split, ...] = ("even", "near", "exact")
NONE = np.zeros(0, np.int64)


def check_split(split: Split, traffic: str) -> None:
    """Raise OptionError unless the split knows the sources it needs under a data flow."""
    if split == "near" and traffic == "stay":
        raise OptionError(
            "split 'near' goes by the home rank of a token, and under traffic model 'stay' tokens leave theirs",
            hint="use --split even or exact, or --traffic home_node_dedup",
        )


def even_share(count_LED: NDArray[Any]) -> NDArray[np.float64]:
    """Share of an expert's tokens that each device computes when every slot is as likely, float64 [..., E, D].

    The expectation of engines that pick a replica at random or in turn. ``count`` is int [..., E, D]; an expert without
    a slot gives zeros.
    """
    total = count_LED.sum(axis=-1, keepdims=True)
    share: NDArray[np.float64] = count_LED / np.maximum(total, 1)
    return share


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
    holders = make_holders(count_ED)
    num_experts, num_devices = np.shape(count_ED)
    quota = np.zeros(holders.device_H.size, np.int64)
    speed = np.array(speed_D, dtype=np.float64)  # of its own: to numba an array that may not be written is another type
    problem = QuotaProblem(load, speed, NONE, NONE, 0.0)
    balance(problem, holders, quota, make_scratch(num_experts, num_devices))
    out = np.zeros((num_experts, num_devices), np.int64)
    out[holders.expert_H, holders.device_H] = quota
    return out


def split_share_BED(
    load_BE: NDArray[np.float64], count_ED: NDArray[Any], speed_D: NDArray[np.float64], split: Split
) -> NDArray[np.float64]:
    """Share of each expert's tokens on each device in each step, float64 [B, E, D] (B = 1 for the even split).

    Under ``near`` it would be another for every source: :mod:`poise.cost.near` has that split.
    """
    even = even_share(count_ED)
    if split == "even" or int(np.max(np.count_nonzero(count_ED, axis=1))) <= 1:
        return even[None]
    share = np.empty((load_BE.shape[0], *count_ED.shape))
    for b, load_E in enumerate(load_BE):
        quota = exact_quota(load_E, count_ED, speed_D)
        total = quota.sum(axis=1, keepdims=True)
        share[b] = np.where(total > 0, quota / np.maximum(total, 1), even)
    return share
