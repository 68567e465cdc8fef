"""Compiled parts of ``poise-near``: tokens spread over holders, and holders chosen with them, by descent on seconds.

A *spread* says how many tokens of each expert every device computes. Every source has as many of them as any other and
sends them to its own device first, then inside its node, then anywhere, in proportion to what is left there
(:func:`book_expert`), so a spread gives every row (:mod:`poise.stepwise.poise.shares`). Its seconds are the slowest
device's compute and the fullest port; both are maxima, on which a descent stalls, so what descends is their norm of a
high power, in which every device and port counts.

Step 1  One expert at a time, the most loaded first: of all ways to move a part of its tokens from one of its devices
        to another one (a holder; where holders may be added, the least loaded device of a node that has a free slot),
        the one that lowers the norm most.
Step 2  Until a sweep over all experts gains nothing, or a number of sweeps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine, book_even_homes, exchange_seconds, expert_work, fullest_ports
from poise.util.compiled import compiled

PARTS = np.array([0.05, 1.0, 0.5, 0.2])
"""Shares of a device's tokens that step 1 tries to move; the last two where the first gains."""
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


class Slots(NamedTuple):
    """Which holders may change: int64 [D], slots for more of them; bool [E, D], those that stay without tokens."""

    free_D: NDArray[np.int64]
    fixed_ED: NDArray[np.bool_]


@compiled
def book_node(tokens_D: NDArray[np.float64], each: float, node: tuple[int, int], flow_PD: NDArray[np.float64]) -> None:
    """What one expert's tokens, float64 [D], bring to the ports of a node's devices (first, behind the last).

    ``each`` of them come from every source. Anew in ``flow_PD``, float64 [4, D].
    """
    need, room = 0.0, 0.0
    for d in range(node[0], node[1]):
        stay = min(tokens_D[d], each)
        need += each - stay
        room += tokens_D[d] - stay
    inside = min(need, room)
    sent, taken = inside / max(need, 1e-300), inside / max(room, 1e-300)
    for d in range(node[0], node[1]):
        stay = min(tokens_D[d], each)
        flow_PD[0, d] = (each - stay) * sent
        flow_PD[1, d] = (tokens_D[d] - stay) * taken
        flow_PD[2, d] = (each - stay) * (1.0 - sent)
        flow_PD[3, d] = (tokens_D[d] - stay) * (1.0 - taken)


@compiled
def book_expert(tokens_D: NDArray[np.float64], machine: Machine, flow_PD: NDArray[np.float64]) -> None:
    """:func:`book_node` for all nodes."""
    each, first = tokens_D.sum() / tokens_D.size, 0
    for n in range(machine.size_N.size):
        book_node(tokens_D, each, (first, first + machine.size_N[n]), flow_PD)
        first += machine.size_N[n]


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


class Descent(NamedTuple):
    """A spread that moves, and its sums of powers.

    Parameters
    ----------
    spread, machine : what moves, and where.
    node_N2 : int64 [N, 2], first device of each node and the one behind its last.
    sum_2N : float64 [2, N], sums of powers of each node's compute and ports, in ``scale`` seconds.
    tokens_D, work_D, flow_PD : working memory for the nodes that a move touches.
    scale : seconds.
    """

    spread: Spread
    machine: Machine
    node_N2: NDArray[np.int64]
    sum_2N: NDArray[np.float64]
    tokens_D: NDArray[np.float64]
    work_D: NDArray[np.float64]
    flow_PD: NDArray[np.float64]
    scale: float


class TokenMove(NamedTuple):
    """Tokens of an expert from a device to a device."""

    expert: int
    source: int
    target: int
    tokens: float


@compiled
def begin(spread: Spread, machine: Machine) -> Descent:
    """A descent from a spread."""
    devices, nodes = machine.speed_D.size, machine.size_N.size
    node_N2, first = np.zeros((nodes, 2), np.int64), 0
    for n in range(nodes):
        node_N2[n, 0], node_N2[n, 1] = first, first + machine.size_N[n]
        first += machine.size_N[n]
    out = Descent(
        spread, machine, node_N2, np.zeros((2, nodes)), np.zeros(devices), np.zeros(devices), np.zeros((4, devices)),
        max(spread_seconds(spread, machine), 1e-300),
    )  # fmt: skip
    for n in range(nodes):
        out.sum_2N[0, n], out.sum_2N[1, n] = _node_sums(out, n, spread.work_D, spread.port_PD)
    return out


@compiled
def _node_sums(
    descent: Descent, n: int, work_D: NDArray[np.float64], port_PD: NDArray[np.float64]
) -> tuple[float, float]:
    """Sums of powers of a node's compute and ports."""
    machine, scale = descent.machine, descent.scale
    intra = (machine.out_intra_s + machine.back_intra_s) / scale
    inter = (machine.out_inter_s + machine.back_inter_s) / scale
    compute, ports, out_sum, in_sum = 0.0, 0.0, 0.0, 0.0
    first, last = descent.node_N2[n]
    for d in range(first, last):
        compute += _power(work_D[d] / machine.speed_D[d] / scale)
        ports += _power(port_PD[0, d] * intra) + _power(port_PD[1, d] * intra)
        out_sum += port_PD[2, d]
        in_sum += port_PD[3, d]
        if not machine.nic_shared or d == last - 1:
            ports += _power(out_sum * inter) + _power(in_sum * inter)
            out_sum, in_sum = 0.0, 0.0
    return compute, ports


@compiled
def _norm(compute: float, ports: float) -> float:
    """Both maxima, as norms of the 16th power."""
    return max(compute, 0.0) ** 0.0625 + max(ports, 0.0) ** 0.0625


@compiled
def norm_after(descent: Descent, move: TokenMove, apply: bool) -> float:
    """The norm after a move, of which ``apply`` makes a fact; only the nodes of its two devices change."""
    spread, machine = descent.spread, descent.machine
    e, a, b, amount = move
    row_D, tokens_D, work_D, flow_PD = spread.tokens_ED[e], descent.tokens_D, descent.work_D, descent.flow_PD
    if row_D[a] - amount < EMPTY:
        amount = row_D[a]
    each = row_D.sum() / row_D.size
    compute, ports, nodes = descent.sum_2N[0].sum(), descent.sum_2N[1].sum(), (machine.node_D[a], machine.node_D[b])
    for turn in range(2):
        n = nodes[turn]
        if turn == 1 and n == nodes[0]:
            break
        first, last = descent.node_N2[n]
        for d in range(first, last):
            tokens_D[d], work_D[d] = row_D[d], spread.work_D[d]
        if nodes[0] == n:
            tokens_D[a] -= amount
            work_D[a] += expert_work(tokens_D[a], machine) - expert_work(row_D[a], machine)
        if nodes[1] == n:
            tokens_D[b] += amount
            work_D[b] += expert_work(tokens_D[b], machine) - expert_work(row_D[b], machine)
        book_node(tokens_D, each, (first, last), flow_PD)
        for p in range(4):
            for d in range(first, last):
                flow = flow_PD[p, d]
                flow_PD[p, d] += spread.port_PD[p, d] - spread.flow_EPD[e, p, d]
                if apply:
                    spread.flow_EPD[e, p, d] = flow
                    spread.port_PD[p, d] = flow_PD[p, d]
        node_compute, node_ports = _node_sums(descent, n, work_D, flow_PD)
        compute += node_compute - descent.sum_2N[0, n]
        ports += node_ports - descent.sum_2N[1, n]
        if apply:
            for d in range(first, last):
                spread.work_D[d] = work_D[d]
            descent.sum_2N[0, n], descent.sum_2N[1, n] = node_compute, node_ports
    if apply:
        row_D[a] -= amount
        row_D[b] += amount
    return _norm(compute, ports)


@compiled
def _idle_devices(descent: Descent, e: int, slots: Slots) -> NDArray[np.int64]:
    """Of each node the least loaded device that lacks an expert and has a free slot, int64 [N]; -1: none."""
    work_D, speed_D = descent.spread.work_D, descent.machine.speed_D
    idle_N = np.full(descent.node_N2.shape[0], -1)
    for d in range(work_D.size):
        n = descent.machine.node_D[d]
        lacks = slots.free_D[d] > 0 and not descent.spread.held_ED[e, d]
        if lacks and (idle_N[n] < 0 or work_D[d] / speed_D[d] < work_D[idle_N[n]] / speed_D[idle_N[n]]):
            idle_N[n] = d
    return idle_N


@compiled
def _best_move(descent: Descent, e: int, slots: Slots, now: float) -> tuple[float, TokenMove]:
    """Step 1 for one expert: the norm after it and the move, from -1 where none gains."""
    spread = descent.spread
    best, chosen = now - LEAST_MOVE, TokenMove(e, -1, -1, 0.0)
    devices = spread.work_D.size
    idle_N = _idle_devices(descent, e, slots)
    for a in range(devices):
        if spread.tokens_ED[e, a] <= 0.0:
            continue
        for b in range(devices):
            if b == a or not (spread.held_ED[e, b] or idle_N[descent.machine.node_D[b]] == b):
                continue
            gains = False
            for i in range(PARTS.size):
                move = TokenMove(e, a, b, spread.tokens_ED[e, a] * PARTS[i])
                value = norm_after(descent, move, False)
                if value < best:
                    best, chosen = value, move
                if i == 0:
                    gains = value < now
                elif i == 1 and not gains:
                    break
    return best, chosen


@compiled(nogil=True)
def descend(spread: Spread, slots: Slots, sweeps: int, machine: Machine) -> int:
    """Steps 1 and 2, in place, slots too; moves made. A holder that need not stay goes with its last token."""
    descent = begin(spread, machine)
    order = np.argsort(-spread.tokens_ED.sum(axis=1), kind="mergesort")
    now, made = _norm(descent.sum_2N[0].sum(), descent.sum_2N[1].sum()), 0
    for _ in range(sweeps):
        before = now
        for e in order:
            _, move = _best_move(descent, e, slots, now)
            a, b = move.source, move.target
            if a < 0:
                continue
            now = norm_after(descent, move, True)
            if not spread.held_ED[e, b]:
                spread.held_ED[e, b] = True
                slots.free_D[b] -= 1
            if spread.tokens_ED[e, a] <= 0.0 and not slots.fixed_ED[e, a]:
                spread.held_ED[e, a] = False
                slots.free_D[a] += 1
            made += 1
        if now > before - LEAST_SWEEP:
            break
    return made
