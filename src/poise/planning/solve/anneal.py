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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds
from poise.cost.entries import HeldEntries, LayerEntries
from poise.planning.budget import Budget
from poise.planning.methods.lpt import pack_all
from poise.planning.placement import EMPTY, Placement
from poise.planning.problem import PlacementProblem
from poise.util.compiled import compiled
from poise.util.executors import cores, in_threads

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


class _Annealing(NamedTuple):
    """One layer under way.

    Parameters
    ----------
    load_BE : float64 [B, E + 1]; the last column is the empty slot's zero load.
    weight_B, rate_D : of scenarios; what turns load into relative load of a device.
    expert_S, device_S : int64 [S], the expert (-1: none) and the device of each slot.
    copies_E : int64 [E + 1], slots of each expert; 1 for the empty slot.
    held_ED, slot_EK : bool [E + 1, D], and the slots of each expert in any order, int64 [E + 1, D].
    x_DB, after_DB : float64 [D, B], relative loads, and those after a proposal of the devices that are marked.
    mark_D : int64 [D].
    """

    load_BE: NDArray[np.float64]
    weight_B: NDArray[np.float64]
    rate_D: NDArray[np.float64]
    expert_S: NDArray[np.int64]
    device_S: NDArray[np.int64]
    copies_E: NDArray[np.int64]
    held_ED: NDArray[np.bool_]
    slot_EK: NDArray[np.int64]
    x_DB: NDArray[np.float64]
    after_DB: NDArray[np.float64]
    mark_D: NDArray[np.int64]


@compiled(nogil=True)
def _begun(load_BE, weight_B, slot_expert, slot_device, rate_D):  # type: ignore[no-untyped-def]
    """Sums of what ``slot_expert`` holds, which is changed in place from now on."""
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
    return _Annealing(load_BE, weight_B, rate_D, slot_expert, slot_device, copies, held, where, x,
                      np.zeros((devices, steps)), np.zeros(devices, np.int64))  # fmt: skip


@compiled(nogil=True)
def _move_slot(layer, e, from_s, to_s):  # type: ignore[no-untyped-def]
    """A copy of an expert, if it is one, to another slot."""
    if e < 0:
        return
    layer.held_ED[e, layer.device_S[from_s]] = False
    layer.held_ED[e, layer.device_S[to_s]] = True
    for k in range(layer.copies_E[e]):
        if layer.slot_EK[e, k] == from_s:
            layer.slot_EK[e, k] = to_s
            break


@compiled(nogil=True)
def _swap(layer, heat, high):  # type: ignore[no-untyped-def]
    """Propose to swap the contents of two slots of two devices; whether that was accepted."""
    load_BE, weight_B, rate_D, x, held = layer.load_BE, layer.weight_B, layer.rate_D, layer.x_DB, layer.held_ED
    steps, slots = load_BE.shape[0], layer.expert_S.size
    i, j = np.random.randint(slots), np.random.randint(slots)
    di, dj = layer.device_S[i], layer.device_S[j]
    a, c = layer.expert_S[i], layer.expert_S[j]
    if di == dj or a == c or (a >= 0 and held[a, dj]) or (c >= 0 and held[c, di]):
        return False
    delta = 0.0
    for b in range(steps):
        moved = load_BE[b, c] / layer.copies_E[c] - load_BE[b, a] / layer.copies_E[a]
        one, two = x[di, b] + moved * rate_D[di], x[dj, b] - moved * rate_D[dj]
        delta += weight_B[b] * (_power(one, high) + _power(two, high))
        delta -= weight_B[b] * (_power(x[di, b], high) + _power(x[dj, b], high))
    if delta > 0.0 and np.random.random() >= np.exp(-delta / heat):
        return False
    for b in range(steps):
        moved = load_BE[b, c] / layer.copies_E[c] - load_BE[b, a] / layer.copies_E[a]
        x[di, b] += moved * rate_D[di]
        x[dj, b] -= moved * rate_D[dj]
    layer.expert_S[i], layer.expert_S[j] = c, a
    _move_slot(layer, a, i, j)
    _move_slot(layer, c, j, i)
    return True


@compiled(nogil=True)
def _spread_anew(layer, e, change):  # type: ignore[no-untyped-def]
    """Loads of the devices of an expert, each of whose copies gets ``change`` of its load more; they are marked."""
    if e < 0:
        return
    steps = layer.load_BE.shape[0]
    for k in range(layer.copies_E[e]):
        d = layer.device_S[layer.slot_EK[e, k]]
        if layer.mark_D[d] == 0:
            layer.mark_D[d] = 1
            for b in range(steps):
                layer.after_DB[d, b] = layer.x_DB[d, b]
        for b in range(steps):
            layer.after_DB[d, b] += layer.load_BE[b, e] * change * layer.rate_D[d]


@compiled(nogil=True)
def _replace(layer, heat, high):  # type: ignore[no-untyped-def]
    """Propose another expert in place of a replica, or of nothing; whether that was accepted."""
    load_BE, rate_D, copies, x, after = layer.load_BE, layer.rate_D, layer.copies_E, layer.x_DB, layer.after_DB
    steps, experts, devices = load_BE.shape[0], load_BE.shape[1] - 1, rate_D.size
    i = np.random.randint(layer.expert_S.size)
    a, di = layer.expert_S[i], layer.device_S[i]
    c = np.random.randint(experts)
    if c == a or layer.held_ED[c, di] or (a >= 0 and copies[a] < 2):
        return False
    layer.mark_D[di] = 1
    for b in range(steps):
        after[di, b] = x[di, b]
    _spread_anew(layer, a, 1.0 / (copies[a] - 1) - 1.0 / copies[a] if a >= 0 else 0.0)
    _spread_anew(layer, c, 1.0 / (copies[c] + 1) - 1.0 / copies[c])
    for b in range(steps):
        if a >= 0:
            after[di, b] -= load_BE[b, a] / (copies[a] - 1) * rate_D[di]
        after[di, b] += load_BE[b, c] / (copies[c] + 1) * rate_D[di]
    delta = 0.0
    for d in range(devices):
        if layer.mark_D[d]:
            for b in range(steps):
                delta += layer.weight_B[b] * (_power(after[d, b], high) - _power(x[d, b], high))
    taken = delta <= 0.0 or np.random.random() < np.exp(-delta / heat)
    for d in range(devices):
        if layer.mark_D[d]:
            layer.mark_D[d] = 0
            if taken:
                for b in range(steps):
                    x[d, b] = after[d, b]
    if taken:
        _give_slot(layer, i, a, c)
    return taken


@compiled(nogil=True)
def _give_slot(layer, s, a, c):  # type: ignore[no-untyped-def]
    """A slot from expert ``a``, if it held one, to expert ``c``."""
    d, copies = layer.device_S[s], layer.copies_E
    if a >= 0:
        for k in range(copies[a]):
            if layer.slot_EK[a, k] == s:
                layer.slot_EK[a, k] = layer.slot_EK[a, copies[a] - 1]
                break
        copies[a] -= 1
        layer.held_ED[a, d] = False
    layer.slot_EK[c, copies[c]] = s
    copies[c] += 1
    layer.held_ED[c, d] = True
    layer.expert_S[s] = c


@compiled(nogil=True)
def _fullest(layer):  # type: ignore[no-untyped-def]
    """Weighted mean of the scenarios' maxima."""
    value = 0.0
    for b in range(layer.weight_B.size):
        most = 0.0
        for d in range(layer.rate_D.size):
            most = max(most, layer.x_DB[d, b])
        value += layer.weight_B[b] * most
    return value


@compiled(nogil=True)
def anneal_slots(
    load_BE: NDArray[np.float64], weight_B: NDArray[np.float64], slot_expert: NDArray[np.int64],
    slot_device: NDArray[Any], rate_D: NDArray[np.float64], proposals: int, draws_seed: int, stop: NDArray[np.int64],
) -> float:  # fmt: skip
    """Steps 2 and 3: improve ``slot_expert`` (int64 [S], -1 empty) in place; returns the weighted mean of maxima.

    ``load_BE`` float64 [B, E + 1]: the last column is the empty slot's zero load; ``rate_D`` float64 [D] turns load
    into relative load of a device. ``stop`` int64 [1]: not 0 once the clock has run out.
    """
    np.random.seed(draws_seed)
    layer = _begun(load_BE, weight_B, slot_expert, slot_device, rate_D)
    best, kept = np.inf, slot_expert.copy()
    for turn in range(proposals):
        if turn % 1024 == 0 and stop[0]:
            break
        done = turn / proposals
        heat, high = HOT * (COLD / HOT) ** done, done >= 0.5
        swap = np.random.random() >= REPLICA_SHARE
        accepted = _swap(layer, heat, high) if swap else _replace(layer, heat, high)
        if accepted and done > 0.75 and turn % 256 == 0:
            value = _fullest(layer)
            if value < best:
                best = value
                for s in range(kept.size):
                    kept[s] = slot_expert[s]
    if best < np.inf:
        for s in range(kept.size):
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
    batch, stop, threads = problem.batch, np.zeros(1, np.int64), 1
    if place_LE is None:
        place_LE = np.zeros((batch.num_layers, batch.num_experts), np.int64)
    if budget is None:
        return _annealed(problem, place_LE, proposals, seed, stop, threads)
    with budget.stops(stop, "annealing"):
        return _annealed(problem, place_LE, proposals, seed, stop, cores() if budget.spread else 1)


def _annealed(
    problem: PlacementProblem, place_LE: NDArray[np.int64], proposals: int, seed: int, stop: NDArray[np.int64],
    threads: int,
) -> Placement:  # fmt: skip
    batch, devices = problem.batch, problem.num_devices
    work_BLE, weight_B = scenarios(problem)
    slots_D, place_D, speed_D = problem.layer_slots_D, problem.place_D, problem.cluster.speed_D
    places = int(place_D[-1]) + 1
    rate_D = speed_D.sum() / speed_D

    def anneal(layer: int) -> LayerEntries:  # random numbers are a thread's own, and seeded by the layer
        load = np.concatenate([work_BLE[:, layer], np.zeros((len(work_BLE), 1))], axis=1)
        load /= np.maximum(load.sum(axis=1, keepdims=True), 1e-300)
        held_ED = np.zeros((batch.num_experts, devices), np.bool_)
        for place in range(places):
            on, here = np.flatnonzero(place_LE[layer] == place), np.flatnonzero(place_D == place)
            if not on.size:
                continue
            own, room_D = np.ascontiguousarray(load[:, [*on, -1]]), np.minimum(slots_D[here], on.size)
            slot_device = np.repeat(np.arange(here.size), room_D)
            first = slot_table(pack_all(np.sqrt(weight_B @ own[:, :-1] ** 2), room_D, speed_D[here]), room_D)
            made = first.copy()
            anneal_slots(own, weight_B, made, slot_device, rate_D[here], proposals // places, seed + layer, stop)
            made = first if stop[0] else made
            used = made >= 0
            held_ED[on[made[used]], here[slot_device[used]]] = True
        return LayerEntries.of_counts(held_ED)

    held = in_threads(anneal, range(batch.num_layers), threads, "poise-annealing")
    return problem.placed(HeldEntries.of_layers(held), "annealed")


def slot_table(held_ED: NDArray[Any], slots_D: NDArray[np.int64]) -> NDArray[np.int64]:
    """Expert of each slot, int64 [S]; what is left empty comes last on its device."""
    held = LayerEntries.of_counts(held_ED)
    out, first_D = np.full(int(slots_D.sum()), EMPTY, np.int64), np.cumsum(slots_D) - slots_D
    turn_H = np.arange(len(held.device_H)) - np.searchsorted(held.device_H, held.device_H)
    out[first_D[held.device_H] + turn_H] = held.expert_H
    return out
