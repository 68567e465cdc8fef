"""Incremental cost of a placement: what :mod:`poise.planning.solve.search` changes move by move.

The same mathematics as :mod:`poise.cost` under the splits ``even`` and ``near``, kept as running sums per layer:
compute seconds [B, D], tokens [B, D] and copies through four kinds of ports [B, D]. A change touches only the tokens
that use the changed experts. Nothing of it is used to report a result: :func:`poise.planning.solve.solve.solve` prices
what the search returns with :func:`poise.cost.step.batch_cost`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.entries import HeldEntries, SlotCounts, entries_of
from poise.cost.machine import (
    book,
    book_even_homes,
    combine_seconds,
    dispatch_seconds,
    exchange_seconds,
    expert_work,
    fullest_ports,
    make_machine,
    token_work,
)
from poise.cost.traffic import DATA_FLOWS, landing_DN
from poise.planning.problem import PlacementProblem
from poise.planning.solve.records import Data, Rows, State
from poise.planning.solve.sources import book_near, make_sources, takers
from poise.routing.trace import NO_EXPERT
from poise.util.compiled import compiled

HOME, DEVICE_DEDUP, NODE_DEDUP, STAY = range(4)
CHANGE_UPDATES = 8
"""What a change costs beside its updates."""
TIE_BREAK = 1e-3
"""Weight of the largest device's tokens: it orders plans that the roofline prices alike (memory-bound decode)."""


def make_data(problem: PlacementProblem, max_rows: int) -> Data:
    """Compile a problem; where the traffic has more than ``max_rows`` rows, evenly spaced steps stand for all."""
    batch, cluster = problem.batch, problem.cluster
    steps = np.arange(batch.num_steps)
    if batch.has_tokens and batch.experts_TLK is not None:
        total = len(batch.experts_TLK) * batch.num_layers
        keep = max(1, min(len(steps), int(len(steps) * max_rows / max(total, 1))))
        steps = np.unique(np.linspace(0, len(steps) - 1, keep).round().astype(np.int64))
    weight, rows = batch.weight_B[steps], _rows(problem, steps)
    reach_L = np.arange(batch.num_layers)
    comes_M = rows.from_M >= 0
    np.maximum.at(reach_L, rows.from_M[comes_M], rows.layer_M[comes_M])
    near = problem.split == "near"
    load_LBE = np.ascontiguousarray(batch.load_BLE[steps].transpose(1, 0, 2))
    return Data(
        rows=rows,
        load_LBE=load_LBE,
        weight_B=weight / weight.sum(),
        reach_L=reach_L,
        machine=make_machine(cluster, problem.model),
        landing_DN=landing_DN(cluster),
        flow=DATA_FLOWS.index(problem.traffic),
        has_tokens=batch.has_tokens,
        keep_full=not problem.engine.empty_slots,
        place_D=problem.place_D.copy(),
        near=near,
        sources=make_sources(rows, load_LBE if near else load_LBE[:0], problem.num_devices),
        stop=np.zeros(1, np.int64),
    )


def _rows(problem: PlacementProblem, steps: NDArray[Any]) -> Rows:
    batch = problem.batch
    layers, experts = batch.num_layers, batch.num_experts
    if batch.experts_TLK is None:
        none = np.zeros(0, np.int64)
        ptr = np.zeros((layers, experts + 1), np.int64)
        return Rows(
            np.zeros(layers + 1, np.int64), np.zeros((0, batch.top_k), np.int16), none.astype(np.int32),
            none.astype(np.int32), none, none, none.astype(np.float64), none, ptr, none, ptr,
        )  # fmt: skip
    step_T = batch.step_T()
    kept = np.isin(step_T, steps)
    step_T, experts_TLK = np.searchsorted(steps, step_T[kept]), batch.experts_TLK[kept]
    home_T = batch.home_of_tokens(problem.num_devices)[kept]
    stay = problem.traffic == "stay"
    origin_TL = batch.came_from_TL()[kept] if stay else np.full((len(home_T), layers), -1, np.int64)
    parts: list[NDArray[Any]] = []
    weights: list[NDArray[np.float64]] = []
    for layer in range(layers):
        some_T = experts_TLK[:, layer, 0] != NO_EXPERT
        ids, origin = experts_TLK[some_T, layer].astype(np.int32), origin_TL[some_T, layer]
        source = np.where(origin < 0, home_T[some_T], origin % experts)
        if not stay:
            ids = np.sort(np.where(ids == NO_EXPERT, experts, ids), axis=1)
            ids[ids == experts] = NO_EXPERT
        key = np.column_stack([step_T[some_T], origin // experts, source, ids]).astype(np.int32)
        unique, count = np.unique(key, axis=0, return_counts=True)
        parts.append(unique)
        weights.append(count.astype(np.float64))
    start = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    table = np.concatenate(parts)
    layer_M, from_M = np.repeat(np.arange(layers), np.diff(start)), table[:, 1].astype(np.int64)
    ids_MK = np.ascontiguousarray(table[:, 3:]).astype(np.int16)
    uses_M, pick = np.nonzero(ids_MK != NO_EXPERT)
    comes_M = np.flatnonzero(from_M >= 0)
    by_expert, by_expert_ptr = _index(layer_M[uses_M], ids_MK[uses_M, pick], uses_M, (layers, experts))
    by_source, by_source_ptr = _index(from_M[comes_M], table[comes_M, 2], comes_M, (layers, experts))
    return Rows(
        start,
        ids_MK,
        table[:, 0].copy(),
        table[:, 2].copy(),
        from_M,
        layer_M.astype(np.int64),
        np.concatenate(weights),
        by_expert,
        by_expert_ptr,
        by_source,
        by_source_ptr,
    )


def _index(
    layer_X: NDArray[Any], expert_X: NDArray[Any], row_X: NDArray[Any], shape: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of each (layer, expert): row numbers and int64 [L, E + 1] offsets."""
    layers, experts = shape
    flat = layer_X.astype(np.int64) * experts + expert_X
    order = np.argsort(flat, kind="stable")
    edges = np.arange(layers)[:, None] * experts + np.arange(experts + 1)
    return row_X[order].astype(np.int64), np.searchsorted(flat[order], edges).astype(np.int64)


def make_state(data: Data, problem: PlacementProblem, counts: SlotCounts) -> State:
    """State of a placement, second slots of an expert on a device left out, with all sums computed."""
    held = entries_of(counts).once()
    layers, experts, devices = held.shape
    steps, layer_X, copies_LE, used = data.weight_B.size, held.layer_X(), held.replicas_LE(), held.used_LD()
    slots = np.minimum(problem.slots_D, experts)
    room = (problem.slots_D * layers - used.sum(axis=0))[None] if problem.pooled else slots[None] - used
    hold_LED, held_LED = np.full(held.shape, -1, np.int16), np.zeros(held.shape, np.bool_)
    held_LED[layer_X, held.expert_X, held.device_X] = True
    by_expert = np.argsort(layer_X * experts + held.expert_X, kind="stable")
    turn_X = np.arange(len(by_expert)) - np.repeat(np.cumsum(copies_LE) - copies_LE.ravel(), copies_LE.ravel())
    hold_LED[layer_X, held.expert_X[by_expert], turn_X] = held.device_X[by_expert]
    state = State(
        hold_LED=hold_LED,
        copies_LE=copies_LE,
        held_LED=held_LED,
        used_LD=used,
        room_GD=np.ascontiguousarray(room),
        compute_LBD=np.zeros((layers, steps, devices)),
        tokens_LBD=np.zeros((layers, steps, devices)),
        port_LFBPD=np.zeros((layers, 2 if data.flow == STAY else 1, steps, 4, devices)),
        stamp_M=np.zeros(len(data.rows.weight_M), np.int64),
        near_D=np.zeros(devices, np.int16),
        work=np.zeros(2, np.int64),
    )
    for layer in range(layers):
        rebuild(data, state, layer)
    return state


def held_by(state: State) -> HeldEntries:
    """The placement of a state."""
    layers, experts, devices = state.held_LED.shape
    copies = state.copies_LE.ravel()
    flat = np.repeat(np.arange(layers * experts), copies)
    turn = np.arange(len(flat)) - np.repeat(np.cumsum(copies) - copies, copies)
    layer_S, expert_S = np.divmod(flat, experts)
    return HeldEntries.of_slots(layer_S, expert_S, state.hold_LED[layer_S, expert_S, turn], (layers, experts, devices))


@compiled(nogil=True)
def rebuild(data: Data, state: State, layer: int) -> None:
    """Compute all sums of a layer anew."""
    state.compute_LBD[layer] = 0.0
    state.tokens_LBD[layer] = 0.0
    state.port_LFBPD[layer] = 0.0
    for e in range(state.copies_LE.shape[1]):
        _book_expert(data, state, layer, e, 1.0)
    for m in range(data.rows.start_L[layer], data.rows.start_L[layer + 1]):
        _book_row(data, state, layer, m, 1.0)


@compiled(nogil=True)
def _book_expert(data, state, layer, e, sign):  # type: ignore[no-untyped-def]
    """Add or take away an expert's compute seconds and tokens."""
    if data.near:
        book_near(data, state, layer, e, sign)
        return
    copies = state.copies_LE[layer, e]
    steps = data.weight_B.size
    for b in range(steps):
        n = data.load_LBE[layer, b, e] / copies
        if n > 0.0:
            seconds = expert_work(n, data.machine)
            for i in range(copies):
                d = state.hold_LED[layer, e, i]
                state.compute_LBD[layer, b, d] += sign * seconds / data.machine.speed_D[d]
                state.tokens_LBD[layer, b, d] += sign * n
    state.work[0] += steps * copies


@compiled(nogil=True)
def _book_row(data, state, layer, m, sign):  # type: ignore[no-untyped-def]
    """Add or take away the copies of one token row (:mod:`poise.cost.traffic`)."""
    rows = data.rows
    top_k = rows.experts_MK.shape[1]
    devices = data.machine.speed_D.size
    b, source, weight = rows.step_M[m], rows.source_M[m], sign * rows.weight_M[m]
    out = state.port_LFBPD[layer, 0, b]
    node_D = data.machine.node_D
    old = rows.from_M[m]
    sources = state.copies_LE[old, source] if old >= 0 else 1
    if data.flow == HOME:
        for k in range(top_k):
            e = rows.experts_MK[m, k]
            if e < 0:
                break
            where, copies = takers(data, state, layer, e, source)
            for i in range(copies):
                book(out, source, where[i], weight / copies, node_D)
        state.work[0] += top_k
        return
    missed = np.ones(devices)
    for k in range(top_k):
        e = rows.experts_MK[m, k]
        if e < 0:
            break
        where, copies = takers(data, state, layer, e, source)
        for i in range(copies):
            missed[where[i]] *= 1.0 - 1.0 / copies
    state.work[0] += 3 * (top_k + devices)
    if data.flow == NODE_DEDUP and data.machine.size_N.size > 1:
        _book_nodes(data, state, layer, m, missed, weight)
        return
    for s in range(sources):
        origin = state.hold_LED[old, source, s] if old >= 0 else source
        for d in range(devices):
            if missed[d] < 1.0:
                book(out, origin, d, weight / sources * (1.0 - missed[d]), node_D)
    if data.flow == STAY and top_k > 1:
        back = state.port_LFBPD[layer, 1, b]
        joined = np.ones(devices)
        for k in range(1, top_k):
            e = rows.experts_MK[m, k]
            if e < 0:
                break
            copies = state.copies_LE[layer, e]
            for i in range(copies):
                joined[state.hold_LED[layer, e, i]] *= 1.0 - 1.0 / copies
        heaviest = rows.experts_MK[m, 0]
        copies = state.copies_LE[layer, heaviest]
        for d in range(devices):
            if joined[d] < 1.0:
                for i in range(copies):
                    to = state.hold_LED[layer, heaviest, i]
                    book(back, d, to, weight * (1.0 - joined[d]) / copies, node_D)


@compiled(nogil=True)
def _book_nodes(data, state, layer, m, missed, weight):  # type: ignore[no-untyped-def]
    """Copies of one row under ``home_node_dedup``: once per node over the network, fanned out inside."""
    rows = data.rows
    nodes, devices = data.machine.size_N.size, data.machine.speed_D.size
    b, source = rows.step_M[m], rows.source_M[m]
    port, node_D = state.port_LFBPD[layer, 0, b], data.machine.node_D
    node_missed = np.ones(nodes)
    share = np.zeros(nodes)
    for k in range(rows.experts_MK.shape[1]):
        e = rows.experts_MK[m, k]
        if e < 0:
            break
        where, copies = takers(data, state, layer, e, source)
        share[:] = 0.0
        for i in range(copies):
            share[data.machine.node_D[where[i]]] += 1.0 / copies
        for n in range(nodes):
            node_missed[n] *= 1.0 - share[n]
    home_node = data.machine.node_D[source]
    for n in range(nodes):
        if n != home_node and node_missed[n] < 1.0:
            port[2, source] += weight * (1.0 - node_missed[n])
            port[3, data.landing_DN[source, n]] += weight * (1.0 - node_missed[n])
    for d in range(devices):
        if missed[d] < 1.0:
            n = data.machine.node_D[d]
            origin = source if n == home_node else data.landing_DN[source, n]
            book(port, origin, d, weight * (1.0 - missed[d]), node_D)


@compiled(nogil=True)
def layer_compute(data: Data, state: State, layer: int) -> float:
    """Expected compute seconds of a layer, with the tie break."""
    devices = data.machine.speed_D.size
    out = 0.0
    for b in range(data.weight_B.size):
        most, tokens = 0.0, 0.0
        for d in range(devices):
            most = max(most, state.compute_LBD[layer, b, d])
            tokens = max(tokens, state.tokens_LBD[layer, b, d] / data.machine.speed_D[d])
        out += data.weight_B[b] * (most + TIE_BREAK * tokens * token_work(data.machine))
    return out


@compiled(nogil=True)
def layer_seconds(data: Data, state: State, layer: int) -> float:
    """Expected seconds of a layer that depend on the placement, with the tie break."""
    out, machine = layer_compute(data, state, layer), data.machine
    state.work[0] += data.weight_B.size * machine.speed_D.size
    homes_PD = np.empty((4, 0 if data.has_tokens else machine.speed_D.size))
    for b in range(data.weight_B.size):
        if not (data.has_tokens or data.near):
            book_even_homes(homes_PD, state.tokens_LBD[layer, b], machine)
            port = exchange_seconds(fullest_ports(homes_PD, machine), machine)
        elif data.flow == STAY:
            port = dispatch_seconds(fullest_ports(state.port_LFBPD[layer, 0, b], machine), machine)
            port += combine_seconds(fullest_ports(state.port_LFBPD[layer, 1, b], machine), machine)
        else:
            port = exchange_seconds(fullest_ports(state.port_LFBPD[layer, 0, b], machine), machine)
        out += data.weight_B[b] * port
    return out


@compiled(nogil=True)
def _book_rows(data, state, layer, changed, sign):  # type: ignore[no-untyped-def]
    """Add or take away all rows that a change of the experts ``changed`` [n] of a layer touches, each once."""
    rows = data.rows
    if not data.has_tokens:
        return
    state.work[1] += 1
    stamp = state.work[1]
    for e in changed:
        for i in range(rows.by_expert_ptr[layer, e], rows.by_expert_ptr[layer, e + 1]):
            m = rows.by_expert[i]
            if state.stamp_M[m] != stamp:
                state.stamp_M[m] = stamp
                _book_row(data, state, layer, m, sign)
    if data.flow == STAY:
        for e in changed:
            for i in range(rows.by_source_ptr[layer, e], rows.by_source_ptr[layer, e + 1]):
                m = rows.by_source[i]
                _book_row(data, state, rows.layer_M[m], m, sign)


@compiled(nogil=True)
def _toggle(state, layer, e, d):  # type: ignore[no-untyped-def]
    """Put expert e on device d, or take it away."""
    group = layer if state.room_GD.shape[0] > 1 else 0
    copies = state.copies_LE[layer, e]
    if state.held_LED[layer, e, d]:
        for i in range(copies):
            if state.hold_LED[layer, e, i] == d:
                state.hold_LED[layer, e, i] = state.hold_LED[layer, e, copies - 1]
                break
        state.hold_LED[layer, e, copies - 1] = -1
        state.copies_LE[layer, e] -= 1
        state.held_LED[layer, e, d] = False
        state.used_LD[layer, d] -= 1
        state.room_GD[group, d] += 1
    else:
        state.hold_LED[layer, e, copies] = d
        state.copies_LE[layer, e] += 1
        state.held_LED[layer, e, d] = True
        state.used_LD[layer, d] += 1
        state.room_GD[group, d] -= 1


@compiled(nogil=True)
def put_layer(data: Data, state: State, layer: int, held_ED: NDArray[np.bool_]) -> None:
    """Make a layer hold bool [E, D], whatever it held, with all sums that depend on it."""
    for e in range(held_ED.shape[0]):
        for d in range(held_ED.shape[1]):
            if state.held_LED[layer, e, d] != held_ED[e, d]:
                _toggle(state, layer, e, d)
    for later in range(layer, data.reach_L[layer] + 1):
        rebuild(data, state, later)
    state.work[0] += held_ED.size


@compiled(nogil=True)
def _distinct(experts):  # type: ignore[no-untyped-def]
    """Experts without repetition, ascending; a few at most."""
    out, count = np.empty(experts.size, np.int64), 0
    for e in experts:
        at = count
        while at > 0 and out[at - 1] > e:
            at -= 1
        if at == 0 or out[at - 1] != e:
            for i in range(count, at, -1):
                out[i] = out[i - 1]
            out[at] = e
            count += 1
    return out[:count]


@compiled(nogil=True)
def change(
    data: Data, state: State, layer: int, experts: NDArray[np.int64], devices: NDArray[np.int64], limit: float
) -> bool:
    """Toggle (expert, device) pairs of a layer; undone, with False, if its compute alone comes out above ``limit``.

    ``experts`` and ``devices`` are int64 [n]; an expert may appear more than once.
    """
    changed = _distinct(experts)
    state.work[0] += CHANGE_UPDATES
    for e in changed:
        _book_expert(data, state, layer, e, -1.0)
    for i in range(experts.size):
        _toggle(state, layer, experts[i], devices[i])
    for e in changed:
        _book_expert(data, state, layer, e, 1.0)
    late = layer_compute(data, state, layer) > limit
    for e in changed:
        if late:
            _book_expert(data, state, layer, e, -1.0)
    if late or data.has_tokens:
        for i in range(experts.size):
            _toggle(state, layer, experts[i], devices[i])
    if late:
        for e in changed:
            _book_expert(data, state, layer, e, 1.0)
        return False
    if data.has_tokens:
        _book_rows(data, state, layer, changed, -1.0)
        for i in range(experts.size):
            _toggle(state, layer, experts[i], devices[i])
        _book_rows(data, state, layer, changed, 1.0)
    return True
