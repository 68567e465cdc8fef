"""Compiled parts of ``poise`` in training: which experts to gather, so that a layer takes least modelled time.

Modelled time: compute + all-to-alls of all passes + exposed weights (:mod:`poise.stepwise.poise.joint`).

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

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import exposed_seconds, gather_seconds
from poise.stepwise.poise.joint import (
    SLACKS,
    best_quotas,
    node_needs,
    quota_seconds,
    split_nodes,
    split_tokens,
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


@compiled
def give_to_nodes(need_EN, holds_ED, count, free_D, machine, out_ED):  # type: ignore[no-untyped-def]
    """The ``count`` pairs (expert, node) with most tokens from the node's sources get a replica there; pairs given.

    Inside the node it goes to the device with least tokens so far.
    """
    experts, devices = holds_ED.shape
    nodes = machine.size_N.size
    holds_EN = np.zeros((experts, nodes), np.bool_)
    many_EN = np.zeros((experts, nodes), np.int64)
    for e in range(experts):
        for d in range(devices):
            if holds_ED[e, d]:
                holds_EN[e, machine.node_D[d]] = True
                many_EN[e, machine.node_D[d]] += 1
    load_D = np.zeros(devices)
    for e in range(experts):
        for d in range(devices):
            if holds_ED[e, d]:
                load_D[d] += need_EN[e, machine.node_D[d]] / many_EN[e, machine.node_D[d]]
    order = np.argsort(-need_EN.ravel(), kind="mergesort")
    given = 0
    for pair in order:
        e, n = pair // nodes, pair % nodes
        if given == count or need_EN[e, n] == 0:
            break
        if holds_EN[e, n]:
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
    return given


@compiled
def fill_node(load_E, own_EX, holds_EX, free_X, speed_X, tolerance, quota_EX):  # type: ignore[no-untyped-def]
    """Surplus fill inside one node, in place; leaves the exact split in ``quota_EX``."""
    experts, devices = holds_EX.shape
    tried = np.zeros(devices, np.bool_)
    for _ in range(experts * devices):
        most = split_tokens(load_E, own_EX, holds_EX, speed_X, 0.0, quota_EX)
        mean = load_E.sum() / speed_X.sum()
        if most <= tolerance * mean:
            return
        load_X = quota_EX.sum(axis=0) / speed_X
        tried[:] = False
        done = True
        for _ in range(devices):
            to = -1
            for d in range(devices):
                if not tried[d] and free_X[d] > 0 and load_X[d] < mean and (to < 0 or load_X[d] < load_X[to]):
                    to = d
            if to < 0:
                return
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
            return


@compiled
def fill_nodes(load_SE, quota_EN, holds_ED, free_D, machine, tolerance, quota_ED):  # type: ignore[no-untyped-def]
    """:func:`fill_node` in every node, in place."""
    first = 0
    for n in range(machine.size_N.size):
        last = first + machine.size_N[n]
        own = np.ascontiguousarray(load_SE[first:last].T)
        holds = np.ascontiguousarray(holds_ED[:, first:last])
        free = free_D[first:last].copy()
        part = np.zeros(holds.shape, np.int64)
        speed = machine.speed_D[first:last].copy()
        fill_node(np.ascontiguousarray(quota_EN[:, n]), own, holds, free, speed, tolerance, part)
        holds_ED[:, first:last] = holds
        free_D[first:last] = free
        quota_ED[:, first:last] = part
        first = last


@compiled
def _try(load_SE, need_EN, wide_ED, room_D, owned_ED, price, slack, tolerance, least, best_ED, best_quota):  # type: ignore[no-untyped-def]  # fmt: skip
    """Step 2 for one slack and tolerance: the modelled seconds; what beats ``least`` goes to ``best``."""
    machine, quota_EN, quota_ED = price.machine, need_EN.copy(), np.zeros(wide_ED.shape, np.int64)
    if need_EN.shape[1] > 1:
        split_nodes(need_EN, wide_ED, machine, slack, quota_EN)
    full, left = wide_ED.copy(), room_D.copy()
    fill_nodes(load_SE, quota_EN, full, left, machine, tolerance, quota_ED)
    seconds = quota_seconds(quota_ED, load_SE, need_EN, machine)
    if seconds < least:
        fetched = full & ~owned_ED
        gather = gather_seconds(owned_ED, fetched, price)
        seconds += exposed_seconds(gather, 0.0, price)
        if seconds < least:
            best_ED[:] = full
            best_quota[:] = quota_ED
    return seconds


@compiled(nogil=True)
def plan_layer(load_SE, owned_ED, free_D, price, counts, best_ED):  # type: ignore[no-untyped-def]
    """Holders with the least modelled time, bool [E, D] in ``best_ED``; (its seconds, seconds of no replicas).

    ``price``: :class:`poise.cost.weights.CompiledPrice`; ``counts``: replicas a node that step 1 tries, rising. First
    all of them with few slacks, then the best one with all slacks and tolerances.
    """
    experts, devices = owned_ED.shape
    machine = price.machine
    nodes = machine.size_N.size
    need_EN = node_needs(load_SE, machine.node_D, nodes)
    best_quota = np.zeros((experts, devices), np.int64)
    best_ED[:] = owned_ED
    alone = best_quotas(load_SE, owned_ED, machine, SLACKS, best_quota)
    least, chosen, given = alone, 0, -1
    for count in counts:
        wide, room = owned_ED.copy(), free_D.copy()
        now = 0
        if nodes > 1:
            now = give_to_nodes(need_EN, owned_ED, count * nodes, room, machine, wide)
        if now == given:
            break
        given = now
        for slack in COARSE_SLACKS:
            seconds = _try(load_SE, need_EN, wide, room, owned_ED, price, slack,
                           COARSE_TOLERANCE, least, best_ED, best_quota)  # fmt: skip
            if seconds < least:
                least, chosen = seconds, count
    wide, room = owned_ED.copy(), free_D.copy()
    if nodes > 1:
        give_to_nodes(need_EN, owned_ED, chosen * nodes, room, machine, wide)
    for slack in SLACKS:
        for tolerance in TOLERANCES:
            seconds = _try(load_SE, need_EN, wide, room, owned_ED, price, slack,
                           tolerance, least, best_ED, best_quota)  # fmt: skip
            least = min(least, seconds)
        if nodes == 1:
            break
    if least < alone:
        _spare(owned_ED, best_ED, best_quota, free_D, price)
    return least, alone


@compiled
def _spare(owned_ED, best_ED, quota_ED, free_D, price):  # type: ignore[no-untyped-def]
    """Step 4: slots still free get what their node computes most of, where that hides."""
    experts, devices = best_ED.shape
    machine = price.machine
    gather = gather_seconds(owned_ED, best_ED & ~owned_ED, price)
    paid = exposed_seconds(gather, 0.0, price)
    left = free_D.copy()
    each_EN = np.zeros((experts, machine.size_N.size))
    many_EN = np.zeros((experts, machine.size_N.size))
    load_D = np.zeros(devices)
    for d in range(devices):
        for e in range(experts):
            each_EN[e, machine.node_D[d]] += quota_ED[e, d]
            load_D[d] += quota_ED[e, d]
            if best_ED[e, d]:
                many_EN[e, machine.node_D[d]] += 1.0
                left[d] -= 0 if owned_ED[e, d] else 1
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
            fetched = best_ED & ~owned_ED
            gather = gather_seconds(owned_ED, fetched, price)
            if exposed_seconds(gather, 0.0, price) > paid:
                best_ED[expert, d] = False
                continue
            many_EN[expert, n] += 1.0


@compiled(nogil=True)
def calibrate(load_SE, owned_ED, held_ED, free_D, price, extra, quota_ED):  # type: ignore[no-untyped-def]
    """Quotas from exact loads; up to ``extra`` replicas more in ``held_ED`` while each pays for its late gather."""
    experts, devices = held_ED.shape
    machine = price.machine
    nodes = machine.size_N.size
    need_EN = node_needs(load_SE, machine.node_D, nodes)
    least = best_quotas(load_SE, held_ED, machine, SLACKS, quota_ED)
    if extra == 0:
        return least
    fetched = held_ED & ~owned_ED
    early = gather_seconds(owned_ED, fetched, price)
    paid = exposed_seconds(early, 0.0, price)
    first_held, trial = held_ED.copy(), np.zeros((experts, devices), np.int64)
    wider = held_ED.copy()
    for _ in range(extra):
        found = False
        for kind in range(2):
            wider[:] = held_ED
            if kind == 0:
                e, d = _replica_of_fullest(quota_ED, held_ED, free_D, machine)
            else:
                e, d = _replica_in_short_node(quota_ED, need_EN, held_ED, free_D, machine)
            if e < 0:
                continue
            wider[e, d] = True
            more = wider & ~first_held
            late = gather_seconds(first_held, more, price)
            costs = exposed_seconds(early, late, price) - paid
            if costs >= least:
                continue
            seconds = best_quotas(load_SE, wider, machine, SLACKS, trial) + costs
            if seconds < least * (1.0 - 1e-9):
                least = seconds
                held_ED[:] = wider
                quota_ED[:] = trial
                free_D[d] -= 1
                found = True
                break
        if not found:
            break
    return least


@compiled
def _replica_of_fullest(quota_ED, held_ED, free_D, machine):  # type: ignore[no-untyped-def]
    """The fullest device's largest share, to the idlest device with a free slot, of its node if one lies below mean."""
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
def _replica_in_short_node(quota_ED, need_EN, held_ED, free_D, machine):  # type: ignore[no-untyped-def]
    """The expert that a node sends most tokens away for, to the node's idlest device with a free slot."""
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
