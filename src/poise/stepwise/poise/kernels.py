"""Compiled parts of the fast loop: what a split costs, splitting by seconds, filling step slots. Nothing allocates
inside a step: a :class:`Workspace` is made once for a shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import exchange_seconds, expert_work, fullest_of_sums, knee, token_work
from poise.cost.quota import Holders, Scratch, balance, compile_holders, holders_room, make_scratch, near_start
from poise.util.compiled import compiled

UNITS = 64
"""Work is balanced in whole units: the mean work of a device is about this many times the number of experts."""


class Workspace(NamedTuple):
    """Working memory for one shape."""

    room: Holders
    scratch: Scratch
    units_E: NDArray[np.int64]
    quota_H: NDArray[np.int64]
    tokens_H: NDArray[np.float64]
    best_H: NDArray[np.float64]
    local_H: NDArray[np.int64]
    base_D: NDArray[np.int64]
    load_E: NDArray[np.float64]
    sum_E: NDArray[np.float64]
    seconds_D: NDArray[np.float64]
    sum_D: NDArray[np.float64]
    have_E: NDArray[np.float64]
    away_D2: NDArray[np.float64]


def make_workspace(num_experts: int, num_devices: int, num_entries: int) -> Workspace:
    """Memory for E experts, D devices and at most ``num_entries`` holders in all."""
    whole, more = np.zeros((2, num_entries), np.int64), np.zeros((2, num_entries))
    real_D, real_E = np.zeros((2, num_devices)), np.zeros((3, num_experts))
    return Workspace(
        holders_room(num_experts, num_devices, num_entries), make_scratch(num_experts, num_devices),
        np.zeros(num_experts, np.int64), whole[0], more[0], more[1], whole[1], np.zeros(num_devices, np.int64),
        real_E[0], real_E[2], real_D[0], real_D[1], real_E[1], np.zeros((num_devices, 2)),
    )  # fmt: skip


@compiled
def layer_seconds(tokens_H, holders, load_SE, machine, space):  # type: ignore[no-untyped-def]
    """Modelled compute, dispatch and combine of a split (float64 [H] tokens), without latencies.

    ``load_SE`` int64 [D, E] are the tokens of each source, matched to the nearest quotas
    (:func:`poise.cost.route.rows_into`); size 0: sources spread evenly. One copy a pair (``home``): deduplicating
    flows send at most that.
    """
    devices = machine.speed_D.size
    seconds, arrive = space.seconds_D, space.sum_D
    seconds[:] = 0.0
    arrive[:] = 0.0
    total = 0.0
    for h in range(holders.device_H.size):
        n = tokens_H[h]
        if n > 0.0:
            d = holders.device_H[h]
            seconds[d] += expert_work(n, machine)
            arrive[d] += n
            total += n
    worst = 0.0
    for d in range(devices):
        worst = max(worst, seconds[d] / machine.speed_D[d])
    if devices == 1:
        return worst + machine.start_s
    leave = seconds
    nodes = machine.size_N.size
    exact = load_SE.size > 0
    load_E = space.sum_E
    load_E[:] = 0.0
    for h in range(holders.device_H.size):
        load_E[holders.expert_H[h]] += tokens_H[h]
    for d in range(devices):  # tokens on their own device do not travel
        leave[d] = total / devices
        if exact:
            leave[d] = 0.0
            for e in range(load_SE.shape[1]):
                leave[d] += load_SE[d, e]
    for h in range(holders.device_H.size):
        d, e = holders.device_H[h], holders.expert_H[h]
        stay = min(tokens_H[h], load_SE[d, e] if exact else load_E[e] / devices)
        arrive[d] -= stay
        leave[d] -= stay
    away_N2, first = space.away_D2[:nodes], 0
    away_N2[:] = 0.0
    for n in range(nodes if nodes > 1 else 0):
        size = machine.size_N[n]
        for e in range(load_E.size):
            need, place = load_E[e] * size / devices, 0.0
            if exact:
                need = 0.0
                for d in range(first, first + size):
                    need += load_SE[d, e]
            for h in range(holders.ptr_E[e], holders.ptr_E[e + 1]):
                if machine.node_D[holders.device_H[h]] == n:
                    place += tokens_H[h]
            away_N2[n, 0] += need - min(need, place)
            away_N2[n, 1] += place - min(need, place)
        first += size
    return worst + machine.start_s + exchange_seconds(fullest_of_sums(leave, arrive, away_N2, machine), machine)


@compiled
def even_tokens(load_E, holders, tokens_H):  # type: ignore[no-untyped-def]
    """The same share to every holder, float64 [H]."""
    for e in range(load_E.size):
        first, last = holders.ptr_E[e], holders.ptr_E[e + 1]
        for h in range(first, last):
            tokens_H[h] = load_E[e] / (last - first)


@compiled
def split_by_work(load_E, local_H, holders, machine, slack, scale, tokens_H, space):  # type: ignore[no-untyped-def]
    """Split by seconds, float64 [H] tokens: experts bound by reading their weights stay whole.

    Those go, longest first, to the holder that would finish first (beside an even share of the others); the tokens of
    the others are then split exactly over what is left. In units of 1 / ``scale`` tokens' compute; ``local_H`` int64
    [H] (units that may stay at home) or size 0, ``slack`` as in :func:`poise.cost.quota.balance`.
    """
    seconds, order, base_D = space.seconds_D, space.scratch.order_E, space.base_D
    experts, devices = load_E.size, machine.speed_D.size
    large, each = 2.0 * knee(machine), token_work(machine)
    seconds[:] = 0.0
    count = 0
    for e in range(experts):
        first, last = holders.ptr_E[e], holders.ptr_E[e + 1]
        space.units_E[e] = 0
        work = expert_work(load_E[e], machine)
        if last - first == 1:
            tokens_H[first] = load_E[e]
            seconds[holders.device_H[first]] += work
        elif load_E[e] >= large:
            space.units_E[e] = np.int64(load_E[e] * scale + 0.5)
        else:
            j = count
            while j > 0 and load_E[order[j - 1]] < load_E[e]:
                order[j] = order[j - 1]
                j -= 1
            order[j] = e
            count += 1
    for d in range(devices):
        base_D[d] = np.int64(seconds[d] / each * scale + 0.5)
    for e in holders.shared_Y:
        if space.units_E[e] > 0:
            first, last = holders.ptr_E[e], holders.ptr_E[e + 1]
            for h in range(first, last):
                seconds[holders.device_H[h]] += load_E[e] / (last - first) * each
    for i in range(count):
        e = order[i]
        best, at = -1, 0.0
        for h in range(holders.ptr_E[e], holders.ptr_E[e + 1]):
            tokens_H[h] = 0.0
            d = holders.device_H[h]
            if best < 0 or seconds[d] / machine.speed_D[d] < at:
                best, at = h, seconds[d] / machine.speed_D[d]
        d = holders.device_H[best]
        tokens_H[best] = load_E[e]
        seconds[d] += expert_work(load_E[e], machine)
        base_D[d] += np.int64(expert_work(load_E[e], machine) / each * scale + 0.5)
    if local_H.size:
        for e in holders.shared_Y:
            if space.units_E[e] == 0:
                for h in range(holders.ptr_E[e], holders.ptr_E[e + 1]):
                    local_H[h] = 0
    balance(space.units_E, local_H, base_D, holders, machine.speed_D, slack, space.quota_H, space.scratch)
    for e in holders.shared_Y:
        if space.units_E[e] > 0:
            for h in range(holders.ptr_E[e], holders.ptr_E[e + 1]):
                tokens_H[h] = space.quota_H[h] / scale


@compiled
def best_split(load_SE, holders, machine, slack, space):  # type: ignore[no-untyped-def]
    """The fastest of three splits for these sources, float64 [H] whole tokens in ``space.best_H``; its seconds.

    Exact in tokens; by work; by work with ``slack``, which leaves more tokens at home.
    """
    count = holders.device_H.size
    local_H = space.local_H[:count]
    load_E = space.load_E
    for e in range(load_E.size):
        space.units_E[e] = 0
        for s in range(load_SE.shape[0]):
            space.units_E[e] += load_SE[s, e]
        load_E[e] = space.units_E[e]
    least = np.inf
    for turn in range(3):
        near_start(load_SE, holders, machine.node_D, local_H)
        if turn == 0:
            balance(
                space.units_E, local_H, space.base_D[:0], holders, machine.speed_D, 0.0, space.quota_H, space.scratch
            )
            for h in range(count):
                space.tokens_H[h] = space.quota_H[h]
        else:
            split_by_work(load_E, local_H, holders, machine, slack * (turn - 1), 1.0, space.tokens_H, space)
        seconds = layer_seconds(space.tokens_H, holders, load_SE, machine, space)
        if seconds < least:
            least = seconds
            space.best_H[:count] = space.tokens_H[:count]
    return least


@compiled
def plan_seconds(load_E, holders, machine, control_s, space):  # type: ignore[no-untyped-def]
    """Modelled seconds of the split by work on loads known in expectation, control included."""
    total = 0.0
    for e in range(load_E.size):
        total += load_E[e]
    scale = max(1.0, UNITS * load_E.size / max(total, 1e-9))
    split_by_work(load_E, space.local_H[:0], holders, machine, 0.0, scale, space.tokens_H, space)
    return layer_seconds(space.tokens_H, holders, np.zeros((0, 0), np.int64), machine, space) + control_s


@compiled
def passive_seconds(load_E, holders, machine, space):  # type: ignore[no-untyped-def]
    """Modelled seconds of the engine's even split."""
    even_tokens(load_E, holders, space.tokens_H)
    return layer_seconds(space.tokens_H, holders, np.zeros((0, 0), np.int64), machine, space)


@compiled
def next_replica(work_E, held_ED, static_ED, slots_D, holders, machine, space, drop):  # type: ignore[no-untyped-def]
    """The replica that takes most from a fullest device, (expert, device, expert to drop or -1); expert -1: none.

    Work (seconds of each expert, float64 [E]) is split exactly over the holders first; ``space.quota_H`` keeps that
    split in units. The receiver is the idlest device with a free slot, or with a step replica that brings less.
    """
    experts, devices = held_ED.shape
    total = 0.0
    for e in range(experts):
        total += work_E[e]
    scale = UNITS * experts / max(total, 1e-300)
    for e in range(experts):
        space.units_E[e] = np.int64(work_E[e] * scale + 0.5)
    balance(
        space.units_E, space.local_H[:0], space.base_D[:0], holders, machine.speed_D, 0.0, space.quota_H, space.scratch
    )
    load_D = space.scratch.load_D
    most, least, units = 0.0, 1e300, 0
    for d in range(devices):
        most = max(most, load_D[d] / machine.speed_D[d])
        units += load_D[d]
    mean = units / machine.speed_D.sum()
    if most <= 1.002 * mean:
        return -1, -1, -1
    used = space.seconds_D
    give = space.have_E
    used[:] = 0.0
    give[:] = 0.0
    for h in range(holders.device_H.size):
        d, e = holders.device_H[h], holders.expert_H[h]
        used[d] += 1.0
        if load_D[d] / machine.speed_D[d] >= most * 0.9999:
            give[e] = max(give[e], float(space.quota_H[h]))
    tried = space.sum_D
    tried[:] = 0.0
    for _ in range(devices):
        to, least = -1, mean
        for d in range(devices):
            if tried[d] == 0.0 and load_D[d] / machine.speed_D[d] < least and slots_D[d] > 0:
                to, least = d, load_D[d] / machine.speed_D[d]
        if to < 0:
            return -1, -1, -1
        tried[to] = 1.0
        expert, amount = -1, 0.0
        for e in range(experts):
            if give[e] > amount and not held_ED[e, to]:
                expert, amount = e, give[e]
        if expert < 0:
            continue
        amount = min(amount, (mean - least) * machine.speed_D[to])
        if used[to] < slots_D[to]:
            return expert, to, -1
        if drop:
            out, value = -1, 0.5 * amount
            for x in range(holders.device_H.size):
                if holders.device_H[x] == to and not static_ED[holders.expert_H[x], to]:
                    many = holders.ptr_E[holders.expert_H[x] + 1] - holders.ptr_E[holders.expert_H[x]]
                    if many > 1 and space.quota_H[x] < value:
                        out, value = holders.expert_H[x], float(space.quota_H[x])
            if out >= 0:
                return expert, to, out
    return -1, -1, -1


def compile_all(holds_ED: NDArray[Any], space: Workspace) -> Holders:
    """:func:`poise.cost.quota.compile_holders` into a space."""
    out: Holders = compile_holders(np.ascontiguousarray(holds_ED), space.room)
    return out
