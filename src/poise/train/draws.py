"""Random numbers for the rows of an expert weight that one rank owns.

Ranks usually have one seed. If each drew for its own rows, experts of different ranks would get the same numbers. So
every rank draws for every expert, in order of their ids, and keeps what is its own: experts differ, and they are the
same whoever owns them. Of the others a scratch of one expert's size is filled; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from poise.util.errors import OptionError

IN_PLACE = frozenset({"normal_", "uniform_", "exponential_", "geometric_", "log_normal_", "cauchy_", "random_",
                      "bernoulli_", "kaiming_uniform_"})  # fmt: skip
"""Methods of a tensor and functions of :mod:`torch.nn.init` (of which others end in these) that fill with numbers."""
LIKE: dict[str, Callable[..., Any]] = {"randn_like": Tensor.normal_, "rand_like": Tensor.uniform_,
                                       "randint_like": Tensor.random_}  # fmt: skip
"""What makes a tensor of random numbers like another one, and what fills it."""
OF_THE_SHAPE = ("generator", "dtype", "layout", "device", "pin_memory", "memory_format", "requires_grad")


class ExpertCount(int):
    """How many experts a rank has, as ``size(0)`` says it: a size and an index, and nothing to scale by.

    Fans of :mod:`torch.nn.init` are counted from it, and others' initialisers that use them: in the unsharded model it
    is the number of all experts. ``len(weight)`` and ``shape[0]`` are plain numbers.
    """

    def _counted(self, value: Any) -> Any:
        return ExpertCount(value) if isinstance(value, int) else value

    def __mul__(self, other: Any) -> Any:
        return self._scaled() if isinstance(other, float) else self._counted(int(self) * other)

    def __add__(self, other: Any) -> Any:
        return self._scaled() if isinstance(other, float) else self._counted(int(self) + other)

    __rmul__, __radd__ = __mul__, __add__

    def _scaled(self, *_: Any) -> Any:
        raise OptionError(
            f"scaled by size(0) of a weight of sharded experts, which counts to {int(self)} with the experts of this "
            "rank alone",
            hint="initialise the unsharded model; or normal_, uniform_ or trunc_normal_ with the width that is meant; "
            "len(weight) counts this rank's experts",
        )

    __float__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __pow__ = __rpow__ = _scaled


def draw(
    func: Any, rows: Tensor, mine: Sequence[int], experts: int, listed: bool, args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Fill rows [n, ...], a plain tensor, by a function that fills a tensor: once an expert.

    Parameters
    ----------
    func : takes a tensor first, or as ``tensor``.
    rows : of the experts ``mine``, in that order.
    experts : E.
    listed : experts have tensors of their own in the unsharded model, by whose shape numbers may be scaled.
    args, kwargs : all that ``func`` takes beside the tensor.

    Raises
    ------
    OptionError : a parameter is a tensor, or ``kaiming_uniform_`` scales by the number of experts.
    """
    name = func.__name__
    if any(isinstance(value, Tensor) and value.dim() for value in (*args, *kwargs.values())):
        raise OptionError(
            f"{name} of {experts} experts that are sharded, by a tensor of parameters",
            hint="draw on the unsharded model",
        )
    if name == "kaiming_uniform_" and not listed and "fan_out" in (*args, *kwargs.values()):
        raise OptionError(
            f"{name} by fan_out of a stacked weight counts its {experts} experts, of which {len(mine)} are here",
            hint="initialise the unsharded model, or each expert by its own shape",
        )
    at = {expert: row for row, expert in enumerate(mine)}
    scratch = rows.new_empty((1, *rows.shape[1:]))
    for expert in range(experts):
        into = rows[at[expert]].unsqueeze(0) if expert in at else scratch
        into = into[0] if listed else into
        func(into, *args, **kwargs)
    return rows


def draw_like(
    func: Any, rows: Tensor, mine: Sequence[int], experts: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> Tensor:
    """A tensor of random numbers like rows [n, ...], a plain tensor; as :func:`draw`."""
    shape = {key: value for key, value in kwargs.items() if key in OF_THE_SHAPE and key != "generator"}
    rest = {key: value for key, value in kwargs.items() if key not in shape}
    if func.__name__ == "randint_like":
        given = [*args, *(rest.pop(key) for key in ("low", "high") if key in rest)]
        args = given if len(given) > 1 else (0, *given)
    with torch.no_grad():
        return draw(LIKE[func.__name__], torch.empty_like(rows, **shape), mine, experts, False, args, rest)
