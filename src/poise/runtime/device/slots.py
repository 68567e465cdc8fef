"""What several kernels read and sum: the entries of a slot table, and sums over an expert's slots."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def placed(D_PAD: tl.constexpr, S_PAD: tl.constexpr, D: tl.constexpr, S: tl.constexpr):
    """Of every entry of a padded slot table: device, slot, index, and whether it is one; [D_PAD, S_PAD]."""
    device = tl.arange(0, D_PAD)[:, None] + tl.zeros((D_PAD, S_PAD), tl.int32)
    slot = tl.arange(0, S_PAD)[None, :] + tl.zeros((D_PAD, S_PAD), tl.int32)
    return device, slot, device * S + slot, (device < D) & (slot < S)


@triton.jit
def reset(ptr, value, E: tl.constexpr, E_PAD: tl.constexpr):
    """An int64 [E] array of working memory, between two barriers."""
    each = tl.arange(0, E_PAD)
    tl.debug_barrier()
    tl.store(ptr + each, tl.zeros((E_PAD,), tl.int64) + value, mask=each < E)
    tl.debug_barrier()


@triton.jit
def least_of(ptr, value, expert, among, empty, E: tl.constexpr, E_PAD: tl.constexpr):
    """Least value of an expert's entries among some, at each entry, int64."""
    reset(ptr, empty, E, E_PAD)
    tl.atomic_min(ptr + expert, value.to(tl.int64), mask=among)
    tl.debug_barrier()
    return tl.load(ptr + expert)


@triton.jit
def sum_of(ptr, value, expert, among, E: tl.constexpr, E_PAD: tl.constexpr):
    """Sum of the values of an expert's entries among some, at each entry, int64."""
    reset(ptr, 0, E, E_PAD)
    tl.atomic_add(ptr + expert, value.to(tl.int64), mask=among)
    tl.debug_barrier()
    return tl.load(ptr + expert)


@triton.jit
def dealt(ptr, tokens, expert, held, turn, E: tl.constexpr, E_PAD: tl.constexpr):
    """The engine's even split, int64: tokens in turn to their static slots, the first ones get what is left."""
    static = held & (turn >= 0)
    one = tl.full(expert.shape, 1, tl.int64)
    holders = tl.where(static, sum_of(ptr, one, expert, static, E, E_PAD), 1)
    return tl.where(static, tokens // holders + (turn < tokens % holders).to(tl.int64), 0)
