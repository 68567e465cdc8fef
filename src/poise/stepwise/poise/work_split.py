"""Compiled parts of ``poise`` in serving: tokens split by seconds, and what a split costs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import exchange_seconds, expert_work, fullest_of_sums, knee, token_work
from poise.cost.quota import Holders, QuotaProblem, balance, near_start
from poise.stepwise.poise.workspace import UNITS, HeldLayer
from poise.util.compiled import compiled


@compiled
def split_seconds(tokens_H: NDArray[np.float64], load_SE: NDArray[np.int64], layer: HeldLayer) -> float:
    """Modelled compute, dispatch and combine of a split (float64 [H] tokens), without latencies.

    ``load_SE`` int64 [D, E] are the tokens of each source, matched to the nearest quotas
    (:func:`poise.cost.route.rows_into`); size 0: sources spread evenly. One copy a pair (``home``): deduplicating
    flows send at most that.
    """
    holders, machine, space = layer.holders, layer.machine, layer.space
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
def even_tokens(load_E: NDArray[np.float64], holders: Holders, tokens_H: NDArray[np.float64]) -> None:
    """The same share to every holder, float64 [H]."""
    for e in range(load_E.size):
        first, last = holders.ptr_E[e], holders.ptr_E[e + 1]
        for h in range(first, last):
            tokens_H[h] = load_E[e] / (last - first)


@compiled
def split_by_work(
    load_E: NDArray[np.float64], local_H: NDArray[np.int64], slack: float, scale: float, layer: HeldLayer
) -> None:
    """Split by seconds, float64 [H] in ``space.tokens_H``: experts bound by reading their weights stay whole.

    Those go, longest first, to the holder that would finish first (beside an even share of the others); the tokens of
    the others are then split exactly over what is left. In units of 1 / ``scale`` tokens' compute; ``local_H`` int64
    [H] (units that may stay at home) or size 0, ``slack`` as in :func:`poise.cost.quota.balance`.
    """
    holders, machine, space = layer.holders, layer.machine, layer.space
    tokens_H = space.tokens_H
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
    balance(QuotaProblem(space.units_E, machine.speed_D, local_H, base_D, slack), holders, space.quota_H, space.scratch)
    for e in holders.shared_Y:
        if space.units_E[e] > 0:
            for h in range(holders.ptr_E[e], holders.ptr_E[e + 1]):
                tokens_H[h] = space.quota_H[h] / scale


@compiled
def best_split(load_SE: NDArray[np.int64], slack: float, layer: HeldLayer) -> float:
    """The fastest of three splits for these sources, float64 [H] whole tokens in ``space.best_H``; its seconds.

    Exact in tokens; by work; by work with ``slack``, which leaves more tokens at home.
    """
    holders, machine, space = layer.holders, layer.machine, layer.space
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
            problem = QuotaProblem(space.units_E, machine.speed_D, local_H, space.base_D[:0], 0.0)
            balance(problem, holders, space.quota_H, space.scratch)
            for h in range(count):
                space.tokens_H[h] = space.quota_H[h]
        else:
            split_by_work(load_E, local_H, slack * (turn - 1), 1.0, layer)
        seconds = split_seconds(space.tokens_H, load_SE, layer)
        if seconds < least:
            least = seconds
            for h in range(count):
                space.best_H[h] = space.tokens_H[h]
    return least


def exact_quota_by_work(load_SE: NDArray[np.int64], slack: float, layer: HeldLayer) -> NDArray[np.int64]:
    """Quotas of :func:`best_split`, int64 [E, D]."""
    best_split(np.ascontiguousarray(load_SE), slack, layer)
    holders, quota_ED = layer.holders, np.zeros((load_SE.shape[1], load_SE.shape[0]), np.int64)
    quota_ED[holders.expert_H, holders.device_H] = np.rint(layer.space.best_H[: holders.device_H.size])
    return quota_ED


@compiled
def plan_seconds(load_E: NDArray[np.float64], control_s: float, layer: HeldLayer) -> float:
    """Modelled seconds of the split by work on loads known in expectation, control included."""
    total = 0.0
    for e in range(load_E.size):
        total += load_E[e]
    scale = max(1.0, UNITS * load_E.size / max(total, 1e-9))
    split_by_work(load_E, layer.space.local_H[:0], 0.0, scale, layer)
    return split_seconds(layer.space.tokens_H, np.zeros((0, 0), np.int64), layer) + control_s


@compiled
def passive_seconds(load_E: NDArray[np.float64], layer: HeldLayer) -> float:
    """Modelled seconds of the engine's even split."""
    even_tokens(load_E, layer.holders, layer.space.tokens_H)
    return split_seconds(layer.space.tokens_H, np.zeros((0, 0), np.int64), layer)
