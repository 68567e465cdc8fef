"""Time between MoE layers, measured on the run: what a gather can hide behind (Hecate's T_nonMoE)."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEPT = 20
"""Times that are kept."""


class WindowClock:
    """From the end of a layer's experts to the next layer's dispatch, on the clock of the tokens' device."""

    def __init__(self) -> None:
        self._left_at: Any = None
        self._windows: deque[tuple[Any, Any]] = deque(maxlen=KEPT)

    def forget(self) -> None:
        """A forward pass begins: no layer came before."""
        self._left_at = None

    def enter(self, x: Tensor) -> None:
        """A layer begins."""
        if self._left_at is not None:
            self._windows.append((self._left_at, _now(x)))

    def leave(self, y: Tensor) -> None:
        """A layer is done."""
        self._left_at = _now(y)

    def median(self) -> float | None:
        """Median on this rank, seconds; None without two layers."""
        return float(np.median([_seconds(*window) for window in self._windows])) if self._windows else None


def _now(like: Tensor) -> Any:
    if like.is_cuda:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
