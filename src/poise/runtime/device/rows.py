"""Kernel (b): where one source sends its tokens, nearest first: own device, own node, anywhere.

What :func:`poise.cost.route.rows_into` gives for one source, token for token. It walks sources and places in order,
each matched to what is free; here both lie on a line (prefix sums), and a source's tokens meet the places that its
stretch of the line covers. Programs of some experts each; none needs another.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stretch(start, amount, low, high):
    """How much of ``start .. start + amount`` lies in ``low .. high``."""
    return tl.maximum(tl.minimum(start + amount, high) - tl.maximum(start, low), 0)


@triton.jit
def rows_kernel(
    load_ptr, dense_ptr, first_ptr, size_ptr, row_ptr, source, D: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    N_PAD: tl.constexpr, W_PAD: tl.constexpr, E_BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill ``row`` int32 [E, D] from ``load`` int32 [D, E] and ``dense`` int32 [E, D] quotas."""
    each = tl.program_id(0) * E_BLOCK + tl.arange(0, E_BLOCK)
    node = tl.arange(0, N_PAD)
    real = node < N
    within = tl.arange(0, W_PAD)
    device = tl.load(first_ptr + node, mask=real, other=0)[:, None] + within[None, :]
    inside = (within[None, :] < tl.load(size_ptr + node, mask=real, other=0)[:, None])[None, :, :]
    inside = inside & (each < E)[:, None, None]
    expert = each[:, None, None]
    mine = (device == source)[None, :, :] & inside
    device = device[None, :, :]
    have = tl.load(load_ptr + device * E + expert, mask=inside, other=0)
    free = tl.load(dense_ptr + expert * D + device, mask=inside, other=0)
    stay = tl.minimum(have, free)
    row = tl.where(mine, stay, 0)
    have -= stay
    free -= stay

    have_before, free_before = tl.cumsum(have, axis=2) - have, tl.cumsum(free, axis=2) - free
    have_node, free_node = tl.sum(have, axis=2)[:, :, None], tl.sum(free, axis=2)[:, :, None]
    start = tl.sum(tl.sum(tl.where(mine, have_before, 0), axis=2), axis=1)[:, None, None]
    end = start + tl.sum(tl.sum(tl.where(mine, have, 0), axis=2), axis=1)[:, None, None]
    home = tl.max(mine.to(tl.int32), axis=2)[:, :, None]
    row += home * stretch(free_before, free, start, end)
    have_left = have - stretch(have_before, have, 0, free_node)
    free_left = free - stretch(free_before, free, 0, have_node)

    have_nodes, free_nodes = tl.sum(have_left, axis=2), tl.sum(free_left, axis=2)
    have_before = (tl.cumsum(have_nodes, axis=1) - have_nodes)[:, :, None] + tl.cumsum(have_left, axis=2) - have_left
    free_before = (tl.cumsum(free_nodes, axis=1) - free_nodes)[:, :, None] + tl.cumsum(free_left, axis=2) - free_left
    start = tl.sum(tl.sum(tl.where(mine, have_before, 0), axis=2), axis=1)[:, None, None]
    end = start + tl.sum(tl.sum(tl.where(mine, have_left, 0), axis=2), axis=1)[:, None, None]
    row += stretch(free_before, free_left, start, end)
    tl.store(row_ptr + expert * D + device, row, mask=inside)
