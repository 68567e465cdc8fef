"""Annealing for the split ``near`` on loads alone: the start that weighs what nodes keep against balance.

    minimise  sum_b w[b] ( |compute[b]|_8  +  2 |tokens[b] * seconds a token|_8  +  exchange[b] )

in every layer, norms over devices, homes equal, scenarios b a few steps, drawn where they can be
(:mod:`poise.planning.solve.scenarios`). Which requests meet on which device is chance; of loads alone a change costs
little, so that many are tried. As in :mod:`poise.planning.solve.anneal` a high power stands for the maximum, so that
every device counts. Tokens count beside seconds, which in small steps are reads of weights: whoever has most tokens has
most in the next traffic too, and then they decide. (Measured on
Llama-4, other requests: without that term imbalance 1.9 instead of 1.5, and 2 to 5 % slower.)

Step 1  Start: :mod:`poise.planning.solve.node_first`.
Step 2  Proposals: swap the contents of two slots of two devices, or replace a replica of a replicated expert by another
        expert. Accepted by Metropolis' rule, the temperature falling to 0 with the square of what is left.
Step 3  The best of all states is kept.
"""

from __future__ import annotations

# ruff: noqa: NPY002 - inside compiled code numpy's global generator is numba's own, seeded in the same call
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import exchange_seconds, fullest_ports, token_work
from poise.planning.budget import Budget
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.complete import as_held
from poise.planning.solve.effort import some_steps
from poise.planning.solve.node_first import node_first
from poise.planning.solve.records import Data, State
from poise.planning.solve.scenarios import can_be_drawn, drawn_steps
from poise.planning.solve.state import change, make_data, make_state
from poise.routing.batch import RoutingBatch
from poise.util.compiled import compiled

SCENARIOS = 8
"""Steps that are looked at, if there are so many. (Three times as many, and four times the proposals, gave no better
plans for other requests, half as many worse ones.)
"""
PROPOSALS = 60_000
"""Most proposals a layer."""
RATE = 1e7
"""Proposals in a nominal second, of one step and one device."""
HOT = 1e-3
"""First temperature, as a part of the seconds."""
REPLICA_SHARE = 0.4
"""Share of proposals that change replicas."""
BALANCE = 2.0
"""Weight of the tokens' norm."""


@compiled
def _norm(value_D: NDArray[np.float64], speed_D: NDArray[np.float64]) -> float:
    """|value / speed|_8."""
    most, out = 1e-300, 0.0
    for d in range(value_D.size):
        most = max(most, value_D[d] / speed_D[d])
    for d in range(value_D.size):
        x = value_D[d] / speed_D[d] / most
        x *= x
        x *= x
        out += x * x
    return most * out**0.125


@compiled(nogil=True)
def _balanced(data: Data, state: State, layer: int) -> float:
    """What is minimised."""
    machine, out = data.machine, 0.0
    ones_D = np.ones(machine.speed_D.size)
    for b in range(data.weight_B.size):
        tokens = BALANCE * token_work(machine) * _norm(state.tokens_LBD[layer, b], machine.speed_D)
        port = exchange_seconds(fullest_ports(state.port_LFBPD[layer, 0, b], machine), machine)
        out += data.weight_B[b] * (_norm(state.compute_LBD[layer, b], ones_D) + tokens + port)
    return out


@compiled(nogil=True)
def _keep(state: State, layer: int, best_ED: NDArray[np.bool_]) -> None:
    """Copy who holds what in one layer."""
    experts, devices = best_ED.shape
    for e in range(experts):
        for d in range(devices):
            best_ED[e, d] = state.held_LED[layer, e, d]


@compiled(nogil=True)
def _anneal(data: Data, state: State, layer: int, proposals: int, draws_seed: int, best_ED: NDArray[np.bool_]) -> None:
    """Steps 2 and 3 in one layer; the best state in ``best_ED`` [E, D], the last one in ``state``."""
    np.random.seed(draws_seed)
    experts = state.held_LED.shape[1]
    four_e, four_d = np.empty(4, np.int64), np.empty(4, np.int64)
    now = _balanced(data, state, layer)
    best = now
    _keep(state, layer, best_ED)
    for turn in range(proposals):
        if data.stop[0]:
            return
        heat = HOT * now * (1.0 - turn / proposals) ** 2
        limit = now - heat * np.log(max(np.random.random(), 1e-300))
        e, f = np.random.randint(experts), np.random.randint(experts)
        swap = np.random.random() >= REPLICA_SHARE
        for _ in range(experts):
            if swap or state.copies_LE[layer, e] > 1:
                break
            e = (e + 1) % experts
        a = state.hold_LED[layer, e, np.random.randint(state.copies_LE[layer, e])]
        c = state.hold_LED[layer, f, np.random.randint(state.copies_LE[layer, f])] if swap else a
        if e == f or state.held_LED[layer, f, a]:
            continue
        if data.place_D[state.hold_LED[layer, f, 0]] != data.place_D[a]:
            continue
        if (a == c or state.held_LED[layer, e, c]) if swap else state.copies_LE[layer, e] < 2:
            continue
        four_e[0], four_e[1], four_e[2], four_e[3] = e, f, e, f
        four_d[0], four_d[1], four_d[2], four_d[3] = a, a, c, c
        these_e, these_d = (four_e, four_d) if swap else (four_e[:2], four_d[:2])
        if not change(data, state, layer, these_e, these_d, limit):
            continue
        after = _balanced(data, state, layer)
        if after > limit:
            change(data, state, layer, these_e[::-1].copy(), these_d[::-1].copy(), np.inf)  # as in descent
            continue
        now = after
        if now < best:
            best = now
            _keep(state, layer, best_ED)


def proposals_within(problem: PlacementProblem, seconds: float) -> tuple[int, float]:
    """Proposals a layer that fit in so many nominal seconds, and how many of them they take."""
    each = SCENARIOS * problem.num_devices * problem.batch.num_layers / RATE
    proposals = min(PROPOSALS, int(seconds / each))
    return proposals, proposals * each


def near_starts(
    whole: PlacementProblem, problem: PlacementProblem, *, proposals: int, seed: int, budget: Budget
) -> Iterator[Placement]:
    """Node-first, and annealed from there, with all slots filled where engines want them so; ``problem`` has the steps
    that the search looks at.
    """
    first = as_held(problem, node_first(whole))
    yield first
    if whole.risk == "mean" and can_be_drawn(whole.batch):
        problem = replace(whole, batch=drawn_steps(whole.batch, SCENARIOS, seed + 2))
    yield near_annealed(problem, first, proposals=proposals, seed=seed, budget=budget)


def near_annealed(
    problem: PlacementProblem, start: Placement, *, proposals: int, seed: int, budget: Budget
) -> Placement:  # fmt: skip
    """A placement for the loads of some steps of a problem; slots are counted by layer. Layers that the clock of a
    budget cuts are the best until then.
    """
    problem = _of_loads(some_steps(problem, SCENARIOS, problem.batch.num_steps), start)
    held_LED = start.count_LED() > 0
    data = make_data(problem, 0)
    state = make_state(data, problem, held_LED)
    with budget.stops(data.stop, "annealing near"):
        for layer, held_ED in enumerate(held_LED):
            _anneal(data, state, layer, proposals, seed + layer, held_ED)
    return problem.placed(held_LED, "near-annealed")


def _of_loads(problem: PlacementProblem, start: Placement) -> PlacementProblem:
    """The problem with loads alone; copies that the data flow saves under ``start``, and all layers alike, are taken
    off the bytes of one.
    """
    batch, model = problem.batch, problem.model
    loads = RoutingBatch(batch.load_BLE, batch.weight_B, batch.top_k, batch.layer_ids_L)
    count_LED = start.count_LED()
    out = replace(problem, batch=loads, traffic="home")
    known, alone = (one.pricing.cost(one.batch, count_LED) for one in (problem, out))
    start_s = problem.cluster.dispatch_wire.start_s
    sent = [float((cost.dispatch_BL - start_s * (cost.pairs_BL > 0)).sum()) for cost in (known, alone)]
    part = sent[0] / sent[1] if min(sent) > 0 else 1.0
    fewer = replace(model, dispatch_bytes=model.dispatch_bytes * part, combine_bytes=model.combine_bytes * part)
    return replace(out, model=fewer)
