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
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.cost.route import locality_rows
from poise.cost.split import exact_quota
from poise.stepwise.protocol import MAX_ROWS, LayerView, StepPlan, StepPolicy
from poise.util.errors import OptionError


def level(
    quota_EX: NDArray[np.int64],
    holds_EX: NDArray[np.bool_],
    free_X: NDArray[np.int64],
    speed_X: NDArray[np.float64],
    tolerance: float,
) -> None:
    """Steps 2a and 2b over parts X (nodes, or devices of one), in place: tokens, holders and free slots."""
    load_X = quota_EX.sum(axis=0).astype(np.float64)
    mean_X = load_X.sum() / speed_X.sum() * speed_X
    for _ in range(4 * quota_EX.size):
        full = int(np.argmax(load_X / speed_X))
        if load_X[full] <= tolerance * mean_X[full]:
            break
        roomy_X = mean_X - load_X >= 1.0
        roomy_X[full] = False
        fits_EX = roomy_X & (holds_EX | (free_X > 0)) & (quota_EX[:, full] > 0)[:, None]
        givers = np.flatnonzero(fits_EX.any(axis=1))
        if not len(givers):
            break
        e = int(givers[np.argmax(quota_EX[givers, full])])
        to = int(np.argmin(np.where(fits_EX[e], load_X / speed_X, np.inf)))
        room, surplus = int(mean_X[to] - load_X[to]), int(np.ceil(load_X[full] - mean_X[full]))
        amount = min(int(quota_EX[e, full]), room, max(1, surplus))
        free_X[to] -= not holds_EX[e, to]
        holds_EX[e, to] = True
        for array in (quota_EX[e], load_X):
            array[full] -= amount
            array[to] += amount


def hierarchical(
    load_E: NDArray[np.int64],
    static_ED: NDArray[np.bool_],
    step_slots: int,
    node_D: NDArray[np.int64],
    speed_D: NDArray[np.float64],
    tolerance: float,
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Step 2: holders, bool [E, D], and tokens, int64 [E, D], of loads int64 [E]."""
    nodes = int(node_D.max()) + 1
    in_node_ND = np.equal.outer(np.arange(nodes), node_D)
    holds_EN = np.stack([static_ED[:, here].any(axis=1) for here in in_node_ND], axis=1)
    quota_EN = np.zeros(holds_EN.shape, np.int64)
    quota_EN[np.arange(len(load_E)), holds_EN.argmax(axis=1)] = load_E
    level(quota_EN, holds_EN, step_slots * in_node_ND.sum(axis=1), in_node_ND @ speed_D, tolerance)
    out_ED, quota_ED = static_ED.copy(), np.zeros(static_ED.shape, np.int64)
    for n, here in enumerate(in_node_ND):
        holds_EX, speed_X = static_ED[:, here].copy(), speed_D[here]
        quota_EX, free_X = np.zeros(holds_EX.shape, np.int64), np.full(len(speed_X), step_slots)
        lands_E: NDArray[np.bool_] = ~np.asarray(holds_EX.any(axis=1))
        heaviest = np.argsort(-quota_EN[:, n], kind="stable")
        for e in (*heaviest[~lands_E[heaviest]], *heaviest[lands_E[heaviest]]):
            if quota_EN[e, n]:
                fits_X = free_X > 0 if lands_E[e] else holds_EX[e]
                to = int(np.argmin(np.where(fits_X, quota_EX.sum(axis=0) / speed_X, np.inf)))
                free_X[to] -= lands_E[e]
                holds_EX[e, to] = True
                quota_EX[e, to] = quota_EN[e, n]
        level(quota_EX, holds_EX, free_X, speed_X, tolerance)
        out_ED[:, here], quota_ED[:, here] = holds_EX, quota_EX
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
