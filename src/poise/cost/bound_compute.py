"""Lower bounds on the compute of a layer, in seconds without the start. What each rests on: :mod:`poise.cost.bound`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.util.compiled import compiled

FINE = 4_000_000
"""Parts of experts that are priced one by one; above it, numbers of replicas are taken in larger steps."""


def compute_bound(
    work_XE: NDArray[np.float64], slots_D: NDArray[Any], speed_D: NDArray[np.float64], *, spare: int
) -> NDArray[np.float64]:
    """Bound on max_d of compute seconds, float64 [X].

    Parameters
    ----------
    work_XE : float64 [X, E], seconds of each expert at speed 1.
    slots_D : int [D], most experts a device can hold in this layer.
    speed_D : float64 [D].
    spare : most slots that this layer can have beyond one per expert.
    """
    num_experts, num_devices = work_XE.shape[1], len(speed_D)
    usable = np.minimum(np.asarray(slots_D), num_experts)
    fastest = np.sort(speed_D)[::-1]
    copies = max(1, min(num_devices, spare + 1))
    bound = np.maximum(work_XE.sum(axis=1) / speed_D.sum(), work_XE.max(axis=1) / fastest[:copies].sum())
    if spare > 0:
        return bound
    down = -np.sort(-work_XE, axis=1)
    for k in range(1, (num_experts - 1) // num_devices + 1):
        together = down[:, k * num_devices - k : k * num_devices + 1].sum(axis=1)
        bound = np.maximum(bound, together / fastest[0])
    if int(usable.sum()) > num_experts:
        return bound
    up_sum = np.concatenate([np.zeros((len(down), 1)), np.cumsum(down[:, ::-1], axis=1)], axis=1)
    holders = np.flatnonzero(usable > 0)
    filled = (down[:, :1] + up_sum[:, usable[holders] - 1]) / speed_D[holders]
    return np.maximum(bound, filled.min(axis=1))


def reads_bound(
    tokens_XE: NDArray[np.float64], one_token: float, slots_D: NDArray[Any], speed_D: NDArray[np.float64], *, spare: int
) -> NDArray[np.float64]:
    """Bound on max_d of compute seconds by whole reads of weights, float64 [X].

    Parameters
    ----------
    tokens_XE : float64 [X, E], tokens of each expert.
    one_token : seconds of one token of an expert at speed 1, of which most is reading its weights.
    slots_D, speed_D, spare : as in :func:`compute_bound`.
    """
    num_experts = tokens_XE.shape[1]
    usable = np.minimum(np.asarray(slots_D), num_experts)
    turn_D = [np.arange(1, n + 1) / speed for n, speed in zip(usable.tolist(), speed_D.tolist(), strict=True)]
    times = np.concatenate([[0.0], np.sort(np.concatenate(turn_D))])
    breaks = np.sort(np.where(tokens_XE >= 1.0, np.floor(tokens_XE), np.inf), axis=1)
    broken = (np.cumsum(breaks, axis=1) <= max(0, spare)).sum(axis=1)
    whole = (tokens_XE >= 1.0).sum(axis=1) - broken
    out: NDArray[np.float64] = one_token * times[np.minimum(whole, len(times) - 1)]
    return out


def filled_work(
    load_BE: NDArray[np.float64], weight_B: NDArray[np.float64], cluster: Cluster, model: ModelSpec, *, spare: int
) -> float:
    """Least seconds at speed 1 of all slots of one layer together, were all of them filled with different experts a
    device and tokens split evenly: the mean over steps.

    Parameters
    ----------
    load_BE : float64 [B, E], tokens of each expert.
    weight_B : float64 [B].
    spare : slots beyond one an expert, all of them used.
    """
    most = min(cluster.num_devices, spare + 1)
    assert spare <= load_BE.shape[1] * (most - 1), f"{spare} slots more, {load_BE.shape[1]} experts, {most} copies each"
    counts = np.arange(1, most + 1)
    if load_BE.size * most > FINE:  # more replicas never take less: fewer of them stand for those in between
        counts = np.unique(np.rint(1.5 ** np.arange(20))).astype(int)
        counts = counts[counts <= most]
    seconds_RBE = expert_seconds(load_BE / counts[:, None, None], cluster, model)
    seconds_RE = counts[:, None] * np.einsum("b,rbe->re", weight_B, seconds_RBE)
    step = np.searchsorted(counts, np.arange(1, most + 1), side="right") - 1
    return float(_least_filled(np.ascontiguousarray(seconds_RE[step].T), spare))


@compiled
def _next_vertex(seconds_R, at):  # type: ignore[no-untyped-def]
    """Next vertex of the lower hull of a column and the slope to it; at the end of the hull the same vertex."""
    to, slope = at, np.inf
    for r in range(at + 1, seconds_R.size):
        rise = (seconds_R[r] - seconds_R[at]) / (r - at)
        if rise < slope:
            to, slope = r, rise
    return to, slope


@compiled
def _least_filled(seconds_ER: NDArray[np.float64], spare: int) -> float:
    """Least sum over experts with ``spare`` replicas more than one each; column r: an expert with r + 1 replicas.

    Step 1  Lagrange: along the lower hulls of the columns the cheapest next replicas are taken, ``spare`` of them: a
            lower bound; with the last ones' own seconds, where a segment of a hull is cut, an upper one.
    Step 2  Where they differ, by dynamic programming over the replicas that lie no further above the hulls, at this
            price of a replica, than the bounds lie apart: no other can be in a least sum.
    """
    experts, columns = seconds_ER.shape
    at_E, to_E, slope_E = np.zeros(experts, np.int64), np.zeros(experts, np.int64), np.zeros(experts)
    total, left = 0.0, spare
    for e in range(experts):
        total += seconds_ER[e, 0]
        to_E[e], slope_E[e] = _next_vertex(seconds_ER[e], 0)
    least, most, price = total, total, 0.0
    while left > 0:
        e = int(np.argmin(slope_E))
        at, price = at_E[e], slope_E[e]
        step = min(left, to_E[e] - at)
        least, most = total + price * step, total + seconds_ER[e, at + step] - seconds_ER[e, at]
        left -= step
        if left > 0 or at + step == to_E[e]:
            total, at_E[e] = most, to_E[e]
            to_E[e], slope_E[e] = _next_vertex(seconds_ER[e], at_E[e])
    if most - least <= 1e-12 * abs(most):
        return least
    best = np.full(spare + 1, np.inf)
    best[0] = 0.0
    above = most - least + 1e-9 * abs(most)
    kept_R = np.empty(columns, np.int64)
    for e in range(experts):
        kept = 0
        for r in range(columns):
            if seconds_ER[e, r] - seconds_ER[e, at_E[e]] - price * (r - at_E[e]) <= above:
                kept_R[kept] = r
                kept += 1
        for used in range(spare, -1, -1):
            lowest = np.inf
            for i in range(kept):
                if kept_R[i] > used:
                    break
                lowest = min(lowest, best[used - kept_R[i]] + seconds_ER[e, kept_R[i]])
            best[used] = lowest
    return best[spare]
