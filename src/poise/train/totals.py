"""What is asked of all numbers of expert weights, over the ranks: norms, sums, extrema, spreads, equality, counts.

Sums are taken in float32 at least and over the ranks in float64, so that few bits overflow no sooner than in the whole
weight. Filled into the table of :mod:`poise.train.rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from poise.runtime.collectives import reduce_over
from poise.train.draws import ExpertCount
from poise.train.ownership import Ownership
from poise.train.rows import (
    _SPECIAL,
    ExpertRows,
    _as_said,
    _elsewhere,
    _first,
    _kept,
    _own_part,
    _ownerships,
    _size,
    _tagged,
    counted_from_the_start,
    plain,
    plainly,
    stepping,
)  # fmt: skip
from poise.util.errors import OptionError

OF_ALL = (
    "norms, sums, extrema and spreads of expert weights and their gradients are of all experts, so every rank asks for "
    "them, not one that writes a log; this rank's: poise.train.local_rows(weight)"
)


def local_rows(weight: Tensor) -> Tensor:
    """Rows that this rank has of an expert weight, of its gradient or of what was computed from them: plain numbers.

    Parameters
    ----------
    weight : of sharded experts, on this rank [n, ...] of [E, ...]; any other tensor is given back without its graph.

    Returns
    -------
    [n, ...], in the same memory and without a graph; experts in the order of their ids. Operations on it are of this
    rank's numbers alone.
    """
    return plain(weight)


# ---- of all experts -----------------------------------------------------------------------------------------------


def _over_ranks(local_X: Tensor, ownership: Ownership, op: Any) -> Tensor:
    """A reduction over the ranks of a few numbers, float64; its gradient goes to this rank's, as in the whole model."""
    local_X = local_X.double()
    here = local_X.detach().to(ownership.mesh.device_type, copy=True)
    reduce_over(here, op, ownership.group, OF_ALL)
    total_X = here.to(local_X.device)
    if not local_X.requires_grad:
        return total_X
    if op == dist.ReduceOp.SUM:
        return local_X + (total_X - local_X.detach())
    return torch.where(local_X.detach() == total_X, local_X, total_X)


def _norms(tensors: list[Any], ord: Any = 2, dtype: Any = None) -> list[Tensor]:
    """Norm of every tensor; those of rows by one reduction a process group."""
    ord, out = float(ord), [None] * len(tensors)
    for ownership in _ownerships(one if isinstance(one, ExpertRows) else None for one in tensors):
        at = [
            i for i, one in enumerate(tensors) if isinstance(one, ExpertRows) and one.ownership.group is ownership.group
        ]
        for i, norm in zip(at, _norms_of_rows([tensors[i] for i in at], ord, ownership), strict=True):
            out[i] = norm.to(dtype or tensors[i].dtype)
    for i, one in enumerate(tensors):
        if out[i] is None:
            norm = torch.linalg.vector_norm(one, ord, dtype=dtype)
            out[i] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return out


def _norms_of_list(func: Any, tensors: Sequence[Any], *args: Any, **kwargs: Any) -> list[Tensor]:
    return _norms(list(tensors), *args, **kwargs)


def _norms_of_rows(rows: list[ExpertRows], ord: float, ownership: Ownership) -> Tensor:
    powered = ord not in (0.0, math.inf, -math.inf)
    empty = math.inf if ord == -math.inf else 0.0
    with plainly():
        each = [torch.linalg.vector_norm(one, ord) if len(one) else one.new_tensor(empty) for one in rows]
        local = torch.stack([one.to(each[0].device, torch.float64) for one in each])
    op = {math.inf: dist.ReduceOp.MAX, -math.inf: dist.ReduceOp.MIN}.get(ord, dist.ReduceOp.SUM)
    total = _over_ranks(local**ord if powered else local, ownership, op)
    return total ** (1.0 / ord) if powered else total


def _norm(
    func: Any,
    rows: Any,
    p: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    ord: Any = None,
    dtype: Any = None,
    **_: Any,
) -> Any:
    """``torch.linalg.vector_norm``, ``torch.norm`` and ``Tensor.norm``, which name the order ``ord`` or ``p``."""
    order = p if p is not None else ord
    order = 2 if order in (None, "fro") else order
    if dim is None and not keepdim and not isinstance(order, str):
        _check_step("norm", rows)
        return _norms([rows], order, dtype)[0]
    return _by_axis(func, rows, dim, lambda: func(rows, order, dim, keepdim, dtype=dtype))


def _check_step(what: str, rows: Any) -> None:
    """Refuse what an optimizer asks of one weight in its step, where that is all experts of a list."""
    if stepping and rows.ownership.listed:
        raise OptionError(
            f"{stepping[0]} scales by the {what} of a weight, and {len(rows.ownership.owner_E)} experts of a list "
            "are one weight here",
            hint="take an optimizer that works element by element, or stack the experts of the model: [E, ...]",
        )


def _reduction(op: Any, empty: float) -> Callable[..., Any]:
    def reduce(func: Any, rows: Any, dim: Any = None, *args: Any, axis: Any = None, **kwargs: Any) -> Any:
        dim = axis if dim is None else dim
        if isinstance(dim, Tensor):  # torch.max(a, b)
            like = _first((rows, dim), {})
            pair = [_own_part(rows, like), _own_part(dim, like)]
            return _as_said(func, "maximum", pair, kwargs, like)
        if dim is None and not kwargs.get("keepdim"):
            if func.__name__ not in ("any", "all"):  # whether a gradient is finite
                _check_step(func.__name__, rows)
            with plainly():
                dtype = kwargs.get("dtype") or (rows.dtype if op != dist.ReduceOp.SUM else _sums_of(rows.dtype))
                named = {**kwargs, "dtype": _wide(dtype)} if op == dist.ReduceOp.SUM else kwargs
                one = func(rows, **named) if len(rows) else func(rows.new_full((1,), empty), **named)
            total = _over_ranks(one.reshape(1), rows.ownership, op)[0]
            return total.to(dtype if op == dist.ReduceOp.SUM else one.dtype)
        return _by_axis(func, rows, dim, lambda: func(rows, dim, *args, **kwargs))

    return reduce


def _mean(func: Any, rows: Any, dim: Any = None, *args: Any, axis: Any = None, **kwargs: Any) -> Any:
    dim = axis if dim is None else dim
    if dim is None and not kwargs.get("keepdim"):
        dtype = kwargs.pop("dtype", None) or rows.dtype
        return (torch.sum(rows, **{**kwargs, "dtype": _wide(dtype)}) / rows.numel()).to(dtype)
    return _by_axis(func, rows, dim, lambda: func(rows, dim, *args, **kwargs))


def _spread(root: bool) -> Callable[..., Any]:
    def spread(
        func: Any, rows: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *,
        correction: Any = None, axis: Any = None,
    ) -> Any:  # fmt: skip
        if isinstance(dim, bool):  # var(unbiased), which names no axis
            dim, unbiased = None, dim
        dim = axis if dim is None else dim
        less = unbiased if correction is None else correction
        if dim is None and not keepdim:
            wide = rows.to(_wide(rows.dtype))
            apart = wide - torch.mean(wide).detach()  # its own gradient is 0 over all experts, not over those here
            variance = torch.sum(apart.square()) / (rows.numel() - less)
            return (variance.sqrt() if root else variance).to(rows.dtype)
        return _by_axis(
            func,
            rows,
            dim,
            lambda: func(rows, dim, correction=less, keepdim=keepdim) if len(rows) else rows.mean(dim, keepdim=keepdim),
        )

    return spread


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a type are added up in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _sums_of(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.int64


def _same(func: Any, rows: Any, other: Any, *args: Any, **kwargs: Any) -> bool:
    """``torch.equal`` and ``torch.allclose``: whether all experts are."""
    like = _first((rows, other), kwargs)
    with plainly():
        same = func(_own_part(rows, like), _own_part(other, like), *args, **kwargs)
        all_same = _over_ranks(torch.tensor([float(same)]), like.ownership, dist.ReduceOp.MIN)
    return bool(all_same.item())


def _norm_of_any(func: Any, rows: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """``torch.linalg.norm``: of all numbers without order or axis; else of vectors or matrices along axes."""
    if dim is None and not keepdim and (ord is None or len(_size(rows)) == 1):
        return _norm(func, rows, ord, **kwargs)
    return _by_axis(func, rows, dim, lambda: func(rows, ord, dim, keepdim, **kwargs))


def _by_axis(func: Any, rows: ExpertRows, dim: Any, run: Callable[[], Any]) -> Any:
    """Reduce along axes within an expert; along the axis of experts other ranks have the rest, so it is refused."""
    axes = dim if isinstance(dim, (tuple, list)) else () if dim is None else (dim,)
    size = _size(rows)
    if not axes or any(axis % len(size) == 0 for axis in axes):
        raise OptionError(
            f"{getattr(func, '__name__', func)} along the axis of experts, of which this rank has {size[0]} of "
            f"{len(rows.ownership.owner_E)}",
            hint="leave dim out for the value of all experts, or use poise.train.full_state_dict",
        )
    if rows.ownership.listed and any(axis >= 0 for axis in axes):
        raise counted_from_the_start(getattr(func, "__name__", ""), rows)
    with plainly():
        return _kept(run(), rows, getattr(func, "__name__", ""))


def _numel(func: Any, rows: ExpertRows) -> int:
    return len(rows.ownership.owner_E) * math.prod(_size(rows)[1:])


def _axes(func: Any, rows: ExpertRows) -> int:
    return len(_size(rows)) - rows.ownership.listed


def _length(func: Any, rows: ExpertRows, dim: int | None = None) -> Any:
    """``size``: of one expert of a list, as in the unsharded model; the experts here are no number to scale by."""
    size = _size(rows)
    if dim is None:
        return size
    at = dim + rows.ownership.listed if dim >= 0 else dim
    return ExpertCount(size[at]) if at % len(size) == 0 else size[at]


def _copy(func: Any, into: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Any:
    """From rows of the same experts, or from the tensor of all experts."""
    source = getattr(source, "rows", source)  # of a state dict
    like = _first((into, source), {})
    if into is like:
        source = _own_part(source, like)
    elif type(into) is Tensor and into.shape != _size(like):
        raise _elsewhere("copy_", f"into {list(into.shape)}", like)
    with plainly():
        return _tagged(func(into, source, *args, **kwargs), like)


_T = torch.Tensor
_SPECIAL.update({
    _T.copy_: _copy, _T.numel: _numel, _T.nelement: _numel, torch.numel: _numel,
    _T.size: _length, torch.equal: _same, _T.equal: _same, torch.allclose: _same, _T.allclose: _same,
    torch.linalg.norm: _norm_of_any, torch._foreach_norm: _norms_of_list,
    _T.dim: _axes, _T.ndim.__get__: _axes, _T.ndimension: _axes,
    torch.linalg.vector_norm: _norm, torch.norm: _norm, _T.norm: _norm,
    torch.mean: _mean, _T.mean: _mean, torch.var: _spread(False), _T.var: _spread(False), torch.std: _spread(True),
    _T.std: _spread(True),
})  # fmt: skip
for _op, _empty, _names in (
    (dist.ReduceOp.SUM, 0, ("sum",)), (dist.ReduceOp.MAX, 0, ("any",)), (dist.ReduceOp.MIN, 1, ("all",)),
    (dist.ReduceOp.MAX, -math.inf, ("max", "amax")), (dist.ReduceOp.MIN, math.inf, ("min", "amin")),
):  # fmt: skip
    for _name in _names:
        _SPECIAL[getattr(torch, _name)] = _SPECIAL[getattr(_T, _name)] = _reduction(_op, _empty)
