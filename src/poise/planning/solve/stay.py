"""``poise-stay``: placement with replicas for traffic that stays where it is (``stay``, ExFlow's data flow).

With a dispatch that keeps a token on its device wherever that holds its next expert (the ``split`` policy), an expert
with a replica on every device never makes a token move, and its tokens are the filler that balances the devices.
What is left is a graph partition.

Step 1  Redundant slots: the hottest experts of each layer go to every device (D - 1 slots each). One slot left over
        on a device gets the hottest expert that it does not hold.
Step 2  Graph: nodes are the other (layer, expert) pairs; an edge weighs how many tokens go from one to the other,
        layers in which a token used an expert of step 1, or none, skipped.
Step 3  Simulated annealing over swaps of two experts of a layer: maximise the edge weight inside devices, minus a
        price on owners' loads above :data:`FILL` of the mean: the filler can lift a device, but not lower it.
"""

from __future__ import annotations

# ruff: noqa: NPY002 - inside compiled code numpy's global generator is numba's own, seeded in the same call
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.planning.budget import Budget, Limit
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.routing.trace import NO_EXPERT
from poise.util.compiled import compiled
from poise.util.errors import NoResultError

PROPOSALS = 2_000_000
"""A layer; fewer where the time limit does not allow as many."""
PROPOSALS_PER_SECOND = 2.5e6
HOT, COLD = 2e-3, 1e-5
"""First and last temperature, in shares of all tokens."""
FILL, PRICE = 0.6, 0.3


class StayGraph(NamedTuple):
    """Step 2's graph; nodes are layer * E + expert, int64 [L * E].

    Parameters
    ----------
    ptr, neighbour, weight : edges of each node: offsets int64 [L * E + 1], other ends int64, shares of all tokens.
    load : float64 [L * E], relative to a device's mean.
    fixed : bool [L * E], experts of step 1, which lie everywhere.
    layers, experts, devices : L, E, D.
    """

    ptr: NDArray[np.int64]
    neighbour: NDArray[np.int64]
    weight: NDArray[np.float64]
    load: NDArray[np.float64]
    fixed: NDArray[np.bool_]
    layers: int
    experts: int
    devices: int


@compiled(nogil=True)
def _anneal(graph: StayGraph, owner: NDArray[np.int64], proposals: int, seed: int, stop: NDArray[np.int64]) -> None:
    """Swap owners (int64 [L * E], in place); ``stop`` int64 [1]: not 0 once the clock has run out."""
    np.random.seed(seed)
    ptr, neighbour, weight, load, fixed, layers, experts, devices = graph
    x = np.zeros((layers, devices))
    for n in range(layers * experts):
        if not fixed[n]:
            x[n // experts, owner[n]] += load[n]
    for turn in range(proposals):
        if turn % 1024 == 0 and stop[0]:
            break
        heat = HOT * (COLD / HOT) ** (turn / proposals)
        layer = np.random.randint(layers)
        e, f = layer * experts + np.random.randint(experts), layer * experts + np.random.randint(experts)
        a, c = owner[e], owner[f]
        if a == c or fixed[e] or fixed[f]:
            continue
        gain = 0.0
        for i in range(ptr[e], ptr[e + 1]):
            other = owner[neighbour[i]]
            if not fixed[neighbour[i]]:
                gain += weight[i] * ((other == c) - (other == a))
        for i in range(ptr[f], ptr[f + 1]):
            other = owner[neighbour[i]]
            if not fixed[neighbour[i]]:
                gain += weight[i] * ((other == a) - (other == c))
        on_a, on_c = x[layer, a] - load[e] + load[f], x[layer, c] - load[f] + load[e]
        above = max(0.0, on_a - FILL) ** 2 + max(0.0, on_c - FILL) ** 2
        above -= max(0.0, x[layer, a] - FILL) ** 2 + max(0.0, x[layer, c] - FILL) ** 2
        gain -= PRICE * above
        if gain >= 0.0 or np.random.random() < np.exp(gain / heat):
            owner[e], owner[f] = c, a
            x[layer, a], x[layer, c] = on_a, on_c


def _graph(experts_TLK: NDArray[np.int16], everywhere_LE: NDArray[np.bool_]) -> tuple[NDArray[np.int64], ...]:
    """Step 2: offsets int64 [L * E + 1], neighbours and tokens of both directions."""
    layers, experts = everywhere_LE.shape
    first_TL = experts_TLK[:, :, 0].astype(np.int64)
    node_TL = first_TL + np.arange(layers) * experts
    skipped_TL = (first_TL == NO_EXPERT) | everywhere_LE.ravel()[node_TL]
    last_T = np.full(len(node_TL), -1)
    pairs = [np.zeros((0, 2), np.int64)]
    for layer in range(layers):
        here_T = ~skipped_TL[:, layer]
        go_T = here_T & (last_T >= 0)
        pairs.append(np.stack([last_T[go_T], node_TL[go_T, layer]], axis=1))
        last_T[here_T] = node_TL[here_T, layer]
    flat = np.concatenate(pairs)
    key, tokens = np.unique(flat[:, 0] * (layers * experts) + flat[:, 1], return_counts=True)
    ends = np.stack([key // (layers * experts), key % (layers * experts)])
    source, neighbour = np.concatenate(ends), np.concatenate(ends[::-1])
    order = np.argsort(source, kind="stable")
    ptr = np.searchsorted(source[order], np.arange(layers * experts + 1))
    return ptr.astype(np.int64), neighbour[order], np.concatenate([tokens, tokens])[order]


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """See the module docstring; ``details["stay_weight"]`` is the share of moves inside devices that step 3 counts.

    Raises
    ------
    NoResultError : loads without tokens, or devices with unequal slots.
    """
    batch, devices, budget = problem.batch, problem.num_devices, Budget.of(time_limit_s)
    experts_TLK = problem.tokens_for("poise-stay")
    slots_D = problem.slots_D
    if problem.pooled or (slots_D != slots_D[0]).any():
        raise NoResultError(f"poise-stay needs as many slots on every device, got {slots_D.tolist()[:8]}")
    layers, experts = batch.num_layers, batch.num_experts
    load_LE = batch.load_BLE.sum(axis=0)
    spare = int(slots_D.sum()) - experts
    hot = min(spare // (devices - 1), experts) if devices > 1 else 0
    everywhere = np.zeros((layers, experts), dtype=bool)
    np.put_along_axis(everywhere, np.argsort(-load_LE, axis=1, kind="stable")[:, :hot], True, axis=1)
    # an expert of step 1 sits in one slot of every device; its owner entry only keeps the sizes equal
    rng = np.random.default_rng(seed)
    owner = np.zeros(layers * experts, np.int64)
    for layer in range(layers):
        others = rng.permutation(np.flatnonzero(~everywhere[layer]))
        owner[layer * experts + others] = np.arange(others.size) % devices
    ptr, neighbour, tokens = _graph(experts_TLK, everywhere)
    total = max(1, len(experts_TLK))
    relative = (load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-300) * devices).ravel()
    proposals = int(min(PROPOSALS * layers, max(1.0, budget.seconds) * PROPOSALS_PER_SECOND))
    graph = StayGraph(ptr, neighbour, tokens / total, relative, everywhere.ravel(), layers, experts, devices)
    stop = np.zeros(1, np.int64)
    with budget.stops(stop, "poise-stay"):
        _anneal(graph, owner, proposals, seed, stop)
    held = np.zeros((layers, experts, devices), dtype=bool)
    for layer in range(layers):
        held[layer, np.arange(experts), owner[layer * experts : (layer + 1) * experts]] = True
        held[layer, everywhere[layer]] = True
        for d in range(devices):
            for e in np.argsort(-load_LE[layer] / held[layer].sum(axis=1), kind="stable"):
                if held[layer, :, d].sum() >= slots_D[d]:
                    break
                held[layer, e, d] = True
    source = np.repeat(np.arange(layers * experts), np.diff(ptr))
    inside = float(tokens[owner[source] == owner[neighbour]].sum() / max(1, tokens.sum()))
    return MethodResult(problem.placed(held, "poise-stay"), {"stay_weight": inside, "everywhere": hot})
