"""Running sums of :mod:`poise.planning.solve.state` where the split goes by the source of tokens (``near``).

Which devices take an expert's tokens, and so its seconds, depends on the homes of those tokens: they are kept as a list
of sources for every layer, expert and step. Where no token of a load is known, every device has the same part of it; of
loads alone copies are booked with the expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import expert_work
from poise.util.compiled import compiled

if TYPE_CHECKING:
    from poise.planning.solve.state import Data, Rows, State


class Sources(NamedTuple):
    """Where tokens come from: entries ``ptr_LX[l, e * B + b]`` to the next are of expert e of layer l in step b, and
    their weights sum to its load.
    """

    ptr_LX: NDArray[np.int64]
    device_Y: NDArray[np.int64]
    weight_Y: NDArray[np.float64]


def make_sources(rows: Rows, load_LBE: NDArray[np.float64], devices: int) -> Sources:
    """Of rows whose sources are home ranks, for loads of as many layers as are wanted."""
    layers, steps, experts = load_LBE.shape
    ptr_LX = np.zeros((layers, experts * steps + 1), np.int64)
    device, weight, total = [np.zeros(0, np.int64)], [np.zeros(0)], 0
    for layer in range(layers):
        some = slice(rows.start_L[layer], rows.start_L[layer + 1])
        row, pick = np.nonzero(rows.experts_MK[some] >= 0)
        place = rows.experts_MK[some][row, pick].astype(np.int64) * steps + rows.step_M[some][row]
        key, back = np.unique(place * devices + rows.source_M[some][row], return_inverse=True)
        ptr_LX[layer] = total + np.searchsorted(key, np.arange(experts * steps + 1) * devices)
        device.append(key % devices)
        known = np.bincount(place, weights=rows.weight_M[some][row], minlength=experts * steps)
        scale = load_LBE[layer].T.ravel() / np.maximum(known, 1.0)
        tokens = np.bincount(back, weights=rows.weight_M[some][row], minlength=len(key))
        weight.append(tokens * scale[key // devices])
        total += len(key)
    return Sources(ptr_LX, np.concatenate(device), np.concatenate(weight))


@compiled(nogil=True)
def takers(data: Data, state: State, layer: int, expert: int, source: int) -> tuple[NDArray[np.int16], int]:
    """Devices that share a source's tokens of an expert evenly, the first n of int16 [D], and n.

    All that hold it; under ``near`` the source itself, else those of its node, where there are any.
    """
    hold, copies = state.hold_LED[layer, expert], state.copies_LE[layer, expert]
    if not data.near:
        return hold, copies
    if state.held_LED[layer, expert, source]:
        state.near_D[0] = source
        return state.near_D, 1
    count, node_D = 0, data.machine.node_D
    for i in range(copies):
        if node_D[hold[i]] == node_D[source]:
            state.near_D[count] = hold[i]
            count += 1
    if count == 0:
        return hold, copies
    return state.near_D, count


@compiled(nogil=True)
def book_near(data: Data, state: State, layer: int, expert: int, sign: float) -> None:
    """Add or take away an expert's compute seconds and tokens, and, of loads alone, its copies."""
    machine, sources = data.machine, data.sources
    node_D, size_N = machine.node_D, machine.size_N
    steps, devices, nodes = data.weight_B.size, machine.speed_D.size, size_N.size
    hold, copies = state.hold_LED[layer, expert], state.copies_LE[layer, expert]
    held_D = state.held_LED[layer, expert]
    own_D, left_N, copies_N = np.zeros(devices), np.zeros(nodes), np.zeros(nodes)
    for i in range(copies):
        copies_N[node_D[hold[i]]] += 1.0
    for b in range(steps):
        load = data.load_LBE[layer, b, expert]
        if load <= 0.0:
            continue
        first, last = sources.ptr_LX[layer, expert * steps + b], sources.ptr_LX[layer, expert * steps + b + 1]
        each, rest = load / devices if first == last else 0.0, 0.0
        for n in range(nodes):
            left_N[n] = each * (size_N[n] - copies_N[n])
        for i in range(copies):
            own_D[hold[i]] = each
        for y in range(first, last):
            d = sources.device_Y[y]
            if held_D[d]:
                own_D[d] += sources.weight_Y[y]
            else:
                left_N[node_D[d]] += sources.weight_Y[y]
        state.work[0] += last - first
        for n in range(nodes):
            if copies_N[n] == 0.0:
                rest += left_N[n]
        port = state.port_LFBPD[layer, 0, b]
        for i in range(copies):
            d = hold[i]
            beside = left_N[node_D[d]] / copies_N[node_D[d]]
            tokens = own_D[d] + beside + rest / copies
            if tokens > 0.0:
                state.compute_LBD[layer, b, d] += sign * expert_work(tokens, machine) / machine.speed_D[d]
                state.tokens_LBD[layer, b, d] += sign * tokens
            if not data.has_tokens:
                port[1, d] += sign * beside
                port[3, d] += sign * rest / copies
        if not data.has_tokens:
            for d in range(devices):
                if not held_D[d]:
                    port[0 if copies_N[node_D[d]] > 0.0 else 2, d] += sign * each
            state.work[0] += devices
    state.work[0] += steps * copies
