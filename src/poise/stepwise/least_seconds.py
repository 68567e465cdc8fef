"""A lower bound of the seconds of a training layer: what no plan with these owners and step slots can be below.

Of each part the least that some plan could have, so that their sum is below every plan:

compute     all pairs at the rate of large groups, spread by the devices' speeds.
exchange    pairs of a group's tokens (a node; a device, where there is one node) for experts that it does not hold
            leave it through its ports, evenly; and pairs that leave their device, which holds few, do so through ports
            inside the node and between nodes, at best in such shares that both take as long.
weights     what it holds beside what its devices own came in, each expert once, and its gradient goes back: through its
            ports, evenly, all of it before the gate and hidden as far as anything hides.

A group may hold as many experts beside its own as its devices have slots; how many it does is chosen for the least sum
of the last two, with those that most of its pairs are for. The group with most decides. Control, starts of messages
between rounds and every rounding of tokens are left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds
from poise.cost.weights import StepPrice
from poise.stepwise.step_seconds import exchange_seconds
from poise.util.errors import OptionError

LARGE = 1e9
"""Tokens of an expert, of which each takes the least that one can."""


def least_layer_seconds(
    load_SE: NDArray[np.int64], owner_E: NDArray[np.int64], price: StepPrice, step_slots: int
) -> float:
    """Of one layer in one step, without attention.

    Parameters
    ----------
    load_SE : int64 [D, E], tokens of each expert from each source.
    owner_E : int64 [E], who owns each expert.
    price : of :func:`poise.cost.weights.training_price`.
    step_slots : experts that a device can hold for the step beside those that it owns.

    Raises
    ------
    OptionError : loads of other devices or experts than the owners and the machine have.
    """
    cluster = price.cluster
    if load_SE.shape != (cluster.num_devices, len(owner_E)):
        raise OptionError(
            f"loads of {load_SE.shape} [devices, experts] for {cluster.num_devices} devices and {len(owner_E)} owners"
        )
    if not load_SE.any():
        return 0.0
    group_D = cluster.node_D.astype(np.int64) if cluster.num_nodes > 1 else np.arange(cluster.num_devices)
    return _least_compute(int(load_SE.sum()), price) + max(
        _least_moved(load_SE, owner_E, group_D == group, price, step_slots) for group in np.unique(group_D)
    )


def _least_compute(pairs: int, price: StepPrice) -> float:
    cluster = price.cluster
    each_s = float(expert_seconds(np.array([[LARGE]]), cluster, price.model).sum()) / LARGE
    return each_s * pairs * price.compute_passes / float(np.sum(cluster.speed_D))


def _least_moved(
    load_SE: NDArray[np.int64], owner_E: NDArray[np.int64], inside_D: NDArray[np.bool_], price: StepPrice,
    step_slots: int,
) -> float:  # fmt: skip
    """Exchange and weights of one group."""
    away_X = np.sort(load_SE[inside_D].sum(axis=0)[~inside_D[owner_E]])[::-1]
    size, outside = int(inside_D.sum()), int((~inside_D).sum())
    if not outside:
        return exchange_seconds(np.zeros((len(inside_D),) * 2), price)
    start_s = exchange_seconds(np.zeros((len(inside_D),) * 2), price)
    each_s = _pair_seconds(np.outer(inside_D, ~inside_D) / (size * outside), price)
    least_s = 0.0
    if size > 1:
        near_DD = np.outer(inside_D, inside_D) & ~np.eye(len(inside_D), dtype=bool)
        near_s = _pair_seconds(near_DD / (size * (size - 1)), price)
        least_s = _off_device(load_SE, owner_E, inside_D, step_slots) * near_s * each_s / (near_s + each_s)
    most = min(len(away_X), size * step_slots)
    left_R = away_X.sum() - np.concatenate([[0], np.cumsum(away_X[:most])])
    return start_s + min(max(least_s, each_s * float(left)) + _least_shown(count, size, price)
                         for count, left in enumerate(left_R))  # fmt: skip


def _pair_seconds(share_DD: NDArray[np.float64], price: StepPrice) -> float:
    """Of one pair that is spread so, without the start."""
    start_s = exchange_seconds(np.zeros_like(share_DD), price)
    return (exchange_seconds(share_DD * LARGE, price) - start_s) / LARGE


def _off_device(
    load_SE: NDArray[np.int64], owner_E: NDArray[np.int64], inside_D: NDArray[np.bool_], step_slots: int
) -> float:
    """Pairs of a group that leave their device, were its slots all for those that most of its own pairs are for."""
    total = 0
    for device in np.flatnonzero(inside_D):
        others_X = np.sort(load_SE[device, owner_E != device])[::-1]
        total += int(others_X[step_slots:].sum())
    return float(total)


def _least_shown(count: int, size: int, price: StepPrice) -> float:
    """Of so many experts that come into a group of so many devices, and their gradients."""
    cluster = price.cluster
    wire, across = cluster.plain_wire, cluster.num_nodes > 1
    through = count if across and cluster.nic_shared else -(-count // size)
    byte_s = through / (wire.inter_bytes_per_s if across else wire.intra_bytes_per_s)
    back_s = byte_s * price.gathered_bytes * price.gradient_ratio
    return price.shown_seconds(byte_s * price.gathered_bytes, 0.0, back_s)
