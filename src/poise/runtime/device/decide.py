"""Kernel (d): whether to leave a layer alone: the engine's even split over the static placement is predicted to be as
fast as the exact split over this step's holders and its control time. It ends the program of
:mod:`poise.runtime.device.fill`, which has that split.

Both splits, in whole tokens of the expected loads, are priced as :func:`poise.stepwise.poise.work_split.split_seconds`
prices them where sources are not known: the slowest device's compute, and dispatch and combine through the fullest
ports with every device the home of 1 / D. All in integers: picoseconds, and tokens times D where the homes' shares are
fractions, which fits 64 bits up to
:data:`poise.stepwise.kernels.MOST_PAIRS`. The numbers at ``price_ptr``: :data:`poise.stepwise.kernels.PRICES`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from poise.runtime.device.slots import dealt, reset


@triton.jit
def compute_time(quota, price_ptr):
    """Picoseconds of the slowest device, int64."""
    tokens = quota.to(tl.int64)
    read = tl.minimum(tokens, 1) * tl.load(price_ptr + 1)
    work = tl.maximum(tokens * tl.load(price_ptr), read) + tokens * tl.load(price_ptr + 2)
    return tl.max(tl.sum(work, axis=1), axis=0) + tl.load(price_ptr + 3)


@triton.jit
def exchange_time(quota, tokens, expert, held, load_ptr, node_of_ptr, size_ptr, price_ptr, room_ptr, D: tl.constexpr,
                  E: tl.constexpr, N: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr):  # fmt: skip
    """Picoseconds of dispatch and combine, int64. ``tokens`` int64 [D_PAD, S_PAD]: of the entry's expert."""
    device, each = tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    node = tl.load(node_of_ptr + device, mask=device < D, other=-1)
    here = each < E
    load = tl.load(load_ptr + each, mask=here, other=0).to(tl.int64)
    total = tl.sum(load, axis=0)
    amount = quota.to(tl.int64) * D
    stay = tl.sum(tl.minimum(amount, tokens), axis=1)
    leaves = tl.where(device < D, total - stay, 0)
    comes = tl.sum(amount, axis=1) - stay
    inside, between = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    shared = tl.load(price_ptr + 11)
    for n in range(N):
        reset(room_ptr, 0, E, E_PAD)
        tl.atomic_add(room_ptr + expert, amount, mask=held & (node == n)[:, None])
        tl.debug_barrier()
        place = tl.load(room_ptr + each, mask=here, other=0)
        size = tl.load(size_ptr + n).to(tl.int64)
        kept = tl.minimum(load * size, place)
        away_out, away_in = tl.sum(load * size - kept, axis=0), tl.sum(place - kept, axis=0)
        out_sum = tl.sum(tl.where(node == n, leaves, 0), axis=0)
        in_sum = tl.sum(tl.where(node == n, comes, 0), axis=0)
        ports = tl.where(shared != 0, 1, size)
        if N > 1:
            between = tl.maximum(between, tl.maximum(away_in // ports, away_out // ports))
        else:
            away_out, away_in = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
        fullest_out = tl.max(tl.where(node == n, leaves, 0), axis=0) * (out_sum - away_out) // tl.maximum(out_sum, 1)
        fullest_in = tl.max(tl.where(node == n, comes, 0), axis=0) * (in_sum - away_in) // tl.maximum(in_sum, 1)
        inside = tl.maximum(inside, tl.maximum(fullest_out, fullest_in))
    there = tl.maximum(inside * tl.load(price_ptr + 4), between * tl.load(price_ptr + 5))
    back = tl.maximum(inside * tl.load(price_ptr + 6), between * tl.load(price_ptr + 7))
    return (there + back) // D


@triton.jit
def decided(quota, expert, held, turn, load_ptr, node_of_ptr, size_ptr, price_ptr, room_ptr, leave_ptr, seconds_ptr,
            D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr):  # fmt: skip
    """Price ``quota`` [D_PAD, S_PAD] and the even split, and say which; ``room_ptr`` int64 [E], working memory."""
    tokens = tl.load(load_ptr + expert, mask=held, other=0).to(tl.int64)
    even = dealt(room_ptr, tokens, expert, held, turn, E, E_PAD)
    planned_ps = compute_time(quota, price_ptr) + tl.load(price_ptr + 8)
    passive_ps = compute_time(even, price_ptr)
    if D > 1:
        planned_ps += exchange_time(quota, tokens, expert, held, load_ptr, node_of_ptr, size_ptr, price_ptr, room_ptr,
                                    D, E, N, D_PAD, E_PAD)  # fmt: skip
        passive_ps += exchange_time(even, tokens, expert, held, load_ptr, node_of_ptr, size_ptr, price_ptr, room_ptr,
                                    D, E, N, D_PAD, E_PAD)  # fmt: skip
    margin = tl.load(price_ptr + 10)
    below = passive_ps * (1000 - margin) - margin * tl.load(price_ptr + 9)
    tl.store(leave_ptr, (planned_ps * 1000 > below).to(tl.int32))
    tl.store(seconds_ptr, planned_ps)
    tl.store(seconds_ptr + 1, passive_ps)
