"""Compiled parts of ``poise`` in training: which experts to gather, so that a layer takes least modelled time.

Modelled time: compute + all-to-alls of all passes + exposed weights (:mod:`poise.cost.weights`), tokens split by
:mod:`poise.stepwise.poise.node_split`.

Before the gate (:func:`plan_layer`), loads predicted and spread evenly over the sources
    Step 1  The k pairs (expert, node) with most tokens from the node's sources, of those the node lacks, for k on a
            grid: a replica on the device of the node with least tokens and a free slot.
    Step 2  For several slacks of the split over nodes: inside each node, fullest devices give to idlest ones with free
            slots until within several tolerances ("surplus fill").
    Step 3  Of all these plans, the one with the least modelled time.
    Step 4  Slots still free get what their node computes most of, where that gather hides: slack for what the
            prediction misses.
After the gate (:func:`calibrate`), exact loads of every source
    Step 5  The fastest two-level split.
    Step 6  One replica at a time, of what relieves the fullest device or keeps most tokens in their node, is fetched
            late while the modelled gain exceeds what it exposes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine
from poise.cost.weights import CompiledPrice, exposed_seconds, gather_seconds
from poise.stepwise.poise.node_split import (
    SLACKS,
    PartTokens,
    SourceTokens,
    best_quotas,
    quota_seconds,
    split_nodes,
    split_tokens,
    tokens_of_node,
)
from poise.util.compiled import compiled

COARSE_SLACKS, COARSE_TOLERANCE = np.array([1e9, 0.1]), 1.1
"""What is tried for every count of step 1, before the best count is tried with all slacks and tolerances."""
TOLERANCES = np.array([1.3, 1.1, 1.02])
"""Fullest device of a node over its mean at which surplus fill stops: what is tried."""
GROWTH = 1.3
"""Step between counts of step 1."""
SPARE_SHARE = 0.1
"""A spare slot gets an expert whose tokens on each holder of the node are at least this share of a device's mean."""


class OwnedLayer(NamedTuple):
    """A layer to plan.

    Parameters
    ----------
    sources : tokens, predicted before the gate, exact after it.
    owned_ED : bool [E, D], owners.
    free_D : int64 [D], slots beyond them.
    price : machine, window and passes of the weights.
    """

    sources: SourceTokens
    owned_ED: NDArray[np.bool_]
    free_D: NDArray[np.int64]
    price: CompiledPrice


class Filling(NamedTuple):
    """Holders while slots are being filled, bool [E, D], and the slots still free, int64 [D]."""

    holders_ED: NDArray[np.bool_]
    free_D: NDArray[np.int64]


class GatherPlan(NamedTuple):
    """Modelled seconds of a layer, its holders, bool [E, D], and their tokens, int64 [E, D]."""

    seconds: float
    holders_ED: NDArray[np.bool_]
    quota_ED: NDArray[np.int64]


@compiled
def give_to_nodes(layer: OwnedLayer, count: int) -> tuple[int, Filling]:
    """The ``count`` pairs (expert, node) with most tokens from the node's sources get a replica there; pairs given.

    Inside the node it goes to the device with least tokens so far.
    """
    machine, need_EN = layer.price.machine, layer.sources.need_EN
    out_ED, free_D = layer.owned_ED.copy(), layer.free_D.copy()
    experts, devices = out_ED.shape
    nodes = machine.size_N.size
    many_EN = np.zeros((experts, nodes), np.int64)
    for e in range(experts):
        for d in range(devices):
            if out_ED[e, d]:
                many_EN[e, machine.node_D[d]] += 1
    load_D = np.zeros(devices)
    for e in range(experts):
        for d in range(devices):
            if out_ED[e, d]:
                load_D[d] += need_EN[e, machine.node_D[d]] / many_EN[e, machine.node_D[d]]
    order = np.argsort(-need_EN.ravel(), kind="mergesort")
    given = 0
    for pair in order:
        e, n = pair // nodes, pair % nodes
        if given == count or need_EN[e, n] == 0:
            break
        if many_EN[e, n] > 0:
            continue
        to = -1
        for d in range(devices):
            fits = machine.node_D[d] == n and free_D[d] > 0
            if fits and (to < 0 or load_D[d] / machine.speed_D[d] < load_D[to] / machine.speed_D[to]):
                to = d
        if to < 0:
            continue
        out_ED[e, to] = True
        free_D[to] -= 1
        load_D[to] += need_EN[e, n]
        given += 1
    return given, Filling(out_ED, free_D)


@compiled
def fill_node(tokens: PartTokens, filling: Filling, tolerance: float) -> NDArray[np.int64]:
    """Surplus fill inside one node, in place; the exact split, int64 [E, X]."""
    holds_EX, free_X = filling.holders_ED, filling.free_D
    experts, devices = holds_EX.shape
    tried = np.zeros(devices, np.bool_)
    mean = tokens.load_E.sum() / tokens.speed_X.sum()
    most, quota_EX = split_tokens(tokens, holds_EX, 0.0)
    for _ in range(experts * devices):
        if most <= tolerance * mean:
            break
        load_X = quota_EX.sum(axis=0) / tokens.speed_X
        tried[:] = False
        done = True
        for _ in range(devices):
            to = -1
            for d in range(devices):
                if not tried[d] and free_X[d] > 0 and load_X[d] < mean and (to < 0 or load_X[d] < load_X[to]):
                    to = d
            if to < 0:
                break
            tried[to] = True
            expert, amount = -1, 0
            for d in range(devices):
                if load_X[d] >= most * 0.9999:
                    for e in range(experts):
                        if quota_EX[e, d] > amount and not holds_EX[e, to]:
                            expert, amount = e, quota_EX[e, d]
            if expert >= 0:
                holds_EX[expert, to] = True
                free_X[to] -= 1
                done = False
                break
        if done:
            break
        most, quota_EX = split_tokens(tokens, holds_EX, 0.0)
    return quota_EX


@compiled
def fill_nodes(
    sources: SourceTokens, quota_EN: NDArray[np.int64], start: Filling, machine: Machine, tolerance: float
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """:func:`fill_node` in every node: holders, bool [E, D], and their tokens, int64 [E, D]."""
    holders_ED, quota_ED = start.holders_ED.copy(), np.zeros(start.holders_ED.shape, np.int64)
    first = 0
    for n in range(machine.size_N.size):
        last = first + machine.size_N[n]
        inside = Filling(np.ascontiguousarray(holders_ED[:, first:last]), start.free_D[first:last].copy())
        tokens = tokens_of_node(sources, quota_EN, n, first, machine)
        quota_EX = fill_node(tokens, inside, tolerance)
        for e in range(quota_EX.shape[0]):
            for d in range(first, last):
                quota_ED[e, d] = quota_EX[e, d - first]
                holders_ED[e, d] = inside.holders_ED[e, d - first]
        first = last
    return holders_ED, quota_ED


@compiled
def _try(layer: OwnedLayer, start: Filling, slack: float, tolerance: float, least: float) -> GatherPlan:
    """Step 2 for one slack and tolerance; its weights are priced only where it beats ``least`` without them."""
    machine, sources = layer.price.machine, layer.sources
    quota_EN = split_nodes(sources, start.holders_ED, machine, slack)
    holders_ED, quota_ED = fill_nodes(sources, quota_EN, start, machine, tolerance)
    seconds = quota_seconds(quota_ED, sources, machine)
    if seconds < least:
        gather = gather_seconds(layer.owned_ED, holders_ED & ~layer.owned_ED, layer.price)
        seconds += exposed_seconds(gather, 0.0, layer.price)
    return GatherPlan(seconds, holders_ED, quota_ED)


@compiled(nogil=True)
def plan_layer(layer: OwnedLayer, counts: NDArray[np.int64]) -> tuple[GatherPlan, float]:
    """The plan with the least modelled time, and the seconds of no replicas.

    ``counts``: replicas a node that step 1 tries, rising (:func:`tried_counts`). First all of them with few slacks,
    then the best one with all slacks and tolerances.
    """
    nodes = layer.price.machine.size_N.size
    alone, quota_ED = best_quotas(layer.sources, layer.owned_ED, layer.price.machine)
    best = GatherPlan(alone, layer.owned_ED.copy(), quota_ED)
    chosen, before = 0, -1
    for count in counts:
        given, start = give_to_nodes(layer, count * nodes)
        if given == before:
            break
        before = given
        for slack in COARSE_SLACKS:
            tried = _try(layer, start, slack, COARSE_TOLERANCE, best.seconds)
            if tried.seconds < best.seconds:
                best, chosen = tried, count
    _, start = give_to_nodes(layer, chosen * nodes)
    for slack in SLACKS:
        for tolerance in TOLERANCES:
            tried = _try(layer, start, slack, tolerance, best.seconds)
            if tried.seconds < best.seconds:
                best = tried
        if nodes == 1:
            break
    if best.seconds < alone:
        best = GatherPlan(best.seconds, _spare(layer, best), best.quota_ED)
    return best, alone


@compiled
def free_slots(layer: OwnedLayer, holders_ED: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Slots that replicas have left free, int64 [D]."""
    left = layer.free_D.copy()
    for e in range(holders_ED.shape[0]):
        for d in range(holders_ED.shape[1]):
            if holders_ED[e, d] and not layer.owned_ED[e, d]:
                left[d] -= 1
    return left


@compiled
def _spare(layer: OwnedLayer, plan: GatherPlan) -> NDArray[np.bool_]:
    """Step 4: holders with what slots still free get."""
    machine, price, quota_ED = layer.price.machine, layer.price, plan.quota_ED
    best_ED = plan.holders_ED.copy()
    experts, devices = best_ED.shape
    gather = gather_seconds(layer.owned_ED, best_ED & ~layer.owned_ED, price)
    paid = exposed_seconds(gather, 0.0, price)
    left = free_slots(layer, best_ED)
    each_EN = np.zeros((experts, machine.size_N.size))
    many_EN = np.zeros((experts, machine.size_N.size))
    load_D = np.zeros(devices)
    for d in range(devices):
        for e in range(experts):
            each_EN[e, machine.node_D[d]] += quota_ED[e, d]
            load_D[d] += quota_ED[e, d]
            if best_ED[e, d]:
                many_EN[e, machine.node_D[d]] += 1.0
    mean = load_D.mean()
    for _ in range(left.sum()):
        for d in np.argsort(-left):
            if left[d] <= 0:
                break
            n = machine.node_D[d]
            expert, most = -1, SPARE_SHARE * mean
            for e in range(experts):
                if many_EN[e, n] > 0 and not best_ED[e, d] and each_EN[e, n] / many_EN[e, n] > most:
                    expert, most = e, each_EN[e, n] / many_EN[e, n]
            left[d] -= 1
            if expert < 0:
                continue
            best_ED[expert, d] = True
            gather = gather_seconds(layer.owned_ED, best_ED & ~layer.owned_ED, price)
            if exposed_seconds(gather, 0.0, price) > paid:
                best_ED[expert, d] = False
                continue
            many_EN[expert, n] += 1.0
    return best_ED


@compiled(nogil=True)
def calibrate(layer: OwnedLayer, held_ED: NDArray[np.bool_], extra: int) -> GatherPlan:
    """Steps 5 and 6 for holders bool [E, D]: up to ``extra`` replicas more while each pays for its late gather.

    Seconds are without what the gather before the gate exposes.
    """
    price = layer.price
    least, quota_ED = best_quotas(layer.sources, held_ED, price.machine)
    best = GatherPlan(least, held_ED.copy(), quota_ED)
    if extra == 0:
        return best
    free_D = free_slots(layer, held_ED)
    early = gather_seconds(layer.owned_ED, held_ED & ~layer.owned_ED, price)
    paid = exposed_seconds(early, 0.0, price)
    for _ in range(extra):
        found = False
        for kind in range(2):
            e, d = replica_of_fullest(layer, best, free_D) if kind == 0 else replica_in_short_node(layer, best, free_D)
            if e < 0:
                continue
            wider = best.holders_ED.copy()
            wider[e, d] = True
            late = gather_seconds(held_ED, wider & ~held_ED, price)
            costs = exposed_seconds(early, late, price) - paid
            if costs >= best.seconds:
                continue
            seconds, quota_ED = best_quotas(layer.sources, wider, price.machine)
            if seconds + costs < best.seconds * (1.0 - 1e-9):
                best = GatherPlan(seconds + costs, wider, quota_ED)
                free_D[d] -= 1
                found = True
                break
        if not found:
            break
    return best


@compiled
def replica_of_fullest(layer: OwnedLayer, plan: GatherPlan, free_D: NDArray[np.int64]) -> tuple[int, int]:
    """The fullest device's largest share, to the idlest device with a free slot, of its node if one lies below mean."""
    machine, quota_ED, held_ED = layer.price.machine, plan.quota_ED, plan.holders_ED
    experts, devices = quota_ED.shape
    load_D = quota_ED.sum(axis=0) / machine.speed_D
    top = np.argmax(load_D)
    mean = load_D.mean()
    to = -1
    for d in range(devices):
        near = machine.node_D[d] == machine.node_D[top]
        if free_D[d] == 0 or d == top or load_D[d] >= mean:
            continue
        if (
            to < 0
            or (near and machine.node_D[to] != machine.node_D[top])
            or (near == (machine.node_D[to] == machine.node_D[top]) and load_D[d] < load_D[to])
        ):
            to = d
    expert = -1
    if to >= 0:
        for e in range(experts):
            if quota_ED[e, top] > 0 and not held_ED[e, to] and (expert < 0 or quota_ED[e, top] > quota_ED[expert, top]):
                expert = e
    return expert, to


@compiled
def replica_in_short_node(layer: OwnedLayer, plan: GatherPlan, free_D: NDArray[np.int64]) -> tuple[int, int]:
    """The expert that a node sends most tokens away for, to the node's idlest device with a free slot."""
    machine, need_EN = layer.price.machine, layer.sources.need_EN
    quota_ED, held_ED = plan.quota_ED, plan.holders_ED
    experts, devices = quota_ED.shape
    nodes = machine.size_N.size
    load_D = quota_ED.sum(axis=0) / machine.speed_D
    expert, to, most = -1, -1, 0
    if nodes == 1:
        return expert, to
    idle_N = np.full(nodes, -1)
    for d in range(devices):
        n = machine.node_D[d]
        if free_D[d] > 0 and (idle_N[n] < 0 or load_D[d] < load_D[idle_N[n]]):
            idle_N[n] = d
    for e in range(experts):
        for n in range(nodes):
            if idle_N[n] < 0 or need_EN[e, n] <= most:
                continue
            here = False
            for d in range(devices):
                here = here or (held_ED[e, d] and machine.node_D[d] == n)
            if not here:
                expert, to, most = e, idle_N[n], need_EN[e, n]
    return expert, to


def tried_counts(step_slots: int, devices_per_node: int, num_experts: int) -> NDArray[np.int64]:
    """Replicas a node to try: 0, 1 and ``GROWTH`` times more each time."""
    top = min(step_slots * devices_per_node, num_experts)
    grid = {0, *(round(GROWTH**i) for i in range(64) if round(GROWTH**i) <= top), top}
    return np.array(sorted(grid), np.int64)
