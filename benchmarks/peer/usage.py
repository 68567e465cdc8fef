"""What a step uses on this rank: bytes out of its interfaces, and memory at its peak. Linux."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def sent_bytes() -> int:
    """Out of the emulated device's interfaces so far, with headers and acknowledgements; 0 where it has none."""
    total = 0
    for line in Path("/proc/self/net/dev").read_text("ascii").splitlines()[2:]:
        name, _, numbers = line.partition(":")
        if name.strip() in ("fab0", "net0"):
            total += int(numbers.split()[8])
    return total


def _kilobytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    return 0


@contextmanager
def peak_memory(found: list[int]) -> Iterator[None]:
    """Append the bytes by which this process grew at most within the block.

    Every block of 64 KiB comes from the system and goes back to it meanwhile, so that what lies free is not counted.
    """
    libc: Any = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 65_536)
    libc.mallopt(M_TRIM_THRESHOLD, 65_536)
    libc.malloc_trim(0)
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    yield
    found.append(1024 * max(0, _kilobytes("VmHWM") - before))
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Parameters, gradients and states on this rank."""
    from torch.distributed.tensor import DTensor

    def size(one: Any) -> int:
        local = one.to_local() if isinstance(one, DTensor) else one
        return int(local.nbytes) if isinstance(local, torch.Tensor) else 0

    weights = list(model.parameters())
    states = [value for weight in weights for value in optimizer.state.get(weight, {}).values()]
    return sum(map(size, [*weights, *(weight.grad for weight in weights if weight.grad is not None), *states]))
