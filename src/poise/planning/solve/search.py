"""The ``poise`` planner: starts from every method, then swaps, moves and replica moves on the full cost.

Step 1  Starts: the placements of all other methods, one annealed for balance in every scenario
        (:mod:`poise.planning.solve.anneal`), and, where traffic is linear, affinity assignments. Under the
        home data flows layers do not depend on each other, so the best start of each layer is taken; under ``stay``
        the best whole one. With replicas, the best start without them goes beside it through step 2.
Step 2  Descent, layer by layer, first improvement: swap two experts of two devices; move one to a free slot; replace a
        redundant replica by another expert; where the engine may have empty slots, drop one or add one. Devices that
        decide a maximum come first.
Step 3  Perturbation: a few random swaps in the layer with the largest gap to its bound, descent again, and back if
        that did not help, until the work budget is spent.
Step 4  Of the result and all starts that are at least as good as every other method's placement under
        :func:`poise.cost.step.batch_cost`, the independent evaluator, the best; or, where that is 3 % better, the one
        that costs least when the expected loads shift at random. The plan is never worse than a rival's on the fitted
        traffic.

The budget is counted in elementary updates, not seconds, so the result depends on the seed alone; the wall clock only
stops a run that would take four times its limit. Under the exact split the search works on the even one, and step 4
chooses by the exact one.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.compiled import compiled
from poise.cost.step import batch_cost
from poise.observe.batch import RoutingBatch
from poise.planning.methods.lpt import pack
from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.planning.solve.affinity import affinity_start
from poise.planning.solve.anneal import PROPOSALS, annealed
from poise.planning.solve.complete import complete
from poise.planning.solve.fill import filled
from poise.planning.solve.state import STAY, Data, State, change, layer_seconds, make_data, make_state, rebuild

UPDATES_PER_SECOND = 30e6
"""Elementary updates a second on one core: turns a time limit into a work budget."""
KICK_UPDATES = 15_000
"""What one perturbation costs beside its updates."""
PROPOSALS_PER_SECOND = 8e6
SHIFT, SHIFTS = 0.15, 8
"""Log-normal spread of the loads that step 4 tries, and how many draws."""
WORTH = 0.03
"""Share of the shifted cost for which step 4 gives up some of the fitted one."""
MAX_ROWS = 3_000_000
BETTER = 1.0 - 1e-9


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
    change(data, state, layer, experts[::-1], devices[::-1], np.inf)
    return best


@compiled(nogil=True)
def _device_order(data, state, layer):  # type: ignore[no-untyped-def]
    """Devices by how often they decide a maximum, the most deciding first."""
    steps, devices = data.weight_B.size, data.speed_D.size
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
                    top = max(top, state.port_LFPBD[layer, 0, kind, b, d2])
                power[d] += 0.25 * data.weight_B[b] * (state.port_LFPBD[layer, 0, kind, b, d] / top) ** 8
    return np.argsort(-power)


@compiled(nogil=True)
def _room(state, layer, d):  # type: ignore[no-untyped-def]
    group = layer if state.room_GD.shape[0] > 1 or state.held_LED.shape[0] == 1 else 0
    return state.room_GD[group, d] > 0 and state.used_LD[layer, d] < state.held_LED.shape[1]


@compiled(nogil=True)
def _descend_from(data, state, layer, a, best, limit):  # type: ignore[no-untyped-def]
    """All changes that involve device a; returns the score."""
    experts, devices = state.held_LED.shape[1], data.speed_D.size
    one_e, one_d = np.empty(1, np.int64), np.empty(1, np.int64)
    two_e, two_d = np.empty(2, np.int64), np.empty(2, np.int64)
    four_e, four_d = np.empty(4, np.int64), np.empty(4, np.int64)
    for e in range(experts):
        if state.work[0] > limit:
            return best
        if not state.held_LED[layer, e, a]:
            if _room(state, layer, a):  # add a replica
                one_e[0], one_d[0] = e, a
                best = _try(data, state, layer, one_e, one_d, best)
            continue
        for c in range(devices):
            if c == a or state.held_LED[layer, e, c]:
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
            if not state.held_LED[layer, e, a] or state.work[0] > limit:
                break
        if state.held_LED[layer, e, a] and state.copies_LE[layer, e] > 1:
            if not data.keep_full:
                one_e[0], one_d[0] = e, a  # drop a replica
                best = _try(data, state, layer, one_e, one_d, best)
            for f in range(experts):  # replace it by another expert
                if not state.held_LED[layer, e, a] or state.copies_LE[layer, e] < 2:
                    break
                if not state.held_LED[layer, f, a]:
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
        if best >= before * (1.0 - 1e-7) or state.work[0] > limit:
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
            if a != c and not state.held_LED[layer, e, c] and not state.held_LED[layer, f, a]:
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
    for name in ("hold_LED", "copies_LE", "held_LED", "used_LD", "compute_LBD", "tokens_LBD", "port_LFPBD"):
        getattr(to, name)[layer] = getattr(other, name)[layer]
    for later in range(layer + 1, int(data.reach_L[layer]) + 1):
        rebuild(data, to, later)


def _snapshot(data: Data, state: State, layer: int) -> tuple[NDArray[Any], ...]:
    room = state.room_GD.copy()
    last = int(data.reach_L[layer]) + 1
    return (
        room, state.hold_LED[layer].copy(), state.copies_LE[layer].copy(), state.held_LED[layer].copy(),
        state.used_LD[layer].copy(), state.compute_LBD[layer].copy(), state.tokens_LBD[layer].copy(),
        state.port_LFPBD[layer:last].copy(),
    )  # fmt: skip


def _restore(state: State, layer: int, saved: tuple[NDArray[Any], ...]) -> None:
    state.room_GD[:] = saved[0]
    names = ("hold_LED", "copies_LE", "held_LED", "used_LD", "compute_LBD", "tokens_LBD")
    for name, value in zip(names, saved[1:7], strict=True):
        getattr(state, name)[layer] = value
    state.port_LFPBD[layer : layer + len(saved[7])] = saved[7]


def _seconds_L(problem: PlacementProblem, placement: Placement) -> NDArray[np.float64]:
    cost = batch_cost(problem.batch, placement.count_LED(), problem.cluster, problem.model, traffic=problem.traffic,
                      split=problem.split)  # fmt: skip
    out: NDArray[np.float64] = problem.batch.weight_B @ cost.seconds_BL
    return out


def _best_layers(problem: PlacementProblem, options: list[Placement]) -> Placement:
    """Each layer from the option that is fastest there under the problem's own split; layers do not depend on others.

    The search itself works on the even split, so under the exact one this is where its layers meet those of rivals.
    """
    best_L = np.stack([_seconds_L(problem, option) for option in options]).argmin(axis=0)
    count_LED = np.stack([options[best].count_LED()[layer] for layer, best in enumerate(best_L.tolist())])
    return Placement.from_counts(count_LED, slots_D=problem.slots_D, layer_ids_L=problem.batch.layer_ids_L,
                                 method="best-layers")  # fmt: skip


def _shift_seconds(problem: PlacementProblem, placements: list[Placement], seed: int) -> list[float]:
    """What shifted loads cost on top: each expert's load times a log-normal factor, the same for all placements."""
    batch = problem.batch
    load_LE = batch.load_LE()
    rng = np.random.default_rng(seed)
    draws = load_LE * np.exp(SHIFT * rng.standard_normal((SHIFTS, *load_LE.shape)))
    draws *= load_LE.sum(axis=1)[None, :, None] / np.maximum(draws.sum(axis=2, keepdims=True), 1e-300)
    both = np.concatenate([load_LE[None], draws])
    loads = RoutingBatch(both, np.full(len(both), 1 / len(both)), batch.top_k, batch.layer_ids_L.copy())
    out = []
    for placement in placements:
        cost = batch_cost(loads, placement.count_LED(), problem.cluster, problem.model, traffic="home",
                          split=problem.split).seconds_BL.mean(axis=1)  # fmt: skip
        out.append(float(cost[1:].mean() - cost[0]))
    return out


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


def plain_start(problem: PlacementProblem) -> Placement:
    """LPT without replicas; redundant slots stay empty."""
    batch = problem.batch
    slots = np.minimum(problem.slots_D, batch.num_experts)
    ones = np.ones(batch.num_experts, np.int64)
    counts = np.stack([pack(load, ones, slots, problem.cluster.speed_D) for load in batch.load_LE()])
    return Placement.from_counts(
        counts, slots_D=None if problem.pooled else problem.slots_D, layer_ids_L=batch.layer_ids_L, method="lpt-plain"
    )


def _best_start(data: Data, problem: PlacementProblem, starts: list[Placement]) -> State:
    """Step 1."""
    states = [make_state(data, problem, np.asarray(start.count_LED() > 0)) for start in starts]
    layers = problem.batch.num_layers
    score = np.array([[layer_seconds(data, state, layer) for layer in range(layers)] for state in states])
    best = states[int(np.argmin(score.sum(axis=1)))]
    if problem.pooled or (data.flow == STAY and data.has_tokens):
        return best
    for layer in range(layers):
        _copy_layer(data, best, states[int(np.argmin(score[:, layer]))], layer)
    return best


def search(
    problem: PlacementProblem,
    starts: list[Placement],
    *,
    time_limit_s: float,
    seed: int,
    progress: Progress | None = None,
) -> MethodResult:
    """Improve the best of ``starts`` (feasible placements, at least one) for about ``time_limit_s`` seconds."""
    data = make_data(problem, MAX_ROWS)
    pool = [*starts, plain_start(problem), *affinity_start(problem)]
    if problem.num_devices > 1 and not problem.pooled:
        proposals = min(PROPOSALS, int(0.3 * time_limit_s * PROPOSALS_PER_SECOND / problem.batch.num_layers))
        pool.append(annealed(problem, proposals=proposals, seed=seed))
        if problem.split == "exact" and problem.spare_slots > 0:
            pool.append(filled(problem, seed=seed))
    is_plain = [int(start.replicas_LE().max()) == 1 for start in pool]
    if not problem.engine.empty_slots:
        pool = [complete(problem, start) for start in pool]
    states = [_best_start(data, problem, pool)]
    if (states[0].copies_LE > 1).any():
        # Replicas cost weight reads, and descent seldom drops all of them, or, where the engine wants slots filled,
        # replaces all: descend from none, or from those that filling adds, as well.
        states.append(_best_start(data, problem, [start for start, plain in zip(pool, is_plain, strict=True) if plain]))
    _descend(data, states[0], 0, -1)  # compiles, so that compiling does not count as search
    began = time.monotonic()
    layers = problem.batch.num_layers
    budget = time_limit_s * UPDATES_PER_SECOND
    local = np.zeros((len(states), layers), dtype=bool)
    for turn, state in enumerate(states):
        state.work[0] = 0
        for layer in range(layers):
            limit = budget * 0.7 / len(states) * (layer + 1) / layers
            rebuild(data, state, layer)
            _descend(data, state, layer, limit)
            local[turn, layer] = state.work[0] <= limit
            if progress:
                progress("descent", (turn * layers + layer + 1) / layers / len(states))
            if time.monotonic() - began > 4 * time_limit_s:
                break
    state, local_L = _merge(data, problem, states, local)
    state.work[0] = sum(int(each.work[0]) for each in states)
    rng = np.random.default_rng(seed)
    kicks, helped = 0, 0
    while state.work[0] < budget and time.monotonic() - began < 4 * time_limit_s and problem.num_devices > 1:
        layer = int(rng.integers(layers))
        kicks += 1
        saved = _snapshot(data, state, layer)
        before = float(_score(data, state, layer))
        if local_L[layer]:
            _kick(data, state, layer, rng.random((int(rng.integers(1, 4)), 50, 4)))
        after = float(_descend(data, state, layer, budget))
        local_L[layer] = True
        if after < before * BETTER:
            helped += 1
        else:
            _restore(state, layer, saved)
        state.work[0] += KICK_UPDATES
        if progress and kicks % 16 == 0:
            progress("perturbation", min(1.0, float(state.work[0]) / budget))
    found = Placement.from_counts(
        state.held_LED.astype(np.int32), slots_D=None if problem.pooled else problem.slots_D,
        layer_ids_L=problem.batch.layer_ids_L, method="poise",
    )  # fmt: skip
    options = [found, *pool]
    if not (problem.pooled or problem.traffic == "stay"):
        options.append(_best_layers(problem, options))
    seconds = [float(_seconds_L(problem, o).mean()) + problem.migration_seconds(o) for o in options]
    # at least as good as every start that others would have used; among those, the one that holds when loads shift
    limit = min(seconds[1 : 1 + len(starts)] or seconds)
    fit = [i for i, value in enumerate(seconds) if value <= limit * (1 + 1e-9)]
    shifted = _shift_seconds(problem, [options[i] for i in fit], seed)
    total = {i: seconds[i] + more for i, more in zip(fit, shifted, strict=True)}
    best, robust = min(fit, key=seconds.__getitem__), min(total, key=total.__getitem__)
    if total[robust] < (1 - WORTH) * total[best]:
        best = robust
    chosen = options[best]
    details = {
        "updates": int(state.work[0]),
        "kicks": kicks,
        "kicks_that_helped": helped,
        "chosen": "search" if best == 0 else chosen.method,
        "starts": {o.method: value for o, value in zip(pool, seconds[1:], strict=False)},
    }
    return MethodResult(Placement(chosen.slot_expert_LS, chosen.slot_device_S, chosen.num_experts, chosen.num_devices,
                                  chosen.layer_ids_L, "poise"), details)  # fmt: skip
