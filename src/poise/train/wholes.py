"""Which operations on rows of an expert weight ask for experts that other ranks have.

Said by name, from what an operation is given: it looks along the axis of experts, at all numbers at once, or gives that
axis up, so that what comes after it would do so without knowing. Operations not named here work number by number, or
on rows as rows (indices, iteration, ``shape``), which are documented to be those of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

ALL_NUMBERS = frozenset({
    "median", "nanmedian", "quantile", "nanquantile", "prod", "argmax", "argmin", "logsumexp", "nanmean", "nansum",
    "aminmax", "kthvalue", "mode", "std_mean", "var_mean", "cosine_similarity", "count_nonzero",
})  # fmt: skip
"""Of all numbers, unless they get an axis."""
WITHOUT_AXIS = frozenset({"histc", "unique", "unique_consecutive", "dist", "masked_select", "take"})
LOSSES = frozenset({"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "binary_cross_entropy"})
"""Of all numbers, unless they are not reduced."""
ALONG = frozenset({
    "cumsum", "cumsum_", "cumprod", "cumprod_", "logcumsumexp", "cummax", "cummin", "softmax", "log_softmax", "sort",
    "argsort", "topk", "diff", "flip", "roll", "normalize",
})  # fmt: skip
"""Along an axis; the last one, or each that is given."""
SWAPPED = frozenset({"transpose", "transpose_", "swapaxes", "swapdims"})
SEVERAL = SWAPPED | {"permute", "flip"}
"""They name axes one after another."""
AFTER_ONE = frozenset({
    "quantile", "nanquantile", "topk", "kthvalue", "roll", "diff", "normalize", "cosine_similarity",
})  # fmt: skip
"""They take something else before the axis."""
DEFAULT = {"normalize": 1, "cosine_similarity": 1, "kthvalue": -1, "mode": -1}
"""Axes that are not the last, or not none, where none is given."""
RESHAPED = frozenset({
    "view", "reshape", "flatten", "ravel", "view_as", "reshape_as", "unflatten", "unsqueeze", "squeeze", "einsum",
    "tensordot", "dot", "vdot", "inner",
})  # fmt: skip
"""What comes out has the axis of experts first, or has given it up."""
SAME_NUMBERS = RESHAPED - {"einsum", "tensordot", "dot", "vdot", "inner"}
"""What comes out has the same bytes in another shape."""
KEPT = ALL_NUMBERS | ALONG | RESHAPED | {"matrix_norm", "svdvals", "std", "var", "select", "det", "logdet", "slogdet"}
"""Operations after which a first axis as long as before is that of experts, however many follow."""
DIMS = ("dim", "axis", "dims", "dim0", "dim1")


def plain_name(name: str) -> str:
    """Of functions of :mod:`torch.linalg` what they are called there."""
    return name.removeprefix("linalg_")


def asks_for_all(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], axes: int) -> str:
    """What an operation of that name, on rows of ``axes`` axes, wants of experts on other ranks, or ``""``."""
    dims = _dims(name, args, kwargs)
    if name in WITHOUT_AXIS or (name in ALL_NUMBERS and dims is None):
        return "of all numbers"
    if name in LOSSES and kwargs.get("reduction", "mean") != "none":
        return "reduced over all numbers"
    if name in ALL_NUMBERS | ALONG and any(dim % axes == 0 for dim in dims or (-1,)):
        return "along the axis of experts"
    if name in SWAPPED and any(dim % axes == 0 for dim in dims or ()):
        return "with the axis of experts elsewhere"
    if name == "permute" and dims and dims[0] % axes:
        return "with the axis of experts elsewhere"
    if name == "flatten" and axes > 1 and _named(0, "start_dim", args, kwargs) % axes == 0:
        return "with the axis of experts in another" if _named(-1, "end_dim", args, kwargs, 2) % axes else ""
    if name in ("unsqueeze", "squeeze", "unflatten"):
        if any(dim % (axes + (name == "unsqueeze")) == 0 for dim in dims or (0,)):
            return "with the axis of experts elsewhere"
    if name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dim() > 1:
        return "of numbers that a mask or indices choose"
    return ""


def with_rows(name: str, args: list[Any], size: Sequence[int]) -> list[Any]:
    """What a view of rows of that size is given, its -1 reckoned: PyTorch cannot where a rank owns no expert."""
    if name not in ("view", "reshape") or size[0] or len(args) < 2:
        return args
    sizes = list(args[1]) if isinstance(args[1], (tuple, list)) else args[1:]
    if -1 not in sizes[1:] or sizes.count(-1) > 1 or sizes[0] != 0:
        return args
    others = prod(one for one in sizes[1:] if one != -1)
    return [args[0], *(max(1, prod(size[1:]) // max(1, others)) if one == -1 else one for one in sizes)]


def keeps_experts(name: str, args: Sequence[Any], out: Any, rows: Tensor) -> bool:
    """Whether the first axis of what comes out is that of experts if it is as long.

    That of a rank without experts always is: what has the same bytes in another shape must have as many an expert.
    """
    if name in SAME_NUMBERS and isinstance(out, Tensor):
        return bool(out.dim()) and _row_bytes(out) == _row_bytes(rows)
    if name == "__getitem__":
        first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        return first is Ellipsis or (isinstance(first, slice) and first == slice(None))
    return name in KEPT


def _row_bytes(tensor: Tensor) -> int:
    return prod(tensor.size()[1:]) * tensor.element_size()


def _named(default: int, key: str, args: Sequence[Any], kwargs: Mapping[str, Any], at: int = 1) -> int:
    return int(kwargs.get(key, args[at] if len(args) > at else default))


def _dims(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Axes that a call names, after the tensors and numbers before them."""
    found = [kwargs[key] for key in DIMS if kwargs.get(key) is not None]
    if not found:
        at = 2 if name in AFTER_ONE else 1
        rest = args[at:] if name in SEVERAL else args[at : at + 1]
        found = [value for value in rest if isinstance(value, (int, tuple, list)) and not isinstance(value, bool)]
    dims = tuple(dim for value in found for dim in (value if isinstance(value, (tuple, list)) else (value,)))
    return dims or ((DEFAULT[name],) if name in DEFAULT else None)
