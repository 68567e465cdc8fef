"""The rows of an expert weight that one rank owns, as a tensor that knows which experts they are.

Weights, gradients and optimizer states of sharded experts are :class:`ExpertRows`, and so is what elementwise
operations make of them: an average kept by hand, a snapshot, a mask. So stock code is right, or refused:

- Norms, sums, extrema and ``numel`` are those of all experts on all ranks, as DTensor answers them: collective. So
  ``torch.nn.utils.clip_grad_norm_``, ``GradScaler`` and optimizers that scale by a tensor's norm do what they do to the
  unsharded weight (:mod:`poise.train.totals`). ``shape`` is that of the rows here; ``dim()`` and ``size(axis)`` of a
  list of experts are those of one expert.
- Operations after which the axis of experts provably is first give rows again; others are refused, on every rank alike
  (:mod:`poise.train.wholes`). Indices, slices and iteration give plain tensors of this rank's experts.
- Rows of one layer from before and after its owners moved do not mix: :class:`~poise.util.errors.ModelError` on all
  ranks.
- Random numbers are drawn for all experts (:mod:`poise.train.draws`), so that ranks with one seed differ.
- They cannot be pickled: a file would hold one rank's experts.

What is allowed is done by PyTorch on plain tensors, without a dispatch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from poise.runtime.collectives import reduce_over
from poise.train.draws import IN_PLACE, LIKE, draw, draw_like
from poise.train.ownership import Ownership
from poise.train.wholes import SHAPED, Fate, fate, from_the_start, plain_name, shape_of, squeezed
from poise.util.errors import OptionError

plainly = torch._C.DisableTorchFunctionSubclass
"""Within it, rows are tensors like any other."""


class GradientMark:
    """What was done to one gradient since it is watched (:mod:`poise.train.marks`): taken away, or made zeros."""

    __slots__ = ("gone", "zeroed")

    def __init__(self) -> None:
        self.gone, self.zeroed = False, False


class ExpertRows(torch.Tensor):
    """See the module docstring; made by :func:`rows_of`."""

    ownership: Ownership
    gradient_mark: GradientMark | None = None  # of a weight whose gradient is watched
    zero_mark: GradientMark | None = None  # of that gradient

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
        name, module = getattr(func, "__name__", ""), getattr(func, "__module__", "") or ""
        if module == dist.all_reduce.__module__:
            return _between_ranks(func, name, args, kwargs)
        if name.startswith(("_foreach_", "_fused_", "_amp_foreach_")):
            return _foreach(func, name, args, kwargs)
        if name in IN_PLACE or name in LIKE:
            return _random(func, name, list(args), dict(kwargs))
        like = _first(args, kwargs)
        args = [_own_part(value, like) for value in args]
        if any(isinstance(value, DTensor) and not value.dim() for value in args):  # a norm of FSDP2's gradients
            args = [value.full_tensor() if isinstance(value, DTensor) else value for value in args]
        if module.startswith("torch.autograd"):
            with plainly():
                return _tagged(func(*args, **kwargs), like)
        return _as_said(func, plain_name(func), args, kwargs, like)

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


class StackedRows(torch.Tensor):
    """Snapshots of one weight, [k, n, ...]: rows with one axis before that of experts, to be reduced to rows."""

    ownership: Ownership

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, plain_name(func)
        every = [one for one in _flat((*args, *kwargs.values())) if isinstance(one, StackedRows)]
        for one in every[1:]:
            every[0].ownership.check(one.ownership)
        dims = [kwargs[key] for key in ("dim", "axis") if key in kwargs] or list(args[1:2])
        fact = getattr(func, "__name__", "") in ("__get__", "__set__") and name not in TENSORS_OF_TENSORS
        if fact or name in STACK_FACTS:
            with plainly():
                return func(*args, **kwargs)
        over = name in OVER_A_STACK and dims[:1] in ([0], [(0,)], [[0]]) and not kwargs.get("keepdim") and not args[2:]
        taken = name == "__getitem__" and isinstance(args[1], int)
        joins = name in ("cat", "concat", "concatenate") and dims in ([], [0]) and len(every) == len(args[0])
        with plainly():
            if not (over or taken or joins):
                raise _elsewhere(name, "of several snapshots", rows_of(every[0].detach()[0], every[0].ownership))
            out = func(*args, **kwargs)
            for one in out if isinstance(out, tuple) else (out,):
                if type(one) is Tensor:
                    one.__class__, one.ownership = StackedRows if joins else ExpertRows, every[0].ownership
            return out


def refused(what: str) -> OptionError:
    """What is said where a file or another process would get one rank's experts."""
    return OptionError(
        f"rows of sharded experts cannot be {what}: this rank owns a part of the experts",
        hint="poise.train.save_checkpoint, full_state_dict or full_optimizer_state_dict; torch.distributed.checkpoint "
        "with get_state_dict; Hugging Face's Trainer: poise.train.hf.ShardedExpertsMixin; "
        "of this rank alone: poise.train.local_rows",
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


def _as_said(func: Any, name: str, args: list[Any], kwargs: dict[str, Any], like: ExpertRows) -> Any:
    """Run an operation, if the rule knows what becomes of its experts (:mod:`poise.train.wholes`)."""
    experts, here = len(like.ownership.owner_E), _size(like)
    sizes = {id(one): _size(one) for one in _flat((*args, *kwargs.values())) if isinstance(one, ExpertRows)}
    asked = getattr(func, "__name__", "")
    is_fact = asked in ("__set__", "__delete__") or (asked == "__get__" and name not in TENSORS_OF_TENSORS)
    with plainly():
        what = fate(name, is_fact, args, kwargs, sizes, experts)
        if isinstance(what, str):
            raise _elsewhere(name, what, like)
        if like.ownership.listed and what is Fate.ROWS and from_the_start(name, args, kwargs):
            raise counted_from_the_start(name, like)
        if name == "squeeze":
            args, kwargs = [args[0], squeezed(args, kwargs, here)], {}
        shape = (
            None
            if what is not Fate.ROWS or name not in SHAPED or args[0] is not like
            else shape_of(name, args, kwargs, here, experts)
        )
        if shape is not None and not isinstance(args[1:2] and args[1], torch.dtype):
            shaped = Tensor.expand if name in EXPANDED else Tensor.view if name.startswith("view") else Tensor.reshape
            out = shaped(args[0], shape)
        else:
            out = func(*args, **kwargs)
        if name == "to" and out.is_meta and not like.is_meta:
            raise OptionError(
                f"weights of {len(like.ownership.mine)} sharded experts would be lost on the meta device",
                hint="leave out cpu_ram_efficient_loading: every rank loads the model, then fully_shard_experts; "
                "or shard it on the meta device and load a state dict into it",
            )
        if what is Fate.STACKED:
            out.__class__, out.ownership = StackedRows, like.ownership
            return out
        return _kept(out, like, name) if what is Fate.ROWS else _of_the_shape(out, name, like)


def _of_the_shape(out: Any, name: str, like: ExpertRows) -> Any:
    """``new_empty`` and its like make rows of the shape of rows."""
    return _tagged(out, like) if name.startswith("new_") else out


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _kept(out: Any, like: ExpertRows, name: str) -> Any:
    """Of what kept the axis of experts first, whatever axes follow."""
    if type(out) is Tensor:
        if not out.dim() or out.size(0) != _size(like)[0]:
            raise _elsewhere(name, f"to {list(out.shape)}", like)
        out.__class__, out.ownership = ExpertRows, like.ownership
        if like.zero_mark is not None and name in SAME_NUMBERS:
            out.zero_mark = like.zero_mark
    elif isinstance(out, (tuple, list)):
        for one in out:
            _kept(one, like, name)
    return out


def _elsewhere(name: str, wants: str, rows: ExpertRows) -> OptionError:
    return OptionError(
        f"{name} {wants} of a weight of {len(rows.ownership.owner_E)} experts, of which this rank has {_size(rows)[0]}",
        hint="sum, mean, var, std, norm, min and max without dim are of all experts; this rank's numbers: "
        "poise.train.local_rows(weight), in hooks too; those of all experts: poise.train.full_state_dict",
    )


def counted_from_the_start(name: str, rows: ExpertRows) -> OptionError:
    """What is said of axes of a list's weight: ``dim()`` is that of one expert, and ``shape`` has one axis more."""
    return OptionError(
        f"{name} along an axis that is counted from the first one, of a weight of {len(rows.ownership.owner_E)} "
        "experts of a list: of one expert's axes, or of the rows'?",
        hint="count axes from the last one (dim=-1); this rank's numbers: poise.train.local_rows(weight)",
    )


def _between_ranks(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """A collective over rows: one number an expert may be gathered; all else would mix experts."""
    like = _first(args, kwargs)
    if name not in ("all_gather", "gather") or len(_size(like)) > 1:
        raise OptionError(
            f"{name} over rows of sharded experts, which are of other experts on every rank",
            hint="leave out run.parameters(): their gradients are summed over the ranks already; to send this rank's "
            "numbers: poise.train.local_rows",
        )
    bare = [plain(value) if isinstance(value, ExpertRows) else value for value in args]
    named = {key: plain(value) if isinstance(value, ExpertRows) else value for key, value in kwargs.items()}
    return func(*bare, **named)


def _random(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Random numbers in rows, or like rows: every rank draws for all experts (:mod:`poise.train.draws`)."""
    rows = kwargs.pop("tensor") if "tensor" in kwargs else args.pop(0)
    if not isinstance(rows, ExpertRows):
        raise _elsewhere(name, "into other numbers, with the chances", _first(args, kwargs))
    one, mine = rows.ownership, rows.ownership.mine
    with plainly():
        if name in LIKE:
            return _tagged(draw_like(func, rows, mine, len(one.owner_E), args, kwargs), rows)
        draw(func, rows, mine, len(one.owner_E), one.listed, args, kwargs)
    return rows


def _own_part(value: Any, like: ExpertRows) -> Any:
    """Rows of this rank of a tensor of all experts that stands beside rows, as a mask by expert does."""
    if type(value) not in (Tensor, torch.nn.Parameter) or not value.dim():
        return value
    here, experts = _size(like), len(like.ownership.owner_E)
    if value.dim() == len(here) and value.shape[0] == experts != here[0]:
        return value[like.ownership.index(value.device)]
    return value


def _of_the_same(*values: Any) -> bool:
    """Whether these are rows of the same experts and plain numbers, as they are in most of an optimizer's step."""
    ownership = getattr(values[0], "ownership", None)
    others = [value for value in values[1:] if type(value) is not float and type(value) is not int]
    if ownership is None or any(type(one) is not ExpertRows or one.ownership is not ownership for one in others):
        return False
    with plainly():
        axes = values[0].dim()
        return all(one.dim() == axes for one in others)


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
    lists = [value for value in (*args, *kwargs.values()) if _one_each(value, len(first))]
    likes: list[ExpertRows | None] = []
    for at in zip(*lists, strict=True):
        likes.append(_first(at, {}) if any(isinstance(one, ExpertRows) for one in at) else None)
    args = [args[0], *(_own_parts(value, likes) for value in args[1:])]
    kwargs = {key: _own_parts(value, likes) for key, value in kwargs.items()}
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


def _own_parts(value: Any, likes: Sequence[ExpertRows | None]) -> Any:
    """A list beside a list of rows: rows of this rank of those that are of all experts."""
    if not _one_each(value, len(likes)):
        return value
    return [one if like is None else _own_part(one, like) for one, like in zip(value, likes, strict=True)]


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
        reduce_over(seen, dist.ReduceOp.MAX, ownership.group)
        found.copy_(seen)


def _ownerships(rows: Iterable[ExpertRows | None]) -> list[Ownership]:
    """One of each process group, in the order they come."""
    seen: dict[int, Ownership] = {}
    for one in rows:
        if one is not None:
            seen.setdefault(id(one.ownership.group), one.ownership)
    return list(seen.values())


TENSORS_OF_TENSORS = frozenset({"data", "grad", "real", "imag", "T", "H", "mT", "mH"})
"""Properties that are tensors."""
SAME_NUMBERS = frozenset({"data", "detach"})
"""Of the same memory, whole."""
STACK_FACTS = frozenset({"size", "dim", "stride", "__repr__", "__len__", "requires_grad", "is_floating_point"})
OVER_A_STACK = frozenset({"sum", "mean", "amax", "amin", "max", "min", "median", "std", "var", "norm", "prod", "any",
                          "all", "logsumexp", "squeeze", "select"})  # fmt: skip
EXPANDED = frozenset({"expand", "expand_as", "broadcast_to"})
stepping: list[str] = []
"""The optimizer that makes a step now (:mod:`poise.train.states`)."""
_T = torch.Tensor
_SPECIAL: dict[Any, Callable[..., Any]] = {}
"""What is not run as PyTorch runs it (:mod:`poise.train.totals`, :mod:`poise.train.marks`)."""
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
