"""ForeMoE's idea (arXiv 2606.11867): in RL post-training every micro-step is balanced by what its rollout recorded.

Read was the abstract, not the paper. What it says

    Step 1  Rollout records routing; recompute and policy update replay it, so the loads of every micro-step are known.
    Step 2  A hierarchical planner decomposes the balancing of a micro-step into smaller problems.
    Step 3  A transfer engine moves experts over two hardware paths (CPU-assisted and GPU-direct), overlapped.

Not known to us: the objective, what the levels are, whether experts are relocated or replicated, limits of memory, how
tokens are split, and the transfer engine's schedule. Chosen here

    Step 1  Loads of the record (:attr:`poise.stepwise.protocol.LayerView.foreseen`); without one, predicted loads.
    Step 2a Nodes: the fullest node gives tokens of the expert it computes most of to the idlest one that holds it or
            has a free slot, until the fullest is within ``tolerance`` of the mean.
    Step 2b Devices of a node: an expert that is new there lands on the least loaded device with a free slot, heaviest
            first; then as step 2a.
    Step 3  Replicas are gathered before the gate and live for the micro-step, within the step slots that every policy
            here has, over the same links, and hide in the same window: there is no second path.
    Step 4  The tokens are split as planned. Where the loads are not those of the record, exactly over the holders.

Balance alone decides, what a transfer exposes does not: nothing that was read says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.cost.route import locality_rows
from poise.cost.split import exact_quota
from poise.stepwise.protocol import MAX_ROWS, LayerView, StepPlan, StepPolicy
from poise.util.compiled import compiled
from poise.util.errors import OptionError


@compiled
def level(
    quota_EX: NDArray[np.int64],
    holds_EX: NDArray[np.bool_],
    free_X: NDArray[np.int64],
    speed_X: NDArray[np.float64],
    tolerance: float,
) -> None:
    """Steps 2a and 2b over parts X (nodes, or devices of one), in place."""
    experts, parts = quota_EX.shape
    load_X = quota_EX.sum(axis=0).astype(np.float64)
    mean = load_X.sum() / speed_X.sum()
    for _ in range(4 * experts * parts):
        a = np.argmax(load_X / speed_X)
        if load_X[a] <= tolerance * mean * speed_X[a]:
            break
        expert, to = -1, -1
        for e in np.argsort(-quota_EX[:, a], kind="mergesort"):
            if quota_EX[e, a] == 0:
                break
            for x in range(parts):
                room = mean * speed_X[x] - load_X[x]
                fits = x != a and room >= 1.0 and (holds_EX[e, x] or free_X[x] > 0)
                if fits and (to < 0 or load_X[x] / speed_X[x] < load_X[to] / speed_X[to]):
                    to = x
            if to >= 0:
                expert = e
                break
        if expert < 0:
            break
        room, surplus = int(mean * speed_X[to] - load_X[to]), int(np.ceil(load_X[a] - mean * speed_X[a]))
        amount = min(quota_EX[expert, a], max(1, min(room, surplus)))
        if not holds_EX[expert, to]:
            holds_EX[expert, to] = True
            free_X[to] -= 1
        quota_EX[expert, a] -= amount
        quota_EX[expert, to] += amount
        load_X[a] -= amount
        load_X[to] += amount


@compiled
def hierarchical(
    load_E: NDArray[np.int64],
    static_ED: NDArray[np.bool_],
    step_slots: int,
    node_D: NDArray[np.int64],
    speed_D: NDArray[np.float64],
    tolerance: float,
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Step 2: holders, bool [E, D], and tokens, int64 [E, D], of loads int64 [E]."""
    experts, devices = static_ED.shape
    nodes = node_D.max() + 1
    holds_EN, quota_EN = np.zeros((experts, nodes), np.bool_), np.zeros((experts, nodes), np.int64)
    free_N, speed_N = np.zeros(nodes, np.int64), np.zeros(nodes)
    for d in range(devices):
        free_N[node_D[d]] += step_slots
        speed_N[node_D[d]] += speed_D[d]
        for e in range(experts):
            holds_EN[e, node_D[d]] |= static_ED[e, d]
    for e in range(experts):
        quota_EN[e, np.argmax(holds_EN[e])] = load_E[e]
    level(quota_EN, holds_EN, free_N, speed_N, tolerance)
    out_ED, quota_ED = static_ED.copy(), np.zeros((experts, devices), np.int64)
    for n in range(nodes):
        here = np.flatnonzero(node_D == n)
        holds_EX = np.zeros((experts, here.size), np.bool_)
        quota_EX = np.zeros((experts, here.size), np.int64)
        free_X, speed_X = np.full(here.size, step_slots), np.zeros(here.size)
        for i in range(here.size):
            holds_EX[:, i] = static_ED[:, here[i]]
            speed_X[i] = speed_D[here[i]]
        load_X = np.zeros(here.size)
        for turn in range(2):  # those that are here already, then those that land
            for e in np.argsort(-quota_EN[:, n], kind="mergesort"):
                if quota_EN[e, n] == 0 or static_ED[e, here].any() == (turn == 1):
                    continue
                to = -1
                for i in range(here.size):
                    fits = holds_EX[e, i] if turn == 0 else free_X[i] > 0
                    if fits and (to < 0 or load_X[i] / speed_X[i] < load_X[to] / speed_X[to]):
                        to = i
                if turn == 1:
                    holds_EX[e, to] = True
                    free_X[to] -= 1
                quota_EX[e, to] = quota_EN[e, n]
                load_X[to] += quota_EN[e, n]
        level(quota_EX, holds_EX, free_X, speed_X, tolerance)
        for i in range(here.size):
            out_ED[:, here[i]] |= holds_EX[:, i]
            quota_ED[:, here[i]] = quota_EX[:, i]
    return out_ED, quota_ED


@dataclass(frozen=True, slots=True)
class ForeMoe(StepPolicy):
    """See the module docstring.

    Parameters
    ----------
    tolerance : fullest part over the mean at which a level is balanced.
    """

    name: ClassVar[str] = "fore-moe"
    summary: ClassVar[str] = "routing known from the rollout: nodes, then devices, are levelled before the micro-step"
    exact: ClassVar[bool] = True
    grid: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"tolerance": 1.1}, {"tolerance": 1.3})
    tolerance: float = 1.02

    def __post_init__(self) -> None:
        if not self.tolerance >= 1.0:
            raise OptionError(f"fore-moe needs a tolerance of at least 1, got {self.tolerance}")

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Steps 1 to 3."""
        load_E = np.rint(view.predicted_E).astype(np.int64)
        if view.foreseen is not None:
            load_E = view.foreseen.load_SE.sum(axis=0)
        return self._plan(view, load_E)[0]

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Step 4."""
        known, load_E, cluster = view.foreseen, load_SE.sum(axis=0), view.price.cluster
        rows = load_SE.size * len(load_SE)
        if known is None or rows > MAX_ROWS or not np.array_equal(known.load_SE, load_SE):
            return StepPlan(holders_ED, exact_quota(load_E, holders_ED, cluster.speed_D))
        _, quota_ED = self._plan(view, load_E)
        rows_SED = locality_rows(load_SE, quota_ED, cluster.node_D)
        return StepPlan(holders_ED, quota_ED, rows_SED, passive=known.replayed)

    def _plan(self, view: LayerView, load_E: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        cluster = view.price.cluster
        return hierarchical(load_E, view.static_ED, view.step_slots, cluster.node_D.astype(np.int64),
                            np.array(cluster.speed_D), self.tolerance)  # fmt: skip
