"""``exact-balance``: the least possible maximum under the even split, proven by search, layer by layer.

Step 1  U = the maximum of LPT with greedy replicas.
Step 2  A plan below U needs r[e] > load[e] / U replicas of each expert. Go through all ways to add the slots left.
Step 3  For each, pack the pieces load[e] / r[e], largest first, depth first: devices alike in load, room and experts
        are tried once, an expert's pieces in ascending devices, and a branch ends where what is left cannot fit.
Step 4  A packing found lowers U: back to step 2. When none is found, U is proven.

For small layers (the search counts its nodes and gives up after :data:`MAX_NODES`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from poise.planning.budget import Budget, Limit
from poise.planning.methods.lpt import pack_all
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.util.errors import NoResultError

MAX_NODES, NODES_PER_SECOND = 400_000, 200_000
MAX_SLOTS = 24


class _Nodes:
    """Nodes left."""

    def __init__(self, most: int, budget: Budget | None = None) -> None:
        self.most = self.left = most
        self.budget = budget

    def spend(self) -> None:
        self.left -= 1
        late = self.left % 256 == 0 and self.budget is not None and self.budget.over("exact-balance")
        if self.left < 0 or late:
            raise NoResultError(
                f"exact-balance gave up after {self.most - self.left} nodes", hint="use method poise, or more time"
            )


def even_optimum(
    load_E: NDArray[np.float64], slots_D: NDArray[np.int64], nodes: _Nodes | None = None
) -> tuple[NDArray[np.int64], float]:
    """Least maximum of ``sum_e load / replicas`` over devices of equal speed, and a plan, int64 [E, D], that has it.

    Raises
    ------
    NoResultError : the search is too large.
    """
    if int(slots_D.sum()) > MAX_SLOTS:
        raise NoResultError(f"exact-balance takes {MAX_SLOTS} slots, got {slots_D.sum()}", hint="use method poise")
    nodes = nodes or _Nodes(MAX_NODES)
    best = pack_all(load_E, slots_D, np.ones(len(slots_D))).astype(np.int64)
    value = float((load_E[:, None] * best / best.sum(axis=1, keepdims=True)).sum(axis=0).max())
    while True:
        if value == 0:  # nobody computes in this layer
            return best, value
        below = value * (1 - 1e-9)
        found = next(
            (plan for copies in _replicas(load_E, slots_D, below, nodes)
             if (plan := _pack(load_E, copies, slots_D, below, nodes)) is not None), None,
        )  # fmt: skip
        if found is None:
            return best, value
        best = found
        value = float((load_E[:, None] * best / best.sum(axis=1, keepdims=True)).sum(axis=0).max())


def _replicas(
    load_E: NDArray[np.float64], slots_D: NDArray[np.int64], below: float, nodes: _Nodes
) -> Iterator[list[int]]:
    """Step 2."""
    devices = int((slots_D > 0).sum())
    least = [max(1, int(np.floor(load / below)) + 1) for load in load_E]
    spare = int(slots_D.sum()) - sum(least)
    if spare < 0 or max(least) > devices or load_E.sum() / len(slots_D) > below:
        return
    order = np.argsort(-load_E)

    def more(at: int, left: int, copies: list[int]) -> Iterator[list[int]]:
        nodes.spend()
        if at == len(order):
            yield copies
            return
        e = int(order[at])
        for extra in range(min(left, devices - least[e]) + 1):
            yield from more(at + 1, left - extra, [*copies[:e], least[e] + extra, *copies[e + 1 :]])

    yield from more(0, spare, list(least))


def _pack(
    load_E: NDArray[np.float64], copies: list[int], slots_D: NDArray[np.int64], below: float, nodes: _Nodes
) -> NDArray[np.int64] | None:
    """Step 3."""
    pieces = sorted(((load / n, e) for e, (load, n) in enumerate(zip(load_E, copies, strict=True)) for _ in range(n)),
                    key=lambda piece: (-piece[0], piece[1]))  # fmt: skip
    devices = len(slots_D)
    held: list[frozenset[int]] = [frozenset()] * devices
    total, room = [0.0] * devices, slots_D.tolist()

    def place(at: int) -> bool:
        nodes.spend()
        if at == len(pieces):
            return True
        size, e = pieces[at]
        first = 0
        if at and pieces[at - 1][1] == e:
            first = max(d for d in range(devices) if e in held[d]) + 1
        tried = set()
        for d in range(first, devices):
            kind = (total[d], room[d], held[d])
            if room[d] == 0 or e in held[d] or total[d] + size > below or kind in tried:
                continue
            tried.add(kind)
            before = held[d], total[d]
            held[d], total[d], room[d] = held[d] | {e}, total[d] + size, room[d] - 1
            if place(at + 1):
                return True
            held[d], total[d] = before
            room[d] += 1
        return False

    if not place(0):
        return None
    out = np.zeros((len(load_E), devices), np.int64)
    for d, experts in enumerate(held):
        out[list(experts), d] = 1
    return out


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """Proven balance of the expected loads; ``details["proven_maximum"]`` lists the tokens of each layer.

    Raises
    ------
    NoResultError : too many slots, unequal speeds, or the search gave up.
    """
    if problem.pooled or (problem.cluster.speed_D != problem.cluster.speed_D[0]).any():
        raise NoResultError("exact-balance needs devices of equal speed and slots counted by layer")
    budget = Budget.of(time_limit_s)
    nodes = _Nodes(int(min(MAX_NODES, budget.seconds * NODES_PER_SECOND)), budget)
    found = [even_optimum(load, problem.layer_slots_D, nodes) for load in problem.batch.load_LE()]
    placement = problem.placed(np.stack([plan for plan, _ in found]), "exact-balance")
    return MethodResult(placement, {"proven_maximum": [value for _, value in found]})
