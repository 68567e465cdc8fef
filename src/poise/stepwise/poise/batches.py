"""Compiled parts of ``poise-near``: the way to other holders, one batch of fetches after the other.

A batch takes no longer than one fetch over the network, or inside nodes, whatever its ports carry
(:func:`poise.cost.weights.gather_seconds`). Hence it doubles: an expert gets at most as many new holders in other nodes
as it has holders that send nothing else. A node takes an expert from the network once; its other devices have it from
there in a later batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine
from poise.cost.weights import CompiledPrice, gather_seconds
from poise.util.compiled import compiled


class Way(NamedTuple):
    """Where batches lead.

    Parameters
    ----------
    target_ED : bool [E, D], the holders in the end.
    worth_ED : float64 [E, D], of a replica: what is worth most comes first, what is worth least goes first.
    static_ED : bool [E, D], holders that never go.
    slots_D : int64 [D], most experts of a device.
    """

    target_ED: NDArray[np.bool_]
    worth_ED: NDArray[np.float64]
    static_ED: NDArray[np.bool_]
    slots_D: NDArray[np.int64]


@compiled
def one_fetch_seconds(far: bool, machine: Machine) -> float:
    """Seconds of one expert over the network (``far``) or inside a node."""
    rate = machine.inter_bytes_per_s if far else machine.intra_bytes_per_s
    return machine.expert_bytes / rate + machine.latency_s


@compiled
def _goes(held_D: NDArray[np.bool_], d: int, e: int, way: Way, dropped_ED: NDArray[np.bool_]) -> bool:
    return held_D[d] and not way.target_ED[e, d] and not way.static_ED[e, d] and not dropped_ED[e, d]


@compiled
def next_batch(
    held_ED: NDArray[np.bool_], way: Way, far: bool, price: CompiledPrice
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What comes, over the network too if ``far``, and what is dropped for it; bool [E, D] each."""
    experts, devices = held_ED.shape
    machine = price.machine
    limit = one_fetch_seconds(far, machine) * (1.0 + 1e-9)
    coming_ED, dropped_ED = np.zeros_like(held_ED), np.zeros_like(held_ED)
    free_D = way.slots_D - held_ED.sum(axis=0)
    here_EN = np.zeros((experts, machine.size_N.size), np.bool_)
    for e in range(experts):
        for d in range(devices):
            here_EN[e, machine.node_D[d]] |= held_ED[e, d]
    came_EN = np.zeros_like(here_EN)
    for pair in np.argsort(-way.worth_ED.ravel(), kind="mergesort"):
        e, d = pair // devices, pair % devices
        n = machine.node_D[d]
        if held_ED[e, d] or not way.target_ED[e, d] or came_EN[e, n] or not (far or here_EN[e, n]):
            continue
        old = -1
        if free_D[d] <= 0:
            for x in range(experts):
                if _goes(held_ED[x], d, x, way, dropped_ED) and (old < 0 or way.worth_ED[x, d] < way.worth_ED[old, d]):
                    old = x
            if old < 0:
                continue
        coming_ED[e, d] = True
        if old >= 0:
            dropped_ED[old, d] = True
        if gather_seconds(held_ED & ~dropped_ED, coming_ED, price) > limit:
            coming_ED[e, d] = False
            if old >= 0:
                dropped_ED[old, d] = False
            continue
        if old < 0:
            free_D[d] -= 1
        came_EN[e, n] |= not here_EN[e, n]
    return coming_ED, dropped_ED
