"""Values of a configuration, checked. A name with a dot reaches into a nested table (``ffn_config.moe_top_k``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from poise.util.errors import ModelError

Config = dict[str, Any]
MOST = 10**7
MOST_LAYERS = 10_000


def damaged(message: str) -> ModelError:
    """The error for a value of the wrong kind or length."""
    return ModelError(message, hint="the config is damaged, or its family writes this key in another way")


def get(config: Config, name: str) -> Any:
    """The value of a key, or None where the config or the nested table has none."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def present(config: Config, names: Iterable[str]) -> list[str]:
    """Those of the keys that the config sets to something else than null."""
    return [name for name in names if get(config, name) is not None]


def whole(value: Any, name: str) -> int:
    """A whole number from 0 to 10 million.

    Raises
    ------
    ModelError : anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST:
        raise damaged(f"{name} must be a whole number, got {str(value)[:120]!r}")
    return value


def number(config: Config, *names: str, default: int | None = None) -> int:
    """The first of these keys that is set; ``default`` where none is.

    Raises
    ------
    ModelError : none is set and there is no default, or the value is no whole number.
    """
    for name in present(config, names):
        return whole(get(config, name), name)
    if default is None:
        raise ModelError(f"the config has none of {', '.join(names)}", hint="is it a Mixture-of-Experts model?")
    return default


def whole_list(value: Any, name: str) -> list[int]:
    """A list of whole numbers; ``"3,4,5"`` is one, too.

    Raises
    ------
    ModelError : anything else.
    """
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        value = [int(part) if part.isascii() and part.isdigit() and len(part) < 8 else part for part in parts]
    if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
        raise damaged(f"{name} must be a list of whole numbers, got {str(value)[:120]}")
    return value


def same_everywhere(value: Any, name: str, moe: Sequence[int], layers: int) -> int:
    """A number that may be given as a list with one entry a layer; all MoE layers have the same.

    Parameters
    ----------
    value, name : of the key.
    moe, layers : ids of the MoE layers, and how many layers there are.

    Raises
    ------
    ModelError : MoE layers differ, or the list has another length.
    """
    if not isinstance(value, list):
        return whole(value, name)
    if len(value) != layers:
        raise damaged(f"{name} has {len(value)} entries, the model has {layers} layers")
    found = sorted({whole(value[layer], name) for layer in moe})
    if len(found) != 1:
        raise ModelError(f"{name} differs from layer to layer: {found[:6]}", hint="poise knows one size for all layers")
    return found[0]


def agreed(config: Config, names: Iterable[str], moe: Sequence[int], layers: int) -> int:
    """The one value that all of these keys give, as far as the config has them.

    Raises
    ------
    ModelError : none is set, or two disagree.
    """
    names = tuple(names)
    found = {name: same_everywhere(get(config, name), name, moe, layers) for name in present(config, names)}
    if not found:
        raise ModelError(f"the config has none of {', '.join(names)}", hint="is it a Mixture-of-Experts model?")
    if len(set(found.values())) > 1:
        raise ModelError(
            f"the config disagrees with itself: {', '.join(f'{k} is {v}' for k, v in found.items())}",
            hint="remove the keys that the model's own code does not read",
        )
    return next(iter(found.values()))
