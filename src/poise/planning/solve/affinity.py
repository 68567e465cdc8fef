"""Affinity assignments: a start for ``stay`` traffic, where a token should go on where it is.

ExFlow-like (arXiv 2401.08383): layer by layer, the experts of a layer are assigned to the slots so that most of the
transitions from the layer before stay on their device. A price on load, from a small grid, trades it for balance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from poise.cost.entries import HeldEntries
from poise.planning.methods.lpt import pack
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.routing.trace import NO_EXPERT

PRICES, ROUNDS = (1.0, 3.0), 6


def _assign(
    gain_ED: NDArray[np.float64], load_E: NDArray[np.float64], slots_D: NDArray[np.int64], price: float
) -> NDArray[np.int64]:
    """Device of each expert, int [E]: most gain, with the price of a device raised while it is overloaded."""
    slot_device = np.repeat(np.arange(len(slots_D)), slots_D)
    price_D = np.zeros(len(slots_D))
    share = load_E.sum() * slots_D / slots_D.sum()
    best, best_load = np.zeros(len(load_E), np.int64), np.inf
    for _ in range(ROUNDS):
        value = gain_ED - load_E[:, None] * price_D
        _, slot = linear_sum_assignment(-value[:, slot_device])
        device = slot_device[slot]
        load_D = np.bincount(device, weights=load_E, minlength=len(slots_D))
        worst = float((load_D / np.maximum(share, 1e-12)).max())
        if worst < best_load:
            best, best_load = device, worst
        price_D += price * (load_D / np.maximum(share, 1e-12) - 1.0)
    return best


def affinity_start(problem: PlacementProblem) -> list[Placement]:
    """Placements without replicas, one a price; none unless the traffic is ``stay`` with tokens."""
    batch = problem.batch
    if problem.traffic != "stay" or batch.experts_TLK is None:
        return []
    experts, devices = batch.num_experts, problem.num_devices
    slots = np.minimum(problem.slots_D, experts).astype(np.int64)
    load_LE = batch.load_LE()
    ids, origin_TL = batch.experts_TLK.astype(np.int64), batch.came_from_TL()
    out = []
    for price in PRICES:
        device = np.empty((batch.num_layers, experts), np.int64)
        device[0] = pack(load_LE[0], np.ones(experts, np.int64), slots, problem.cluster.speed_D).argmax(axis=1)
        for layer in range(1, batch.num_layers):
            known_T = origin_TL[:, layer] >= 0  # the others are still at home
            came = device[:layer].ravel()[origin_TL[known_T, layer]]
            to = ids[known_T, layer]
            flat = (to * devices + came[:, None])[to != NO_EXPERT]
            gain = np.bincount(flat, minlength=experts * devices).reshape(experts, devices) / max(1, len(ids))
            load = load_LE[layer] / max(load_LE[layer].sum(), 1e-12)
            device[layer] = _assign(gain, load, slots, price)
        out.append(problem.placed(HeldEntries.of_devices(device, devices), f"affinity-{price:g}"))
    return out
