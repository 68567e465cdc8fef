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

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from poise.control.align import aligned
from poise.cost.compute import expert_seconds
from poise.cost.step import batch_cost
from poise.engines.plugins.nudge import nudged
from poise.engines.plugins.settings import PolicySettings
from poise.engines.slots import full_table
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.methods.eplb import rebalance_experts
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.anneal import PROPOSALS, anneal_slots
from poise.planning.solve.near_anneal import near_annealed, proposals_within
from poise.planning.solve.search import PROPOSALS_PER_SECOND
from poise.routing.batch import RoutingBatch
from poise.util.compiled import compiled

EXPERT_TOKENS = 512.0
"""Mean tokens of an expert in a step where none is named: what a step costs against what moves cost."""
LINEAR = 128.0
"""Such steps are priced by this many at a time, so that every expert is bound by arithmetic: tokens count."""
ROUNDING = 1e-9


NUDGES = 128
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
class NewMap:
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
) -> NewMap:  # fmt: skip
    """The map of layers with load; ``known``: the base is the map in use."""
    shape = _Shape(*numbers)
    layers, experts = load_LE.shape
    model = settings.model or ModelSpec.generic(experts, 1, np.arange(layers))
    pairs, steps = EXPERT_TOKENS * experts * LINEAR, settings.horizon_steps / LINEAR
    if settings.tokens_per_step is not None:
        pairs, steps = float(settings.tokens_per_step * model.top_k), settings.horizon_steps
    load_LE = load_LE * (pairs / load_LE.sum(axis=1))[:, None]
    priced = _Priced(_problem(load_LE, cluster, model, base_LS.shape[1], settings), base_LS, known, steps)
    near = settings.split == "near" and cluster.num_nodes > 1 and shape.nodes == 1
    base_L = priced.seconds(base_LS[None])[0]
    found = _candidates(priced, base_L, shape, settings, 1 - NEAR_SHARE * near)
    if known:  # step 5, before anything is priced
        found = [_same_slots(base_LS, _renumbered(base_LS, one, priced.problem), shape.ranks) for one in found]
        found.insert(0, _from_base(priced, base_L, shape))
    tables = np.stack([base_LS, *found])
    step_CL = np.vstack([base_L[None], priced.seconds(tables[1:])])
    best_L = _cheapest(step_CL, tables, priced)
    if near:
        one = _near(priced, tables[best_L, np.arange(layers)], settings)
        tables = np.concatenate([tables, one[None]])
        step_CL = np.vstack([step_CL, priced.seconds(one[None])])
        best_L = _cheapest(step_CL, tables, priced)
    return _chosen(tables, step_CL, best_L, priced, settings)


@dataclass(frozen=True, slots=True, eq=False)
class _Priced:
    """The problem, the map that moves start from, and how many steps a map serves."""

    problem: PlacementProblem
    base_LS: NDArray[np.int64]
    known: bool
    steps: float

    def seconds(self, table_CLS: NDArray[np.int64]) -> NDArray[np.float64]:
        """Step 3: of a step, float64 [C, L]. All maps are priced as layers of one."""
        problem = self.problem
        maps, layers, slots = table_CLS.shape
        count = _counts(table_CLS.reshape(-1, slots), problem.batch.num_experts, problem.num_devices)
        many = RoutingBatch(np.tile(problem.batch.load_BLE, (1, maps, 1)), np.ones(1), problem.batch.top_k,
                            np.arange(maps * layers, dtype=np.int32))  # fmt: skip
        cost = batch_cost(many, count, problem.cluster, problem.model, traffic="home", split=problem.split)
        return cost.seconds_BL[0].reshape(maps, layers)

    def fetches(self, table_CLS: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Experts that each rank lacks in the base, int64 [C, L, D], and the seconds they take, float64 [C, L]."""
        cluster, model = self.problem.cluster, self.problem.model
        if not self.known:
            return np.zeros((*table_CLS.shape[:2], cluster.num_devices), np.int64), np.zeros(table_CLS.shape[:2])
        inside, outside = _fetched(
            self.base_LS, table_CLS, self.problem.batch.num_experts, cluster.node_D.astype(np.int64)
        )
        wires = inside / cluster.intra_bytes_per_s + outside / cluster.inter_bytes_per_s
        return inside + outside, wires.max(axis=2) * model.expert_bytes


def _cheapest(
    step_CL: NDArray[np.float64], table_CLS: NDArray[np.int64], priced: _Priced
) -> NDArray[np.int64]:  # fmt: skip
    """The number of the best map of each layer."""
    problem = priced.problem
    score = priced.steps * step_CL + priced.fetches(table_CLS)[1]
    if table_CLS.shape[2] // problem.num_devices <= problem.batch.num_experts:
        twice_CL = np.stack([_twice(table, problem.num_devices) for table in table_CLS])
        twice_CL[0] = False
        score[twice_CL] = np.inf
    best: NDArray[np.int64] = np.argmin(score, axis=0)
    best[score.min(axis=0) >= score[0] * (1 - ROUNDING)] = 0
    return best


def _chosen(
    found_CLS: NDArray[np.int64], step_CL: NDArray[np.float64], best_L: NDArray[np.int64], priced: _Priced,
    settings: PolicySettings,
) -> NewMap:  # fmt: skip
    """Steps 3 and 4: what of the best maps is gone to now."""
    base, every = priced.base_LS, np.arange(len(best_L))
    saved_L = step_CL[0] - step_CL[best_L, every]
    gain = float(saved_L.sum() / step_CL[0].sum())
    if priced.known and best_L.any() and gain < settings.min_gain:
        why = f"the best map found gains {gain:.2%} of a step, POISE_MIN_GAIN asks for {settings.min_gain:.2%}"
        return NewMap(base.copy(), 0.0, 0, 0, 0, why)
    out, devices = found_CLS[best_L, every], priced.problem.num_devices
    new_1LD, moves_1L = priced.fetches(out[None])
    new_LD, left = new_1LD[0], 0
    if priced.known and settings.max_moves is not None:
        worth = np.where(best_L > 0, priced.steps * saved_L - moves_1L[0], -np.inf)
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
    return NewMap(out, gain, int(new_LD.sum(axis=0).max()), int((best_L > 0).sum()), left, kept)


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
def _counts(table_LS: NDArray[np.int64], experts: int, devices: int) -> NDArray[np.int32]:
    """Slots of each expert on each device, int32 [L, E, D]."""
    layers, slots = table_LS.shape
    out = np.zeros((layers, experts, devices), np.int32)
    each = slots // devices
    for layer in range(layers):
        for s in range(slots):
            out[layer, table_LS[layer, s], s // each] += 1
    return out


@compiled
def _twice(table_LS: NDArray[np.int64], devices: int) -> NDArray[np.bool_]:
    """Whether a rank of the layer has an expert twice, bool [L]."""
    layers, slots = table_LS.shape
    each, out = slots // devices, np.zeros(layers, np.bool_)
    for layer in range(layers):
        for s in range(slots):
            for t in range(s // each * each, s):
                if table_LS[layer, s] == table_LS[layer, t]:
                    out[layer] = True
    return out


@compiled
def _fetched(
    base_LS: NDArray[np.int64], table_CLS: NDArray[np.int64], experts: int, node_D: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Experts that each rank lacks in the base, int64 [C, L, D] each: those that a rank of its node has, and others."""
    maps, layers, slots = table_CLS.shape
    devices, nodes = node_D.size, node_D.max() + 1
    each = slots // devices
    inside, outside = np.zeros((2, maps, layers, devices), np.int64)
    for layer in range(layers):
        have_ED, have_EN = np.zeros((experts, devices), np.bool_), np.zeros((experts, nodes), np.bool_)
        for s in range(slots):
            have_ED[base_LS[layer, s], s // each] = True
            have_EN[base_LS[layer, s], node_D[s // each]] = True
        for c in range(maps):
            for s in range(slots):
                e, d = table_CLS[c, layer, s], s // each
                again = have_ED[e, d]
                for t in range(d * each, s):
                    again = again or table_CLS[c, layer, t] == e
                if not again:
                    if have_EN[e, node_D[d]]:
                        inside[c, layer, d] += 1
                    else:
                        outside[c, layer, d] += 1
    return inside, outside


def _candidates(
    priced: _Priced, base_L: NDArray[np.float64], shape: _Shape, settings: PolicySettings, share: float
) -> list[NDArray[np.int64]]:
    """The engine's own map, and the least full of those annealed from it, and from the base where its groups are whole;
    layer by layer, with no expert twice on a rank where that can be.
    """
    problem, base = priced.problem, priced.base_LS
    load, cluster = problem.batch.load_LE(), problem.cluster
    theirs, _, _ = rebalance_experts(load, base.shape[1], shape.groups, shape.nodes, shape.ranks, sums="double")
    theirs = theirs.astype(np.int64)
    starts = [theirs]
    if priced.known and shape.nodes > 1:
        kept = theirs.copy()
        whole_L = _whole(base, problem.batch.num_experts, shape)
        kept[whole_L] = base[whole_L]
        starts.append(kept)
    proposals = int(share * settings.time_limit_s * PROPOSALS_PER_SECOND / (len(starts) * len(load) * shape.nodes))
    work_LE = expert_seconds(problem.batch.load_BLE, cluster, problem.model)[0]
    rate_D = cluster.speed_D.sum() / cluster.speed_D
    made = [
        _annealed(work_LE, start, shape.nodes, rate_D, max(1, min(PROPOSALS, proposals)), settings.seed)
        for start in starts
    ]
    fullest = np.stack([_fullest(load, one, 1 / cluster.speed_D, True) for one in made])
    return [theirs, np.stack(made)[fullest.argmin(axis=0), np.arange(len(load))]]


@compiled
def _annealed(
    load_LE: NDArray[np.float64], table_LS: NDArray[np.int64], nodes: int, rate_D: NDArray[np.float64], proposals: int,
    seed: int,
) -> NDArray[np.int64]:  # fmt: skip
    """The table after annealing, node by node, each with the experts it has; second copies on a rank go first, and what
    is empty in the end gets the least loaded expert that the rank lacks.
    """
    layers, slots = table_LS.shape
    experts, devices = load_LE.shape[1], rate_D.size
    of_node, ranks, each = slots // nodes, devices // nodes, slots // devices
    out, stop, one = table_LS.copy(), np.zeros(1, np.int64), np.ones(1)
    device_S = np.arange(of_node) // each
    for layer in range(layers):
        for node in range(nodes):
            row = out[layer, node * of_node : (node + 1) * of_node]
            here = np.unique(row)
            place_E = np.zeros(experts, np.int64)
            own = np.zeros((1, here.size + 1))
            for i in range(here.size):
                place_E[here[i]] = i
                own[0, i] = load_LE[layer, here[i]]
            own /= max(own.sum(), 1e-300)
            mine = np.empty(of_node, np.int64)
            for s in range(of_node):
                mine[s] = place_E[row[s]]
                for t in range(s // each * each, s):
                    if mine[t] == mine[s]:
                        mine[s] = -1
                        break
            rate = rate_D[node * ranks : (node + 1) * ranks] / nodes
            anneal_slots(own, one, mine, device_S, rate, proposals, seed + layer, stop)
            order = np.argsort(own[0, :-1], kind="mergesort")
            for s in range(of_node):
                if mine[s] < 0:
                    first = s // each * each
                    for e in order:
                        if not (mine[first : first + each] == e).any():
                            mine[s] = e
                            break
                    if mine[s] < 0:  # the rank has every expert of the node
                        mine[s] = order[0]
            for s in range(of_node):
                row[s] = here[mine[s]]
    return out


@compiled
def _fullest(
    load_LE: NDArray[np.float64], table_LS: NDArray[np.int64], rate_D: NDArray[np.float64], once: bool
) -> NDArray[np.float64]:  # fmt: skip
    """Tokens of the fullest rank, times its rate, of each layer, float64 [L]; infinite where experts must lie ``once``
    on a rank and one does not.
    """
    layers, slots = table_LS.shape
    each, out = slots // rate_D.size, np.zeros(layers)
    for layer in range(layers):
        count_E = np.bincount(table_LS[layer], minlength=load_LE.shape[1])
        for d in range(rate_D.size):
            x = 0.0
            for s in range(d * each, (d + 1) * each):
                e = table_LS[layer, s]
                x += load_LE[layer, e] / count_E[e] * rate_D[d]
                for t in range(d * each, s):
                    if once and table_LS[layer, t] == e:
                        x = np.inf
            out[layer] = max(out[layer], x)
    return out


def _whole(base_LS: NDArray[np.int64], experts: int, shape: _Shape) -> NDArray[np.bool_]:
    """In which layers the base has every group on one node, and as many groups on each, bool [L]."""
    layers, slots = base_LS.shape
    held_LGN = np.zeros((layers, shape.groups, shape.nodes), np.bool_)
    group_LS = base_LS // (experts // shape.groups)
    held_LGN[np.arange(layers)[:, None], group_LS, np.arange(slots) // (slots // shape.nodes)] = True
    whole: NDArray[np.bool_] = (held_LGN.sum(axis=2) == 1).all(axis=1)
    return whole & (held_LGN.sum(axis=1) == shape.groups // shape.nodes).all(axis=1)


def _from_base(priced: _Priced, base_L: NDArray[np.float64], shape: _Shape) -> NDArray[np.int64]:
    """The map in use after the moves that pay; layers whose groups it tears stay."""
    problem, out = priced.problem, priced.base_LS.copy()
    cluster, load_LE = problem.cluster, problem.batch.load_LE()
    rate_D = cluster.speed_D.mean() / cluster.speed_D
    place_D = np.arange(shape.ranks) // (shape.ranks // shape.nodes)
    price = problem.model.expert_bytes / cluster.slowest_bytes_per_s
    most_L = _fullest(load_LE, out, rate_D, False)
    whole_L = np.ones(len(out), np.bool_) if shape.nodes == 1 else _whole(out, load_LE.shape[1], shape)
    for layer in np.flatnonzero(whole_L).tolist():
        worth = priced.steps * base_L[layer] / most_L[layer]  # a step's time follows its fullest rank
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
