"""What becomes of the axis of experts in an operation on rows of an expert weight.

One rule: said by name from the axes that are given and the shape of the whole weight [E, ...], never from how many
experts are here, so that every rank gives the same answer. An operation keeps rows where the axis of experts provably
stays first: number by number (PyTorch's own tag, and names it has not tagged), or along, or over other axes. Indices,
iteration and facts are documented to be those of this rank. All else is refused, names that nobody has thought of too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from poise.train.draws import ExpertCount


class Fate(Enum):
    """What comes out of an operation on rows."""

    ROWS = "rows"
    MINE = "this rank's numbers or facts, as documented"
    STACKED = "rows with an axis before them"


REFUSED_THOUGH_TAGGED = frozenset({"equal", "max", "min", "rrelu", "where", "mvlgamma"})
NUMBER_BY_NUMBER = frozenset(
    "absolute alias_copy and arccos arccosh arcsin arcsinh arctan arctan2 arctanh bfloat16 bool byte"
    " cdouble cfloat chalf char clone conj contiguous cpu cuda data detach divide double empty_like fill fix"
    " float floor_divide floordiv full_like greater greater_equal half imag int invert isclose isreal less"
    " less_equal log_sigmoid logsigmoid long lshift masked_fill mod mtia multiply negative not_equal ones_like"
    " or pin_memory real requires_grad resolve_conj resolve_neg retain_grad rshift share_memory short softsign"
    " special_erf special_expit special_gammaln subtract tanhshrink to truediv type type_as xor xpu zero"
    " zeros_like".split()
)
"""Beside those that PyTorch tags as pointwise."""
LOSSES = frozenset({"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "binary_cross_entropy",
                    "binary_cross_entropy_with_logits", "soft_margin_loss", "poisson_nll_loss"})  # fmt: skip
"""Number by number, if they are not reduced."""
ALONG = frozenset(
    "aminmax argmax argmin argsort cosine_similarity count_nonzero cross cummax cummin cumprod cumsum diagonal"
    " diff flip gather glu index_add index_copy index_fill kthvalue log_softmax logcumsumexp logsumexp"
    " matrix_norm median mode moveaxis movedim nanmean nanmedian nanquantile nansum normalize prod quantile"
    " repeat_interleave roll scatter scatter_add scatter_reduce softmax softmin sort std_mean swapaxes swapdims"
    " take_along_dim topk transpose unfold var_mean vecdot".split()
)
"""Along, over or between the axes that they name."""
TAKEN = frozenset({"select", "unbind", "narrow", "split", "chunk", "tensor_split", "index_select"})
"""Experts of this rank where they name the axis of experts, as an index does."""
SEVERAL = frozenset({"transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "flip"})
"""They name axes one after another."""
AFTER_ONE = frozenset({"quantile", "nanquantile", "topk", "kthvalue", "roll", "diff", "normalize", "cosine_similarity",
                       "split", "chunk", "tensor_split", "matrix_norm", "repeat_interleave", "vecdot", "cross",
                       "take_along_dim"})  # fmt: skip
"""They take something else before the axis."""
DEFAULT: dict[str, tuple[int, ...]] = {
    "normalize": (1,), "cosine_similarity": (1,), "kthvalue": (-1,), "mode": (-1,), "sort": (-1,), "argsort": (-1,),
    "topk": (-1,), "diff": (-1,), "matrix_norm": (-2, -1), "vecdot": (-1,), "glu": (-1,), "unbind": (0,), "split": (0,),
    "chunk": (0,), "tensor_split": (0,), "linalg_diagonal": (-2, -1), "diagonal": (0, 1),
}  # fmt: skip
"""Axes where none is given; of all numbers, or refused, for names that are not here."""
MATRICES = frozenset(
    "adjoint cholesky cholesky_ex cond det eig eigh eigvals eigvalsh inv inv_ex inverse logdet lu lu_factor mH"
    " mT matrix_exp matrix_power matrix_rank pinv pinverse qr slogdet solve solve_ex solve_triangular svd"
    " svdvals tril triu".split()
)
"""Of the last two axes."""
PRODUCTS = frozenset({"matmul", "rmatmul", "bmm"})
SHAPED = frozenset({"view", "reshape", "view_as", "reshape_as", "flatten", "ravel", "expand", "expand_as",
                    "broadcast_to"})  # fmt: skip
FACTS = frozenset(
    "__array__ __array_wrap__ __dir__ __dlpack__ __dlpack_device__ __format__ __hash__ __iter__ __len__"
    " __repr__ __setitem__ __setstate__ __str__ _has_compatible_shallow_copy_type as_subclass backward can_cast"
    " const_data_ptr data_ptr dim_order element_size get_device grad_fn has_names module_load new new_empty"
    " new_empty_strided new_full new_ones new_tensor new_zeros numpy record_stream register_hook"
    " register_post_accumulate_grad_hook result_type set size sizes storage storage_offset storage_type stride"
    " tolist untyped_storage".split()
)
"""Asked of this rank's rows, or done to them."""
DIMS = ("dim", "axis", "dims", "dim0", "dim1", "dim2", "axis0", "axis1", "source", "destination")


def plain_name(func: Any) -> str:
    """A name for the function, the method in place, the operator and the property alike."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    if name in FACTS or name in ("__set__", "__delete__", "__getitem__"):
        return name
    if name.startswith("__"):
        bare = name.strip("_")
        for cut in (bare, bare[1:]):
            if cut in OPERATORS:
                return cut
        return name
    return name.removeprefix("linalg_").rstrip("_") if name != "linalg_diagonal" else name


OPERATORS = frozenset(
    "abs add and div eq floordiv ge gt invert le lshift lt matmul mod mul ne neg or pos pow rshift sub truediv"
    " xor".split()
)


@cache
def number_by_number(name: str) -> bool:
    """Whether every number of the result comes of numbers in the same place."""
    if name in NUMBER_BY_NUMBER or name in OPERATORS - {"matmul"}:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if name in REFUSED_THOUGH_TAGGED or packet is None or name.startswith("__"):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def fate(
    name: str,
    is_fact: bool,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    sizes: Mapping[int, Sequence[int]],
    experts: int,
) -> Fate | str:
    """What comes out, or what the operation wants of experts on other ranks.

    Parameters
    ----------
    name : of :func:`plain_name`. is_fact : a property that is no tensor, or the setting of one.
    sizes : of every rows among the arguments, by ``id``; their first axis is that of experts.
    experts : E.
    """
    shapes = list(sizes.values())
    size = shapes[0]
    axes, first = len(size), args[0] if args else None
    leads = id(first) in sizes
    if is_fact or name in FACTS or name.startswith("is_"):
        return "of all numbers" if name == "is_nonzero" else Fate.MINE
    if name.startswith("_") and not name.startswith("__") and not hasattr(torch.ops.aten, name):  # of PyTorch's own
        return Fate.MINE
    if name in ("to", "type_as"):  # the other has a type and a device alone
        return Fate.ROWS if leads else Fate.MINE
    if number_by_number(name) or (name == "where" and len(args) + len(kwargs) == 3) or _unreduced(name, kwargs):
        return _aligned(args, kwargs, sizes, experts) or Fate.ROWS
    if name in ("cat", "concat", "concatenate", "stack"):
        return _joined(name, args, kwargs, sizes, axes)
    if name in ("einsum",):
        return _einsum(args, sizes)
    if name in PRODUCTS:
        return _product(args, sizes)
    if name in ("baddbmm", "addmm"):
        return Fate.ROWS if name == "baddbmm" and not _aligned(args, kwargs, sizes, experts) else "along experts"
    if not leads:
        shaped_like = (
            name in ("view_as", "reshape_as") and isinstance(first, Tensor) and first.numel() == math.prod(size)
        )
        return Fate.ROWS if shaped_like else "into other numbers"
    if name == "__getitem__":
        return _index(args[1], axes)
    dims = _dims(name, args, kwargs)
    if name in ALONG or name in TAKEN or name == "linalg_diagonal":
        if dims is None:
            return "of all numbers"
        if any(dim % axes == 0 for dim in dims):
            return Fate.MINE if name in TAKEN else "along the axis of experts"
        return Fate.ROWS
    if name in MATRICES:
        return Fate.ROWS if axes > 2 else "along the axis of experts"
    if name == "permute":
        return Fate.ROWS if dims and dims[0] % axes == 0 else "with the axis of experts elsewhere"
    if name in ("layer_norm", "rms_norm"):
        return Fate.ROWS if len(args) > 1 and len(args[1]) < axes else "of all numbers"
    if name == "unsqueeze":
        return Fate.STACKED if dims and dims[0] % (axes + 1) == 0 else Fate.ROWS
    if name == "squeeze":
        return (
            "without the axis of experts" if experts == 1 and (not dims or 0 in [d % axes for d in dims]) else Fate.ROWS
        )
    if name in ("unflatten", "T", "H", "t"):
        moved = axes > 1 if name != "unflatten" else not dims or dims[0] % axes == 0
        return "with the axis of experts elsewhere" if moved else Fate.ROWS
    if name in ("repeat", "tile"):
        times = tuple(_flat(args[1:]))
        keeps = times[0] == 1 if len(times) == axes else name == "tile" and len(times) < axes
        return Fate.ROWS if keeps else "along the axis of experts"
    if name in SHAPED:
        return Fate.ROWS if shape_of(name, args, kwargs, size, experts) is not None else "to another shape"
    return "of numbers that may be other ranks'"


def from_the_start(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation along axes names one that is counted from the first."""
    if name not in ALONG:
        return False
    return any(dim >= 0 for dim in _dims(name, args, kwargs) or ())


def shape_of(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], size: Sequence[int], experts: int
) -> tuple[int, ...] | None:
    """The shape [n, ...] that rows of ``size`` get, if the axis of experts stays as it is; else None."""
    here, rest, axes = size[0], math.prod(size[1:]), len(size)
    if name in ("flatten", "ravel"):
        at = [*args[1:], kwargs.get("start_dim", 0), -1][0] if name == "flatten" else 0
        to = args[2] if len(args) > 2 else kwargs.get("end_dim", -1)
        at, to = at % axes, to % axes if name == "flatten" else axes - 1
        joined = math.prod(size[at : to + 1])
        return None if at == 0 and math.prod(size[1 : to + 1]) != 1 else (*size[:at], joined, *size[to + 1 :])
    given = args[1:] or [kwargs[key] for key in ("shape", "size", "other") if key in kwargs]
    if given and isinstance(given[0], torch.dtype):
        return tuple(size) if axes > 1 else None
    target = tuple(given[0].shape) if given and isinstance(given[0], Tensor) else tuple(_flat(given))
    if not target:
        return None
    first, others = target[0], target[1:]
    if name in ("expand", "expand_as", "broadcast_to"):
        return (here, *others) if len(target) == axes and first in (-1, here, experts) else None
    if first == -1:
        return (here, *others) if -1 not in others and math.prod(others) == rest else None
    if first not in (here, experts):
        return None
    known = math.prod(one for one in others if one != -1)
    if -1 in others:
        others = tuple(rest // known if one == -1 and known else one for one in others)
    return (here, *others) if math.prod(others) == rest else None


def squeezed(args: Sequence[Any], kwargs: Mapping[str, Any], size: Sequence[int]) -> tuple[int, ...]:
    """Axes of one number that go, the axis of experts never."""
    dims = _dims("squeeze", args, kwargs) or tuple(range(len(size)))
    return tuple(dim % len(size) for dim in dims if dim % len(size) and size[dim] == 1)


def _unreduced(name: str, kwargs: Mapping[str, Any]) -> bool:
    return name in LOSSES and kwargs.get("reduction", "mean") == "none"


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from value
        else:
            yield value


def _aligned(args: Sequence[Any], kwargs: Mapping[str, Any], sizes: Mapping[int, Sequence[int]], experts: int) -> str:
    """What is wrong where tensors stand beside rows whose axis of experts they have elsewhere, or longer."""
    axes, here = max((len(size), size[0]) for size in sizes.values())
    for value in (*args, *kwargs.values()):
        if isinstance(value, ExpertCount):
            return "by size(0), which counts the experts of this rank alone,"
        if not isinstance(value, Tensor):
            continue
        size = sizes.get(id(value))
        if size is not None:
            if len(size) != axes:
                return f"beside rows of {axes} axes, with {len(size)},"
        elif type(value) is Tensor and (len(value.shape) > axes or (
            len(value.shape) == axes and value.shape[0] not in (1, here, experts))):  # fmt: skip
            return f"beside a tensor of shape {list(value.shape)}"
    return ""


def _joined(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], sizes: Mapping[int, Sequence[int]], axes: int
) -> Fate | str:
    parts = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if any(id(one) not in sizes or len(sizes[id(one)]) != axes for one in parts):
        return "beside other numbers"
    if name == "stack" and dim % (axes + 1) == 0:
        return Fate.STACKED
    return Fate.ROWS if name == "stack" or dim % axes else "along the axis of experts"


def _product(args: Sequence[Any], sizes: Mapping[int, Sequence[int]]) -> Fate | str:
    """Matrix products: the axis of experts is one of matrices in a stack, or of the rows of the first factor."""
    left, right = args[0], args[1]
    a, b = (len(sizes[id(one)]) if id(one) in sizes else len(one.shape) for one in (left, right))
    if id(left) in sizes and id(right) in sizes:
        return Fate.ROWS if a == b > 2 else "along the axis of experts"
    axes, other = (a, b) if id(left) in sizes else (b, a)
    if axes == 2 and id(left) in sizes:
        return Fate.ROWS if other < 3 else "beside a stack of matrices"
    if axes < 3 or other > axes:
        return "along the axis of experts"
    factor, rows = (right, left) if id(left) in sizes else (left, right)
    stacked = other == axes and factor.shape[0] not in (1, sizes[id(rows)][0])
    return "beside another stack of matrices" if stacked else Fate.ROWS


def _einsum(args: Sequence[Any], sizes: Mapping[int, Sequence[int]]) -> Fate | str:
    if not isinstance(args[0], str):
        return "along the axis of experts"
    inputs, _, out = args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    operands = list(_flat(args[1:]))
    heads = {term[:1] for term, value in zip(terms, operands, strict=False) if id(value) in sizes}
    letter = heads.pop() if len(heads) == 1 else ""
    keeps = letter.isalpha() and out[:1] == letter and out.count(letter) == 1
    once = all(term.count(letter) <= 1 for term in terms) if letter else False
    return Fate.ROWS if keeps and once else "along the axis of experts"


def _index(index: Any, axes: int) -> Fate | str:
    every = index if isinstance(index, tuple) else (index,)
    if index is None:
        return Fate.STACKED
    if isinstance(index, Tensor) and len(index.shape) > 1:
        return "of numbers that a mask or indices choose"
    if not every or every[0] is None:
        return "with the axis of experts elsewhere"
    first, used = every[0], sum(one is not None and one is not Ellipsis for one in every)
    whole = isinstance(first, slice) and first in (slice(None), slice(0, None), slice(None, None, 1))
    if not whole and (first is not Ellipsis or used >= axes):
        return Fate.MINE
    at = [i for i, one in enumerate(every) if isinstance(one, (int, list, Tensor))]
    chosen = any(isinstance(every[i], (list, Tensor)) for i in at)
    apart = chosen and at[-1] - at[0] >= len(at)  # PyTorch puts what they choose first
    return "with the axis of experts elsewhere" if apart else Fate.ROWS


def _dims(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Axes that a call names, after the tensors and numbers before them."""
    found = [kwargs[key] for key in DIMS if kwargs.get(key) is not None]
    if name in ("diagonal", "linalg_diagonal"):
        first, second = (args[2], args[3]) if len(args) > 3 else DEFAULT[name]
        return kwargs.get("dim1", first), kwargs.get("dim2", second)
    if not found:
        at = 2 if name in AFTER_ONE else 1
        rest = args[at:] if name in SEVERAL | {"permute", "squeeze"} else args[at : at + 1]
        found = [value for value in rest if isinstance(value, (int, tuple, list)) and not isinstance(value, bool)]
    dims = tuple(_flat(found))
    return dims or DEFAULT.get(name)
