"""The ``poise`` planner: starts from every method, then swaps, moves and replica moves on the full cost.

Step 1  Starts: the placements of all other methods, one annealed for balance in every scenario
        (:mod:`poise.planning.solve.anneal`), under the split ``near`` two with nodes before devices
        (:mod:`poise.planning.solve.node_first`, :mod:`poise.planning.solve.near_anneal`), and, where traffic is
        linear, affinity assignments. Under the
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

Where enough requests are known (not for ``stay``, and for no other risk than the mean), steps 1 to 3 look at steps
drawn anew from them, and step 4 chooses by others (:mod:`poise.planning.solve.scenarios`): a plan must hold for
requests that it does not know.

The budget is counted in elementary updates, and traffic that would take too much of it is searched on evenly spaced
steps (:mod:`poise.planning.solve.effort`), so the result depends on limit and seed alone, unless the clock cuts it.
Under the exact split the search works on the even one, and step 4 chooses by the exact one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_times
from poise.cost.step import batch_cost
from poise.planning.budget import UPDATES_PER_SECOND, Budget, Limit
from poise.planning.methods.lpt import pack
from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.planning.solve.affinity import affinity_start
from poise.planning.solve.anneal import PROPOSALS, annealed
from poise.planning.solve.complete import complete
from poise.planning.solve.effort import price_seconds, some_steps, state_seconds
from poise.planning.solve.fill import filled
from poise.planning.solve.near_anneal import near_annealed, proposals_within
from poise.planning.solve.node_first import node_first
from poise.planning.solve.scenarios import DRAWN, JUDGED, MOST_DRAWN, can_be_drawn, drawn_steps
from poise.planning.solve.state import (
    STAY,
    TIE_BREAK,
    Data,
    State,
    change,
    layer_seconds,
    make_data,
    make_state,
    rebuild,
)
from poise.routing.batch import RoutingBatch
from poise.util.compiled import compiled

KICK_UPDATES = 15_000
"""What one perturbation costs beside its updates."""
PROPOSALS_PER_SECOND = 8e6
SHIFT, SHIFTS = 0.15, 8
"""Log-normal spread of the loads that step 4 tries, and how many draws."""
WORTH = 0.03
"""Share of the shifted cost for which step 4 gives up some of the fitted one."""
MAX_ROWS = 3_000_000
OVERHEAD, LEAST_SEARCH, UNTIL = 0.5, 0.2, 0.95
"""Shares of the seconds: most for prices and data, where there are steps to leave out; least for steps 2 and 3; when
the clock ends those.
"""
OPTIONS = 6
"""Placements that are priced beside the starts."""
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
    one_e, one_d = np.empty(1, np.int64), np.empty(1, np.int64)
    two_e, two_d = np.empty(2, np.int64), np.empty(2, np.int64)
    four_e, four_d = np.empty(4, np.int64), np.empty(4, np.int64)
    for e in range(experts):
        if state.work[0] > limit or data.stop[0]:
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
            if not state.held_LED[layer, e, a] or state.work[0] > limit or data.stop[0]:
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
    for name in ("hold_LED", "copies_LE", "held_LED", "used_LD", "compute_LBD", "tokens_LBD", "port_LFBPD"):
        getattr(to, name)[layer] = getattr(other, name)[layer]
    for later in range(layer + 1, int(data.reach_L[layer]) + 1):
        rebuild(data, to, later)


def _snapshot(data: Data, state: State, layer: int) -> tuple[NDArray[Any], ...]:
    room = state.room_GD.copy()
    last = int(data.reach_L[layer]) + 1
    return (
        room, state.hold_LED[layer].copy(), state.copies_LE[layer].copy(), state.held_LED[layer].copy(),
        state.used_LD[layer].copy(), state.compute_LBD[layer].copy(), state.tokens_LBD[layer].copy(),
        state.port_LFBPD[layer:last].copy(),
    )  # fmt: skip


def _restore(state: State, layer: int, saved: tuple[NDArray[Any], ...]) -> None:
    state.room_GD[:] = saved[0]
    names = ("hold_LED", "copies_LE", "held_LED", "used_LD", "compute_LBD", "tokens_LBD")
    for name, value in zip(names, saved[1:7], strict=True):
        getattr(state, name)[layer] = value
    state.port_LFBPD[layer : layer + len(saved[7])] = saved[7]


def _best_layers(problem: PlacementProblem, options: list[Placement], seconds_OL: NDArray[np.float64]) -> Placement:
    """Each layer from the option that is fastest there under the problem's own split; layers do not depend on others.

    The search itself works on the even split, so under the exact one this is where its layers meet those of rivals.
    """
    best_L = seconds_OL.argmin(axis=0)
    counts = {best: options[best].count_LED() for best in set(best_L.tolist())}
    count_LED = np.stack([counts[best][layer] for layer, best in enumerate(best_L.tolist())])
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


def _choose(
    whole: PlacementProblem, given: PlacementProblem, problem: PlacementProblem, options: list[Placement],
    seconds: list[float], starts: int, seed: int,
) -> int:  # fmt: skip
    """Step 4: number of the option that is taken; ``seconds`` are theirs on the steps that were searched.

    The first option is the search's, the next ``starts`` are other methods'.
    """
    if given is not problem:  # what was given decides who is as good as others, steps that nobody has seen who is best
        own = [float(_price(given, o).seconds_L.mean()) + given.migration_seconds(o) for o in options]
        others = replace(whole, batch=drawn_steps(whole.batch, JUDGED, seed + 1))
        score = [float(_price(others, o).seconds_L.mean()) + others.migration_seconds(o) for o in options]
        limit = min(own[1 : 1 + starts])
        return min((i for i, value in enumerate(own) if value <= limit * (1 + 1e-9)), key=score.__getitem__)
    limit = min(seconds[1 : 1 + starts])
    fit = [i for i, value in enumerate(seconds) if value <= limit * (1 + 1e-9)]
    shifted = _shift_seconds(problem, [options[i] for i in fit], seed)
    total = {i: seconds[i] + more for i, more in zip(fit, shifted, strict=True)}
    best, robust = min(fit, key=seconds.__getitem__), min(total, key=total.__getitem__)
    return robust if total[robust] < (1 - WORTH) * total[best] else best


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


def _best_start(
    data: Data, problem: PlacementProblem, starts: list[Placement], scores_SL: NDArray[np.float64]
) -> State:
    """Step 1: the state of the best start, or of the best of each layer, by their ``scores_SL`` [starts, L]."""
    best = starts[int(np.argmin(scores_SL.sum(axis=1)))].count_LED() > 0
    if not (problem.pooled or (data.flow == STAY and data.has_tokens)):
        picks = scores_SL.argmin(axis=0).tolist()
        counts = {pick: starts[pick].count_LED() for pick in set(picks)}
        best = np.stack([counts[pick][layer] > 0 for layer, pick in enumerate(picks)])
    return make_state(data, problem, best)


@dataclass(frozen=True, slots=True)
class _Price:
    """A placement under the independent evaluator, float64 [L] each: seconds, and what the search counts of them."""

    seconds_L: NDArray[np.float64]
    score_L: NDArray[np.float64]


def _price(problem: PlacementProblem, placement: Placement) -> _Price:
    batch, cluster, count_LED = problem.batch, problem.cluster, placement.count_LED()
    cost = problem.pricing.cost(batch, count_LED)
    seconds_L: NDArray[np.float64] = batch.weight_B @ cost.seconds_BL
    if problem.split == "exact":  # the search works on the even split
        cost = problem.pricing.cost(batch, count_LED, split="even")
    most_BL = (cost.tokens_BLD / cluster.speed_D).max(axis=2)
    times = expert_times(cluster, problem.model)
    per_token = times.compute_s + times.activation_s
    return _Price(seconds_L, batch.weight_B @ (cost.seconds_BL + TIE_BREAK * per_token * most_BL))


def _own_starts(
    whole: PlacementProblem, problem: PlacementProblem, proposals: int, near: int, budget: Budget, seed: int
) -> Iterator[Placement]:
    """Step 1: starts beside those of other methods; ``problem`` has some of the steps of the ``whole``."""
    yield plain_start(whole)
    yield from affinity_start(problem)
    if problem.num_devices > 1 and not problem.pooled:
        yield annealed(whole, proposals=proposals, seed=seed, budget=budget)
        if problem.split == "exact" and problem.spare_slots > 0:
            yield filled(whole, seed=seed)
        if problem.split == "near" and problem.cluster.num_nodes > 1:
            first = complete(problem, node_first(whole))
            yield first
            yield near_annealed(problem, first, proposals=near, seed=seed, budget=budget)


def _descents(
    data: Data, problem: PlacementProblem, states: list[State], updates: float, seed: int, progress: Progress | None
) -> tuple[State, int, int]:
    """Steps 2 and 3, until ``updates`` are made or ``data.stop`` is set: state, kicks, and how many of them helped."""
    layers = problem.batch.num_layers
    local = np.zeros((len(states), layers), dtype=bool)
    for turn, state in enumerate(states):
        state.work[0] = 0
        for layer in range(layers):
            limit = updates * 0.7 / len(states) * (layer + 1) / layers
            rebuild(data, state, layer)
            _descend(data, state, layer, limit)
            local[turn, layer] = state.work[0] <= limit
            if progress:
                progress("descent", (turn * layers + layer + 1) / layers / len(states))
            if data.stop[0]:
                break
    state, local_L = _merge(data, problem, states, local)
    state.work[0] = sum(int(each.work[0]) for each in states)
    rng = np.random.default_rng(seed)
    kicks, helped = 0, 0
    while state.work[0] < updates and not data.stop[0] and problem.num_devices > 1:
        layer = int(rng.integers(layers))
        kicks += 1
        saved = _snapshot(data, state, layer)
        before = float(_score(data, state, layer))
        if local_L[layer]:
            _kick(data, state, layer, rng.random((int(rng.integers(1, 4)), 50, 4)))
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


def search(
    problem: PlacementProblem,
    starts: list[Placement],
    *,
    time_limit_s: Limit,
    seed: int,
    progress: Progress | None = None,
    behind_s: float = 0.0,
) -> MethodResult:
    """Improve the best of ``starts`` (feasible placements, at least one) within a budget.

    ``behind_s`` are nominal seconds that the starts took more than theirs, negative where they left some.
    """
    budget, whole = Budget.of(time_limit_s), problem
    drawn = whole.traffic != "stay" and whole.risk == "mean" and can_be_drawn(whole.batch)
    if drawn:
        steps = min(max(whole.batch.num_steps, DRAWN), MOST_DRAWN)
        problem = replace(whole, batch=drawn_steps(whole.batch, steps, seed))
    each = price_seconds(problem) * (1 + (problem.split == "exact"))
    overhead = (len(starts) + OPTIONS) * each + state_seconds(problem)
    most = min(overhead, OVERHEAD * budget.seconds + max(0.0, -behind_s))
    problem = some_steps(problem, budget.afford(most, "steps"), overhead)
    given = some_steps(whole, budget.seconds, overhead) if drawn else problem
    proposals = min(PROPOSALS, int(0.3 * budget.seconds * PROPOSALS_PER_SECOND / problem.batch.num_layers))
    near, near_s = proposals_within(problem, 0.3 * budget.seconds * (problem.split == "near"))
    data = make_data(problem, MAX_ROWS)
    pool: list[Placement] = []
    prices: list[_Price] = []
    plain: list[bool] = []
    for start in chain(starts, _own_starts(whole, problem, proposals, near, budget.part(0.3, until=0.8), seed)):
        if pool and budget.over("starts"):
            break
        plain.append(int(start.replicas_LE().max()) == 1)
        pool.append(start if problem.engine.empty_slots else complete(problem, start))
        prices.append(_price(problem, pool[-1]))
    score_OL = np.stack([price.score_L for price in prices])
    states = [_best_start(data, problem, pool, score_OL)]
    if (states[0].copies_LE > 1).any() and any(plain):
        # Replicas cost weight reads, and descent seldom drops all of them, or, where the engine wants slots filled,
        # replaces all: descend from none, or from those that filling adds, as well.
        bare = np.flatnonzero(plain)
        states.append(_best_start(data, problem, [pool[i] for i in bare], score_OL[bare]))
    overhead *= problem.batch.num_steps / max(problem.batch.num_steps, whole.batch.num_steps)
    late = behind_s + overhead + near_s + proposals * problem.batch.num_layers / PROPOSALS_PER_SECOND
    updates = UPDATES_PER_SECOND * max(LEAST_SEARCH * budget.seconds, budget.seconds - max(0.0, late))
    with budget.part(1.0, until=UNTIL).stops(data.stop):
        state, kicks, helped = _descents(data, problem, states, updates, seed, progress)
    if data.stop[0] and state.work[0] < updates:
        budget.cuts.add("search")
    found = Placement.from_counts(
        state.held_LED.astype(np.int32), slots_D=None if problem.pooled else problem.slots_D,
        layer_ids_L=problem.batch.layer_ids_L, method="poise",
    )  # fmt: skip
    options, prices = [found, *pool], [_price(problem, found), *prices]
    if not (problem.pooled or problem.traffic == "stay"):
        options.append(_best_layers(problem, options, np.stack([price.seconds_L for price in prices])))
        prices.append(_price(problem, options[-1]))
    seconds = [float(p.seconds_L.mean()) + problem.migration_seconds(o) for o, p in zip(options, prices, strict=True)]
    best = _choose(whole, given, problem, options, seconds, len(starts), seed)
    chosen = options[best]
    details = {
        "updates": int(state.work[0]),
        "kicks": kicks,
        "kicks_that_helped": helped,
        "chosen": "search" if best == 0 else chosen.method,
        "starts": {o.method: value for o, value in zip(pool, seconds[1:], strict=False)},
    }
    if problem.batch.sampled:
        details["searched_on"] = problem.batch.sampled
    return MethodResult(Placement(chosen.slot_expert_LS, chosen.slot_device_S, chosen.num_experts, chosen.num_devices,
                                  chosen.layer_ids_L, "poise"), details)  # fmt: skip
