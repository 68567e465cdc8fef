"""From the map in use, few moves: what brings down the fullest rank, one change at a time, while it pays.

Step 1  The fullest rank of a layer gives: it swaps an expert for a smaller one of another rank, has one of its experts
        copied to another rank in the place of a copy that others have too, or takes a small expert in the place of a
        copy of its own. Of all such changes, that after which the fullest rank is least full; of equal ones, that after
        which the ranks concerned are.
Step 2  Until no change makes the fullest rank less full, or the limit. Ranks of another place (a node, where expert
        groups stay whole) are no partners.
Step 3  Of all states on the way that with the least ``worth * fullest rank + price * most fetches of a rank``.

Compared with SwiftBalance (:mod:`poise.planning.methods.swift_balance`), which a plugin asked before: copies are moved
only where that helps, and the way ends where it pays best. All of it is compiled, as a plan has tenths of a second.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.util.compiled import compiled

LEAST = 1e-6
"""Part of its load by which the fullest rank must lose in a change."""
TIE = 1e-7
"""Part of the load of the ranks concerned that counts where changes are as good otherwise."""


@compiled(nogil=True)
def _loads(
    load_E: NDArray[np.float64], slot_expert_S: NDArray[np.int64], rate_D: NDArray[np.float64],
    copies_E: NDArray[np.int64], x_D: NDArray[np.float64],
) -> None:  # fmt: skip
    """Each rank's load times its rate, summed anew, so that no rounding gathers."""
    each = slot_expert_S.size // rate_D.size
    x_D[:] = 0.0
    for s in range(slot_expert_S.size):
        x_D[s // each] += load_E[slot_expert_S[s]] / copies_E[slot_expert_S[s]] * rate_D[s // each]


@compiled(nogil=True)
def _replaced(
    load_E: NDArray[np.float64], rate_D: NDArray[np.float64], copies_E: NDArray[np.int64],
    held_ED: NDArray[np.int64], x_D: NDArray[np.float64], change: tuple[int, int, int], top: float,
) -> float:  # fmt: skip
    """What a change (rank, out, into) is worth in which a rank has an expert in the place of a copy of another: the
    fullest rank's load, and a little of the fullest that is concerned; infinite once a rank reaches ``top``.
    """
    rank, out, into = change
    k, m = copies_E[out], copies_E[into]
    up = load_E[out] / (k - 1) - load_E[out] / k
    down = load_E[into] / m - load_E[into] / (m + 1)
    most = x_D[rank] + (load_E[into] / (m + 1) - load_E[out] / k) * rate_D[rank]
    most += ((held_ED[out, rank] - 1) * up - held_ED[into, rank] * down) * rate_D[rank]
    concerned = most
    for d in range(rate_D.size):
        if most >= top:
            return np.inf
        if d == rank:
            continue
        value = x_D[d] + (held_ED[out, d] * up - held_ED[into, d] * down) * rate_D[d]
        most = max(most, value)
        if held_ED[out, d] > 0:
            concerned = max(concerned, value)
    return most + TIE * concerned if most < top else np.inf


@compiled(nogil=True)
def _put(
    slot_expert_S: NDArray[np.int64], slot: int, into: int, copies_E: NDArray[np.int64], held_ED: NDArray[np.int64],
    first_ED: NDArray[np.int64], fetched_D: NDArray[np.int64],
) -> None:  # fmt: skip
    """Another expert into a slot, with all that is counted."""
    out, rank = slot_expert_S[slot], slot // (slot_expert_S.size // fetched_D.size)
    copies_E[out] -= 1
    held_ED[out, rank] -= 1
    if held_ED[out, rank] == 0 and first_ED[out, rank] == 0:
        fetched_D[rank] -= 1
    if held_ED[into, rank] == 0 and first_ED[into, rank] == 0:
        fetched_D[rank] += 1
    copies_E[into] += 1
    held_ED[into, rank] += 1
    slot_expert_S[slot] = into


@compiled(nogil=True)
def nudged(
    load_E: NDArray[np.float64], slot_expert_S: NDArray[np.int64], rate_D: NDArray[np.float64],
    place_D: NDArray[np.int64], most: int, worth: float, price: float,
) -> int:  # fmt: skip
    """Change ``slot_expert_S`` of one layer in place; returns the changes.

    Parameters
    ----------
    load_E : tokens of each expert.
    slot_expert_S : expert of each slot, every expert at least once; slot s is on rank s // (S / D).
    rate_D : mean speed over speed of each rank.
    place_D : ranks of another place are no partners.
    most : changes at most.
    worth : seconds that a token less on the fullest rank saves.
    price : seconds of a fetch.
    """
    slots, devices, experts = slot_expert_S.size, rate_D.size, load_E.size
    each = slots // devices
    copies_E, held_ED = np.zeros(experts, np.int64), np.zeros((experts, devices), np.int64)
    x_D = np.zeros(devices)
    for s in range(slots):
        copies_E[slot_expert_S[s]] += 1
        held_ED[slot_expert_S[s], s // each] += 1
    _loads(load_E, slot_expert_S, rate_D, copies_E, x_D)
    here_EP = np.zeros((experts, place_D.max() + 1), np.bool_)
    for s in range(slots):
        here_EP[slot_expert_S[s], place_D[s // each]] = True
    first_ED = held_ED.copy()
    fetched_D = np.zeros(devices, np.int64)
    kept_S = slot_expert_S.copy()
    least, changes = worth * x_D.max(), 0
    for step in range(1, most + 1):
        hot = int(np.argmax(x_D))
        top = x_D[hot] * (1.0 - LEAST)
        next_one, next_two = -1, 0.0  # the fullest of the others, and what the fullest of the rest of them has
        for d in range(devices):
            if d != hot and (next_one < 0 or x_D[d] > x_D[next_one]):
                next_one = d
        for d in range(devices):
            if d not in (hot, next_one):
                next_two = max(next_two, x_D[d])
        best, best_i, best_j, kind = np.inf, -1, -1, 0
        for i in range(hot * each, (hot + 1) * each):
            a = slot_expert_S[i]
            share = load_E[a] / copies_E[a]
            for j in range(slots):
                d = j // each
                if d == hot or place_D[d] != place_D[hot]:
                    continue
                c = slot_expert_S[j]
                if held_ED[a, d] > 0 or a == c:
                    continue
                other = load_E[c] / copies_E[c]
                if held_ED[c, hot] == 0 and other < share:
                    pair = max(x_D[hot] + (other - share) * rate_D[hot], x_D[d] + (share - other) * rate_D[d])
                    value = max(pair, next_two if d == next_one else x_D[next_one])
                    if value < top and value + TIE * pair < best:
                        best, best_i, best_j, kind = value + TIE * pair, i, j, 0
                if copies_E[c] > 1:
                    value = _replaced(load_E, rate_D, copies_E, held_ED, x_D, (d, c, a), min(best, top))
                    if value < best:
                        best, best_i, best_j, kind = value, j, a, 1
            if copies_E[a] > 1:
                for c in range(experts):
                    if held_ED[c, hot] > 0:
                        continue
                    if here_EP[c, place_D[hot]]:  # an expert of another place would leave it
                        value = _replaced(load_E, rate_D, copies_E, held_ED, x_D, (hot, a, c), min(best, top))
                        if value < best:
                            best, best_i, best_j, kind = value, i, c, 1
        if best == np.inf:
            break
        given = slot_expert_S[best_i]
        into = slot_expert_S[best_j] if kind == 0 else best_j
        _put(slot_expert_S, best_i, into, copies_E, held_ED, first_ED, fetched_D)
        if kind == 0:
            _put(slot_expert_S, best_j, given, copies_E, held_ED, first_ED, fetched_D)
        _loads(load_E, slot_expert_S, rate_D, copies_E, x_D)
        value = worth * x_D.max() + price * fetched_D.max()
        if value < least:
            least, changes = value, step
            for s in range(slots):
                kept_S[s] = slot_expert_S[s]
    for s in range(slots):
        slot_expert_S[s] = kept_S[s]
    return changes
