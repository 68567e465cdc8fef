"""Compiled parts of ``poise`` in training: tokens split on two levels, and what a split costs.

The network joins nodes, a fast fabric the devices of a node, and a replica crosses the network once per node. So tokens
of known sources are split in two levels:

    Level 1  Nodes. Tokens of each expert on each node: what the node's own sources send, moved from nodes above (1 +
             slack) times the mean (:func:`poise.cost.quota.balance`); slack 0 balances, a large one keeps tokens home.
    Level 2  Devices of a node, for the node's tokens: an exact split over its holders.

:mod:`poise.stepwise.poise.gathers` chooses the holders.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine, exchange_seconds, expert_work, fullest_of_sums
from poise.cost.quota import Holders, QuotaProblem, Scratch, balance, compile_holders
from poise.util.compiled import compiled

SLACKS = np.array([0.0, 0.1, 0.3, 1.0, 1e9])
"""How far the fullest node may lie above the mean to keep tokens at home: what is tried."""
EVEN = 1.02
"""Fullest device over the mean below which no smaller slack is tried."""
NEAR_SLACK = 0.05
"""The same inside a node, at most."""


class SourceTokens(NamedTuple):
    """Tokens of each expert by where they come from: int64 [D, E] by device, [E, N] by node."""

    load_SE: NDArray[np.int64]
    need_EN: NDArray[np.int64]


class PartTokens(NamedTuple):
    """Tokens to be split over parts (the nodes, or the devices of one).

    Parameters
    ----------
    load_E : int64 [E], tokens of each expert.
    own_EX : int64 [E, X], tokens that each part's own sources send.
    speed_X : float64 [X], of the parts.
    """

    load_E: NDArray[np.int64]
    own_EX: NDArray[np.int64]
    speed_X: NDArray[np.float64]


@compiled
def _room(experts: int, devices: int) -> tuple[Holders, Scratch]:
    entries = experts * devices
    holders = Holders(
        np.zeros(experts + 1, np.int64), np.zeros(entries, np.int64), np.zeros(entries, np.int64),
        np.zeros(devices + 1, np.int64), np.zeros(entries, np.int64), np.zeros(experts, np.int64),
    )  # fmt: skip
    d, e = np.zeros((6, devices), np.int64), np.zeros((3, experts), np.int64)
    return holders, Scratch(d[0], d[1], d[2], d[3], d[4], d[5], e[0], e[1], e[2])


@compiled
def split_tokens(tokens: PartTokens, holds_EX: NDArray[np.bool_], slack: float) -> tuple[float, NDArray[np.int64]]:
    """Exact split of whole tokens over holders, bool [E, X], from a local start: largest load / speed, int64 [E, X]."""
    experts, parts = holds_EX.shape
    room, scratch = _room(experts, parts)
    holders = compile_holders(holds_EX, room)
    local_H = np.zeros(holders.device_H.size, np.int64)
    quota_H = np.zeros(holders.device_H.size, np.int64)
    for e in range(experts):
        left = tokens.load_E[e]
        for h in range(holders.ptr_E[e], holders.ptr_E[e + 1]):
            local_H[h] = min(left, tokens.own_EX[e, holders.device_H[h]])
            left -= local_H[h]
    problem = QuotaProblem(tokens.load_E, tokens.speed_X, local_H, np.zeros(0, np.int64), slack)
    most = balance(problem, holders, quota_H, scratch)
    quota_EX = np.zeros((experts, parts), np.int64)
    for h in range(holders.device_H.size):
        quota_EX[holders.expert_H[h], holders.device_H[h]] = quota_H[h]
    return most, quota_EX


@compiled
def source_tokens(load_SE: NDArray[np.int64], machine: Machine) -> SourceTokens:
    """Exact loads of each source device, int64 [D, E], with those of each node."""
    need_EN = np.zeros((load_SE.shape[1], machine.size_N.size), np.int64)
    for s in range(load_SE.shape[0]):
        for e in range(load_SE.shape[1]):
            need_EN[e, machine.node_D[s]] += load_SE[s, e]
    return SourceTokens(load_SE, need_EN)


@compiled
def split_nodes(
    sources: SourceTokens, holds_ED: NDArray[np.bool_], machine: Machine, slack: float
) -> NDArray[np.int64]:
    """Level 1: tokens of each expert on each node, int64 [E, N]."""
    experts, devices = holds_ED.shape
    nodes = machine.size_N.size
    if nodes == 1:
        return sources.need_EN
    holds_EN = np.zeros((experts, nodes), np.bool_)
    for e in range(experts):
        for d in range(devices):
            if holds_ED[e, d]:
                holds_EN[e, machine.node_D[d]] = True
    speed_N = np.zeros(nodes)
    for d in range(devices):
        speed_N[machine.node_D[d]] += machine.speed_D[d]
    tokens = PartTokens(sources.need_EN.sum(axis=1), sources.need_EN, speed_N)
    return split_tokens(tokens, holds_EN, slack)[1]


@compiled
def tokens_of_node(
    sources: SourceTokens, quota_EN: NDArray[np.int64], node: int, first: int, machine: Machine
) -> PartTokens:
    """A node's share of the tokens, to be split over its devices, the first of which is ``first``."""
    last = first + machine.size_N[node]
    own = np.ascontiguousarray(sources.load_SE[first:last].T)
    return PartTokens(np.ascontiguousarray(quota_EN[:, node]), own, machine.speed_D[first:last].copy())


@compiled
def split_devices(
    sources: SourceTokens, quota_EN: NDArray[np.int64], holds_ED: NDArray[np.bool_], machine: Machine, slack: float
) -> NDArray[np.int64]:
    """Level 2: each node's tokens over its devices, int64 [E, D]."""
    quota_ED = np.zeros(holds_ED.shape, np.int64)
    first = 0
    for n in range(machine.size_N.size):
        last = first + machine.size_N[n]
        tokens = tokens_of_node(sources, quota_EN, n, first, machine)
        _, quota_EX = split_tokens(tokens, np.ascontiguousarray(holds_ED[:, first:last]), slack)
        for e in range(quota_EX.shape[0]):
            for d in range(first, last):
                quota_ED[e, d] = quota_EX[e, d - first]
        first = last
    return quota_ED


@compiled
def quota_seconds(quota_ED: NDArray[np.int64], sources: SourceTokens, machine: Machine) -> float:
    """Modelled compute and all-to-alls of quotas, int64 [E, D], without latencies.

    As :func:`poise.stepwise.poise.work_split.split_seconds`, where the sources are known.
    """
    load_SE, need_EN = sources.load_SE, sources.need_EN
    experts, devices = quota_ED.shape
    nodes = machine.size_N.size
    worst = 0.0
    arrive, leave = np.zeros(devices), np.zeros(devices)
    place_EN = np.zeros((experts, nodes), np.int64)
    for d in range(devices):
        seconds = 0.0
        for e in range(experts):
            q = quota_ED[e, d]
            stay = min(q, load_SE[d, e])
            leave[d] += load_SE[d, e] - stay
            if q > 0:
                seconds += expert_work(float(q), machine)
                arrive[d] += q - stay
                place_EN[e, machine.node_D[d]] += q
        worst = max(worst, seconds / machine.speed_D[d])
    if devices == 1:
        return worst + machine.start_s
    away_N2 = np.zeros((nodes, 2))
    for n in range(nodes):
        for e in range(experts):
            inside = min(need_EN[e, n], place_EN[e, n])
            away_N2[n, 0] += need_EN[e, n] - inside
            away_N2[n, 1] += place_EN[e, n] - inside
    return worst + machine.start_s + exchange_seconds(fullest_of_sums(leave, arrive, away_N2, machine), machine)


@compiled
def best_quotas(
    sources: SourceTokens, holds_ED: NDArray[np.bool_], machine: Machine
) -> tuple[float, NDArray[np.int64]]:
    """The fastest two-level split for these sources: its seconds, and int64 [E, D].

    Slacks are tried from the largest on, until two in a row are slower than the best or the devices are even.
    """
    experts, devices = holds_ED.shape
    nodes = machine.size_N.size
    best_ED = np.zeros((experts, devices), np.int64)
    last_EN, chosen_EN = np.full((experts, nodes), -1), sources.need_EN
    least, worse = np.inf, 0
    even = EVEN * sources.load_SE.sum() / machine.speed_D.sum()
    for slack in SLACKS[::-1]:
        quota_EN = split_nodes(sources, holds_ED, machine, slack)
        if (quota_EN == last_EN).all():
            continue
        last_EN = quota_EN
        quota_ED = split_devices(sources, quota_EN, holds_ED, machine, 0.0)
        seconds = quota_seconds(quota_ED, sources, machine)
        worse += 1
        if seconds < least:
            least, worse = seconds, 0
            best_ED, chosen_EN = quota_ED, quota_EN
        if worse == 2 or (quota_ED.sum(axis=0) / machine.speed_D).max() <= even:
            break
    quota_ED = split_devices(sources, chosen_EN, holds_ED, machine, NEAR_SLACK)
    seconds = quota_seconds(quota_ED, sources, machine)
    if seconds < least:
        return seconds, quota_ED
    return least, best_ED
