"""Modules without their weights: the code and settings of experts, to be run with weights from elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

from poise.runtime.alike import HOOKS


def shell(module: nn.Module, weights: Mapping[int, nn.Parameter]) -> Any:
    """The same module and its parts, without hooks; of its weights those that ``weights`` gives by ``id``.

    Attributes that are no modules are shared, so that what the model changes in them is seen. Of Hugging Face's
    implementations of one code the plain one is taken; one that was registered by the user stays.
    """
    known: dict[int, Any] = {}
    out = _copy(module, weights, known)
    for copy in known.values():
        _bind(copy, known)
    config = vars(module).get("config")
    if hasattr(config, "_experts_implementation"):
        interface: Any = getattr(sys.modules.get("transformers.integrations.moe"), "ALL_EXPERTS_FUNCTIONS", {})
        chosen = interface.get(config._experts_implementation)
        if getattr(chosen, "__module__", "transformers.").startswith("transformers."):
            vars(out)["config"] = _Eager(config)
    return out


def _copy(module: nn.Module, weights: Mapping[int, nn.Parameter], known: dict[int, Any]) -> Any:
    if id(module) in known:
        return known[id(module)]
    out: Any = object.__new__(type(module))
    known[id(module)] = out
    vars(out).update(vars(module))
    vars(out)["_parameters"] = {
        key: weight if weight is None else weights[id(weight)]
        for key, weight in module._parameters.items()
        if weight is None or id(weight) in weights
    }
    vars(out)["_modules"] = {
        key: part if part is None else _copy(part, weights, known) for key, part in module._modules.items()
    }
    for hooks in HOOKS:
        vars(out)[hooks] = type(vars(module)[hooks])()
    vars(out).pop("_compiled_call_impl", None)  # it calls the module it was made of
    return out


def _bind(copy: Any, known: Mapping[int, Any]) -> None:
    """Methods that were put on a module belong to its copy."""
    for key, value in vars(copy).items():
        if isinstance(value, MethodType) and id(value.__self__) in known:
            vars(copy)[key] = MethodType(value.__func__, known[id(value.__self__)])


def filled(shell: Any, weights: Mapping[str, Tensor]) -> Any:
    """A shell of one module with weights, for one call: what that changes in lists, dicts and sets is not kept."""
    out: Any = object.__new__(type(shell))
    for key, value in vars(shell).items():
        vars(out)[key] = value.copy() if type(value) in (dict, list, set) else value
    _bind(out, {id(shell): out})
    vars(out)["_parameters"] = {**shell._parameters, **weights}
    return out


def follow(shell: nn.Module) -> Callable[[bool], None]:
    """A function that puts a shell into training or evaluation, part by part: one may have a ``train`` of its own."""

    def follow(training: bool) -> None:
        if shell.training != training:
            for part in shell.modules():
                part.training = training

    return follow


class _Eager:
    """A config that asks for the plain implementation of experts, and is else the model's, which stays as it is."""

    _experts_implementation = "eager"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
