"""The loads on which the tables' kernels were timed, drawn anew by the rules of the collector that timed them.

Own code after the rules of ai-dynamo/aiconfigurator, ``collector/helper.py`` (Apache-2.0), which wrote the tables. A
table names tokens, experts, top-k, ranks and a distribution and holds one time: that of *the fullest rank*. Its loads
are not in the table, so they are drawn again; a random distribution is the mean of several draws (:mod:`.ranks`).

- *balanced*: expert ``t + j * ceil(E / K)`` modulo E is the j-th of token t; rank 0 is timed.
- *power law a*: loads of the experts are independent with density x**-a on [1, 0.8 N], or [0.01, 2] where there are no
  more pairs than experts; scaled to N * K, rounded, cut at N. What the cut takes off, and what rounding left over, go
  to (or come from) the ranks in turn, there to the emptiest (from the fullest) expert.
"""

from __future__ import annotations

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


def draw_counts(
    tokens: int, experts: int, top_k: int, alpha: float, rng: np.random.Generator
) -> tuple[Counts, int, int]:
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


def fullest_first(count_RE: Counts) -> Counts:
    """Tokens of every expert, int [E], from those by rank, the fullest rank first."""
    fullest = int(count_RE.sum(axis=1).argmax())
    count_RE[[0, fullest]] = count_RE[[fullest, 0]]
    return count_RE.reshape(-1)


def power_law_load(tokens: int, experts: int, top_k: int, ranks: int, alpha: float, rng: np.random.Generator) -> Counts:
    """One draw of tokens of every expert, int [E]: sums to N * K, none above N, the fullest rank first."""
    count, over, missing = draw_counts(tokens, experts, top_k, alpha, rng)
    count_RE = _in_turn(count.reshape(ranks, -1), over, tokens)
    if missing >= 0:
        count_RE = _in_turn(count_RE, missing, tokens)
    else:  # from the fullest experts: the mirror image
        count_RE = tokens - _in_turn(tokens - count_RE, -missing, tokens)
    return fullest_first(count_RE)


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
