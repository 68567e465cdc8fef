"""Products of rows with the matrix of their slot, where only the device knows how many rows a slot has.

=============  ==========================================================================
``TORCH``      PyTorch's grouped matrix product: bfloat16 on a GPU, rows of 16 bytes
``triton``     :mod:`poise.runtime.device.gemm`: what else a GPU is given
``MASKED``     one slot after the other over all rows: a CPU, where it is for tests
=============  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from poise.runtime.device.needs_triton import GEMM, HINT, WHY_NONE
from poise.util.errors import OptionError


class ProductCode(NamedTuple):
    """What computes ``x[r] @ w[slot of r]`` [n, b], 0 after the last end, and the gradients of ``w``, [S, a, b]."""

    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor, Tensor], Tensor]


def slot_product(x_na: Tensor, weight_Sab: Tensor, ends_S: Tensor, code: ProductCode | None = None) -> Tensor:
    """Rows sorted by slot times the matrix of their slot, [n, b]; differentiable.

    Rows after the last end come out as 0, whatever is in them, and so do their gradients.

    Parameters
    ----------
    x_na : [n, a].
    weight_Sab : [S, a, b], however it lies.
    ends_S : int32 [S], where each slot's rows end.
    code : what computes it, in place of :func:`code_for`.
    """
    out: Tensor = _SlotProduct.apply(x_na, weight_Sab, ends_S, code or code_for(x_na, weight_Sab))
    return out


def code_for(x_na: Tensor, weight_Sab: Tensor) -> ProductCode:
    """What computes it for these.

    Raises
    ------
    OptionError : a GPU without Triton, and something other than bfloat16 in rows of 16 bytes.
    """
    if not x_na.is_cuda:
        return MASKED
    if x_na.dtype == torch.bfloat16 and not any(side % 8 for side in weight_Sab.shape[1:]) and _torch_has_it():
        return TORCH
    return triton_code()


def triton_code() -> ProductCode:
    """Triton's kernels.

    Raises
    ------
    OptionError : Triton is not installed.
    """
    if GEMM is None:
        raise OptionError(WHY_NONE, hint=HINT)
    return ProductCode(GEMM.product, GEMM.outer)


class _SlotProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_na: Tensor, weight_Sab: Tensor, ends_S: Tensor, code: ProductCode) -> Tensor:
        ctx.save_for_backward(x_na, weight_Sab, ends_S)
        ctx.code = code
        return code.product(x_na, weight_Sab, ends_S)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_na, weight_Sab, ends_S = ctx.saved_tensors
        dy_nb, dx_na, dw_Sab = grads[0].contiguous(), None, None
        if ctx.needs_input_grad[0]:
            dx_na = ctx.code.product(dy_nb, weight_Sab.transpose(1, 2), ends_S)
        if ctx.needs_input_grad[1]:
            dw_Sab = ctx.code.outer(x_na, dy_nb, ends_S)
        return dx_na, dw_Sab, None, None


def _torch_product(x_na: Tensor, weight_Sab: Tensor, ends_S: Tensor) -> Tensor:
    row_n = torch.arange(len(x_na), device=x_na.device)
    return torch.where((row_n < ends_S[-1])[:, None], _grouped_mm(x_na, weight_Sab, ends_S), 0.0)


def _torch_outer(x_na: Tensor, dy_nb: Tensor, ends_S: Tensor) -> Tensor:
    count_S = ends_S.diff(prepend=ends_S.new_zeros(1))
    return torch.where((count_S > 0)[:, None, None], _grouped_mm(x_na.t(), dy_nb, ends_S), 0.0)


def _grouped_mm(a: Tensor, b: Tensor, ends_S: Tensor) -> Tensor:
    call = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    out: Tensor = call(a, b, offs=ends_S)
    return out


def _torch_has_it() -> bool:
    return hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")


def _masked_product(x_na: Tensor, weight_Sab: Tensor, ends_S: Tensor) -> Tensor:
    y_nb = x_na.new_zeros(len(x_na), weight_Sab.shape[2])
    for slot, inside in enumerate(_rows_of(x_na, ends_S)):
        y_nb = torch.where(inside, x_na @ weight_Sab[slot], y_nb)
    return y_nb


def _masked_outer(x_na: Tensor, dy_nb: Tensor, ends_S: Tensor) -> Tensor:
    return torch.stack([
        torch.where(inside, x_na, 0.0).t() @ torch.where(inside, dy_nb, 0.0) for inside in _rows_of(x_na, ends_S)
    ])  # fmt: skip


def _rows_of(x_na: Tensor, ends_S: Tensor) -> list[Tensor]:
    """Which rows a slot has, bool [n, 1] each."""
    row_n1 = torch.arange(len(x_na), device=x_na.device)[:, None]
    starts_S = torch.cat([ends_S.new_zeros(1), ends_S[:-1]])
    return [(row_n1 >= starts_S[slot]) & (row_n1 < ends_S[slot]) for slot in range(len(ends_S))]


TORCH = ProductCode(_torch_product, _torch_outer)
MASKED = ProductCode(_masked_product, _masked_outer)
