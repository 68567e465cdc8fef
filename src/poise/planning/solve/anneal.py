"""Simulated annealing on loads alone: the start that decides balance, and how well it holds on traffic not seen.

    minimise  sum_b w[b] sum_d ( D * x[b, d] / speed[d] )^p,   x[b, d] = sum_e load[b, e] * count[e, d] / replicas[e]

for every layer, scenarios b scaled to a mean of 1, p = 8 and then 32. A high power stands for the maximum, but every
device counts, not only the fullest of each scenario: the maximum alone leaves the others where they are, and what was
not the fullest in the traffic fitted on is the fullest in the next. (Measured: docs/decisions/0004-robust-start.md.)

Step 1  Start: LPT with replicas for the largest root mean square over scenarios of load / replicas. Which experts
        have replicas decides most of what happens on other traffic, so step 2 seldom changes it.
Step 2  Proposals, half a million a layer: swap the contents of two slots of two devices; now and then replace a
        replica of a replicated expert by another expert. Accepted by Metropolis' rule, temperature falling
        geometrically, p rising half-way.
Step 3  In the last quarter the state with the least weighted mean of maxima is kept.
"""

from __future__ import annotations

# ruff: noqa: NPY002 - inside compiled code numpy's global generator is numba's own, seeded in the same call
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds
from poise.cost.entries import HeldEntries, LayerEntries
from poise.planning.budget import Budget
from poise.planning.methods.lpt import pack_all
from poise.planning.placement import EMPTY, Placement
from poise.planning.problem import PlacementProblem
from poise.util.compiled import compiled
from poise.util.executors import cores

PROPOSALS = 400_000
MAX_SCENARIOS = 8
HOT, COLD = 0.1, 1e-4
"""First and last temperature, in units of a device's mean term."""
REPLICA_SHARE = 0.02
"""Share of proposals that change replicas."""


@compiled(nogil=True)
def _power(x, high):  # type: ignore[no-untyped-def]
    """x^8, or x^32."""
    x *= x
    x *= x
    x *= x
    if high:
        x *= x
        x *= x
    return x


@compiled(nogil=True)
def anneal_slots(
    load_BE: NDArray[np.float64], weight_B: NDArray[np.float64], slot_expert: NDArray[np.int64],
    slot_device: NDArray[Any], rate_D: NDArray[np.float64], proposals: int, draws_seed: int, stop: NDArray[np.int64],
) -> float:  # fmt: skip
    """Improve ``slot_expert`` (int64 [S], -1 empty) in place; returns the weighted mean of maxima.

    ``load_BE`` float64 [B, E + 1]: the last column is the empty slot's zero load; ``rate_D`` float64 [D] turns load
    into relative load of a device. ``stop`` int64 [1]: not 0 once the clock has run out.
    """
    np.random.seed(draws_seed)
    steps, experts = load_BE.shape[0], load_BE.shape[1] - 1
    slots, devices = slot_expert.size, rate_D.size
    copies = np.zeros(experts + 1, np.int64)
    held = np.zeros((experts + 1, devices), np.bool_)
    where = np.full((experts + 1, devices), -1, np.int64)
    for s in range(slots):
        e = slot_expert[s]
        if e >= 0:
            where[e, copies[e]] = s
            copies[e] += 1
            held[e, slot_device[s]] = True
    copies[experts] = 1
    x = np.zeros((devices, steps))
    for s in range(slots):
        e, d = slot_expert[s], slot_device[s]
        for b in range(steps):
            if e >= 0:
                x[d, b] += load_BE[b, e] / copies[e] * rate_D[d]
    after = np.zeros((devices, steps))
    mark = np.zeros(devices, np.int64)
    best = np.inf
    kept = slot_expert.copy()
    for turn in range(proposals):
        if turn % 1024 == 0 and stop[0]:
            break
        done = turn / proposals
        heat = HOT * (COLD / HOT) ** done
        high = done >= 0.5
        if np.random.random() >= REPLICA_SHARE:
            i, j = np.random.randint(slots), np.random.randint(slots)
            di, dj = slot_device[i], slot_device[j]
            a, c = slot_expert[i], slot_expert[j]
            if di == dj or a == c or (a >= 0 and held[a, dj]) or (c >= 0 and held[c, di]):
                continue
            delta = 0.0
            for b in range(steps):
                moved = load_BE[b, c] / copies[c] - load_BE[b, a] / copies[a]
                one, two = x[di, b] + moved * rate_D[di], x[dj, b] - moved * rate_D[dj]
                delta += weight_B[b] * (_power(one, high) + _power(two, high))
                delta -= weight_B[b] * (_power(x[di, b], high) + _power(x[dj, b], high))
            if delta > 0.0 and np.random.random() >= np.exp(-delta / heat):
                continue
            for b in range(steps):
                moved = load_BE[b, c] / copies[c] - load_BE[b, a] / copies[a]
                x[di, b] += moved * rate_D[di]
                x[dj, b] -= moved * rate_D[dj]
            slot_expert[i], slot_expert[j] = c, a
            for e, from_s, to_s in ((a, i, j), (c, j, i)):
                if e >= 0:
                    held[e, slot_device[from_s]] = False
                    held[e, slot_device[to_s]] = True
                    for k in range(copies[e]):
                        if where[e, k] == from_s:
                            where[e, k] = to_s
                            break
        else:
            i = np.random.randint(slots)
            a, di = slot_expert[i], slot_device[i]
            c = np.random.randint(experts)
            if c == a or held[c, di] or (a >= 0 and copies[a] < 2):
                continue
            more = 1.0 / (copies[c] + 1) - 1.0 / copies[c]
            less = 1.0 / (copies[a] - 1) - 1.0 / copies[a] if a >= 0 else 0.0
            mark[di] = 1
            for b in range(steps):
                after[di, b] = x[di, b]
            for q in range(2):
                e, change = (c, more) if q else (a, less)
                if e < 0:
                    continue
                for k in range(copies[e]):
                    d = slot_device[where[e, k]]
                    if mark[d] == 0:
                        mark[d] = 1
                        for b in range(steps):
                            after[d, b] = x[d, b]
                    for b in range(steps):
                        after[d, b] += load_BE[b, e] * change * rate_D[d]
            for b in range(steps):
                if a >= 0:
                    after[di, b] -= load_BE[b, a] / (copies[a] - 1) * rate_D[di]
                after[di, b] += load_BE[b, c] / (copies[c] + 1) * rate_D[di]
            delta = 0.0
            for d in range(devices):
                if mark[d]:
                    for b in range(steps):
                        delta += weight_B[b] * (_power(after[d, b], high) - _power(x[d, b], high))
            taken = delta <= 0.0 or np.random.random() < np.exp(-delta / heat)
            for d in range(devices):
                if mark[d]:
                    mark[d] = 0
                    if taken:
                        for b in range(steps):
                            x[d, b] = after[d, b]
            if not taken:
                continue
            if a >= 0:
                for k in range(copies[a]):
                    if where[a, k] == i:
                        where[a, k] = where[a, copies[a] - 1]
                        break
                copies[a] -= 1
                held[a, di] = False
            where[c, copies[c]] = i
            copies[c] += 1
            held[c, di] = True
            slot_expert[i] = c
        if done > 0.75 and turn % 256 == 0:
            value = 0.0
            for b in range(steps):
                most = 0.0
                for d in range(devices):
                    most = max(most, x[d, b])
                value += weight_B[b] * most
            if value < best:
                best = value
                for s in range(slots):
                    kept[s] = slot_expert[s]
    if best < np.inf:
        for s in range(slots):
            slot_expert[s] = kept[s]
    return best


def scenarios(problem: PlacementProblem) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most 8 scenarios, float64 [B, L, E] and weights [B]: seconds of each expert in runs of consecutive steps."""
    batch = problem.batch
    work = expert_seconds(batch.load_BLE, problem.cluster, problem.model)
    groups = min(batch.num_steps, MAX_SCENARIOS)
    group_B = np.arange(batch.num_steps) * groups // batch.num_steps
    weight = np.bincount(group_B, weights=batch.weight_B, minlength=groups).astype(np.float64)
    work *= batch.weight_B[:, None, None]
    mean = np.add.reduceat(work, np.searchsorted(group_B, np.arange(groups)), axis=0)
    return mean / np.maximum(weight, 1e-300)[:, None, None], weight


def annealed(
    problem: PlacementProblem, *, proposals: int = PROPOSALS, seed: int = 0, budget: Budget | None = None,
    place_LE: NDArray[np.int64] | None = None,
) -> Placement:  # fmt: skip
    """A placement balanced for every scenario alike; slots are counted by layer. Layers that the clock of a budget cuts
    stay as step 1 has them.

    Where routing groups must lie whole, ``place_LE`` int64 [L, E] has the place of each expert. Devices of different
    places then share no expert, so that the sum is one of places, each annealed for its part of the proposals.
    """
    stop = np.zeros(1, np.int64)
    place_LE = (
        np.zeros((problem.batch.num_layers, problem.batch.num_experts), np.int64) if place_LE is None else place_LE
    )
    with nullcontext() if budget is None else budget.stops(stop):
        threads = cores() if budget is not None and budget.spread else 1
        found = _annealed(problem, place_LE, proposals, seed, stop, threads)
    if stop[0] and budget is not None:
        budget.over("annealing")
    return found


def _annealed(
    problem: PlacementProblem, place_LE: NDArray[np.int64], proposals: int, seed: int, stop: NDArray[np.int64],
    threads: int,
) -> Placement:  # fmt: skip
    batch, devices = problem.batch, problem.num_devices
    work_BLE, weight_B = scenarios(problem)
    slots_D, place_D, speed_D = problem.layer_slots_D, problem.place_D, problem.cluster.speed_D
    places = int(place_D[-1]) + 1
    rate_D = speed_D.sum() / speed_D
    slots: list[list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = [[] for _ in range(batch.num_layers)]

    def anneal(layer: int) -> None:  # random numbers are a thread's own, and seeded by the layer
        load = np.concatenate([work_BLE[:, layer], np.zeros((len(work_BLE), 1))], axis=1)
        load /= np.maximum(load.sum(axis=1, keepdims=True), 1e-300)
        for place in range(places):
            on, here = np.flatnonzero(place_LE[layer] == place), np.flatnonzero(place_D == place)
            if not on.size:
                continue
            own, room_D = np.ascontiguousarray(load[:, [*on, -1]]), np.minimum(slots_D[here], on.size)
            slot_device = np.repeat(np.arange(here.size), room_D)
            slot_expert = _start(np.sqrt(weight_B @ own[:, :-1] ** 2), room_D, speed_D[here])
            first = slot_expert.copy()
            anneal_slots(own, weight_B, slot_expert, slot_device, rate_D[here], proposals // places, seed + layer, stop)
            slot_expert = first if stop[0] else slot_expert
            used = slot_expert >= 0
            slots[layer].append((on[slot_expert[used]], here[slot_device[used]]))

    if threads > 1:
        with ThreadPoolExecutor(threads, "poise-annealing") as pool:
            list(pool.map(anneal, range(batch.num_layers)))
    else:
        for layer in range(batch.num_layers):
            anneal(layer)
    expert_S, device_S = (np.concatenate([part[i] for parts in slots for part in parts]) for i in (0, 1))
    layer_S = np.repeat(np.arange(batch.num_layers), [sum(len(part[0]) for part in parts) for parts in slots])
    held = HeldEntries.of_slots(layer_S, expert_S, device_S, (batch.num_layers, batch.num_experts, devices))
    return problem.placed(held, "annealed")


def _start(load_E: NDArray[np.float64], slots_D: NDArray[np.int64], speed_D: NDArray[np.float64]) -> NDArray[np.int64]:
    """Step 1: expert of each slot, int64 [S]; what the packing leaves empty stays empty."""
    held = LayerEntries.of_counts(pack_all(load_E, slots_D, speed_D))
    out, first_D = np.full(int(slots_D.sum()), EMPTY, np.int64), np.cumsum(slots_D) - slots_D
    turn_H = np.arange(len(held.device_H)) - np.searchsorted(held.device_H, held.device_H)
    out[first_D[held.device_H] + turn_H] = held.expert_H
    return out
