"""What cases on several ranks share: the registry they enter, values that all ranks have, one folder for all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Case = Callable[..., Any]


def registry() -> tuple[dict[str, Case], Callable[[Case], Case]]:
    """Cases by name, and the decorator that adds one."""
    cases: dict[str, Case] = {}

    def case(function: Case) -> Case:
        cases[function.__name__] = function
        return function

    return cases, case


def agreed(value: float) -> float:
    """The largest over the ranks, so that an assertion holds or fails on all of them."""
    shared = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item()


def everywhere(value: Any) -> list[Any]:
    """The values of all ranks."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


@contextmanager
def folder() -> Iterator[Path]:
    """One for all ranks."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    try:
        yield Path(name[0])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(name[0], ignore_errors=True)
