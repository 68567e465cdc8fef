"""ExFlow (arXiv 2401.08383; its published code https://github.com/YJHMITWEB/ExFlow): fewest hops between layers.

Step 1  Trace: the heaviest expert of each token in each layer. Tokens from a to b of the next layer are one column of
        the programme with their number as its weight: the same optimum as one column a token, in fewer columns.
Step 2  Integer programme of a stage: binary x[l, e, p], expert e of layer l in part p; for each transition (a, b)
        cost >= |x[l, a, p] - x[l + 1, b, p]| for all p; every expert in one part; every part holds exactly its number
        of experts in every layer; minimise the mean cost, the share of transitions that change their part.
Step 3  Stage 1: parts are the nodes. Stage 2: in each node, parts are its devices, and only transitions that stay on
        the node count. (The code's other mode, which halves the devices until one is left, is not here.)

There is no load term and no notion of replicas: redundant slots stay empty.

What the source leaves open, and what stands in for Gurobi:

- E may not divide by D, and slots may differ: each expert goes to a device with fewest and a free slot.
- The code gives Gurobi 60 s a stage and 5,000 more tokens at a time, each run started from the last. Here HiGHS gets
  all tokens and a start from the descent below, in programmes of at most :data:`MAX_ROWS` cost rows; it stops after
  :data:`MAX_NODES` nodes, the clock being only a guard, so that a seed decides the result.
- Larger programmes: the same objective by block-coordinate descent. With its neighbours fixed the best parts of a
  whole layer are an assignment problem, solved exactly, in sweeps forward and backward until nothing improves, from
  the contiguous layout and from seeded ones: a random layer grown outwards, then the best with some layers drawn anew.
- Models with K > 1 (the paper has top-1 gates): the heaviest experts are followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from poise.cost.entries import HeldEntries
from poise.planning.budget import Budget, Limit
from poise.planning.problem import MethodResult, PlacementProblem, Progress, equal_sizes
from poise.planning.solve.milp import INF, Milp
from poise.routing.batch import RoutingBatch
from poise.routing.profile import count_pairs
from poise.util.errors import NoResultError

MAX_ROWS = 800
"""Cost rows (transitions * parts * 2) up to which the integer programme goes to HiGHS."""
MAX_NODES = 200
ASSIGNMENT_SECONDS = 1e-7
"""Nominal seconds of the best parts of one layer, by the square of its experts."""
STARTS, SWEEPS = 24, 15
"""Most layouts that the descent starts from, and sweeps from each."""
INTER_HOP = 2.0
"""Cost of a hop between nodes in the published code; inside a node it is 1."""


def expected_affinity_LEE(batch: RoutingBatch, *, picks: int = 1) -> NDArray[np.float64]:
    """Step 1: expected tokens of a step from each heaviest expert to the heaviest ``picks`` of the next layer,
    [L - 1, E, E]; 0 where only loads are known. A token that computes nothing in a layer is not followed over it.
    """
    experts = batch.num_experts
    out = np.zeros((max(0, batch.num_layers - 1), experts, experts))
    if batch.experts_TLK is None:
        return out
    weight_T, ids = batch.weight_T(), batch.experts_TLK.astype(np.int64)
    for layer in range(batch.num_layers - 1):
        for k in range(picks):
            pairs = count_pairs(ids[:, layer, 0], ids[:, layer + 1, k], experts, weight_T)
            out[layer] += pairs.reshape(experts, experts)
    return out


def crossings(affinity: NDArray[np.float64], part_LM: NDArray[Any]) -> float:
    """Objective of a stage, not divided by its constant number of transitions: tokens that change their part."""
    return sum(
        float(step[part_LM[layer][:, None] != part_LM[layer + 1][None, :]].sum()) for layer, step in enumerate(affinity)
    )


def hops(affinity: NDArray[np.float64], device_LE: NDArray[Any], node_D: NDArray[Any]) -> tuple[float, float]:
    """Share of transitions that change their device inside a node, and their node."""
    total = max(float(affinity.sum()), 1e-300)
    inter = crossings(affinity, np.asarray(node_D)[device_LE])
    return (crossings(affinity, device_LE) - inter) / total, inter / total


def integer_programme(
    affinity: NDArray[np.float64], sizes_P: NDArray[np.int64], start_LM: NDArray[Any], *, time_limit_s: Limit
) -> tuple[NDArray[np.int64], float]:
    """Step 2: part of each expert int [L, M], and a bound on :func:`crossings`.

    ``flow`` is [L - 1, M, M], ``start_LM`` a feasible layout; M = sum of ``sizes_P``.

    Raises
    ------
    NoResultError : HiGHS found nothing in time.
    """
    layers, members = start_LM.shape
    parts = len(sizes_P)
    scale = max(float(affinity.sum()), 1e-300)
    milp = Milp()
    x = milp.columns(np.zeros((layers, members, parts)))
    pairs = np.argwhere(affinity > 0)
    cost = milp.columns(affinity[affinity > 0] / scale, integer=False)
    for layer in range(layers):
        for e in range(members):
            milp.row(1, x[layer, e], 1.0, 1)
        for p in range(parts):
            milp.row(sizes_P[p], x[layer, :, p], 1.0, sizes_P[p])
    for i, (layer, a, b) in enumerate(pairs):
        for p in range(parts):
            milp.row(0, [cost[i], x[layer, a, p], x[layer + 1, b, p]], [1.0, -1.0, 1.0], INF)
            milp.row(0, [cost[i], x[layer, a, p], x[layer + 1, b, p]], [1.0, 1.0, -1.0], INF)
    first = np.arange(parts)
    if (sizes_P == sizes_P[0]).all():  # parts are alike: expert i of the first layer uses one of the first i + 1
        for e in range(min(parts - 1, members)):
            milp.row(0, x[0, e, e + 1 :], 1.0, 0)
        order = {int(p): i for i, p in enumerate(dict.fromkeys(start_LM[0].tolist()))}
        first = np.array([order[p] for p in range(parts)])
    begin = np.zeros(milp.size)
    named = first[start_LM]
    begin[np.take_along_axis(x, named[:, :, None], axis=2)] = 1.0
    begin[cost] = [named[layer, a] != named[layer + 1, b] for layer, a, b in pairs]
    got = milp.solve(budget=Budget.of(time_limit_s), stage="exflow", most_nodes=MAX_NODES, start=begin)
    return got.values[x].argmax(axis=2), max(0.0, got.bound) * scale


def best_layer(
    affinity: NDArray[np.float64], part_LM: NDArray[Any], layer: int, sizes_P: NDArray[np.int64], *, known: NDArray[Any]
) -> NDArray[np.int64]:
    """The best parts of one layer with its ``known`` neighbours fixed, int [M]: an exact assignment."""
    parts = np.arange(len(sizes_P))
    keep = np.zeros((part_LM.shape[1], len(sizes_P)))
    if layer and known[layer - 1]:
        keep += affinity[layer - 1].T @ (part_LM[layer - 1][:, None] == parts)
    if layer < len(affinity) and known[layer + 1]:
        keep += affinity[layer] @ (part_LM[layer + 1][:, None] == parts)
    slot_part = np.repeat(parts, sizes_P)
    _, slot = linear_sum_assignment(keep[:, slot_part], maximize=True)
    return slot_part[slot]


def _sweep(
    affinity: NDArray[np.float64], part_LM: NDArray[np.int64], sizes_P: NDArray[np.int64], sweeps: int, budget: Budget
) -> tuple[float, int]:
    """Sweeps forward and backward, in place, until nothing improves; returns the crossings and how many it took."""
    known = np.ones(len(part_LM), bool)
    value, done = crossings(affinity, part_LM), 0
    while done < sweeps:
        done += 1
        for layer in [*range(len(part_LM)), *range(len(part_LM) - 2, -1, -1)]:
            part_LM[layer] = best_layer(affinity, part_LM, layer, sizes_P, known=known)
        before, value = value, crossings(affinity, part_LM)
        if value >= before * (1 - 1e-9) or budget.over("exflow"):
            break
    return value, done


def _grow(
    affinity: NDArray[np.float64], part_LM: NDArray[np.int64], known: NDArray[np.bool_], sizes_P: NDArray[np.int64]
) -> None:
    """Fill the layers that are not ``known``, nearest to a known one first, in place."""
    while not known.all():
        beside = ~known & (np.append(known[1:], False) | np.insert(known[:-1], 0, False))
        layer = int(np.flatnonzero(beside)[0])
        part_LM[layer] = best_layer(affinity, part_LM, layer, sizes_P, known=known)
        known[layer] = True


def descend(
    affinity: NDArray[np.float64],
    sizes_P: NDArray[np.int64],
    layers: int,
    *,
    seed: int,
    budget: Budget,
) -> NDArray[np.int64]:
    """Block-coordinate descent on :func:`crossings`, int [L, M]; never worse than contiguous blocks."""
    rng = np.random.default_rng(seed)
    blocks = np.repeat(np.arange(len(sizes_P)), sizes_P)
    best = np.tile(blocks, (layers, 1))
    left = max(1, int(budget.seconds / (2 * layers * ASSIGNMENT_SECONDS * max(1, len(blocks)) ** 2)))
    value, done = _sweep(affinity, best, sizes_P, min(SWEEPS, left), budget)
    left -= done
    for start in range(1, STARTS):
        if value <= 0 or left <= 0 or budget.over("exflow"):
            break
        trial = best.copy()
        if start <= STARTS // 2:
            known = np.zeros(layers, bool)
            root = int(rng.integers(layers))
            trial[root], known[root] = rng.permutation(blocks), True
        else:
            known = rng.random(layers) < 0.5
            known[rng.integers(layers)] = True
        _grow(affinity, trial, known, sizes_P)
        found, done = _sweep(affinity, trial, sizes_P, min(SWEEPS, left), budget)
        left -= done + 1
        if found < value * (1 - 1e-12):
            best, value = trial, found
    return best


def _stages(node_D: NDArray[Any]) -> Iterator[list[NDArray[np.int64]]]:
    """Step 3: each split of a set of devices into the parts of one programme, outermost first."""
    devices = np.arange(len(node_D), dtype=np.int64)
    nodes = [devices[node_D == n] for n in range(int(node_D[-1]) + 1)]
    if len(nodes) > 1:
        yield nodes
    for node in nodes:
        if len(node) > 1:
            yield [node[i : i + 1] for i in range(len(node))]


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """ExFlow in two stages; see the module.

    Raises
    ------
    NoResultError : the batch has loads only.
    """
    batch, node_D = problem.batch, problem.cluster.node_D
    problem.tokens_for("ExFlow")
    affinity = expected_affinity_LEE(batch)
    sizes = equal_sizes(batch.num_experts, problem.slots_D)
    layers = batch.num_layers
    # Experts with the same first device are not told apart yet.
    device_LE = np.zeros((layers, batch.num_experts), np.int64)
    budget = Budget.of(time_limit_s)
    todo = list(_stages(node_D))
    notes: list[dict[str, Any]] = []
    for number, parts in enumerate(todo):
        sizes_P = np.array([int(sizes[part].sum()) for part in parts])
        whole = int(parts[0][0])
        # Stable: the contiguous blocks of a stage are the experts in ascending order.
        member_LM = np.stack([np.flatnonzero(row == whole) for row in device_LE])
        inner = np.zeros((len(affinity), member_LM.shape[1], member_LM.shape[1]))
        for layer, step in enumerate(affinity):
            inner[layer] = step[np.ix_(member_LM[layer], member_LM[layer + 1])]
        share, done = 0.5 / len(todo), number / len(todo)
        part_LM = descend(inner, sizes_P, layers, seed=seed + number,
                          budget=budget.part(share, until=done + share))  # fmt: skip
        value, bound = crossings(inner, part_LM), 0.0
        note: dict[str, Any] = {"parts": len(parts), "by": "descent"}
        if 0 < np.count_nonzero(inner) * 2 * len(parts) <= MAX_ROWS and value > 0:
            try:
                found, bound = integer_programme(
                    inner, sizes_P, part_LM, time_limit_s=budget.part(share, until=done + 2 * share)
                )
                note["by"] = "integer programme"
                if crossings(inner, found) < value:
                    part_LM, value = found, crossings(inner, found)
            except NoResultError:
                pass
        total = max(float(inner.sum()), 1e-300)
        notes.append({**note, "crossing_share": value / total, "bound": bound / total})
        first_P = np.array([int(part[0]) for part in parts])
        np.put_along_axis(device_LE, member_LM, first_P[part_LM], axis=1)
        if progress:
            progress("stage", (number + 1) / len(todo))
    placement = problem.placed(HeldEntries.of_devices(device_LE, problem.num_devices), "exflow")
    intra, inter = hops(affinity, device_LE, node_D)
    return MethodResult(
        placement,
        {
            "stages": notes,
            "hops_inside_nodes": intra,
            "hops_between_nodes": inter,
            "hop_cost": intra + INTER_HOP * inter,
        },
    )
