"""How a plugin plans: the candidates, their price, and which slot an expert gets.

Step 1  Experts of a node. Where the engine asks for it (expert groups that divide over nodes), groups stay whole, once
        on the nodes where the map in use has them, and once packed anew by load.
Step 2  Candidates: the map in use; few moves away from it (:mod:`poise.engines.plugins.nudge`); simulated annealing,
        the start of poise's search that decides balance, for either grouping; the engine's own algorithm (EPLB). Where
        the engine has a rank use the replicas near it first, the best of these is annealed for that as well. Empty
        slots get the least loaded expert that is not on the device. Devices that are interchangeable are numbered to
        fetch least.
Step 3  Layer by layer the cheapest, ``horizon * seconds of a step + seconds to fetch what moves``, on modelled seconds
        (measured ones where settings name machine and model) under the engine's split. The map in use costs no fetch:
        where nothing gains enough, it stays. A candidate with an expert twice on a rank is not taken where that can be
        avoided. Where all layers together gain less than ``min_gain`` of a step, all stay.
Step 4  Layers go in the order in which they pay back, until a rank would fetch more than ``max_moves``: the others keep
        their rows until next time.
Step 5  Experts that stay on their rank keep their slot: engines move weights by slot.

Nothing here looks at a clock, and no sum depends on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from poise.control.align import aligned
from poise.cost.step import batch_cost
from poise.engines.plugins.nudge import nudged
from poise.engines.plugins.settings import PolicySettings
from poise.engines.slots import full_table
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.methods.eplb import balanced_packing, rebalance_experts
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.anneal import PROPOSALS, annealed
from poise.planning.solve.near_anneal import near_annealed, proposals_within
from poise.planning.solve.search import PROPOSALS_PER_SECOND
from poise.routing.batch import RoutingBatch
from poise.util.compiled import compiled

EXPERT_TOKENS = 512.0
"""Mean tokens of an expert in a step where none is named: what a step costs against what moves cost."""
LINEAR = 128.0
"""Such steps are priced by this many at a time, so that every expert is bound by arithmetic: tokens count."""
ROUNDING = 1e-9


NUDGES = 64
"""Most changes of a layer on the way from the map in use."""
NEAR_SHARE = 0.5
"""Of the search, where it weighs what ranks keep."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """Groups, nodes that hold groups whole (1: none does), ranks."""

    groups: int
    nodes: int
    ranks: int


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A map, and what it is worth.

    Parameters
    ----------
    table_LS : int64 [L, S].
    gain : share of the step's modelled seconds that it saves; of a map without one before it, of the trivial map's.
    fetches : most experts that a rank has to fetch.
    layers : layers that change.
    left : layers that gain and wait for the next time.
    kept : why the map in use stays, "" where it does not.
    """

    table_LS: NDArray[np.int64]
    gain: float
    fetches: int
    layers: int
    left: int
    kept: str = ""


def plan(
    load_LE: NDArray[np.float64], base_LS: NDArray[np.int64], known: bool, numbers: tuple[int, int, int],
    cluster: Cluster, settings: PolicySettings,
) -> Planned:  # fmt: skip
    """The map of layers with load; ``known``: the base is the map in use."""
    shape = _Shape(*numbers)
    layers, experts = load_LE.shape
    model = settings.model or ModelSpec.generic(experts, 1, np.arange(layers))
    pairs, steps = EXPERT_TOKENS * experts * LINEAR, settings.horizon_steps / LINEAR
    if settings.tokens_per_step is not None:
        pairs, steps = float(settings.tokens_per_step * model.top_k), settings.horizon_steps
    load_LE = load_LE * (pairs / load_LE.sum(axis=1))[:, None]
    priced = _Priced(_problem(load_LE, cluster, model, base_LS.shape[1], settings), base_LS, known, steps)
    found = [base_LS, *_candidates(priced, shape, settings)]
    maps, _, _ = rebalance_experts(load_LE, base_LS.shape[1], shape.groups, shape.nodes, shape.ranks, sums="double")
    found.append(maps)
    if known:  # step 5, before anything is priced
        found[1:] = [_same_slots(base_LS, _renumbered(base_LS, one, priced.problem), shape.ranks) for one in found[1:]]
    step_CL, moves_CL = priced.seconds(np.stack(found))
    best_L = _cheapest(step_CL, moves_CL, np.stack(found), priced)
    if settings.split == "near" and cluster.num_nodes > 1 and shape.nodes == 1:
        found.append(_near(priced, np.stack(found)[best_L, np.arange(layers)], settings))
        more = priced.seconds(found[-1][None])
        step_CL, moves_CL = (np.vstack(pair) for pair in zip((step_CL, moves_CL), more, strict=True))
        best_L = _cheapest(step_CL, moves_CL, np.stack(found), priced)
    return _chosen(np.stack(found), step_CL, moves_CL, best_L, priced, settings)


@dataclass(frozen=True, slots=True, eq=False)
class _Priced:
    """The problem, the map that moves start from, and how many steps a map serves."""

    problem: PlacementProblem
    base_LS: NDArray[np.int64]
    known: bool
    steps: float

    def seconds(self, table_CLS: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Step 3: of a step, and of the moves before it, float64 [C, L] each. All maps are priced as layers of one."""
        problem = self.problem
        cluster, model, batch = problem.cluster, problem.model, problem.batch
        maps, layers, slots = table_CLS.shape
        count = _counts(table_CLS.reshape(-1, slots), batch.num_experts, cluster.num_devices)
        many = RoutingBatch(np.tile(batch.load_BLE, (1, maps, 1)), np.ones(1), batch.top_k,
                            np.arange(maps * layers, dtype=np.int32))  # fmt: skip
        cost = batch_cost(many, count, cluster, model, traffic="home", split=problem.split)
        step = cost.seconds_BL[0].reshape(maps, layers)
        if not self.known:
            return step, np.zeros_like(step)
        held = _counts(self.base_LS, batch.num_experts, cluster.num_devices) > 0
        fetched = (count.reshape(maps, *held.shape) > 0) & ~held
        near_LEN = np.stack([held[:, :, cluster.node_D == n].any(axis=2) for n in range(cluster.num_nodes)], axis=2)
        inside = fetched & near_LEN[:, :, cluster.node_D]
        wires = inside.sum(axis=2) / cluster.intra_bytes_per_s
        wires = wires + (fetched & ~inside).sum(axis=2) / cluster.inter_bytes_per_s
        return step, wires.max(axis=2) * model.expert_bytes


def _cheapest(
    step_CL: NDArray[np.float64], moves_CL: NDArray[np.float64], found_CLS: NDArray[np.int64], priced: _Priced
) -> NDArray[np.int64]:
    """The number of the best map of each layer."""
    problem = priced.problem
    score = priced.steps * step_CL + moves_CL
    if found_CLS.shape[2] // problem.num_devices <= problem.batch.num_experts:
        for row, table in zip(score[1:], found_CLS[1:], strict=True):
            row[(_counts(table, problem.batch.num_experts, problem.num_devices) > 1).any(axis=(1, 2))] = np.inf
    best: NDArray[np.int64] = np.argmin(score, axis=0)
    best[score.min(axis=0) >= score[0] * (1 - ROUNDING)] = 0
    return best


def _chosen(
    found_CLS: NDArray[np.int64], step_CL: NDArray[np.float64], moves_CL: NDArray[np.float64],
    best_L: NDArray[np.int64], priced: _Priced, settings: PolicySettings,
) -> Planned:  # fmt: skip
    """Steps 3 and 4: what of the best maps is gone to now."""
    base, every = priced.base_LS, np.arange(len(best_L))
    saved_L = step_CL[0] - step_CL[best_L, every]
    gain = float(saved_L.sum() / step_CL[0].sum())
    if priced.known and best_L.any() and gain < settings.min_gain:
        why = f"the best map found gains {gain:.2%} of a step, POISE_MIN_GAIN asks for {settings.min_gain:.2%}"
        return Planned(base.copy(), 0.0, 0, 0, 0, why)
    devices, experts = priced.problem.num_devices, priced.problem.batch.num_experts
    out = found_CLS[best_L, every]
    new_LD = ((_counts(out, experts, devices) > 0) & (_counts(base, experts, devices) == 0)).sum(axis=1)
    left = 0
    if priced.known and settings.max_moves is not None:
        worth = np.where(best_L > 0, priced.steps * saved_L - moves_CL[best_L, every], -np.inf)
        rate = worth / np.maximum(new_LD.max(axis=1), 1)
        sum_D = np.zeros(devices, np.int64)
        for layer in np.argsort(-rate, kind="stable").tolist():
            if best_L[layer] and (sum_D + new_LD[layer]).max() > settings.max_moves:
                best_L[layer], left = 0, left + 1
            elif best_L[layer]:
                sum_D += new_LD[layer]
        out = found_CLS[best_L, every]
        new_LD[best_L == 0] = 0
        saved_L = step_CL[0] - step_CL[best_L, every]
        gain = float(saved_L.sum() / step_CL[0].sum())
    kept = "" if best_L.any() else "no layer gains what its moves cost"
    if left and not best_L.any():
        kept = f"each of {left} layers that gain takes more than POISE_MAX_MOVES, {settings.max_moves}"
    return Planned(out, gain, int(new_LD.sum(axis=0).max()), int((best_L > 0).sum()), left, kept)


def _problem(
    load_LE: NDArray[np.float64], cluster: Cluster, model: ModelSpec, slots: int, settings: PolicySettings
) -> PlacementProblem:
    layers, devices = len(load_LE), cluster.num_devices
    batch = RoutingBatch(load_LE[None].copy(), np.ones(1), model.top_k, np.arange(layers, dtype=np.int32))
    return PlacementProblem(
        batch, cluster, model, np.full(devices, slots // devices), split=settings.split or "even"
    )  # fmt: skip


def _placement(table_LS: NDArray[Any], problem: PlacementProblem) -> Placement:
    devices = problem.num_devices
    device_S = np.repeat(np.arange(devices, dtype=np.int32), table_LS.shape[1] // devices)
    return Placement(table_LS.astype(np.int32), device_S, problem.batch.num_experts, devices)


@compiled
def _counts(table_LS: NDArray[np.int64], experts: int, devices: int) -> NDArray[np.int64]:
    """Slots of each expert on each device, int64 [L, E, D]."""
    layers, slots = table_LS.shape
    out = np.zeros((layers, experts, devices), np.int64)
    each = slots // devices
    for layer in range(layers):
        for s in range(slots):
            out[layer, table_LS[layer, s], s // each] += 1
    return out


def _candidates(priced: _Priced, shape: _Shape, settings: PolicySettings) -> list[NDArray[np.int64]]:
    """A few moves from the base (if known) and annealing, node by node, [L, S] each."""
    load, base = priced.problem.batch.load_LE(), priced.base_LS
    packed_LNX = _packed(load, shape)
    kept_LNX, whole_L = _kept(base, packed_LNX, shape)
    groupings = [packed_LNX]
    if priced.known and not np.array_equal(kept_LNX, packed_LNX):
        groupings.insert(0, kept_LNX)
    near = settings.split == "near" and priced.problem.cluster.num_nodes > 1 and shape.nodes == 1
    proposals = settings.time_limit_s * PROPOSALS_PER_SECOND * (1 - NEAR_SHARE * near) / len(groupings)
    out = [_by_node(priced.problem, base, grouping, settings, shape, proposals) for grouping in groupings]
    if priced.known:
        out.insert(0, _from_base(priced, shape, whole_L))
    return out


def _from_base(priced: _Priced, shape: _Shape, whole_L: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The map in use after the moves that pay; layers whose groups it tears stay."""
    problem, out = priced.problem, priced.base_LS.copy()
    cluster, load_LE = problem.cluster, problem.batch.load_LE()
    rate_D = cluster.speed_D.mean() / cluster.speed_D
    place_D = np.arange(shape.ranks) // (shape.ranks // shape.nodes)
    step_L = priced.seconds(out[None])[0][0]
    price = problem.model.expert_bytes / cluster.slowest_bytes_per_s
    count_LED = _counts(out, problem.batch.num_experts, shape.ranks)
    share_LE = load_LE / count_LED.sum(axis=2)
    most_L = (np.einsum("le,led->ld", share_LE, count_LED) * rate_D).max(axis=1)
    for layer in np.flatnonzero(whole_L | (shape.nodes == 1)).tolist():
        worth = priced.steps * step_L[layer] / most_L[layer]  # a step's time follows its fullest rank
        nudged(load_LE[layer], out[layer], rate_D, place_D, NUDGES, worth, price)
    return out


def _near(priced: _Priced, start_LS: NDArray[np.int64], settings: PolicySettings) -> NDArray[np.int64]:
    """From the best map, annealed for the split near; all slots are filled."""
    problem = priced.problem
    proposals, _ = proposals_within(problem, NEAR_SHARE * settings.time_limit_s)
    budget = Budget(settings.time_limit_s, work=1.0)  # a clock would end elsewhere on another rank
    made = near_annealed(problem, _placement(start_LS, problem), proposals=max(1, proposals), seed=settings.seed,
                         budget=budget)  # fmt: skip
    full, _ = full_table(made, engine="the engine", price_LE=problem.batch.load_LE())
    return _same_slots(start_LS, full.astype(np.int64), problem.num_devices)


def _by_node(
    problem: PlacementProblem, base_LS: NDArray[np.int64], expert_LNX: NDArray[np.int64], settings: PolicySettings,
    shape: _Shape, proposals: float,
) -> NDArray[np.int64]:  # fmt: skip
    """An annealed map, int64 [L, S], in which every node holds its ``expert_LNX``."""
    load = problem.batch.load_LE()
    layers, nodes, each = expert_LNX.shape
    slots = base_LS.shape[1] // nodes
    out = np.empty_like(base_LS)
    each_layer = max(1, int(min(PROPOSALS, proposals / (layers * nodes))))
    for node in range(nodes):
        ids_LX, here = expert_LNX[:, node], slice(node * slots, (node + 1) * slots)
        part = _problem(
            np.take_along_axis(load, ids_LX, axis=1),
            problem.cluster if nodes == 1 else _one_node(problem.cluster, node),
            replace(problem.model, num_experts=each, top_k=min(problem.model.top_k, each)), slots, settings,
        )  # fmt: skip
        made = annealed(part, proposals=each_layer, seed=settings.seed)
        full, _ = full_table(made, engine="the engine", price_LE=part.batch.load_LE())
        out[:, here] = np.take_along_axis(ids_LX, full.astype(np.int64), axis=1)
    return out


def _one_node(cluster: Cluster, node: int) -> Cluster:
    mine = cluster.node_D == node
    return replace(cluster, node_D=np.zeros(int(mine.sum()), np.int32), speed_D=cluster.speed_D[mine])


def _packed(load_LE: NDArray[np.float64], shape: _Shape) -> NDArray[np.int64]:
    """Experts of each node, int64 [L, N, E / N]: groups packed by load."""
    layers, experts = load_LE.shape
    size = experts // shape.groups
    node_LG, _ = balanced_packing(load_LE.reshape(layers, shape.groups, size).sum(axis=2), shape.nodes, "double")
    return _experts_of(node_LG, size, shape.nodes)


def _kept(
    base_LS: NDArray[np.int64], packed_LNX: NDArray[np.int64], shape: _Shape
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The same with groups on the nodes that hold them in the base, and in which layers these hold them whole."""
    layers, slots = base_LS.shape
    size = packed_LNX[0].size // shape.groups
    held_LGN = np.zeros((layers, shape.groups, shape.nodes), np.bool_)
    held_LGN[np.arange(layers)[:, None], base_LS // size, np.arange(slots) // (slots // shape.nodes)] = True
    whole_L = (held_LGN.sum(axis=2) == 1).all(axis=1)
    whole_L &= (held_LGN.sum(axis=1) == shape.groups // shape.nodes).all(axis=1)
    out = packed_LNX.copy()
    out[whole_L] = _experts_of(held_LGN.argmax(axis=2)[whole_L], size, shape.nodes)
    return out, whole_L


def _experts_of(node_LG: NDArray[np.int64], size: int, nodes: int) -> NDArray[np.int64]:
    node_LE = np.repeat(node_LG, size, axis=1)
    return np.argsort(node_LE, axis=1, kind="stable").reshape(len(node_LG), nodes, node_LE.shape[1] // nodes)


def _renumbered(
    base_LS: NDArray[np.int64], table_LS: NDArray[np.int64], problem: PlacementProblem
) -> NDArray[np.int64]:
    """The table with interchangeable ranks numbered so that little is fetched: nodes first, then ranks inside.

    Where nodes are alike, they are matched by what they share, which is near to the best and far quicker than to try
    every pair of nodes with the best order inside (:func:`poise.control.align.aligned`, for nodes that are not).
    """
    cluster, devices = problem.cluster, problem.num_devices
    sizes = cluster.devices_per_node_N
    if (sizes != sizes[0]).any() or (cluster.speed_D != cluster.speed_D[0]).any():
        after = aligned(_placement(base_LS, problem), _placement(table_LS, problem), cluster, whole=False)
        return after.slot_expert_LS.astype(np.int64)
    each = int(sizes[0])
    shared_LDD = _shared(base_LS, table_LS, problem.batch.num_experts, devices)
    rows_LDK = table_LS.reshape(len(table_LS), devices, -1)
    out = np.empty_like(rows_LDK)
    nodes = cluster.num_nodes
    for layer, shared in enumerate(shared_LDD):
        of_nodes = shared.reshape(nodes, each, nodes, each).sum(axis=(1, 3))
        _, other = linear_sum_assignment(-of_nodes)
        for node, theirs in enumerate(other.tolist()):
            mine = shared[node * each : (node + 1) * each, theirs * each : (theirs + 1) * each]
            _, column = linear_sum_assignment(-mine)
            out[layer, node * each : (node + 1) * each] = rows_LDK[layer, theirs * each + column]
    return out.reshape(table_LS.shape)


@compiled
def _shared(
    base_LS: NDArray[np.int64], table_LS: NDArray[np.int64], experts: int, devices: int
) -> NDArray[np.int64]:  # fmt: skip
    """Experts that rank a has in the base and rank b in the table, int64 [L, D, D]."""
    layers, slots = base_LS.shape
    each = slots // devices
    out = np.zeros((layers, devices, devices), np.int64)
    for layer in range(layers):
        have_ED, seen_ED = np.zeros((experts, devices), np.bool_), np.zeros((experts, devices), np.bool_)
        for s in range(slots):
            have_ED[base_LS[layer, s], s // each] = True
        for s in range(slots):
            e, b = table_LS[layer, s], s // each
            if not seen_ED[e, b]:
                seen_ED[e, b] = True
                for a in range(devices):
                    out[layer, a, b] += have_ED[e, a]
    return out


@compiled
def _same_slots(base_LS: NDArray[np.int64], after_LS: NDArray[np.int64], devices: int) -> NDArray[np.int64]:
    """Step 5: the table ``after`` with every expert that stays on its rank in the slot it has."""
    layers, slots = base_LS.shape
    each = slots // devices
    out = np.empty_like(base_LS)
    taken = np.zeros(each, np.bool_)
    for layer in range(layers):
        for d in range(devices):
            first = d * each
            taken[:] = False
            for i in range(each):
                out[layer, first + i] = -1
                for j in range(each):
                    if not taken[j] and after_LS[layer, first + j] == base_LS[layer, first + i]:
                        out[layer, first + i] = after_LS[layer, first + j]
                        taken[j] = True
                        break
            rest = np.sort(after_LS[layer, first : first + each][~taken])
            at = 0
            for i in range(each):
                if out[layer, first + i] < 0:
                    out[layer, first + i] = rest[at]
                    at += 1
    return out
