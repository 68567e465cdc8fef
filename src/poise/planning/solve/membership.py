"""Which groups of devices hold which experts, as a linear programme of one layer: memberships, products of pairs, cuts.

Columns, all in [0, 1] but the seconds
    x[e, g]     expert e is computed in group g (a node; where there is one node, a device)
    z[i, j, g]  both i and j are
    T[q], C[q]  seconds of ports (dispatch and combine together) and of compute in steps q
Rows, with at most ``room[g]`` and at least ``least[g]`` experts in a group
    z[i, j, g] <= x[i, g], x[j, g]
    sum_e x[e, g] within [least[g], room[g]], and times x[e, g] and 1 - x[e, g]:
        sum_{j != i} z[i, j, g] <= (room[g] - 1) x[i, g]
        sum_{j != i} (x[j, g] - z[i, j, g]) >= least[g] (1 - x[i, g])
    T[q] >= seconds of each port, C[q] >= seconds of each group's compute at the speed of all its devices

*Mixed* memberships (the even split): a device computes a share of an expert's tokens, the same for all sources and all
steps, and draws are independent. So what a port sends is its mean over random partitions of the experts, each expert in
one of the groups that hold it. Of every such partition x and z are 0 or 1 and all rows on them hold, so they hold of
the means: sum_g x[e, g] = 1. With two groups z[i, j, 1] = 1 - x[i, 0] - x[j, 0] + z[i, j, 0] for the same reason, and
only columns of group 0 are kept. *Present* memberships (any split): x says that a group holds the expert,
sum_g x[e, g] >= 1, and a token may stay in its group only if that holds all of its experts.

A token of group h that needs picks S sends at least
    1 - z[i, j, h] copies for each two of S (1 - x[i, h] for one), as it stays only if all are there, and
    sum_{e in S} (1 - x[e, h]) / most copies, if a copy serves at most ``most`` picks (1 without deduplication).
The larger of these is convex. A port's sum over its tokens enters by cuts: at a point of the programme, the terms that
are largest there (:meth:`Programme.cut`). Any set of cuts is a relaxation, and more of them make it tighter.

The value that counts is not the solver's but the Lagrangean one of its row prices (:meth:`Programme.proven`): a bound
whatever the prices are, within the rounding of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from poise.planning.budget import Budget
from poise.planning.solve.milp import INF, silent_model

TIE = 1e-6
VIOLATION = 1e-4
CUTS = 8
"""Most ports of a step that get a cut in a round."""


class Groups(NamedTuple):
    """Groups of devices: most and least experts of each, int [G], and speed of its devices together, float64 [G];
    ``mixed``: memberships are shares of tokens that every source and step has alike.
    """

    room_G: NDArray[np.int64]
    least_G: NDArray[np.int64]
    speed_G: NDArray[np.float64]
    mixed: bool

    @property
    def mirrored(self) -> bool:
        """Columns of the second group are those of the first, turned around."""
        return self.mixed and len(self.room_G) == 2


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """Tokens of a layer, a row each, and what their copies cost.

    Parameters
    ----------
    picks_TK : int [T, K], experts, -1 for none.
    port_T, step_T : int [T], the port that it leaves by, and its step.
    weight_T : float64 [T], seconds of one copy times the part of the row in the mean of its step.
    group_R : int [R], group of each port.
    most : picks that one copy serves at most.
    """

    picks_TK: NDArray[np.int64]
    port_T: NDArray[np.int64]
    step_T: NDArray[np.int64]
    weight_T: NDArray[np.float64]
    group_R: NDArray[np.int64]
    most: int


class Limits(NamedTuple):
    """Seconds of steps q, float64 [Q] each: weights in the objective, least and most of ports and of compute."""

    weight_Q: NDArray[np.float64]
    port_Q: NDArray[np.float64]
    port_most_Q: NDArray[np.float64]
    compute_Q: NDArray[np.float64]
    compute_most_Q: NDArray[np.float64]


class _RowList:
    """Rows under construction."""

    def __init__(self) -> None:
        self.columns: list[NDArray[np.int64]] = []
        self.values: list[NDArray[np.float64]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, low: float, columns: NDArray[np.int64], values: NDArray[np.float64], high: float) -> None:
        """``low <= values . columns <= high``; a column may come several times."""
        self.columns.append(columns)
        self.values.append(values)
        self.low.append(low)
        self.high.append(high)


class Programme:
    """The programme of one layer; rows as in the module's docstring.

    Parameters
    ----------
    groups : where experts are counted.
    pairs_P2 : int [P, 2], pairs of experts that have a product; no pair twice.
    num_experts : E.
    limits : of the seconds of steps.
    spare : slots beyond one an expert, of all groups together.
    """

    def __init__(
        self, groups: Groups, pairs_P2: NDArray[np.int64], num_experts: int, limits: Limits, *, spare: int
    ) -> None:
        self.groups, self.pairs_P2, self.limits = groups, pairs_P2, limits
        self.experts, self.sides = num_experts, 1 if groups.mirrored else len(groups.room_G)
        self.pair_EE = np.full((num_experts, num_experts), -1)
        self.pair_EE[pairs_P2[:, 0], pairs_P2[:, 1]] = self.pair_EE[pairs_P2[:, 1], pairs_P2[:, 0]] = np.arange(
            len(pairs_P2)
        )
        self.first_z = num_experts * self.sides
        self.first_t = self.first_z + len(pairs_P2) * self.sides
        steps = len(limits.weight_Q)
        self.first_c = self.first_t + steps
        ones, none = np.ones(self.first_t), np.zeros(self.first_t)
        self.low_X = np.concatenate([none, limits.port_Q, limits.compute_Q])
        self.high_X = np.concatenate([ones, limits.port_most_Q, limits.compute_most_Q])
        self.cost_X = np.concatenate([none, limits.weight_Q, limits.weight_Q])
        self.matrix = csr_array((0, len(self.cost_X)))
        self.row_low, self.row_high = np.zeros(0), np.zeros(0)
        self.model = silent_model()
        self.model.addVars(len(self.cost_X), self.low_X, self.high_X)
        self.model.changeColsCost(len(self.cost_X), np.arange(len(self.cost_X), dtype=np.int32), self.cost_X)
        self.point_X = np.where(self.cost_X > 0, self.low_X, 1 / len(groups.room_G))
        self.point_X[self.first_z : self.first_t] = len(groups.room_G) ** -2.0
        self._add(self._membership(spare))

    def _side(
        self, group: int, experts: NDArray[np.int64], values: NDArray[np.float64], pairs: NDArray[np.int64],
        products: NDArray[np.float64],
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:  # fmt: skip
        """Columns, values and constant of ``values . x[experts, group] + products . z[pairs, group]``."""
        if not self.groups.mirrored:
            columns = [experts * self.sides + group, self.first_z + pairs * self.sides + group]
            return np.concatenate(columns), np.concatenate([values, products]), 0.0
        columns = [experts, self.first_z + pairs]
        if group == 0:
            return np.concatenate(columns), np.concatenate([values, products]), 0.0
        columns += [self.pairs_P2[pairs, 0], self.pairs_P2[pairs, 1]]
        turned = [-values, products, -products, -products]
        return np.concatenate(columns), np.concatenate(turned), float(values.sum() + products.sum())

    def _membership(self, spare: int) -> _RowList:
        rows, every = _RowList(), np.arange(self.experts)
        first, second = self.pairs_P2.T
        for side in range(self.sides):
            for member in (first, second):
                for p, e in enumerate(member.tolist()):
                    at = np.array([self.first_z + p * self.sides + side, e * self.sides + side])
                    rows.add(-INF, at, np.array([1.0, -1.0]), 0.0)
        if self.groups.mirrored:  # the product of the other group is at least 0
            for p, (i, j) in enumerate(self.pairs_P2.tolist()):
                rows.add(-INF, np.array([i, j, self.first_z + p]), np.array([1.0, 1.0, -1.0]), 1.0)
        no_pairs, none = np.zeros(0, np.int64), np.zeros(0)
        for group, (room, least) in enumerate(zip(self.groups.room_G, self.groups.least_G, strict=True)):
            columns, values, constant = self._side(group, every, np.ones(self.experts), no_pairs, none)
            rows.add(least - constant, columns, values, room - constant)
            for e in range(self.experts):
                pairs = self.pair_EE[e][self.pair_EE[e] >= 0]
                one, itself = np.array([e]), np.array([1.0 - room])
                columns, values, constant = self._side(group, one, itself, pairs, np.ones(len(pairs)))
                rows.add(-INF, columns, values, -constant)
                others = np.where(every == e, float(least), 1.0)
                columns, values, constant = self._side(group, every, others, pairs, -np.ones(len(pairs)))
                rows.add(least - constant, columns, values, INF)
        if not self.groups.mirrored:
            most = 1.0 if self.groups.mixed else INF
            for e in range(self.experts):
                rows.add(1.0, e * self.sides + np.arange(self.sides), np.ones(self.sides), most)
            if not self.groups.mixed:
                rows.add(-INF, np.arange(self.first_z), np.ones(self.first_z), float(self.experts + spare))
        return rows

    def compute(self, work_QE: NDArray[np.float64], start_Q: NDArray[np.float64], static: float) -> None:
        """Seconds of each expert at speed 1 and of a start, and least weighted seconds of all steps together. Only
        mixed memberships say where an expert computes.
        """
        rows, steps = _RowList(), np.arange(len(self.limits.weight_Q))
        rows.add(static, self.first_c + steps, self.limits.weight_Q, INF)
        if self.groups.mixed:
            self._each_group(rows, work_QE[:, None] / self.groups.speed_G[:, None], self.first_c, start_Q)
        self._add(rows)

    def arrivals(self, seconds_QGE: NDArray[np.float64]) -> None:
        """Seconds of a group's ports that tokens of other groups for each expert take, were it computed there."""
        if self.groups.mixed:
            rows = _RowList()
            self._each_group(rows, seconds_QGE, self.first_t, np.zeros(len(seconds_QGE)))
            self._add(rows)

    def _each_group(
        self, rows: _RowList, seconds_QGE: NDArray[np.float64], first: int, start_Q: NDArray[np.float64]
    ) -> None:
        every, no_pairs, none = np.arange(self.experts), np.zeros(0, np.int64), np.zeros(0)
        for q, start in enumerate(start_Q.tolist()):
            for group in range(len(self.groups.room_G)):
                columns, values, constant = self._side(group, every, -seconds_QGE[q, group], no_pairs, none)
                rows.add(start - constant, np.append(columns, first + q), np.append(values, 1.0), INF)

    def cut(self, sent: Sent) -> bool:
        """Add cuts of the fullest ports at the last point; whether there were any."""
        value_EG, value_PG = self._values()
        steps, ports, width = len(self.limits.weight_Q), len(sent.group_R), len(value_PG) + self.experts
        group_T = sent.group_R[sent.port_T]
        columns_TX, value_TX = self._terms(sent, group_T, value_EG, value_PG)
        least_T = value_TX.min(axis=1)
        tied = (value_TX <= least_T[:, None] + TIE) & np.isfinite(value_TX)
        weight_TX = sent.weight_T[:, None] * tied / tied.sum(axis=1, keepdims=True)
        picked = sent.picks_TK >= 0
        away_T = (picked * (1.0 - value_EG[sent.picks_TK, group_T[:, None]])).sum(axis=1) / sent.most
        spread_T = away_T > 1.0 - least_T
        weight_TX[spread_T] = 0.0
        spread_TK = (spread_T * sent.weight_T / sent.most)[:, None] * picked
        constant_T = np.where(spread_T, spread_TK.sum(axis=1), sent.weight_T)
        sum_T = sent.weight_T * np.maximum(away_T, 1.0 - least_T)
        flat_T = sent.step_T * ports + sent.port_T
        total, constant = (
            np.bincount(flat_T, part, steps * ports).reshape(steps, ports) for part in (sum_T, constant_T)
        )
        over = total - self.point_X[self.first_t : self.first_c, None]
        wanted = over > np.maximum(np.sort(over, axis=1)[:, -min(CUTS, ports), None] - 1e-15, VIOLATION)
        kept_T, rows = wanted.ravel()[flat_T], _RowList()
        number = np.cumsum(wanted.ravel()) - 1
        sums = np.zeros((int(wanted.sum()), width))
        for columns, weights in ((columns_TX, weight_TX), (len(value_PG) + sent.picks_TK, spread_TK)):
            some = kept_T[:, None] & (weights > 0)
            key = (number[flat_T][:, None] * width + columns)[some]
            sums += np.bincount(key, weights[some], sums.size).reshape(sums.shape)
        for sum_X, q, port in zip(sums, *np.nonzero(wanted), strict=True):
            pairs, experts = np.flatnonzero(sum_X[: len(value_PG)]), np.flatnonzero(sum_X[len(value_PG) :])
            columns, values, more = self._side(
                int(sent.group_R[port]), experts, sum_X[len(value_PG) + experts], pairs, sum_X[pairs]
            )
            at, ones = np.append(columns, self.first_t + q), np.append(values, 1.0)
            rows.add(float(constant[q, port]) - more, at, ones, INF)
        self._add(rows)
        return bool(wanted.any())

    def _values(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Memberships [E, G] and products [P, G] of the last point."""
        x_ES = self.point_X[: self.first_z].reshape(self.experts, self.sides)
        z_PS = self.point_X[self.first_z : self.first_t].reshape(-1, self.sides)
        if not self.groups.mirrored:
            return x_ES, z_PS
        other_P = 1.0 - x_ES[self.pairs_P2, 0].sum(axis=1) + z_PS[:, 0]
        return np.hstack([x_ES, 1.0 - x_ES]), np.column_stack([z_PS[:, 0], other_P])

    def _terms(
        self, sent: Sent, group_T: NDArray[np.int64], value_EG: NDArray[np.float64], value_PG: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Of each token the terms that bound how likely it stays: numbers (pairs first, then experts) and values."""
        many, top_k = sent.picks_TK.shape
        i, j = np.triu_indices(top_k, 1)
        ids_TX = self.pair_EE[sent.picks_TK[:, i], sent.picks_TK[:, j]]
        ids_TX[sent.picks_TK[:, j] < 0] = -1
        value_TX = np.full((many, len(i) + top_k), np.inf)
        if len(value_PG):
            value_TX[:, : len(i)] = np.where(ids_TX >= 0, value_PG[ids_TX, group_T[:, None]], np.inf)
        picked = sent.picks_TK >= 0
        value_TX[:, len(i) :] = np.where(picked, value_EG[sent.picks_TK, group_T[:, None]], np.inf)
        return np.hstack([ids_TX, len(value_PG) + sent.picks_TK]), value_TX

    def _add(self, rows: _RowList) -> None:
        if not rows.low:
            return
        size = np.array([len(one) for one in rows.columns])
        at = np.repeat(np.arange(len(size)), size)
        shape = (len(size), len(self.cost_X))
        more = csr_array((np.concatenate(rows.values), (at, np.concatenate(rows.columns))), shape=shape)
        low, high = np.array(rows.low, dtype=np.float64), np.array(rows.high, dtype=np.float64)
        self.model.addRows(
            len(size), low, high, more.nnz, more.indptr[:-1].astype(np.int32), more.indices.astype(np.int32), more.data
        )
        self.matrix = csr_array(vstack([self.matrix, more]))
        self.row_low, self.row_high = np.append(self.row_low, low), np.append(self.row_high, high)

    def solve(self, budget: Budget, stage: str) -> float:
        """Go to the optimum of the rows there are; what that proves. The clock may end it, ``stage`` is cut then."""
        self.model.setOptionValue("time_limit", min(self.model.getRunTime() + max(0.01, budget.left()), INF))
        self.model.run()
        found = self.model.getSolution()
        status = self.model.getModelStatus()
        if status == highspy.HighsModelStatus.kTimeLimit:
            budget.cuts.add(stage)
        if status == highspy.HighsModelStatus.kOptimal and len(found.col_value) == len(self.cost_X):
            self.point_X = np.array(found.col_value)
        price = np.array(found.row_dual)
        return self.proven(price) if len(price) == len(self.row_low) and np.isfinite(price).all() else -np.inf

    def proven(self, price_R: NDArray[np.float64]) -> float:
        """Least objective of any point that meets all rows, by some prices of rows: for every feasible x
        cost . x >= sum_r price_r (low_r or high_r) + min over columns' ranges of (cost - prices . matrix) . x.
        """
        up = np.where(np.isfinite(self.row_low), np.maximum(price_R, 0.0), 0.0)
        down = np.where(np.isfinite(self.row_high), np.minimum(price_R, 0.0), 0.0)
        sides = up @ np.where(up > 0, self.row_low, 0.0) + down @ np.where(down < 0, self.row_high, 0.0)
        rest = self.cost_X - self.matrix.T @ (up + down)
        return float(sides + np.minimum(rest * self.low_X, rest * self.high_X).sum())
