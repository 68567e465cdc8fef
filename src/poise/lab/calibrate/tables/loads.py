"""The loads on which the tables' kernels were timed, drawn anew by the rules of the collector that timed them.

Own code after the rules of ai-dynamo/aiconfigurator, ``collector/helper.py`` (Apache-2.0), which wrote the tables. A
table names tokens, experts, top-k, ranks and a distribution and holds one time: that of *the fullest rank*. Its loads
are not in the table, so they are drawn again; a random distribution is the mean of several draws (:mod:`.ranks`).

- *balanced*: expert ``t + j * ceil(E / K)`` modulo E is the j-th of token t; rank 0 is timed.
- *power law a*: loads of the experts are independent with density x**-a on [1, 0.8 N], or [0.01, 2] where there are no
  more pairs than experts; scaled to N * K, rounded, cut at N. What the cut takes off, and what rounding left over, go
  to (or come from) the ranks in turn, there to the emptiest (from the fullest) expert.
- *before 2026-04-19* (the wide-EP tables): what was left over went to the emptiest experts one by one, those of the
  last rank first where many are equal. Below one token an expert that piles work on one rank, and makes EPLB look
  better.
- *EPLB*: greedy replication and longest-first placement on the very loads that are timed (an oracle), over the old
  rule.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def balanced_load(tokens: int, experts: int, top_k: int, ranks: int) -> tuple[Counts, int]:
    """Tokens of the experts of rank 0, int [E / ranks], and how many different tokens they are."""
    stride, own = math.ceil(experts / top_k), experts // ranks
    token = np.arange(tokens)
    first = token if tokens >= stride else token * stride / tokens
    chosen_NK = ((first[:, None] + stride * np.arange(top_k)) % experts).astype(np.int64)
    here = chosen_NK < own
    return np.bincount(chosen_NK[here], minlength=own)[:own], int(here.any(axis=1).sum())


def _draw(tokens: int, experts: int, top_k: int, alpha: float, rng: np.random.Generator) -> tuple[Counts, int, int]:
    """Rounded and cut loads [E], pairs that the cut took off, and pairs still missing (or too many, below 0)."""
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    power = 1.0 - alpha
    x = ((high**power - low**power) * rng.random(experts) + low**power) ** (1.0 / power)
    count = np.rint(x / x.sum() * tokens * top_k).astype(np.int64)
    over = int(np.maximum(count - tokens, 0).sum())
    count = np.minimum(count, tokens)
    return count, over, tokens * top_k - int(count.sum()) - over


def _raise_lowest(count_RE: Counts, add_R: Counts, cap: int) -> tuple[Counts, Counts]:
    """In each row the lowest entry (the first of equals) gets 1, ``add_R`` times, none beyond ``cap``; and what was
    left.
    """
    add = np.minimum(add_R, count_RE.shape[1] * cap - count_RE.sum(axis=1))
    low, high = np.zeros(len(add), np.int64), np.full(len(add), cap, np.int64)
    while (low < high).any():  # the highest level to which all lower entries can be raised
        middle = (low + high + 1) // 2
        fits = np.maximum(middle[:, None] - count_RE, 0).sum(axis=1) <= add
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    out = np.maximum(count_RE, low[:, None])
    rest = add - (out - count_RE).sum(axis=1)
    level = (out == low[:, None]) & (low < cap)[:, None]
    return out + (level & (np.cumsum(level, axis=1) <= rest[:, None])), add_R - add


def _in_turn(count_RE: Counts, pairs: int, cap: int) -> Counts:
    """``pairs`` go to the ranks in turn, there to the lowest expert below ``cap``."""
    ranks = count_RE.shape[0]
    while pairs > 0:
        turn = np.arange(ranks)
        room = np.flatnonzero(count_RE.sum(axis=1) < count_RE.shape[1] * cap)
        if not room.size:
            break
        add = np.zeros(ranks, np.int64)
        add[room] = pairs // room.size + (turn[: room.size] < pairs % room.size)
        count_RE, left = _raise_lowest(count_RE, add, cap)
        pairs = int(left.sum())
    return count_RE


def _fullest_first(count_RE: Counts) -> Counts:
    fullest = int(count_RE.sum(axis=1).argmax())
    count_RE[[0, fullest]] = count_RE[[fullest, 0]]
    return count_RE.reshape(-1)


def power_law_load(tokens: int, experts: int, top_k: int, ranks: int, alpha: float, rng: np.random.Generator) -> Counts:
    """One draw of tokens of every expert, int [E]: sums to N * K, none above N, the fullest rank first."""
    count, over, missing = _draw(tokens, experts, top_k, alpha, rng)
    count_RE = _in_turn(count.reshape(ranks, -1), over, tokens)
    if missing >= 0:
        count_RE = _in_turn(count_RE, missing, tokens)
    else:  # from the fullest experts: the mirror image
        count_RE = tokens - _in_turn(tokens - count_RE, -missing, tokens)
    return _fullest_first(count_RE)


def _left_over_to_lowest(count: Counts, over: int, missing: int, cap: int) -> Counts:
    """The old rule for pairs left over: the lowest first (the last of equals), the order kept as it was before."""
    rising = np.argsort(-count, kind="stable")[::-1]
    for expert in rising:
        if over <= 0:
            break
        given = min(over, cap - int(count[expert]))
        count[expert] += given
        over -= given
    rising, turn = np.argsort(-count, kind="stable")[::-1], 0
    while missing != 0:
        expert = rising[turn % len(rising)]
        turn += 1
        if missing > 0 and count[expert] < cap:
            count[expert] += 1
            missing -= 1
        elif missing < 0:
            count[expert if count[expert] > 0 else int(count.argmax())] -= 1
            missing += 1
    return count


def old_power_law_load(
    tokens: int, experts: int, top_k: int, ranks: int, alpha: float, rng: np.random.Generator
) -> Counts:
    """As :func:`power_law_load`, by the rule before 2026-04-19."""
    count = _left_over_to_lowest(*_draw(tokens, experts, top_k, alpha, rng), tokens)
    return _fullest_first(count.reshape(ranks, -1))


def eplb_slots(load_E: NDArray[np.int64], slots: int, ranks: int) -> NDArray[np.float64]:
    """Tokens of every slot, float [ranks, slots / ranks], the fullest rank first.

    Each slot beyond E goes to the expert whose replicas have most tokens each; then slots, the fullest first, go to the
    rank that has fewest tokens and still a place.
    """
    replicas = np.ones(len(load_E), np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    for _ in range(slots - len(load_E)):
        _, expert = heap[0]
        replicas[expert] += 1
        heapq.heapreplace(heap, (-float(load_E[expert]) / replicas[expert], expert))
    each = np.sort(np.repeat(load_E / replicas, replicas))[::-1]
    held: list[list[float]] = [[] for _ in range(ranks)]
    open_ranks = [(0.0, rank) for rank in range(ranks)]
    for load in each.tolist():
        total, rank = heapq.heappop(open_ranks)
        held[rank].append(load)
        if len(held[rank]) < slots // ranks:
            heapq.heappush(open_ranks, (total + load, rank))
    slot_RS = np.array(held)
    fullest = int(slot_RS.sum(axis=1).argmax())
    return np.concatenate([slot_RS[fullest : fullest + 1], np.delete(slot_RS, fullest, axis=0)])


def eplb_load(
    tokens: int, experts: int, top_k: int, ranks: int, alpha: float, slots: int, rng: np.random.Generator
) -> Counts:
    """One draw of tokens of every slot, int [slots], after EPLB knew it: sums to N * K, the fullest rank first."""
    count = _left_over_to_lowest(*_draw(tokens, experts, top_k, alpha, rng), tokens)
    slot = eplb_slots(count, slots, ranks).reshape(-1)
    whole = np.floor(slot).astype(np.int64)
    missing = tokens * top_k - int(whole.sum())
    whole[np.argsort(-(slot - whole), kind="stable")[:missing]] += 1
    return whole


def different_tokens(load_E: Counts, own: int, tokens: int) -> int:
    """Different tokens with an expert among the first ``own``, where pairs are dealt as the collector deals them.

    Experts, the fullest first, are written one after the other into K columns of N tokens: an expert has the tokens of
    an arc of the circle of N, so the answer is the length of a union of arcs.
    """
    order = np.argsort(-load_E, kind="stable")
    start = np.concatenate([[0], np.cumsum(load_E[order])[:-1]]) % tokens
    mine = (order < own) & (load_E[order] > 0)
    begin, length = start[mine], load_E[order][mine]
    if (length >= tokens).any():
        return tokens
    wraps = begin + length > tokens
    low = np.concatenate([begin, np.zeros(int(wraps.sum()), np.int64)])
    high = np.concatenate([np.minimum(begin + length, tokens), (begin + length - tokens)[wraps]])
    by = np.argsort(low, kind="stable")
    low, high = low[by], high[by]
    reach = np.maximum.accumulate(np.concatenate([[0], high[:-1]]))
    return int(np.maximum(high - np.maximum(low, reach), 0).sum())
