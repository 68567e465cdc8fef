"""Whether two modules run the same code with the same constants. Weights are not looked at: they may differ."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
         "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
STATE = {"_compiled_call_impl", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
         "_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
         "_load_state_dict_post_hooks", *HOOKS}  # fmt: skip
"""What a module keeps beside its attributes; hooks of its state, or that it is compiled, take no part
in what it computes."""


class Difference(NamedTuple):
    """Where two modules differ, and what stands there in each."""

    where: str
    first: str
    second: str


class ModuleComparison(NamedTuple):
    """The first difference, or None; and the attributes that could not be compared."""

    difference: Difference | None
    undecided: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether they are alike for certain."""
        return self.difference is None and not self.undecided


def compare(first: Any, second: Any) -> ModuleComparison:
    """Compare two modules (or any two values): classes, attributes, functions with what they hold, and submodules."""
    one = _ModuleComparer()
    try:
        found = one.find(first, second, "")
    except RecursionError:
        found, one.undecided = None, [*one.undecided, "attributes that are nested too deep"]
    return ModuleComparison(found, tuple(one.undecided))


class _ModuleComparer:
    def __init__(self) -> None:
        self.undecided: list[str] = []
        self._seen: dict[tuple[int, int], Any] = {}

    def find(self, a: Any, b: Any, where: str) -> Difference | None:
        if a is b or (id(a), id(b)) in self._seen:
            return None
        self._seen[id(a), id(b)] = a, b  # kept alive: a new object may get the id of one that was collected
        kinds = _kind(a), _kind(b)
        if kinds[0] is not kinds[1]:
            return Difference(where or "class", _class(kinds[0], kinds[1]), _class(kinds[1], kinds[0]))
        try:
            return self._same_kind(a, b, where)
        except RecursionError:
            raise
        except Exception:  # comparing may run code of the model, which may raise anything
            self.undecided.append(where)
            return None

    def _same_kind(self, a: Any, b: Any, where: str) -> Difference | None:
        if isinstance(a, nn.Module):
            return self._modules(a, b, where)
        if isinstance(a, Tensor):
            return self._tensors(a, b, where)
        if isinstance(a, np.ndarray):
            return None if np.array_equal(a, b, equal_nan=a.dtype.kind in "fc") else _two(a, b, where)
        if isinstance(a, types.FunctionType):
            return self._functions(a, b, where)
        if isinstance(a, types.MethodType):
            return self._parts(a, b, where, ("__func__", "__self__"))
        if isinstance(a, partial):
            return self._parts(a, b, where, ("func", "args", "keywords"))
        if isinstance(a, types.CodeType):
            return self._parts(a, b, where, ("co_code", "co_names", "co_varnames", "co_freevars", "co_consts"))
        if isinstance(a, types.CellType):
            return self._parts(a, b, where, ("cell_contents",))
        if isinstance(a, Mapping):
            return self._mappings(a, b, where)
        if isinstance(a, Sequence) and not isinstance(a, (str, bytes)):
            return self._sequences(a, b, where)
        return self._objects(a, b, where)

    def _modules(self, a: nn.Module, b: nn.Module, where: str) -> Difference | None:
        dot = f"{where}." if where else ""
        for state in ("_parameters", "_buffers", "_modules"):
            one, other = vars(a)[state], vars(b)[state]
            names = [[key for key, value in each.items() if value is not None] for each in (one, other)]
            if names[0] != names[1]:
                return Difference(f"{dot}{state[1:]}", str(names[0]), str(names[1]))
            for key in names[0] if state != "_parameters" else ():
                if (found := self.find(one[key], other[key], f"{dot}{key}")) is not None:
                    return found
        one, other = ({key: value for key, value in vars(each).items() if key not in STATE} for each in (a, b))
        return self._mappings(one, other, where, dot)

    def _tensors(self, a: Tensor, b: Tensor, where: str) -> Difference | None:
        if a.shape != b.shape or a.dtype != b.dtype:
            return Difference(where, f"{a.dtype} {tuple(a.shape)}", f"{b.dtype} {tuple(b.shape)}")
        if a.is_meta or b.is_meta:
            self.undecided.append(where)
            return None
        equal = torch.equal(a, b.to(a.device)) or bool(torch.isclose(a, b.to(a.device), 0, 0, equal_nan=True).all())
        return None if equal else _two(a, b, where)

    def _functions(self, a: Any, b: Any, where: str) -> Difference | None:
        if (self.find(a.__code__, b.__code__, where)) is not None:
            return _two(a, b, where)
        for name in ("__defaults__", "__kwdefaults__", "__dict__"):
            if (found := self.find(getattr(a, name), getattr(b, name), f"{where} ({name})")) is not None:
                return found
        for name, one, other in zip(a.__code__.co_freevars, a.__closure__ or (), b.__closure__ or (), strict=True):
            if (found := self.find(one, other, f"{where} ({name})")) is not None:
                return found
        if a.__globals__ is not b.__globals__:
            names = [name for name in a.__code__.co_names if name in a.__globals__ or name in b.__globals__]
            one, other = ({name: each.__globals__.get(name) for name in names} for each in (a, b))
            return self._mappings(one, other, where)
        return None

    def _parts(self, a: Any, b: Any, where: str, names: Sequence[str]) -> Difference | None:
        for name in names:
            if (found := self.find(getattr(a, name), getattr(b, name), where)) is not None:
                return found
        return None

    def _mappings(self, a: Any, b: Any, where: str, dot: str | None = None) -> Difference | None:
        for key in [*a, *(key for key in b if key not in a)]:
            place = f"{dot}{key}" if dot is not None else f"{where}[{key!r}]"
            if key not in a or key not in b:
                return Difference(
                    place, _show(a[key]) if key in a else "absent", _show(b[key]) if key in b else "absent"
                )
            if (found := self.find(a[key], b[key], place)) is not None:
                return found
        return None

    def _sequences(self, a: Any, b: Any, where: str) -> Difference | None:
        if len(a) != len(b):
            return Difference(where, f"{len(a)} values", f"{len(b)} values")
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            if (found := self.find(one, other, f"{where}[{number}]")) is not None:
                return found
        return None

    def _objects(self, a: Any, b: Any, where: str) -> Difference | None:
        kind: Any = type(a)
        if kind.__eq__ is not object.__eq__:
            return None if a == b or (a != a and b != b) else _two(a, b, where)
        if isinstance(a, (type, types.ModuleType, types.BuiltinFunctionType)):
            return _two(a, b, where)
        if hasattr(a, "__dict__") and not any(vars(base).get("__slots__") for base in kind.__mro__):
            if not vars(a) and kind.__module__ not in ("builtins", "torch._C"):
                return None  # no state
            return self._mappings(vars(a), vars(b), where, f"{where}." if where else "")
        self.undecided.append(where)
        return None


def _kind(value: Any) -> type:
    """The class; of a parametrized module the one before, as parametrization makes a class for every module."""
    if isinstance(value, nn.Module) and "parametrizations" in value._modules:
        return parametrize.type_before_parametrizations(value)
    return type(value)


def _class(kind: type, other: type) -> str:
    return kind.__qualname__ if kind.__qualname__ != other.__qualname__ else f"{kind.__qualname__} at {id(kind):#x}"


def _two(a: Any, b: Any, where: str) -> Difference:
    return Difference(where, _show(a), _show(b))


def _show(value: Any) -> str:
    """A value in a few words."""
    code = getattr(value, "__code__", None)
    if code is not None:
        return f"{value.__qualname__} of {code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # its own repr raises
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
