"""Token split: how the tokens of a replicated expert are divided over its replicas.

``even``: every slot gets the same part; ``near``: own device, else own node, else anywhere (:mod:`poise.cost.near`);
``exact``: integer tokens that minimise the fullest device.

It lives below planning because the planner's objective is a split too (docs/decisions/0001-layers.md).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.entries import LayerEntries
from poise.cost.quota import Holders, QuotaProblem, Scratch, balance, holders_of, make_holders, make_scratch
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
    holders, (experts, devices) = make_holders(count_ED), np.shape(count_ED)
    quota_H = _quota(load_E, holders, speed_D, make_scratch(experts, devices))
    out = np.zeros((experts, devices), np.int64)
    out[holders.expert_H, holders.device_H] = quota_H
    return out


def _quota(
    load_E: NDArray[Any], holders: Holders, speed_D: NDArray[np.float64], scratch: Scratch
) -> NDArray[np.int64]:  # fmt: skip
    """:func:`exact_quota` of each (expert, device), int64 [H]."""
    load = np.rint(np.asarray(load_E, dtype=np.float64)).astype(np.int64)
    speed = np.array(speed_D, dtype=np.float64)  # of its own: to numba an array that may not be written is another type
    quota_H = np.zeros(holders.device_H.size, np.int64)
    balance(QuotaProblem(load, speed, NONE, NONE, 0.0), holders, quota_H, scratch)
    return quota_H


class SplitShares(NamedTuple):
    """Share of its expert's tokens that each entry of a layer computes in each step, float64 [B, H] (B = 1 for the even
    split).
    """

    held: LayerEntries
    share_BH: NDArray[np.float64]


def split_shares(
    load_BE: NDArray[np.float64], held: LayerEntries, speed_D: NDArray[np.float64], split: Split
) -> SplitShares:  # fmt: skip
    """Shares of a layer's entries under the even and the exact split.

    Under ``near`` they would be others for every source: :mod:`poise.cost.near` has that split.
    """
    even_H = held.count_H / held.replicas_E()[held.expert_H]
    if split == "even" or int(np.bincount(held.expert_H).max()) <= 1:
        return SplitShares(held, even_H[None])
    order = held.by_expert()
    expert_H, even_H = held.expert_H[order], even_H[order]
    holders = holders_of(expert_H, held.device_H[order], held.num_experts, held.num_devices)
    scratch, share_BH = make_scratch(held.num_experts, held.num_devices), np.empty((len(load_BE), len(order)))
    for b, load_E in enumerate(load_BE):
        quota_H = _quota(load_E, holders, speed_D, scratch)
        total_H = np.bincount(expert_H, quota_H)[expert_H]
        share_BH[b, order] = np.where(total_H > 0, quota_H / np.maximum(total_H, 1), even_H)
    return SplitShares(held, share_BH)
