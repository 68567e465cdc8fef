"""Steps 2 and 3 of :mod:`poise.planning.solve.search`: descent from states, and perturbation of the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.planning.problem import PlacementProblem, Progress
from poise.planning.solve.group_first import moved_groups
from poise.planning.solve.records import Data, State
from poise.planning.solve.state import STAY, change, layer_seconds, put_layer, rebuild
from poise.util.compiled import compiled
from poise.util.executors import in_threads

KICK_UPDATES = 15_000
"""What one perturbation costs beside its updates."""
GROUP_KICKS = 0.25
"""Share of perturbations that move groups, where groups lie whole in several places."""
BETTER = 1.0 - 1e-9
OF_LAYER = ("hold_LED", "copies_LE", "held_LED", "used_LD", "compute_LBD", "tokens_LBD")
"""What a state has of each layer alone; ports of ``stay`` depend on the layers before, too."""


@compiled(nogil=True)
def _score(data, state, layer):  # type: ignore[no-untyped-def]
    """Seconds of the layers that a change of this one can alter."""
    out = layer_seconds(data, state, layer)
    for later in range(layer + 1, data.reach_L[layer] + 1):
        out += layer_seconds(data, state, later)
    return out


@compiled(nogil=True)
def _try(data, state, layer, experts, devices, best):  # type: ignore[no-untyped-def]
    """Make a change if it lowers ``best``; returns the score after it."""
    if not change(data, state, layer, experts, devices, best):
        return best
    score = _score(data, state, layer)
    if score < best * BETTER:
        return score
    change(data, state, layer, experts[::-1].copy(), devices[::-1].copy(), np.inf)  # contiguous: compiled once
    return best


@compiled(nogil=True)
def _device_order(data, state, layer):  # type: ignore[no-untyped-def]
    """Devices by how often they decide a maximum, the most deciding first."""
    steps, devices = data.weight_B.size, data.machine.speed_D.size
    power = np.zeros(devices)
    for b in range(steps):
        most = 1e-300
        for d in range(devices):
            most = max(most, state.compute_LBD[layer, b, d])
        for d in range(devices):
            power[d] += data.weight_B[b] * (state.compute_LBD[layer, b, d] / most) ** 8
            for kind in range(4):
                top = 1e-300
                for d2 in range(devices):
                    top = max(top, state.port_LFBPD[layer, 0, b, kind, d2])
                power[d] += 0.25 * data.weight_B[b] * (state.port_LFBPD[layer, 0, b, kind, d] / top) ** 8
    return np.argsort(-power)


@compiled(nogil=True)
def _room(state, layer, d):  # type: ignore[no-untyped-def]
    group = layer if state.room_GD.shape[0] > 1 or state.held_LED.shape[0] == 1 else 0
    return state.room_GD[group, d] > 0 and state.used_LD[layer, d] < state.held_LED.shape[1]


@compiled(nogil=True)
def _descend_from(data, state, layer, a, best, limit):  # type: ignore[no-untyped-def]
    """All changes that involve device a; returns the score."""
    experts, devices = state.held_LED.shape[1], data.machine.speed_D.size
    place_D, place = data.place_D, data.place_D[a]
    one_e, one_d = np.empty(1, np.int64), np.empty(1, np.int64)
    two_e, two_d = np.empty(2, np.int64), np.empty(2, np.int64)
    four_e, four_d = np.empty(4, np.int64), np.empty(4, np.int64)
    for e in range(experts):
        if state.work[0] > limit or data.stop[0]:
            return best
        if not state.held_LED[layer, e, a]:
            if place_D[state.hold_LED[layer, e, 0]] == place and _room(state, layer, a):  # add a replica
                one_e[0], one_d[0] = e, a
                best = _try(data, state, layer, one_e, one_d, best)
            continue
        for c in range(devices):
            if c == a or place_D[c] != place or state.held_LED[layer, e, c]:
                continue
            if _room(state, layer, c):  # move
                two_e[0], two_e[1] = e, e
                two_d[0], two_d[1] = a, c
                best = _try(data, state, layer, two_e, two_d, best)
                if not state.held_LED[layer, e, a]:
                    break
            for f in range(experts):  # swap
                if state.held_LED[layer, f, c] and not state.held_LED[layer, f, a]:
                    four_e[0], four_e[1], four_e[2], four_e[3] = e, f, e, f
                    four_d[0], four_d[1], four_d[2], four_d[3] = a, c, c, a
                    best = _try(data, state, layer, four_e, four_d, best)
                    if not state.held_LED[layer, e, a]:
                        break
            if not state.held_LED[layer, e, a] or state.work[0] > limit or data.stop[0]:
                break
        if state.held_LED[layer, e, a] and state.copies_LE[layer, e] > 1:
            if not data.keep_full:
                one_e[0], one_d[0] = e, a  # drop a replica
                best = _try(data, state, layer, one_e, one_d, best)
            for f in range(experts):  # replace it by another expert
                if not state.held_LED[layer, e, a] or state.copies_LE[layer, e] < 2:
                    break
                if not state.held_LED[layer, f, a] and place_D[state.hold_LED[layer, f, 0]] == place:
                    two_e[0], two_e[1] = e, f
                    two_d[0], two_d[1] = a, a
                    best = _try(data, state, layer, two_e, two_d, best)
    return best


@compiled(nogil=True)
def _descend(data, state, layer, limit):  # type: ignore[no-untyped-def]
    """Descent in one layer to a local optimum or until the work counter reaches ``limit``; returns the score."""
    best = _score(data, state, layer)
    while True:
        before = best
        for a in _device_order(data, state, layer):
            best = _descend_from(data, state, layer, a, best, limit)
        if best >= before * (1.0 - 1e-7) or state.work[0] > limit or data.stop[0]:
            return best


@compiled(nogil=True)
def _kick(data, state, layer, draws):  # type: ignore[no-untyped-def]
    """Swaps in one layer chosen by uniform ``draws`` [swaps, tries, 4]; the first possible try of each is made."""
    experts = state.held_LED.shape[1]
    four_e, four_d = np.empty(4, np.int64), np.empty(4, np.int64)
    for swap in range(draws.shape[0]):
        for attempt in range(draws.shape[1]):
            u = draws[swap, attempt]
            e, f = int(u[0] * experts), int(u[1] * experts)
            a = state.hold_LED[layer, e, int(u[2] * state.copies_LE[layer, e])]
            c = state.hold_LED[layer, f, int(u[3] * state.copies_LE[layer, f])]
            if a == c or data.place_D[a] != data.place_D[c]:
                continue
            if not state.held_LED[layer, e, c] and not state.held_LED[layer, f, a]:
                four_e[0], four_e[1], four_e[2], four_e[3] = e, f, e, f
                four_d[0], four_d[1], four_d[2], four_d[3] = a, c, c, a
                change(data, state, layer, four_e, four_d, np.inf)
                break


def _copy_layer(data: Data, to: State, other: State, layer: int) -> None:
    """Make a layer of one state equal to another's; ``stay`` sums of the layers it reaches are computed anew."""
    if to.room_GD.shape[0] > 1 or to.held_LED.shape[0] == 1:
        to.room_GD[layer] = other.room_GD[layer]
    else:
        to.room_GD[0] += to.used_LD[layer] - other.used_LD[layer]
    for name in (*OF_LAYER, "port_LFBPD"):
        getattr(to, name)[layer] = getattr(other, name)[layer]
    for later in range(layer + 1, int(data.reach_L[layer]) + 1):
        rebuild(data, to, later)


def _snapshot(data: Data, state: State, layer: int) -> tuple[NDArray[Any], ...]:
    ports = state.port_LFBPD[layer : int(data.reach_L[layer]) + 1]
    return state.room_GD.copy(), ports.copy(), *(getattr(state, name)[layer].copy() for name in OF_LAYER)


def _restore(state: State, layer: int, saved: tuple[NDArray[Any], ...]) -> None:
    state.room_GD[:], ports = saved[0], saved[1]
    state.port_LFBPD[layer : layer + len(ports)] = ports
    for name, value in zip(OF_LAYER, saved[2:], strict=True):
        getattr(state, name)[layer] = value


def _merge(
    data: Data, problem: PlacementProblem, states: list[State], local: NDArray[np.bool_]
) -> tuple[State, NDArray[np.bool_]]:
    """The best of several descents: layer by layer where layers do not depend on each other."""
    layers = problem.batch.num_layers
    score = np.array([[layer_seconds(data, state, layer) for layer in range(layers)] for state in states])
    best = int(np.argmin(score.sum(axis=1)))
    state, local_L = states[best], local[best].copy()
    if not (problem.pooled or (data.flow == STAY and data.has_tokens)):
        for layer in range(layers):
            other = int(np.argmin(score[:, layer]))
            _copy_layer(data, state, states[other], layer)
            local_L[layer] = local[other, layer]
    return state, local_L


def _descent(data: Data, state: State, updates: float, progress: Callable[[float], None]) -> NDArray[np.bool_]:
    """Step 2 of one state, until ``updates`` are made or ``data.stop`` is set: layers at a local optimum, bool [L]."""
    layers = len(data.reach_L)
    local_L = np.zeros(layers, dtype=bool)
    state.work[0] = 0
    for layer in range(layers):
        limit = updates * (layer + 1) / layers
        rebuild(data, state, layer)
        _descend(data, state, layer, limit)
        local_L[layer] = state.work[0] <= limit
        progress((layer + 1) / layers)
        if data.stop[0]:
            break
    return local_L


def descents(
    data: Data, problem: PlacementProblem, states: list[State], updates: float, seed: int,
    progress: Progress | None, threads: bool,
) -> tuple[State, int, int]:  # fmt: skip
    """Steps 2 and 3, until ``updates`` are made or ``data.stop`` is set: state, kicks, and how many of them helped.

    States share nothing that is written, and compiled code releases the interpreter's lock: with ``threads`` they
    descend at the same time, and end where they would one after the other.
    """
    layers = problem.batch.num_layers
    done = [0.0] * len(states)

    def descend(turn: int) -> NDArray[np.bool_]:
        def report(share: float) -> None:
            done[turn] = share
            if progress:
                progress("descent", sum(done) / len(states))

        return _descent(data, states[turn], updates * 0.7 / len(states), report)

    local = in_threads(descend, range(len(states)), len(states) if threads else 1, "poise-descent")
    state, local_L = _merge(data, problem, states, np.stack(local))
    state.work[0] = sum(int(each.work[0]) for each in states)
    rng, places = np.random.default_rng(seed), int(problem.place_D[-1]) + 1
    work_LE = problem.work_LE() if places > 1 else np.zeros((layers, 0))
    kicks, helped = 0, 0
    while state.work[0] < updates and not data.stop[0] and problem.num_devices > 1:
        layer = int(rng.integers(layers))
        kicks += 1
        saved = _snapshot(data, state, layer)
        before = float(_score(data, state, layer))
        if local_L[layer]:
            moved = None
            if places > 1 and rng.random() < GROUP_KICKS:
                moved = moved_groups(problem, state.held_LED[layer], work_LE[layer], rng)
            if moved is None:
                _kick(data, state, layer, rng.random((int(rng.integers(1, 4)), 50, 4)))
            else:
                put_layer(data, state, layer, moved)
        after = float(_descend(data, state, layer, updates))
        local_L[layer] = True
        if after < before * BETTER:
            helped += 1
        else:
            _restore(state, layer, saved)
        state.work[0] += KICK_UPDATES
        if progress and kicks % 16 == 0:
            progress("perturbation", min(1.0, float(state.work[0]) / updates))
    return state, kicks, helped
