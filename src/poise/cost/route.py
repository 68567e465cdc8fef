"""Which source sends which tokens to which replica, and the traffic of whole tokens.

A fast loop deals with whole tokens of known sources, where :mod:`poise.cost.traffic` deals with expectations. Both
book their copies on the same ports (:func:`poise.cost.traffic.port_load`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.traffic import Copies, DataFlow
from poise.machine.cluster import Cluster
from poise.util.compiled import compiled, plain


@compiled
def _stage(have_S, free_D, first, last, source, e, row_SED, all_rows):  # type: ignore[no-untyped-def]
    """Match what sources first..last have with free places among them, in order; booked at ``e`` of ``row_SED``."""
    s, d = first, first
    while s < last and d < last:
        if have_S[s] == 0:
            s += 1
        elif free_D[d] == 0:
            d += 1
        else:
            give = min(have_S[s], free_D[d])
            have_S[s] -= give
            free_D[d] -= give
            if all_rows:
                row_SED[s, e, d] += give
            elif s == source:
                row_SED[0, e, d] += give


@compiled
def rows_into(
    load_SE: NDArray[np.int64],
    quota_ED: NDArray[np.int64],
    node_D: NDArray[np.int64],
    source: int,
    have_S: NDArray[np.int64],
    free_D: NDArray[np.int64],
    row_SED: NDArray[np.int64],
) -> None:
    """Tokens from each source to each (expert, device): own device first, then own node, then anywhere.

    Every rank finds its own row from the same counts and quotas; together the rows use every quota exactly. Fills
    ``row_SED`` int64 [D, E, D], or, for one rank ``source`` >= 0, its row alone, [1, E, D]; where all rows have room
    for one expert only, [D, 1, D], they hold the sum over experts. ``have_S``, ``free_D`` int64 [D] are working memory.
    """
    devices, experts = load_SE.shape
    all_rows = source < 0
    row_SED[:] = 0
    for e in range(experts):
        if not all_rows and load_SE[source, e] == 0:
            continue
        at = min(e, row_SED.shape[1] - 1)
        holders, only = 0, 0
        for d in range(devices):
            free_D[d] = quota_ED[e, d]
            have_S[d] = load_SE[d, e]
            if free_D[d] > 0:
                holders += 1
                only = d
        if holders == 0:
            continue
        if holders == 1:
            if all_rows:
                for s in range(devices):
                    row_SED[s, at, only] += have_S[s]
            else:
                row_SED[0, e, only] = have_S[source]
            continue
        for d in range(devices):
            stay = min(have_S[d], free_D[d])
            have_S[d] -= stay
            free_D[d] -= stay
            if all_rows:
                row_SED[d, at, d] += stay
            elif d == source:
                row_SED[0, e, d] = stay
        first = 0
        while first < devices:
            last = first + 1
            while last < devices and node_D[last] == node_D[first]:
                last += 1
            _stage(have_S, free_D, first, last, source, at, row_SED, all_rows)
            first = last
        _stage(have_S, free_D, 0, devices, source, at, row_SED, all_rows)


def locality_rows(
    load_SE: NDArray[np.int64], quota_ED: NDArray[np.int64], node_D: NDArray[Any], source: int | None = None
) -> NDArray[np.int64]:
    """Rows of all sources, int64 [D, E, D], or of one, [1, E, D]: see :func:`rows_into`.

    ``load_SE`` int64 [D, E] tokens of each source; ``quota_ED`` int64 [E, D] with the same sum over d as over s.
    """
    devices, experts = load_SE.shape
    rows = np.zeros((devices if source is None else 1, experts, devices), np.int64)
    work = np.zeros((2, devices), np.int64)
    rows_into(plain(load_SE, np.int64), plain(quota_ED, np.int64), plain(node_D, np.int64),
              -1 if source is None else source, work[0], work[1], rows)  # fmt: skip
    return rows


def locality_pairs(load_SE: NDArray[np.int64], quota_ED: NDArray[np.int64], node_D: NDArray[Any]) -> NDArray[np.int64]:
    """Sum over experts of :func:`locality_rows`, int64 [D, D], without the rows: 2048 devices need 34 MB, not 9 GB."""
    devices = load_SE.shape[0]
    pairs, work = np.zeros((devices, 1, devices), np.int64), np.zeros((2, devices), np.int64)
    rows_into(plain(load_SE, np.int64), plain(quota_ED, np.int64), plain(node_D, np.int64), -1, work[0], work[1], pairs)
    return pairs[:, 0]


def count_sources(experts_TK: NDArray[Any], source_T: NDArray[Any], load_SE: NDArray[np.int64]) -> None:
    """Tokens of each expert on each source device, int64 [D, E], in place; picks of -1 compute nothing."""
    _count_sources(plain(experts_TK, np.int64), plain(source_T, np.int64), load_SE)


@compiled
def _count_sources(experts_TK: NDArray[np.int64], source_T: NDArray[np.int64], load_SE: NDArray[np.int64]) -> None:
    load_SE[:] = 0
    for t in range(experts_TK.shape[0]):
        for k in range(experts_TK.shape[1]):
            if experts_TK[t, k] >= 0:
                load_SE[source_T[t], experts_TK[t, k]] += 1


def assign_tokens(
    experts_TK: NDArray[Any], source_T: NDArray[Any], row_SED: NDArray[np.int64], device_TK: NDArray[np.int64]
) -> None:
    """Device of each (token, expert) pair, int64 [T, K], in place: a source's tokens of an expert fill its row in
    order, but join a device that the token goes to anyway where there is room. ``row_SED`` is used up. A pick of -1 has
    the device -1.
    """
    _assign_tokens(plain(experts_TK, np.int64), plain(source_T, np.int64), row_SED, device_TK)


@compiled
def _assign_tokens(
    experts_TK: NDArray[np.int64], source_T: NDArray[np.int64], row_SED: NDArray[np.int64], device_TK: NDArray[np.int64]
) -> None:
    devices = row_SED.shape[2]
    for t in range(experts_TK.shape[0]):
        s = source_T[t]
        for k in range(experts_TK.shape[1]):
            e = experts_TK[t, k]
            chosen = -1
            if e < 0:
                device_TK[t, k] = -1
                continue
            for j in range(k):
                if device_TK[t, j] >= 0 and row_SED[s, e, device_TK[t, j]] > 0:
                    chosen = device_TK[t, j]
                    break
            if chosen < 0:
                if row_SED[s, e, s] > 0:
                    chosen = s
                else:
                    for d in range(devices):
                        if row_SED[s, e, d] > 0:
                            chosen = d
                            break
            row_SED[s, e, chosen] -= 1
            device_TK[t, k] = chosen


@compiled
def _count_copies(device_TK, source_T, node_D, dedup, to_DD, node_DN):  # type: ignore[no-untyped-def]
    for t in range(device_TK.shape[0]):
        s = source_T[t]
        for k in range(device_TK.shape[1]):
            d = device_TK[t, k]
            if d < 0:
                continue
            new_device, new_node = True, True
            for j in range(k):
                if device_TK[t, j] >= 0:
                    new_device = new_device and device_TK[t, j] != d
                    new_node = new_node and node_D[device_TK[t, j]] != node_D[d]
            if new_device or not dedup:
                to_DD[s, d] += 1.0
            if new_node:
                node_DN[s, node_D[d]] += 1.0


@compiled
def _count_joins(device_TK, to_DD):  # type: ignore[no-untyped-def]
    """``stay``: the results of a token's other experts join it where its heaviest one ran, once per device."""
    for t in range(device_TK.shape[0]):
        for k in range(1, device_TK.shape[1]):
            new = device_TK[t, k] >= 0
            for j in range(1, k):
                new = new and device_TK[t, j] != device_TK[t, k]
            if new:
                to_DD[device_TK[t, k], device_TK[t, 0]] += 1.0


def deal_evenly(experts_TK: NDArray[np.int64], count_ED: NDArray[Any], source: int) -> NDArray[np.int64]:
    """Devices of one source's pairs, int64 [T, K], if each expert's are dealt over its slots in turn: the engines' way.

    ``count_ED`` int [E, D]: slots of each expert on each device; sources begin at different slots. A pick of -1 has the
    device -1.
    """
    slots_E = count_ED.sum(axis=1)
    table = np.zeros((len(count_ED), int(slots_E.max())), np.int64)
    for expert, row in enumerate(count_ED):
        where = np.repeat(np.arange(len(row)), row)
        table[expert, : len(where)] = where
    real_TK = experts_TK >= 0
    ids = experts_TK[real_TK]
    order = np.argsort(ids, kind="stable")
    count_E = np.bincount(ids, minlength=len(count_ED))
    turn = np.empty(len(ids), np.int64)
    turn[order] = np.arange(len(ids)) - (np.cumsum(count_E) - count_E)[ids[order]]
    out = np.full(experts_TK.shape, -1, np.int64)
    out[real_TK] = table[ids, (turn + source) % slots_E[ids]]
    return out


def token_copies(
    device_TK: NDArray[np.int64], source_T: NDArray[np.int64], cluster: Cluster, traffic: DataFlow
) -> tuple[Copies, Copies]:
    """Copies out and back of one step and layer (B = 1); pair (t, k) runs on ``device_TK[t, k]`` or nowhere (-1)."""
    devices, node_D = cluster.num_devices, cluster.node_D.astype(np.int64)
    to_DD, node_DN = np.zeros((devices, devices)), np.zeros((devices, cluster.num_nodes))
    _count_copies(device_TK, source_T, node_D, traffic != "home", to_DD, node_DN)
    by_node = traffic == "home_node_dedup" and cluster.num_nodes > 1
    out = Copies(to_DD[None], node_DN[None] if by_node else None)
    if traffic != "stay":
        return out, out
    back_DD = np.zeros((devices, devices))
    _count_joins(device_TK, back_DD)
    return out, Copies(back_DD[None])
