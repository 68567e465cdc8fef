"""The rows of an expert weight that one rank owns, as a tensor that knows which experts they are.

Weights, gradients and optimizer states of sharded experts are :class:`ExpertRows`, and so is what elementwise
operations make of them: an average kept by hand, a snapshot, a mask. So stock code is right, or refused:

- Norms, sums, extrema and ``numel`` are those of all experts on all ranks, as DTensor answers them: collective. So
  ``torch.nn.utils.clip_grad_norm_``, ``GradScaler`` and optimizers that scale by a tensor's norm do what they do to the
  unsharded weight. ``shape`` is that of the rows here.
- Rows of one layer from before and after its owners moved do not mix: :class:`~poise.util.errors.ModelError` on all
  ranks.
- Random numbers are drawn for all experts (:mod:`poise.train.draws`), so that ranks with one seed differ.
- They cannot be pickled: a file would hold one rank's experts.

All else is done by PyTorch on plain tensors, without a dispatch of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from poise.train.draws import IN_PLACE, LIKE, draw, draw_like
from poise.train.wholes import RESHAPED, asks_for_all, keeps_experts, plain_name, with_rows
from poise.util.errors import ModelError, OptionError

plainly = torch._C.DisableTorchFunctionSubclass
"""Within it, rows are tensors like any other."""


class Ownership:
    """Who owns which expert of one layer, from one move of owners to the next.

    Parameters
    ----------
    mesh : 1-D, of the ranks that share the layer.
    owner_E : int64 [E], rank of each expert.
    listed : in the unsharded model each expert has tensors of its own, so that ``dim()`` counts one axis less.
    origin : the layer, the same after a move.
    """

    def __init__(
        self, mesh: Any, owner_E: NDArray[np.int64], listed: bool = False, origin: object | None = None
    ) -> None:
        self.mesh, self.rank = mesh, int(mesh.get_local_rank())
        self.owner_E = np.array(owner_E, np.int64)
        self.owner_E.flags.writeable = False
        self.mine: list[int] = np.flatnonzero(self.owner_E == self.rank).tolist()
        self.listed, self.origin = listed, object() if origin is None else origin

    def moved(self, owner_E: NDArray[np.int64]) -> Ownership:
        """The same layer under other owners."""
        return Ownership(self.mesh, owner_E, self.listed, self.origin)

    def check(self, other: Ownership) -> None:
        """Refuse to combine rows of both, if they cannot be.

        Raises
        ------
        ModelError : they are of the same layer, and of other experts; on all ranks.
        """
        if self is not other and self.origin is other.origin and (self.owner_E != other.owner_E).any():
            expert = int(np.flatnonzero(self.owner_E != other.owner_E)[0])
            raise ModelError(
                f"rows from before and after a move of owners meet: expert {expert} is rank "
                f"{self.owner_E[expert]}'s in the one and rank {other.owner_E[expert]}'s in the other",
                hint="name averages and snapshots by run.follow(tensors), and they move with the owners",
            )

    @property
    def group(self) -> Any:
        """Process group of the mesh."""
        return self.mesh.get_group()

    def index(self, device: torch.device) -> Tensor:
        """The experts owned here, int64 [n]."""
        return torch.as_tensor(self.mine, dtype=torch.int64, device=device)

    def __deepcopy__(self, memo: Any) -> Ownership:
        return self


class ExpertRows(torch.Tensor):
    """See the module docstring; made by :func:`rows_of`."""

    ownership: Ownership

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            return special(func, *args, **kwargs)
        if func in _FACTS or (func in _ELEMENTWISE and _of_the_same(*args, *kwargs.values())):
            with plainly():
                like = args[0] if args else _first(args, kwargs)
                out = func(*args, **kwargs)
                return out if out is like else _tagged(out, like)
        name = getattr(func, "__name__", "")
        if getattr(func, "__module__", "") == dist.all_reduce.__module__:
            raise OptionError(
                f"{name} over rows of sharded experts, which are of other experts on every rank",
                hint="leave out run.parameters(): their gradients are summed over the ranks already",
            )
        if name.startswith(("_foreach_", "_fused_", "_amp_foreach_")):
            return _foreach(func, name, args, kwargs)
        if name in IN_PLACE or name in LIKE:
            return _random(func, name, list(args), dict(kwargs))
        like = _first(args, kwargs)
        args = [_own_part(value, like) for value in args]
        name = plain_name(name)
        wants = asks_for_all(name, args, kwargs, len(_size(like)))
        if wants:
            raise _elsewhere(name, wants, like)
        if any(isinstance(value, DTensor) and not value.dim() for value in args):  # a norm of FSDP2's gradients
            args = [value.full_tensor() if isinstance(value, DTensor) else value for value in args]
        args = with_rows(name, args, _size(like))
        with plainly():
            try:
                out = func(*args, **kwargs)
            except RuntimeError as error:
                if name in RESHAPED:  # to a shape that was reckoned from numel(), which is of all experts
                    raise _elsewhere(name, "to another shape", like) from error
                raise
            if name == "to" and out.is_meta and not like.is_meta:
                raise OptionError(
                    f"weights of {len(like.ownership.mine)} sharded experts would be lost on the meta device",
                    hint="leave out cpu_ram_efficient_loading: every rank loads the model, then fully_shard_experts; "
                    "or shard it on the meta device and load a state dict into it",
                )
            if keeps_experts(name, args, out, like):
                _kept(out, like)
            if name in RESHAPED and type(out) is not ExpertRows:
                raise _elsewhere(name, f"to {list(out.shape)}", like)
            return _tagged(out, like)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertRows:
        if id(self) in memo:
            return memo[id(self)]
        with plainly():
            out = _tagged(self.detach().clone(memory_format=torch.preserve_format), self)
            out.requires_grad_(self.requires_grad)
            grad = self.grad
        if getattr(self, "_is_param", False):
            out._is_param = True
        memo[id(self)] = out
        if grad is not None:
            out.grad = grad.__deepcopy__(memo)
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise refused("pickled")


def refused(what: str) -> OptionError:
    """What is said where a file or another process would get one rank's experts."""
    return OptionError(
        f"rows of sharded experts cannot be {what}: this rank owns a part of the experts",
        hint="poise.train.save_checkpoint, full_state_dict or full_optimizer_state_dict; torch.distributed.checkpoint "
        "with get_state_dict; Hugging Face's Trainer: poise.train.hf.ShardedExpertsMixin",
    )


def rows_of(tensor: Tensor, ownership: Ownership) -> ExpertRows:
    """The tensor [n, ...], as rows of the experts that an ownership gives to this rank."""
    with plainly():
        out: ExpertRows = tensor.as_subclass(ExpertRows)
    out.ownership = ownership
    return out


def plain(tensor: Tensor) -> Tensor:
    """The same numbers as an ordinary tensor outside of any graph."""
    with plainly():
        return tensor.detach()


def _tagged(out: Any, like: ExpertRows) -> Any:
    if type(out) is Tensor:
        here, size = _size(like), out.size()
        if len(size) == len(here) and size[0] == here[0]:
            out.__class__ = ExpertRows  # as_subclass would put a node of its own into the graph
            out.ownership = like.ownership
        return out
    if isinstance(out, (tuple, list)) and not isinstance(out, torch.Size):
        return type(out)(_tagged(one, like) for one in out) if type(out) in (tuple, list) else out
    return out


def _kept(out: Any, like: ExpertRows) -> Any:
    """Of what kept the axis of experts first, whatever axes follow."""
    if type(out) is Tensor and out.dim() and out.size(0) == _size(like)[0]:
        out.__class__, out.ownership = ExpertRows, like.ownership
    elif isinstance(out, tuple):
        for one in out:
            _kept(one, like)
    return out


def _elsewhere(name: str, wants: str, rows: ExpertRows) -> OptionError:
    return OptionError(
        f"{name} {wants} of a weight of {len(rows.ownership.owner_E)} experts, of which this rank has {_size(rows)[0]}",
        hint="sum, mean, var, std, norm, min and max without dim are of all experts; for what else there is: "
        "poise.train.full_state_dict",
    )


def _random(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Random numbers in rows, or like rows: every rank draws for all experts (:mod:`poise.train.draws`)."""
    rows = kwargs.pop("tensor") if "tensor" in kwargs else args.pop(0)
    one, mine = rows.ownership, rows.ownership.mine
    with plainly():
        if name in LIKE:
            return _tagged(draw_like(func, rows, mine, len(one.owner_E), args, kwargs), rows)
        draw(func, rows, mine, len(one.owner_E), one.listed, args, kwargs)
    return rows


def _own_part(value: Any, like: ExpertRows) -> Any:
    """Rows of this rank of a tensor of all experts that stands beside rows, as a mask by expert does."""
    if type(value) is not Tensor or not value.dim():
        return value
    here, experts = _size(like), len(like.ownership.owner_E)
    if value.dim() == len(here) and value.shape[0] == experts != here[0]:
        return value[like.ownership.index(value.device)]
    return value


def _of_the_same(*values: Any) -> bool:
    """Whether these are rows of the same experts and plain numbers, as they are in most of an optimizer's step."""
    ownership = getattr(values[0], "ownership", None)
    return ownership is not None and all(
        value.ownership is ownership if type(value) is ExpertRows else type(value) in (float, int) for value in values
    )


def _size(rows: Tensor) -> torch.Size:
    with plainly():
        return rows.size()


def _first(args: Sequence[Any], kwargs: dict[str, Any]) -> ExpertRows:
    """The first rows among the arguments; all of one layer must be of the same experts."""
    found: list[ExpertRows] = []
    for value in (*args, *kwargs.values()):
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, ExpertRows):
                for before in found:
                    before.ownership.check(one.ownership)
                found.append(one)
    return found[0]


# ---- lists of tensors ---------------------------------------------------------------------------------------------


def _foreach(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation on lists, in which rows, plain tensors and DTensors may stand beside each other."""
    first = list(args[0])
    if name == "_foreach_norm":
        return _norms(first, *args[1:], **kwargs)
    lists = [value for value in (*args, *kwargs.values()) if _one_each(value, len(first))]
    likes: list[ExpertRows | None] = []
    for at in zip(*lists, strict=True):
        likes.append(_first(at, {}) if any(isinstance(one, ExpertRows) for one in at) else None)
    spread = [i for i, one in enumerate(first) if isinstance(one, DTensor)]
    whole = [i for i, one in enumerate(first) if not isinstance(one, DTensor)]
    out: list[Any] | None = None
    for indices in (spread, whole):
        if not indices:
            continue
        given: Any = [_part(value, indices, len(first), first) for value in args]
        named: Any = {key: _part(value, indices, len(first), first) for key, value in kwargs.items()}
        with plainly():
            got = func(*given, **named)
        if isinstance(got, (list, tuple)):
            out = out or [None] * len(first)
            for i, one in zip(indices, got, strict=True):
                like = likes[i]
                out[i] = one if like is None else _tagged(one, like)
    if name == "_amp_foreach_non_finite_check_and_unscale_":
        _agree_on_infinity(args[1], likes)
    return out


def _one_each(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count


def _part(value: Any, indices: list[int], count: int, first: list[Any]) -> Any:
    if _one_each(value, count):
        return [value[i] for i in indices]
    one = first[indices[0]]
    if isinstance(value, Tensor) and isinstance(one, DTensor) and not isinstance(value, DTensor):
        return DTensor.from_local(value, one.device_mesh, [Replicate()] * one.device_mesh.ndim, run_check=False)
    return value


def _agree_on_infinity(found: Tensor, likes: Iterable[ExpertRows | None]) -> None:
    """Every rank skips a step in which any rank's experts have overflowed."""
    for ownership in _ownerships(likes):
        seen = found.to(ownership.mesh.device_type)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=ownership.group)
        found.copy_(seen)


def _ownerships(rows: Iterable[ExpertRows | None]) -> list[Ownership]:
    """One of each process group, in the order they come."""
    seen: dict[int, Ownership] = {}
    for one in rows:
        if one is not None:
            seen.setdefault(id(one.ownership.group), one.ownership)
    return list(seen.values())


# ---- of all experts -----------------------------------------------------------------------------------------------


def _over_ranks(local_X: Tensor, ownership: Ownership, op: Any) -> Tensor:
    """A reduction over the ranks of a few numbers, float64; its gradient goes to this rank's, as in the whole model."""
    local_X = local_X.double()
    here = local_X.detach().to(ownership.mesh.device_type, copy=True)
    dist.all_reduce(here, op=op, group=ownership.group)
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
        if stepping and rows.ownership.listed:
            raise OptionError(
                f"{stepping[0]} scales by the norm of a weight, and {len(rows.ownership.owner_E)} experts of a list "
                "are one weight here",
                hint="take an optimizer that works element by element, or stack the experts of the model: [E, ...]",
            )
        return _norms([rows], order, dtype)[0]
    return _by_axis(func, rows, dim, lambda: func(rows, order, dim, keepdim, dtype=dtype))


def _reduction(op: Any, empty: float) -> Callable[..., Any]:
    def reduce(func: Any, rows: Any, dim: Any = None, *args: Any, axis: Any = None, **kwargs: Any) -> Any:
        dim = axis if dim is None else dim
        if isinstance(dim, Tensor):  # torch.max(a, b)
            with plainly():
                return _tagged(func(rows, dim, *args, **kwargs), _first((rows, dim), {}))
        if dim is None and not kwargs.get("keepdim"):
            with plainly():
                one = func(rows, **kwargs) if len(rows) else func(rows.new_full((1,), empty), **kwargs)
            return _over_ranks(one.reshape(1), rows.ownership, op)[0].to(one.dtype)
        return _by_axis(func, rows, dim, lambda: func(rows, dim, *args, **kwargs))

    return reduce


def _mean(func: Any, rows: Any, dim: Any = None, *args: Any, axis: Any = None, **kwargs: Any) -> Any:
    dim = axis if dim is None else dim
    if dim is None and not kwargs.get("keepdim"):
        return torch.sum(rows, **kwargs) / rows.numel()
    return _by_axis(func, rows, dim, lambda: func(rows, dim, *args, **kwargs))


def _spread(root: bool) -> Callable[..., Any]:
    def spread(
        func: Any, rows: Any, dim: Any = None, unbiased: bool = True, *args: Any, correction: Any = None, **kwargs: Any
    ) -> Any:
        if isinstance(dim, bool):  # var(unbiased), which names no axis
            dim, unbiased = None, dim
        less = unbiased if correction is None else correction
        if dim is None and not kwargs.get("keepdim"):
            variance = torch.sum((rows - torch.mean(rows)).square()) / (rows.numel() - less)
            return variance.sqrt() if root else variance
        return _by_axis(func, rows, dim, lambda: func(rows, dim, *args, correction=less, **kwargs))

    return spread


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
    with plainly():
        return _kept(run(), rows)


def _numel(func: Any, rows: ExpertRows) -> int:
    return len(rows.ownership.owner_E) * math.prod(_size(rows)[1:])


def _axes(func: Any, rows: ExpertRows) -> int:
    return len(_size(rows)) - rows.ownership.listed


def _grad(func: Any, rows: ExpertRows, *_: Any) -> Any:
    """The gradient as rows, also where a plain tensor was set."""
    with plainly():
        grad = rows.grad
        if type(grad) is Tensor:
            rows.grad = grad = rows_of(grad, rows.ownership)
    return grad


def _copy(func: Any, into: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Any:
    """From rows of the same experts, or from the tensor of all experts."""
    source = getattr(source, "rows", source)  # of a state dict
    like = _first((into, source), {})
    if into is like:
        source = _own_part(source, like)
    with plainly():
        return _tagged(func(into, source, *args, **kwargs), like)


stepping: list[str] = []
"""The optimizer that makes a step now (:mod:`poise.train.states`)."""
_T = torch.Tensor
_SPECIAL: dict[Any, Callable[..., Any]] = {
    _T.grad.__get__: _grad, _T.copy_: _copy, _T.numel: _numel, _T.nelement: _numel, torch.numel: _numel,
    _T.dim: _axes, _T.ndim.__get__: _axes, _T.ndimension: _axes,
    torch.linalg.vector_norm: _norm, torch.norm: _norm, _T.norm: _norm,
    torch.mean: _mean, _T.mean: _mean, torch.var: _spread(False), _T.var: _spread(False), torch.std: _spread(True),
    _T.std: _spread(True),
}  # fmt: skip
_FACTS = {
    getattr(_T, name).__get__
    for name in ("requires_grad", "dtype", "device", "layout", "is_sparse", "_backward_hooks", "is_leaf",
                 "_post_accumulate_grad_hooks", "_version")
} | {torch.is_complex, torch.is_floating_point, _T.is_complex, _T.is_floating_point}  # fmt: skip
"""What is asked of the tensor alone, and is no tensor."""
_ELEMENTWISE = {
    getattr(_T, name)
    for name in ("add_", "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "lerp_", "sqrt", "add", "sub", "mul", "div",
                 "__add__", "__sub__", "__mul__", "__truediv__")
} | {torch.sqrt, torch.add, torch.sub, torch.mul, torch.div}  # fmt: skip
"""Of an optimizer's step, many times a weight: they are spared the search for DTensors and tensors of all experts."""
for _op, _empty, _names in (
    (dist.ReduceOp.SUM, 0, ("sum",)), (dist.ReduceOp.MAX, 0, ("any",)), (dist.ReduceOp.MIN, 1, ("all",)),
    (dist.ReduceOp.MAX, -math.inf, ("max", "amax")), (dist.ReduceOp.MIN, math.inf, ("min", "amin")),
):  # fmt: skip
    for _name in _names:
        _SPECIAL[getattr(torch, _name)] = _SPECIAL[getattr(_T, _name)] = _reduction(_op, _empty)
