"""Checks that pass on all ranks or fail on all: what one rank cannot do, none begins."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from poise.runtime.collectives import lost
from poise.util import errors
from poise.util.errors import CommunicationError, ModelError, PoiseError, told

T = TypeVar("T")
Traits = Mapping[str, Any]
LONGEST = 160


def agree(check: Callable[[], tuple[T, Traits]], group: Any) -> T:
    """Run ``check`` on every rank of a group and return what it gives here, if it went well on all. Collective.

    Parameters
    ----------
    check : gives its result, and what must be the same on all ranks, by name; it may not communicate.

    Raises
    ------
    PoiseError : on every rank, of one type: the check failed on one of them, or the traits of two differ.
    CommunicationError : a rank was lost.
    """
    result: T | None = None
    failed: PoiseError | None = None
    traits: Traits = {}
    try:
        result, traits = check()
    except PoiseError as error:
        failed = error
    except Exception as error:  # the others must not wait for this rank
        failed = ModelError(f"checking the experts failed: {told(error)}")
        failed.__cause__ = error
    mine = (
        (type(failed).__name__, failed.message, failed.hint) if failed else None,
        {name: _text(value) for name, value in traits.items()},
    )
    parts: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(parts, mine, group=group)
    except RuntimeError as error:
        raise CommunicationError(*lost(error)) from error
    rank = dist.get_rank(group)
    first = next((other for other, (wrong, _) in enumerate(parts) if wrong), None)
    if first is not None:
        kind, message, hint = parts[first][0]
        if first == rank and failed is not None:
            raise failed
        raise getattr(errors, kind, ModelError)(f"rank {first}: {message}", hint=hint) from failed
    expected = parts[0][1]
    for other, (_, found) in enumerate(parts):
        for name in [*expected, *(name for name in found if name not in expected)]:
            if not _equal(found.get(name), expected.get(name)):
                raise ModelError(
                    f"{name}: {expected.get(name)} on rank 0, {found.get(name)} on rank {other}",
                    hint="all ranks must shard one model with the same options",
                )
    assert result is not None
    return result


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def _text(value: Any) -> Any:
    """A value as text that is equal on ranks where the value is: no addresses, at most a line. Numbers stay numbers."""
    if isinstance(value, float):
        return value
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}, {sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:12]}"
    text = value if isinstance(value, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}... ({sha256(text.encode()).hexdigest()[:12]})"
    return text
