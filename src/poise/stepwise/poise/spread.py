"""Compiled parts of ``poise-near``: tokens spread over holders, and holders chosen with them, by descent on seconds.

A *spread* says how many tokens of each expert every device computes. Every source has as many of them as any other and
sends them to its own device first, then inside its node, then anywhere, in proportion to what is left there
(:func:`book_expert`), so a spread gives every row (:mod:`poise.stepwise.poise.shares`). Its seconds are the slowest
device's compute and the fullest port; both are maxima, on which a descent stalls, so what descends is their norm of a
high power, in which every device and port counts.

Step 1  One expert at a time, the most loaded first: of all ways to move a part of its tokens from one of its devices
        to another one (a holder, or one with a free slot where holders may be added), the one that lowers the norm
        most.
Step 2  Until a sweep over all experts gains nothing, or a number of sweeps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine, book_even_homes, exchange_seconds, expert_work, fullest_ports
from poise.util.compiled import compiled

PARTS = np.array([1.0, 0.5, 0.2, 0.05])
"""Shares of a device's tokens that step 1 tries to move."""
LEAST_MOVE, LEAST_SWEEP = 1e-4, 1e-3
"""Least gain of a move and of a sweep, as a share of the layer."""
EMPTY = 1e-9
"""Tokens below which a device has none."""


class Spread(NamedTuple):
    """Tokens on devices, and what they load.

    Parameters
    ----------
    tokens_ED : float64 [E, D], tokens that each device computes.
    held_ED : bool [E, D], who holds which expert.
    work_D : float64 [D], seconds of each device at speed 1.
    port_PD : float64 [4, D], all that passes the ports (:mod:`poise.cost.machine`).
    flow_EPD : float64 [E, 4, D], each expert's part of it.
    """

    tokens_ED: NDArray[np.float64]
    held_ED: NDArray[np.bool_]
    work_D: NDArray[np.float64]
    port_PD: NDArray[np.float64]
    flow_EPD: NDArray[np.float64]


class AfterMove(NamedTuple):
    """Working memory of a descent: one expert's tokens and flow, and all sums, after a move."""

    tokens_D: NDArray[np.float64]
    flow_PD: NDArray[np.float64]
    work_D: NDArray[np.float64]
    port_PD: NDArray[np.float64]


class Slots(NamedTuple):
    """Which holders may change: int64 [D], slots for more of them; bool [E, D], those that stay without tokens."""

    free_D: NDArray[np.int64]
    fixed_ED: NDArray[np.bool_]


@compiled
def book_expert(tokens_D: NDArray[np.float64], machine: Machine, flow_PD: NDArray[np.float64]) -> None:
    """What one expert's tokens, float64 [D], bring to the ports, anew in ``flow_PD``, float64 [4, D]."""
    each = 0.0
    for d in range(tokens_D.size):
        each += tokens_D[d]
    each /= tokens_D.size
    first = 0
    for n in range(machine.size_N.size):
        last = first + machine.size_N[n]
        need, room = 0.0, 0.0
        for d in range(first, last):
            stay = min(tokens_D[d], each)
            need += each - stay
            room += tokens_D[d] - stay
        inside = min(need, room)
        sent, taken = inside / max(need, 1e-300), inside / max(room, 1e-300)
        for d in range(first, last):
            stay = min(tokens_D[d], each)
            flow_PD[0, d] = (each - stay) * sent
            flow_PD[1, d] = (tokens_D[d] - stay) * taken
            flow_PD[2, d] = (each - stay) * (1.0 - sent)
            flow_PD[3, d] = (tokens_D[d] - stay) * (1.0 - taken)
        first = last


@compiled
def make_spread(tokens_ED: NDArray[np.float64], held_ED: NDArray[np.bool_], machine: Machine) -> Spread:
    """A spread with its sums; the arrays that are given become its own."""
    experts, devices = tokens_ED.shape
    work_D, port_PD, flow_EPD = np.zeros(devices), np.zeros((4, devices)), np.zeros((experts, 4, devices))
    for e in range(experts):
        for d in range(devices):
            if tokens_ED[e, d] > 0.0:
                work_D[d] += expert_work(tokens_ED[e, d], machine)
        book_expert(tokens_ED[e], machine, flow_EPD[e])
        port_PD += flow_EPD[e]
    return Spread(tokens_ED, held_ED, work_D, port_PD, flow_EPD)


@compiled
def _layer_seconds(work_D: NDArray[np.float64], port_PD: NDArray[np.float64], machine: Machine) -> float:
    worst = (work_D / machine.speed_D).max() + machine.start_s
    if machine.speed_D.size == 1:
        return worst
    return worst + exchange_seconds(fullest_ports(port_PD, machine), machine)


@compiled
def spread_seconds(spread: Spread, machine: Machine) -> float:
    """Modelled compute, dispatch and combine, without latencies."""
    return _layer_seconds(spread.work_D, spread.port_PD, machine)


@compiled
def even_seconds(load_E: NDArray[np.float64], held_ED: NDArray[np.bool_], machine: Machine) -> float:
    """The same for the engine's even split of loads float64 [E], in which a source asks nobody's place."""
    devices = machine.speed_D.size
    work_D, tokens_D, port_PD = np.zeros(devices), np.zeros(devices), np.zeros((4, devices))
    for e in range(load_E.size):
        many = held_ED[e].sum()
        for d in range(devices):
            if held_ED[e, d]:
                tokens_D[d] += load_E[e] / many
                work_D[d] += expert_work(load_E[e] / many, machine)
    book_even_homes(port_PD, tokens_D, machine)
    return _layer_seconds(work_D, port_PD, machine)


@compiled
def _power(x: float) -> float:
    x *= x
    x *= x
    x *= x
    return x * x


@compiled
def _norm(work_D: NDArray[np.float64], port_PD: NDArray[np.float64], machine: Machine, scale: float) -> float:
    """Both maxima as norms of the 16th power, over ``scale`` seconds."""
    intra = (machine.out_intra_s + machine.back_intra_s) / scale
    inter = (machine.out_inter_s + machine.back_inter_s) / scale
    compute, ports, out_sum, in_sum = 0.0, 0.0, 0.0, 0.0
    devices = machine.speed_D.size
    for d in range(devices):
        compute += _power(work_D[d] / machine.speed_D[d] / scale)
        ports += _power(port_PD[0, d] * intra) + _power(port_PD[1, d] * intra)
        out_sum += port_PD[2, d]
        in_sum += port_PD[3, d]
        if not machine.nic_shared or d == devices - 1 or machine.node_D[d + 1] != machine.node_D[d]:
            ports += _power(out_sum * inter) + _power(in_sum * inter)
            out_sum, in_sum = 0.0, 0.0
    return compute**0.0625 + ports**0.0625


@compiled
def _move(spread: Spread, e: int, move: tuple[int, int, float], machine: Machine, moved: AfterMove) -> None:
    """All sums as they are after a move (from, to, tokens) of an expert."""
    a, b, amount = move
    tokens_D = moved.tokens_D
    tokens_D[:] = spread.tokens_ED[e]
    moved.work_D[:] = spread.work_D
    if tokens_D[a] - amount < EMPTY:
        amount = tokens_D[a]
    left, more = tokens_D[a] - amount, tokens_D[b] + amount
    moved.work_D[a] += expert_work(left, machine) - expert_work(tokens_D[a], machine)
    moved.work_D[b] += expert_work(more, machine) - expert_work(tokens_D[b], machine)
    tokens_D[a], tokens_D[b] = left, more
    book_expert(tokens_D, machine, moved.flow_PD)
    for p in range(4):
        for d in range(tokens_D.size):
            moved.port_PD[p, d] = spread.port_PD[p, d] + moved.flow_PD[p, d] - spread.flow_EPD[e, p, d]


@compiled
def _best_move(
    spread: Spread, e: int, slots: Slots, now: tuple[float, float], machine: Machine, moved: AfterMove
) -> tuple[float, tuple[int, int, float]]:
    """Step 1 for one expert: the norm after it and the move, from -1 where none gains; ``now``: norm and scale."""
    best, chosen = now[0] - LEAST_MOVE, (-1, -1, 0.0)
    devices = spread.work_D.size
    for a in range(devices):
        if spread.tokens_ED[e, a] <= 0.0:
            continue
        for b in range(devices):
            if b == a or not (spread.held_ED[e, b] or slots.free_D[b] > 0):
                continue
            for part in PARTS:
                move = (a, b, spread.tokens_ED[e, a] * part)
                _move(spread, e, move, machine, moved)
                value = _norm(moved.work_D, moved.port_PD, machine, now[1])
                if value < best:
                    best, chosen = value, move
    return best, chosen


@compiled(nogil=True)
def descend(spread: Spread, slots: Slots, sweeps: int, machine: Machine) -> int:
    """Steps 1 and 2, in place, slots too; moves made. A holder that need not stay goes with its last token."""
    devices = spread.work_D.size
    moved = AfterMove(np.zeros(devices), np.zeros((4, devices)), np.zeros(devices), np.zeros((4, devices)))
    load_E = spread.tokens_ED.sum(axis=1)
    order = np.argsort(-load_E, kind="mergesort")
    scale = max(spread_seconds(spread, machine), 1e-300)
    now, made = _norm(spread.work_D, spread.port_PD, machine, scale), 0
    for _ in range(sweeps):
        before = now
        for e in order:
            best, move = _best_move(spread, e, slots, (now, scale), machine, moved)
            a, b, _ = move
            if a < 0:
                continue
            _move(spread, e, move, machine, moved)
            spread.tokens_ED[e] = moved.tokens_D
            spread.flow_EPD[e] = moved.flow_PD
            spread.work_D[:] = moved.work_D
            spread.port_PD[:] = moved.port_PD
            if not spread.held_ED[e, b]:
                spread.held_ED[e, b] = True
                slots.free_D[b] -= 1
            if spread.tokens_ED[e, a] <= 0.0 and not slots.fixed_ED[e, a]:
                spread.held_ED[e, a] = False
                slots.free_D[a] += 1
            now = best
            made += 1
        if now > before - LEAST_SWEEP:
            break
    return made
