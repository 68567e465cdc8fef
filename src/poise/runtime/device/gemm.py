"""Grouped matrix products whose sizes are on the device: one launch, whatever the counts.

Rows are sorted by slot and padded at the end; ``ends`` int32 [S] says where each slot's rows end. A program finds its
slot from them: the grid is large enough for every division of the rows into slots. Any type that ``tl.dot`` takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, INNER = 64, 64, 32
"""Tiles: rows, columns of the product, and what is summed over in one step."""


@triton.jit
def product_kernel(
    x_ptr, w_ptr, ends_ptr, y_ptr, n, x_row, x_in, w_slot, w_in, w_out, IN, OUT, S, S_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``y[r] = x[r] @ w[slot of r]``, [n, OUT]; 0 in rows after the last end. The padding is one slot more."""
    slots = tl.arange(0, S_PAD)
    end = tl.load(ends_ptr + slots, mask=slots < S, other=n)
    start = tl.load(ends_ptr + slots - 1, mask=(slots > 0) & (slots <= S), other=0)
    start = tl.where(slots > S, n, start)
    tiles = (end - start + ROWS - 1) // ROWS
    before = tl.cumsum(tiles, axis=0) - tiles
    tile = tl.program_id(0)
    mine = (before <= tile) & (tile < before + tiles)
    slot = tl.sum(tl.where(mine, slots, 0), axis=0)
    first = tl.sum(tl.where(mine, start + (tile - before) * ROWS, 0), axis=0)
    stop = tl.sum(tl.where(mine, end, 0), axis=0)
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live, wide = row < stop, column < OUT
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    if slot < S:
        w_here = w_ptr + slot.to(tl.int64) * w_slot
        for inner in range(0, IN, INNER):
            at = inner + tl.arange(0, INNER)
            a = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row + at[None, :] * x_in,
                        mask=live[:, None] & (at < IN)[None, :], other=0.0)  # fmt: skip
            b = tl.load(w_here + at.to(tl.int64)[:, None] * w_in + column[None, :] * w_out,
                        mask=(at < IN)[:, None] & wide[None, :], other=0.0)  # fmt: skip
            total = tl.dot(a, b, total, input_precision="ieee", out_dtype=WIDE)
    out = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row.to(tl.int64)[:, None] * OUT + column[None, :], out, mask=live[:, None] & wide[None, :])


@triton.jit
def outer_kernel(
    x_ptr, dy_ptr, ends_ptr, dw_ptr, x_row, x_in, dy_row, dy_out, IN, OUT, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``dw[s] = sum over the rows of s of x[r] dy[r]``, [S, IN, OUT]."""
    slot = tl.program_id(0)
    inner = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(ends_ptr + slot - 1, mask=slot > 0, other=0)
    end = tl.load(ends_ptr + slot)
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    for first in range(start, end, INNER):
        row = first + tl.arange(0, INNER)
        a = tl.load(x_ptr + row.to(tl.int64)[None, :] * x_row + inner[:, None] * x_in,
                    mask=(inner < IN)[:, None] & (row < end)[None, :], other=0.0)  # fmt: skip
        b = tl.load(dy_ptr + row.to(tl.int64)[:, None] * dy_row + column[None, :] * dy_out,
                    mask=(row < end)[:, None] & (column < OUT)[None, :], other=0.0)  # fmt: skip
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=WIDE)
    place = (slot.to(tl.int64) * IN + inner[:, None]) * OUT + column[None, :]
    out = total.to(dw_ptr.dtype.element_ty)
    tl.store(dw_ptr + place, out, mask=(inner < IN)[:, None] & (column < OUT)[None, :])


def product(x_na: Tensor, weight_Sab: Tensor, ends_S: Tensor) -> Tensor:
    """Rows times the matrix of their slot, [n, b]; 0 after the last end."""
    rows, (slots, inner, out) = len(x_na), weight_Sab.shape
    y_nb = x_na.new_empty(rows, out)
    grid = (triton.cdiv(rows, ROWS) + slots, triton.cdiv(out, COLUMNS))
    product_kernel[grid](
        x_na, weight_Sab, ends_S, y_nb, rows, *x_na.stride(), *weight_Sab.stride(), inner, out, slots,
        S_PAD=triton.next_power_of_2(slots + 1), ROWS=ROWS, COLUMNS=COLUMNS, INNER=INNER, WIDE=_wide(x_na),
    )  # fmt: skip
    return y_nb


def outer(x_na: Tensor, dy_nb: Tensor, ends_S: Tensor) -> Tensor:
    """Gradients of the matrices, [S, a, b]."""
    slots, inner, out = len(ends_S), x_na.shape[1], dy_nb.shape[1]
    dw_Sab = x_na.new_empty(slots, inner, out)
    grid = (slots, triton.cdiv(inner, ROWS), triton.cdiv(out, COLUMNS))
    outer_kernel[grid](
        x_na, dy_nb, ends_S, dw_Sab, *x_na.stride(), *dy_nb.stride(), inner, out,
        ROWS=ROWS, COLUMNS=COLUMNS, INNER=INNER, WIDE=_wide(x_na),
    )  # fmt: skip
    return dw_Sab


def _wide(x: Tensor) -> tl.dtype:
    """In what products are summed."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
