"""Compiled parts of ``poise`` in training: tokens split on two levels, and what a split and its weights cost.

The network joins nodes, a fast fabric the devices of a node, and a replica crosses the network once per node. So tokens
of known sources are split in two levels:

    Level 1  Nodes. Tokens of each expert on each node: what the node's own sources send, moved from nodes above (1 +
             slack) times the mean (:func:`poise.cost.quota.balance`); slack 0 balances, a large one keeps tokens home.
    Level 2  Devices of a node, for the node's tokens: an exact split over its holders.

:mod:`poise.stepwise.poise.joint_plan` chooses the holders.
"""

from __future__ import annotations

import numpy as np

from poise.cost.machine import exchange_seconds, expert_work, fullest_of_sums
from poise.cost.quota import Holders, Scratch, balance, compile_holders
from poise.util.compiled import compiled

SLACKS = np.array([0.0, 0.1, 0.3, 1.0, 1e9])
"""How far the fullest node may lie above the mean to keep tokens at home: what is tried."""
EVEN = 1.02
"""Fullest device over the mean below which no smaller slack is tried."""
NEAR_SLACK = 0.05
"""The same inside a node, at most."""


@compiled
def _room(experts, devices):  # type: ignore[no-untyped-def]
    entries = experts * devices
    holders = Holders(
        np.zeros(experts + 1, np.int64), np.zeros(entries, np.int64), np.zeros(entries, np.int64),
        np.zeros(devices + 1, np.int64), np.zeros(entries, np.int64), np.zeros(experts, np.int64),
    )  # fmt: skip
    d, e = np.zeros((6, devices), np.int64), np.zeros((3, experts), np.int64)
    return holders, Scratch(d[0], d[1], d[2], d[3], d[4], d[5], e[0], e[1], e[2])


@compiled
def split_tokens(load_E, local_EX, holds_EX, speed_X, slack, quota_EX):  # type: ignore[no-untyped-def]
    """Exact split of whole tokens over holders from a local start, int64 [E, X]; returns the largest load / speed."""
    experts, parts = holds_EX.shape
    room, scratch = _room(experts, parts)
    holders = compile_holders(holds_EX, room)
    local_H = np.zeros(holders.device_H.size, np.int64)
    quota_H = np.zeros(holders.device_H.size, np.int64)
    for e in range(experts):
        left = load_E[e]
        for h in range(holders.ptr_E[e], holders.ptr_E[e + 1]):
            local_H[h] = min(left, local_EX[e, holders.device_H[h]])
            left -= local_H[h]
    most = balance(load_E, local_H, np.zeros(0, np.int64), holders, speed_X, slack, quota_H, scratch)
    quota_EX[:] = 0
    for h in range(holders.device_H.size):
        quota_EX[holders.expert_H[h], holders.device_H[h]] = quota_H[h]
    return most


@compiled
def node_needs(load_SE, node_D, nodes):  # type: ignore[no-untyped-def]
    """Tokens that the sources of each node send to each expert, int64 [E, N]."""
    out = np.zeros((load_SE.shape[1], nodes), np.int64)
    for s in range(load_SE.shape[0]):
        for e in range(load_SE.shape[1]):
            out[e, node_D[s]] += load_SE[s, e]
    return out


@compiled
def split_nodes(need_EN, holds_ED, machine, slack, quota_EN):  # type: ignore[no-untyped-def]
    """Level 1: tokens of each expert on each node, int64 [E, N]."""
    experts, devices = holds_ED.shape
    nodes = machine.size_N.size
    holds_EN = np.zeros((experts, nodes), np.bool_)
    for e in range(experts):
        for d in range(devices):
            if holds_ED[e, d]:
                holds_EN[e, machine.node_D[d]] = True
    speed_N = np.zeros(nodes)
    for d in range(devices):
        speed_N[machine.node_D[d]] += machine.speed_D[d]
    split_tokens(need_EN.sum(axis=1), need_EN, holds_EN, speed_N, slack, quota_EN)


@compiled
def split_devices(load_SE, quota_EN, holds_ED, machine, slack, quota_ED):  # type: ignore[no-untyped-def]
    """Level 2: each node's tokens over its devices, int64 [E, D]."""
    first = 0
    for n in range(machine.size_N.size):
        last = first + machine.size_N[n]
        part = np.zeros((holds_ED.shape[0], last - first), np.int64)
        own = np.ascontiguousarray(load_SE[first:last].T)
        holds = np.ascontiguousarray(holds_ED[:, first:last])
        split_tokens(np.ascontiguousarray(quota_EN[:, n]), own, holds, machine.speed_D[first:last].copy(), slack, part)
        quota_ED[:, first:last] = part
        first = last


@compiled
def quota_seconds(quota_ED, load_SE, need_EN, machine):  # type: ignore[no-untyped-def]
    """Modelled compute and all-to-alls of quotas, without latencies: see ``kernels.layer_seconds``."""
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
        return worst
    away_N2 = np.zeros((nodes, 2))
    for n in range(nodes):
        for e in range(experts):
            inside = min(need_EN[e, n], place_EN[e, n])
            away_N2[n, 0] += need_EN[e, n] - inside
            away_N2[n, 1] += place_EN[e, n] - inside
    return worst + machine.start_s + exchange_seconds(fullest_of_sums(leave, arrive, away_N2, machine), machine)


@compiled
def best_quotas(load_SE, holds_ED, machine, slacks, best_ED):  # type: ignore[no-untyped-def]
    """The fastest two-level split for these sources, int64 [E, D] in ``best_ED``; its seconds.

    ``slacks`` rising; tried from the largest on, until two in a row are slower than the best or the devices are even.
    """
    experts, devices = holds_ED.shape
    nodes = machine.size_N.size
    need_EN = node_needs(load_SE, machine.node_D, nodes)
    quota_EN, quota_ED = need_EN.copy(), np.zeros((experts, devices), np.int64)
    last_EN, chosen_EN = np.full((experts, nodes), -1), need_EN.copy()
    least, worse = np.inf, 0
    even = EVEN * load_SE.sum() / machine.speed_D.sum()
    for slack in slacks[::-1]:
        if nodes > 1:
            split_nodes(need_EN, holds_ED, machine, slack, quota_EN)
        if (quota_EN == last_EN).all():
            continue
        last_EN[:] = quota_EN
        split_devices(load_SE, quota_EN, holds_ED, machine, 0.0, quota_ED)
        seconds = quota_seconds(quota_ED, load_SE, need_EN, machine)
        worse += 1
        if seconds < least:
            least, worse = seconds, 0
            best_ED[:] = quota_ED
            chosen_EN[:] = quota_EN
        if worse == 2 or (quota_ED.sum(axis=0) / machine.speed_D).max() <= even:
            break
    split_devices(load_SE, chosen_EN, holds_ED, machine, NEAR_SLACK, quota_ED)
    seconds = quota_seconds(quota_ED, load_SE, need_EN, machine)
    if seconds < least:
        least = seconds
        best_ED[:] = quota_ED
    return least
