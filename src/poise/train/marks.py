"""Whether the gradient of an expert weight was dropped, told by what was done and not by what is in it.

A gradient of zeros may be one that nothing was added to, and any that was touched has another version. So three events
set a mark: ``weight.grad = None`` (or ``del``), ``zero_`` of the gradient, also of its ``data`` or of it detached, and
``torch._foreach_zero_``: what ``zero_grad`` of modules and optimizers does, in all of its forms. What is done to plain
tensors of the same memory (:func:`poise.train.totals.local_rows`), or makes zeros otherwise (``mul_(0)``), sets none.
Filled into the table of :mod:`poise.train.rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from poise.train.rows import (
    _SPECIAL,
    ExpertRows,
    GradientMark,
    _as_said,
    _first,
    _foreach,
    _own_part,
    plainly,
    rows_of,
)


def watch(weight: ExpertRows) -> None:
    """Look at the gradient of an owned weight anew: what drops it from now on is told by :func:`dropped`."""
    _mark(weight, weight.grad)


def dropped(weight: ExpertRows) -> bool:
    """Whether the gradient is gone, or was dropped since it is watched and not put back."""
    with plainly():
        if weight.grad is None:
            return True
    mark = weight.gradient_mark
    return mark is not None and (mark.gone or mark.zeroed)


def _mark(weight: ExpertRows, gradient: Any) -> None:
    """A new mark of both; what the weight's gradient was before has none any more that counts."""
    weight.gradient_mark = GradientMark()
    if isinstance(gradient, ExpertRows):
        gradient.zero_mark = weight.gradient_mark


def _replaced(weight: ExpertRows, gradient: Any) -> None:
    """Another gradient stands in place of the one that is watched: after a drop that is the next one's."""
    mark = weight.gradient_mark
    if mark is None:
        return
    if isinstance(gradient, ExpertRows) and gradient.zero_mark is mark:  # it was put aside
        mark.gone = False
    elif not (mark.gone or mark.zeroed):
        _mark(weight, gradient)


def _get(func: Any, weight: ExpertRows, *_: Any) -> Any:
    """The gradient as rows, also where a plain tensor was set."""
    with plainly():
        grad = weight.grad
        if type(grad) is Tensor:
            weight.grad = grad = rows_of(grad, weight.ownership)
            _replaced(weight, grad)
    return grad


def _set(func: Any, weight: ExpertRows, value: Any) -> None:
    like = _first((weight, value), {})
    _as_said(func, "__set__", [weight, _own_part(value, like)], {}, like)
    if value is not None:
        _replaced(weight, weight.grad)
    elif weight.gradient_mark is not None:
        weight.gradient_mark.gone = True


def _delete(func: Any, weight: ExpertRows) -> None:
    _as_said(func, "__delete__", [weight], {}, weight)
    if weight.gradient_mark is not None:
        weight.gradient_mark.gone = True


def _zeroed(rows: Any) -> None:
    if isinstance(rows, ExpertRows) and rows.zero_mark is not None:
        rows.zero_mark.zeroed = True


def _zero(func: Any, *args: Any, **named: Any) -> Any:
    (rows,) = (*args, *named.values())
    out = _as_said(func, "zero", [rows], {}, rows)
    _zeroed(rows)
    return out


def _zero_each(func: Any, *args: Any, **named: Any) -> Any:
    (tensors,) = (*args, *named.values())
    out = _foreach(func, "_foreach_zero_", [list(tensors)], {})
    for one in tensors:
        _zeroed(one)
    return out


_T = torch.Tensor
_DONE: dict[Any, Callable[..., Any]] = {
    _T.grad.__get__: _get, _T.grad.__set__: _set, _T.grad.__delete__: _delete, _T.zero_: _zero, torch.zero_: _zero,
    torch._foreach_zero_: _zero_each,
}  # fmt: skip
_SPECIAL.update(_DONE)
