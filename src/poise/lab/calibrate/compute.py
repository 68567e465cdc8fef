"""An expert's seconds on this device, by tokens and active experts: measured arithmetic, or the device clock's.

The experts are those the runtime runs (:mod:`poise.runtime.experts`): grouped in bfloat16 on CUDA, one after the other
in float32 on a CPU. Weights are taken in turn from a bank that no cache holds, as in a model with other layers between.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.lab.calibrate.fit import ComputeRow
from poise.lab.calibrate.links import WARM_UP, CalibrationRanks, Effort
from poise.lab.emulate.clock import DeviceClock, ExpertCurve
from poise.lab.emulate.quiet import LEAST_REPEATS, held_s, left_alone, settle, waits_s
from poise.runtime.experts import Bank, ExpertKind, recognise
from poise.util.errors import OptionError

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ACTIVE = (1, 2, 4, 8)
QUICK_TOKENS, QUICK_ACTIVE = (1, 8, 64, 512, 4096), (1, 4)
NO_CACHE_BYTES = {"cuda": 512 * 2**20, "cpu": 256 * 2**20}
"""A bank of this size or more: weights are read from memory each time."""
MOST_TRIES = 4
"""So many times the repeats are made where others are in the way."""
MOST_MEMORY = 0.25
"""Part of the device's memory that the bank may take."""


class _Experts(nn.Module):  # type: ignore[misc]
    """Plain (2 matrices) or gated (3) experts without values, for their shapes and code."""

    def __init__(self, hidden: int, inner: int, matrices: int) -> None:
        super().__init__()
        first = (1, (matrices - 1) * inner, hidden)
        self.register_parameter(
            "gate_up_proj" if matrices == 3 else "up_proj", nn.Parameter(torch.empty(first, device="meta"))
        )
        self.down_proj = nn.Parameter(torch.empty(1, hidden, inner, device="meta"))
        self.act_fn = F.silu

    def forward(self, x_Td: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        raise NotImplementedError


def expert_kind(hidden: int, inner: int, matrices: int) -> ExpertKind:
    """How the runtime computes experts of these sizes.

    Raises
    ------
    OptionError : a size is below 1, or matrices is not 2 or 3.
    """
    if min(hidden, inner) < 1 or matrices not in (2, 3):
        raise OptionError(
            f"an expert of hidden {hidden}, inner {inner}, {matrices} matrices",
            hint="sizes of 1 or more; 2 matrices, or 3 for a gated expert",
        )
    return recognise(_Experts(hidden, inner, matrices), probe=False)


def arithmetic_rows(
    kind: ExpertKind, ranks: CalibrationRanks, effort: Effort, *, quick: bool = False
) -> tuple[list[ComputeRow], str, float]:
    """Rows of this rank's arithmetic, all ranks at once; what was left out; and the bytes of a weight it was done with.

    Raises
    ------
    OptionError : an expert does not fit into the memory that may be used.
    """
    on_gpu = ranks.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    active: tuple[int, ...] = QUICK_ACTIVE if quick else ACTIVE
    one_bytes = kind.numel * dtype.itemsize
    memory = MOST_MEMORY * device_memory(ranks)
    room = int(memory / one_bytes)
    if room < 1:
        raise OptionError(
            f"an expert of {one_bytes / 1e9:.3g} GB does not fit into {memory / 1e9:.3g} GB",
            hint="a smaller --hidden or --inner",
        )
    active = tuple(number for number in active if number <= room)
    experts = min(room, max(active[-1], -(-NO_CACHE_BYTES[ranks.device.type] // one_bytes)))
    bank = {
        name: torch.empty(experts, *shape, dtype=dtype, device=ranks.device).uniform_(-0.05, 0.05)
        for name, shape in kind.shapes.items()
    }
    starts = itertools.count()

    def run(tokens: int, number: int) -> Callable[[], object]:
        x_nd = torch.ones(tokens * number, kind.hidden, dtype=dtype, device=ranks.device)

        def once() -> object:
            first = next(starts) * number % (experts - number + 1)
            part: Bank = {name: weight[first : first + number] for name, weight in bank.items()}
            return kind.run([(part, [tokens] * number)], x_nd)

        return once

    with torch.inference_mode():
        tokens = QUICK_TOKENS if quick else TOKENS
        rows, note = _grid(run, tokens, active, ranks, effort, _cuda_timer if on_gpu else _timer)
    return rows, note, float(dtype.itemsize)


def clock_rows(
    curve: ExpertCurve, dilation: float, ranks: CalibrationRanks, effort: Effort, *, quick: bool = False
) -> tuple[list[ComputeRow], str]:
    """Rows of this rank's device clock, in seconds of this machine, as in an emulated run; and what was left out."""
    clock = DeviceClock(curve, dilation)
    tokens = {1, *(round(knot) for knot in curve.tokens_X if knot >= 1), int(2 * curve.tokens_X[-1])}

    def run(each: int, number: int) -> Callable[[], object]:
        return lambda: clock.compute([each] * number)

    return _grid(run, sorted(tokens), QUICK_ACTIVE if quick else ACTIVE[:3], ranks, effort, _timer)


def _grid(
    run: Callable[[int, int], Callable[[], object]],
    tokens: Sequence[int],
    active: Sequence[int],
    ranks: CalibrationRanks,
    effort: Effort,
    timer: Callable[[Callable[[], object], CalibrationRanks], float],
) -> tuple[list[ComputeRow], str]:
    """Rows from few tokens to many until the time is used up, two numbers of tokens at least; a remark if it was."""
    rows: list[ComputeRow] = []
    stop = ranks.elapsed() + effort.seconds
    share = effort.seconds / (2 * len(tokens) * len(active))  # the other half is for rows that are longer than that
    for index, each in enumerate(tokens):
        for number in active:
            once = run(each, number)
            first = min(timer(once, ranks) for _ in range(WARM_UP))
            slowest = max(ranks.agree(first)[0], 1e-7)
            repeats = int(min(10 * effort.repeats, max(LEAST_REPEATS, share / slowest)))
            took, steady = _repeat(once, ranks, timer, repeats)
            rows.append(ComputeRow(each * number, number, took, steady=steady))
        if index in (0, len(tokens) - 1):
            continue
        if ranks.elapsed() + 5 * slowest * tokens[index + 1] / each * len(active) > stop:
            last = f"{each} of {tokens[-1]} tokens an expert"
            return rows, f"time was up at {last}: the curve beyond is a guess; give more --seconds"
    return rows, ""


def _repeat(
    once: Callable[[], object],
    ranks: CalibrationRanks,
    timer: Callable[[Callable[[], object], CalibrationRanks], float],
    repeats: int,
) -> tuple[float, bool]:
    """Median of the repeats that were left alone, and whether it can be trusted; more of them where others disturb."""
    took: list[float] = []
    held: list[float] = []
    lacking = repeats
    while lacking and len(took) < MOST_TRIES * repeats:
        for _ in range(lacking):
            waited = waits_s()
            took.append(timer(once, ranks))
            held.append(held_s(waited))
        lacking = int(ranks.agree(repeats - len(left_alone(took, held)))[0])
    counted, steady = settle(took, held)
    return statistics.median(counted), steady


def _timer(once: Callable[[], object], ranks: CalibrationRanks) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def _cuda_timer(once: Callable[[], object], ranks: CalibrationRanks) -> float:
    """By events: time on the device, with the gaps that its launches leave."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    ranks.wait()
    begin.record()
    once()
    end.record()
    ranks.wait()
    return float(begin.elapsed_time(end)) / 1e3


def device_memory(ranks: CalibrationRanks) -> float:
    """Bytes of this device's memory; on a CPU a rank's share of the machine's."""
    if ranks.device.type == "cuda":
        return float(torch.cuda.get_device_properties(ranks.device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / ranks.sharing
