"""LPLB: a linear programme splits every batch over the edges that redundant experts define (DeepSeek, 2025).

Source: deepseek-ai/LPLB, MIT, read in a public fork.

    Step 1  Topology. Each device holds copies of experts of fixed neighbours: slot j of device i holds an expert of
            device ``r2o[i, j]``. Cube: groups of 8 devices with 2 columns; hypercube: 16 with 2; torus: m x n with 2;
            ring: 1 column.
    Step 2  Which experts: those of each device by load history, most first; the k-th goes over column k.
    Step 3  After the gate, all counts are summed, and within each group a linear programme finds the share of every
            expert (experts of one edge share theirs) that stays with the original, so that the largest load is least.
    Step 4  Every source splits its own tokens of an expert by that share, in whole tokens.

The method moves no weight in a step. Where the static placement holds replicas, they are the edges: the holders of an
expert are the original (the first) and its copies, any number of them, and step slots stay empty. Where it holds none,
the replicas of steps 1 and 2 are put into the step slots once and kept (``keeps``): before the gate of the first step
from ``history_steps`` on, by the mean of the steps seen, so that there is a history to go by. Until then, and wherever
there is no replica, nothing is exchanged (``passive``).

Chosen here. ``topology="auto"``: cube for 8 devices, hypercube for 16, torus else (devices of a node along one side
where nodes are equal and there are several), and the ring where there is one slot only; a cube or hypercube that does
not divide the devices becomes a torus. An odd last slot uses column 0 (the code wants multiples). The code runs five
steps of an interior-point method and falls back to halves when that did not converge; here HiGHS solves it exactly,
every connected part of the edges for itself. Step 4: the code gives the original ``floor(share x tokens)`` of each
source's tokens and the copy the rest; with few tokens a source that leaves the programme's optimum far behind; above
``MAX_ROWS`` entries the plan keeps its quotas only.
``rounding="total"`` splits the sum over all sources instead, which are then matched to the nearest holder. Tokens are
balanced, not seconds, and device speeds are not looked at, as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from poise.planning.solve.milp import Milp
from poise.stepwise.methods.split import even_quota
from poise.stepwise.protocol import MAX_ROWS, LayerView, StepPlan, StepPolicy
from poise.util.errors import NoResultError, OptionError

Topology = Literal["auto", "cube", "hypercube", "torus", "ring"]
Rounding = Literal["source", "total"]


def neighbours(num_devices: int, node_size: int, slots: int, topology: Topology = "auto") -> NDArray[np.int64]:
    """Step 1: r2o, int64 [D, columns], whose experts each device copies. ``node_size`` 0: nodes are not equal."""
    device = np.arange(num_devices)
    if topology == "auto":
        names: dict[int, Topology] = {8: "cube", 16: "hypercube"}
        topology = names.get(num_devices, "torus") if slots > 1 else "ring"
    if topology == "ring":
        return ((device + 1) % num_devices)[:, None]
    group = {"cube": 8, "hypercube": 16}.get(topology, 0)
    if group and num_devices % group == 0:
        first, i = device - device % group, device % group
        turned = i - i % 4 + (i + 3) % 4
        across = (i + 12) % 16 if group == 16 else np.where(i < 4, 4 + (i + 2) % 4, i - 4)
        return np.stack([first + turned, first + across], axis=1)
    side = node_size if 1 < node_size < num_devices else int(np.sqrt(num_devices))
    while num_devices % side:
        side -= 1
    row, column = device // side, device % side
    rows = num_devices // side
    return np.stack([(row + 1) % rows * side + column, row * side + (column + 1) % side], axis=1)


def put_replicas(
    static_ED: NDArray[np.bool_], weight_E: NDArray[np.float64], r2o: NDArray[np.int64], slots: int
) -> NDArray[np.bool_]:
    """Steps 1 and 2: the static holders and one copy over each edge and slot, bool [E, D]."""
    held_ED = static_ED.copy()
    order = np.argsort(-weight_E, kind="stable")
    for device in range(static_ED.shape[1]):
        for k in range(slots):
            source = r2o[device, k % r2o.shape[1]]
            own = order[static_ED[order, source]]
            if source != device and k < own.size:
                held_ED[own[k], device] = True
    return held_ED


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """Solution of step 3, one entry h in H for every holder of a replicated expert: by expert, its original first.

    Parameters
    ----------
    expert_H, device_H : int64 [H].
    share_H : float64 [H], share of the expert's tokens that the device computes; sums to 1 for each expert.
    load_D : float64 [D], tokens of each device at these shares.
    """

    expert_H: NDArray[np.int64]
    device_H: NDArray[np.int64]
    share_H: NDArray[np.float64]
    load_D: NDArray[np.float64]


def solve_shares(load_E: NDArray[np.int64], held_ED: NDArray[np.bool_], original_E: NDArray[np.int64]) -> Shares:
    """Step 3: in every connected part of the edges, the largest load is least.

    Raises
    ------
    NoResultError : HiGHS did not reach the optimum.
    """
    devices = held_ED.shape[1]
    many_E = held_ED.sum(axis=1) > 1
    load_D = np.bincount(held_ED.argmax(axis=1), np.where(many_E, 0.0, load_E), devices).astype(np.float64)
    shared_Y = np.flatnonzero(many_E)
    expert_H, device_H = np.nonzero(held_ED[shared_Y])
    order = np.lexsort((device_H, device_H != original_E[shared_Y][expert_H], expert_H))
    device_H = device_H[order]
    # experts of one edge (the same original and copies) share one variable for each holder
    key = np.packbits(np.column_stack([held_ED[shared_Y], original_E[shared_Y, None] == np.arange(devices)]), axis=1)
    one_G, group_Y = np.unique(key, axis=0, return_index=True, return_inverse=True)[1:]
    group_Y = group_Y.reshape(-1)
    tokens_G = np.bincount(group_Y, load_E[shared_Y]).astype(np.float64)
    first_Y = np.searchsorted(expert_H, np.arange(shared_Y.size + 1))
    size_G = np.diff(first_Y)[one_G]
    first_G = np.cumsum(size_G) - size_G
    group_V = np.repeat(np.arange(one_G.size), size_G)
    device_V = device_H[first_Y[one_G][group_V] + np.arange(group_V.size) - first_G[group_V]]
    edges = coo_array((np.ones(group_V.size), (device_V[first_G][group_V], device_V)), shape=(devices, devices))
    tokens_V = _solve(tokens_G, group_V, device_V, load_D, connected_components(edges, directed=False)[1])
    total_G = np.bincount(group_V, tokens_V, one_G.size)
    even_V = 1.0 / size_G[group_V]
    share_V = np.divide(tokens_V, total_G[group_V], out=even_V, where=total_G[group_V] > 0)
    entry_H = np.arange(device_H.size) - first_Y[expert_H] + first_G[group_Y][expert_H]
    share_H = share_V[entry_H]
    np.add.at(load_D, device_H, share_H * load_E[shared_Y][expert_H])
    return Shares(shared_Y[expert_H], device_H, share_H, load_D)


def _solve(
    tokens_G: NDArray[np.float64],
    group_V: NDArray[np.int64],
    device_V: NDArray[np.int64],
    fixed_D: NDArray[np.float64],
    part_D: NDArray[np.int32],
) -> NDArray[np.float64]:
    """Tokens of each (group, holder), float64 [V]. Rows: loads of devices, then of groups; last columns: maxima."""
    devices, groups, pairs, parts = fixed_D.size, tokens_G.size, group_V.size, int(part_D.max()) + 1
    row = np.concatenate([device_V, devices + group_V, np.arange(devices)])
    column = np.concatenate([np.arange(pairs), np.arange(pairs), pairs + part_D])
    value = np.concatenate([np.ones(2 * pairs), np.full(devices, -1.0)])
    matrix = coo_array((value, (row, column)), shape=(devices + groups, pairs + parts)).tocsc()
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = pairs + parts, devices + groups
    lp.col_cost_ = np.concatenate([np.zeros(pairs), np.ones(parts)])
    lp.col_lower_, lp.col_upper_ = np.zeros(pairs + parts), np.full(pairs + parts, highspy.kHighsInf)
    lp.row_lower_ = np.concatenate([np.full(devices, -highspy.kHighsInf), tokens_G])
    lp.row_upper_ = np.concatenate([-fixed_D, tokens_G])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    model = Milp().model
    model.passModel(lp)
    model.run()
    if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise NoResultError(f"HiGHS did not solve {pairs} columns, {devices + groups} rows: {model.getModelStatus()}")
    return np.maximum(np.array(model.getSolution().col_value)[:pairs], 0.0)


def whole_tokens(tokens_SE: NDArray[np.int64], shares: Shares, num_devices: int, *, nearest: bool) -> NDArray[np.int64]:
    """Step 4: rows int64 [S, E, D]."""
    rows_SED = np.zeros((*tokens_SE.shape, num_devices), np.int64)
    rows_SED[:, shares.expert_H, shares.device_H] = tokens_of_holders(tokens_SE, shares, nearest=nearest)
    return rows_SED


def tokens_of_holders(tokens_SE: NDArray[np.int64], shares: Shares, *, nearest: bool) -> NDArray[np.int64]:
    """Step 4, int64 [S, H]. The running sum over an expert's holders is rounded down, or to the nearest."""
    first_H = np.diff(shares.expert_H, prepend=-1) != 0
    last_H = np.append(first_H[1:], True)[: first_H.size]
    sum_H = np.cumsum(shares.share_H)
    sum_H -= (sum_H - shares.share_H)[np.maximum.accumulate(np.where(first_H, np.arange(first_H.size), 0))]
    tokens_SH = tokens_SE[:, shares.expert_H]
    cut_SH = np.floor(tokens_SH * sum_H + (0.5 if nearest else 1e-6)).astype(np.int64)
    cut_SH = np.where(last_H, tokens_SH, np.minimum(cut_SH, tokens_SH))
    before_SH = np.where(first_H, 0, np.roll(cut_SH, 1, axis=1))
    out: NDArray[np.int64] = cut_SH - before_SH
    return out


@dataclass(frozen=True, slots=True)
class Lplb(StepPolicy):
    """See the module docstring.

    Parameters
    ----------
    topology : the edges, where the static placement has no replicas.
    rounding : whole tokens at each source, or of the sum.
    history_steps : steps seen before replicas are placed; 0: by prediction, at once.
    """

    name: ClassVar[str] = "lplb"
    summary: ClassVar[str] = "tokens split over fixed replica edges by a linear programme on exact loads"
    keeps: ClassVar[bool] = True
    keeps_in_training: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    topology: Topology = "auto"
    rounding: Rounding = "source"
    history_steps: int = 4

    def __post_init__(self) -> None:
        for name, kind in (("topology", Topology), ("rounding", Rounding)):
            if getattr(self, name) not in get_args(kind):
                raise OptionError(
                    f"lplb has no {name} {getattr(self, name)!r}", hint=f"one of {', '.join(get_args(kind))}"
                )
        if self.history_steps < 0:
            raise OptionError(f"history_steps must be at least 0, got {self.history_steps}")

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Steps 1 and 2, once."""
        static_ED = view.static_ED
        early = view.step < self.history_steps or view.step_slots == 0
        if early or (static_ED.sum(axis=1) > 1).any() or (view.before_ED & ~static_ED).any():
            return view.before_ED
        sizes = view.price.cluster.devices_per_node_N
        node_size = int(sizes[0]) if (sizes == sizes[0]).all() else 0
        r2o = neighbours(static_ED.shape[1], node_size, view.step_slots, self.topology)
        weight_E = view.recent_HE.mean(axis=0) if self.history_steps and len(view.recent_HE) else view.predicted_E
        return put_replicas(static_ED, weight_E, r2o, view.step_slots)

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Steps 3 and 4."""
        load_E, many_E = load_SE.sum(axis=0), holders_ED.sum(axis=1) > 1
        if not many_E.any():
            return StepPlan(holders_ED, even_quota(load_E, view.static_ED), passive=True)
        shares = solve_shares(load_E, holders_ED, view.owner_E)
        total = self.rounding == "total"
        if total or holders_ED.size * len(load_SE) > MAX_ROWS:
            quota_ED = np.where(holders_ED & ~many_E[:, None], load_E[:, None], 0)
            tokens_SH = tokens_of_holders(load_E[None] if total else load_SE, shares, nearest=total)
            quota_ED[shares.expert_H, shares.device_H] = tokens_SH.sum(axis=0)
            return StepPlan(holders_ED, quota_ED)
        rows_SED = whole_tokens(load_SE, shares, holders_ED.shape[1], nearest=False)
        quota_ED = rows_SED.sum(axis=0) + np.where(holders_ED & ~many_E[:, None], load_E[:, None], 0)
        alone = np.flatnonzero(~many_E)
        rows_SED[:, alone, holders_ED[alone].argmax(axis=1)] = load_SE[:, alone]
        return StepPlan(holders_ED, quota_ED, rows_SED)
