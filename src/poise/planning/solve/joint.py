"""A bound on compute and traffic of one placement together: no more of either than one map can save.

The bounds of :mod:`poise.cost.bound` are per term and step: each may have another placement in mind. Here one set of
memberships serves all terms and steps of a layer (:mod:`poise.planning.solve.membership`), as a static placement does:

    min over memberships of sum_q W[q] (C[q] + T[q]) + starts

over blocks q of consecutive steps, each the mean of its steps (the mean of a largest port is at least the largest of
the means). C[q] and T[q] are no less than the bounds per term, so the sum is never looser than they are.

Groups are nodes where there are several, and T[q] is what their network takes; else devices, and the fabric of the one
node. The even split has mixed memberships (the same for all sources and steps); under any other split (``exact``, one
that prefers near replicas) the programme only asks who is present, which holds for all of them.

Not for ``stay`` traffic, whose sources are placements too, nor where only loads are known, nor for more tokens than
memory should hold: there the bounds per term stand.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.bound import BoundTerms
from poise.cost.compute import expert_seconds, expert_times
from poise.planning.budget import Budget
from poise.planning.problem import PlacementProblem
from poise.planning.solve.membership import Groups, Limits, Programme, Sent

MOST_BLOCKS, MOST_PAIRS, MOST_ROUNDS = 16, 3000, 40
COLUMN_S, PICK_S = 3.5e-4, 1e-7
"""Nominal seconds of a round for a column of the programme and for a pair of a token's picks."""
MORE_CUTS = 0.25
"""How much longer a round takes for each before it, as a part of the first."""
MOST_TERMS = 4_000_000
"""Picks and pairs of picks of all tokens that a cut looks at."""
ENOUGH = 1e-4
"""Relative gain of two rounds below which a layer is done."""
STAGE = "bound"


class JointBound(NamedTuple):
    """Seconds a layer and step that no placement can beat, float64 [L], and which bound that is: ``""`` where the time
    was too short for a joint one of any layer.
    """

    seconds_L: NDArray[np.float64]
    said: str


class ClosedBounds(NamedTuple):
    """The bounds per term that are to be tightened, float64: compute of a static plan [L], and of each step [B, L]."""

    compute_L: NDArray[np.float64]
    terms: BoundTerms

    def seconds_L(self, weight_B: NDArray[np.float64]) -> NDArray[np.float64]:
        """All of them together, float64 [L]."""
        return self.compute_L + weight_B @ (self.terms.dispatch_BL + self.terms.combine_BL + self.terms.kv_BL)


def has_joint_bound(problem: PlacementProblem) -> bool:
    """Whether it can be any tighter than the bounds per term."""
    batch = problem.batch
    if batch.experts_TLK is None or problem.traffic == "stay" or problem.num_devices == 1:
        return False
    return len(batch.experts_TLK) * batch.top_k * (batch.top_k + 1) // 2 <= MOST_TERMS


def joint_bound(problem: PlacementProblem, closed: ClosedBounds, budget: Budget) -> JointBound:
    """Tighten bounds per term, layer by layer, for as long as the budget allows; never below them.

    Parameters
    ----------
    problem : one that :func:`has_joint_bound`.
    closed : its bounds per term.
    budget : nominal seconds are shared out evenly over layers; too few for one round each serve the first layers alone.
    """
    layers, out = problem.batch.num_layers, closed.seconds_L(problem.batch.weight_B)
    case = _Tightening(problem)
    each = case.round_seconds()
    turn = np.arange(MOST_ROUNDS)
    rounds = int((np.cumsum(1.0 + MORE_CUTS * turn) * each <= budget.seconds / layers).sum())
    served = layers if rounds else min(layers, int(budget.seconds / each))
    done = 0
    for layer in range(served):
        if budget.over(STAGE):
            break
        got = case.tighten(layer, closed, max(1, rounds), budget)
        out[layer], done = max(out[layer], got), done + 1
    said = "joint" if done == layers else f"joint in {done} of {layers} layers, else per term" if done else ""
    return JointBound(out, said)


class _Tightening:
    """What all layers share."""

    def __init__(self, problem: PlacementProblem) -> None:
        self.problem, batch, cluster = problem, problem.batch, problem.cluster
        self.many = cluster.num_nodes > 1
        self.group_D = cluster.node_D.astype(np.int64) if self.many else np.arange(cluster.num_devices)
        slots_G = np.bincount(self.group_D, weights=problem.layer_slots_D).astype(np.int64)
        room_G = np.minimum(slots_G, batch.num_experts)
        least_G = np.maximum(0, batch.num_experts - (room_G.sum() - room_G))
        speed_G = np.bincount(self.group_D, weights=cluster.speed_D).astype(np.float64)
        self.groups = Groups(room_G, least_G, speed_G, problem.split == "even")
        shared = self.many and cluster.nic_shared
        self.port_D = self.group_D if shared else np.arange(cluster.num_devices)
        self.group_R = np.arange(len(room_G)) if shared else self.group_D
        self.ports_G = np.bincount(self.group_R)
        self.block_B = _blocks(batch.weight_B)
        self.weight_Q = np.bincount(self.block_B, weights=batch.weight_B).astype(np.float64)
        self.step_T = batch.step_T()
        self.home_T = batch.home_of_tokens(cluster.num_devices)
        out, back = cluster.dispatch_wire, cluster.combine_wire
        rates = [(w.inter_bytes_per_s if self.many else w.intra_bytes_per_s) for w in (out, back)]
        model = problem.model
        self.copy_s = model.dispatch_bytes_per_token / rates[0] + model.combine_bytes_per_token / rates[1]
        self.start_s = out.start_s + back.start_s
        self.most = self._most_served()

    def _most_served(self) -> int:
        """Most picks of a token that one copy serves."""
        problem, top_k = self.problem, self.problem.batch.top_k
        if problem.traffic == "home":
            return 1
        by_node = problem.traffic == "home_node_dedup" and self.many
        room = self.groups.room_G.max() if by_node else problem.layer_slots_D.max()
        return max(1, min(top_k, int(room)))

    def num_pairs(self) -> int:
        """Pairs of experts whose products may be columns."""
        sides, batch = 1 if self.groups.mirrored else len(self.groups.room_G), self.problem.batch
        if self.problem.traffic == "home" or batch.top_k == 1:
            return 0
        return min(batch.num_experts * (batch.num_experts - 1) // 2, MOST_PAIRS // sides)

    def round_seconds(self) -> float:
        """Nominal seconds of the first round of a layer."""
        sides, batch = 1 if self.groups.mirrored else len(self.groups.room_G), self.problem.batch
        columns = (batch.num_experts + self.num_pairs()) * sides + 2 * len(self.weight_Q)
        return COLUMN_S * columns + PICK_S * len(self.step_T) * batch.top_k**2

    def tighten(self, layer: int, closed: ClosedBounds, rounds: int, budget: Budget) -> float:
        """The bound of a layer by some rounds of cuts."""
        problem, batch = self.problem, self.problem.batch
        cluster, model, terms = problem.cluster, problem.model, closed.terms
        unit = float(closed.seconds_L(batch.weight_B)[layer])  # so that the solver's tolerances mean something
        busy_Q = self._mean((batch.tokens_BL()[:, layer] > 0).astype(np.float64))
        if unit <= 0 or not busy_Q.any():
            return 0.0
        sent = self._sent(layer, unit)
        work_QE = self._mean(expert_seconds(batch.load_BLE[:, layer], cluster, model)) / unit
        start_Q = busy_Q * expert_times(cluster, model).start_s / unit
        port_Q = self._mean(terms.dispatch_BL[:, layer] + terms.combine_BL[:, layer]) / unit - busy_Q * (
            self.start_s / unit
        )
        port_Q = np.maximum(port_Q, 0.0)
        compute_Q = self._mean(terms.compute_BL[:, layer]) / unit
        pairs_Q = np.bincount(sent.step_T, sent.weight_T * (sent.picks_TK >= 0).sum(axis=1), len(port_Q))
        slowest = start_Q + work_QE.sum(axis=1) / cluster.speed_D.min()
        limits = Limits(self.weight_Q, port_Q, port_Q + pairs_Q, compute_Q, np.maximum(slowest, compute_Q))
        programme = Programme(
            self.groups, self._pairs(sent), batch.num_experts, limits, spare=max(0, problem.spare_slots)
        )
        programme.compute(work_QE, start_Q, float(closed.compute_L[layer]) / unit)
        programme.arrivals(self._arrivals(sent))
        best, before = -np.inf, -np.inf
        for turn in range(rounds):
            if turn > 0 and budget.over(STAGE):
                break
            if not programme.cut(sent) and turn > 0:
                break
            best = max(best, programme.solve(budget, STAGE))
            if turn % 2 and best - before < ENOUGH * best:
                break
            before = best if turn % 2 else before
        return unit * (best + float(self.weight_Q @ busy_Q) * self.start_s / unit)

    def _mean(self, value_BX: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weighted mean over the steps of each block, float64 [Q, ...]."""
        weight_B = self.problem.batch.weight_B / self.weight_Q[self.block_B]
        out = np.zeros((len(self.weight_Q), *value_BX.shape[1:]))
        np.add.at(out, self.block_B, value_BX * weight_B.reshape(-1, *[1] * (value_BX.ndim - 1)))
        return out

    def _sent(self, layer: int, unit: float) -> Sent:
        """Tokens of a layer that compute anything."""
        batch = self.problem.batch
        assert batch.experts_TLK is not None
        some = (batch.experts_TLK[:, layer, 0] >= 0) & (batch.weight_B[self.step_T] > 0)
        step_T = self.step_T[some]
        weight_T = batch.weight_B[step_T] / self.weight_Q[self.block_B[step_T]] * (self.copy_s / unit)
        return Sent(batch.experts_TLK[some, layer].astype(np.int64), self.port_D[self.home_T[some]],
                    self.block_B[step_T], weight_T, self.group_R, self.most)  # fmt: skip

    def _pairs(self, sent: Sent) -> NDArray[np.int64]:
        """The pairs that most tokens pick, int [P, 2]."""
        experts, most = self.problem.batch.num_experts, self.num_pairs()
        if not most:
            return np.zeros((0, 2), np.int64)
        i, j = np.triu_indices(sent.picks_TK.shape[1], 1)
        first, second = sent.picks_TK[:, i], sent.picks_TK[:, j]
        low, high = np.minimum(first, second), np.maximum(first, second)
        times = np.bincount((low * experts + high)[low >= 0], minlength=experts**2)
        found = np.argsort(-times, kind="stable")[:most]
        found = np.sort(found[times[found] > 0])
        return np.column_stack([found // experts, found % experts])

    def _arrivals(self, sent: Sent) -> NDArray[np.float64]:
        """Seconds of a group's mean port, were each expert there, float64 [Q, G, E]; the fullest takes no less."""
        shape = (len(self.weight_Q), len(self.groups.room_G), self.problem.batch.num_experts)
        group_T = self.group_R[sent.port_T]
        flat = ((sent.step_T * shape[1] + group_T)[:, None] * shape[2] + sent.picks_TK)[sent.picks_TK >= 0]
        weight = np.broadcast_to(sent.weight_T[:, None], sent.picks_TK.shape)[sent.picks_TK >= 0]
        from_QGE = np.bincount(flat, weight, int(np.prod(shape))).reshape(shape)
        others: NDArray[np.float64] = from_QGE.sum(axis=1, keepdims=True) - from_QGE
        return others / sent.most / self.ports_G[None, :, None]


def _blocks(weight_B: NDArray[np.float64]) -> NDArray[np.int64]:
    """Block of each step: consecutive ones, at most so many, each with some weight; int [B]."""
    block = np.arange(len(weight_B)) * min(MOST_BLOCKS, len(weight_B)) // len(weight_B)
    some = np.bincount(block, weights=weight_B) > 0
    return (np.maximum(np.cumsum(some) - 1, 0))[block]
