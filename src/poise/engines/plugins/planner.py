"""How a plugin plans: the candidates, their price, and which slot an expert gets.

Step 1  Experts of a node. Where the engine asks for it (expert groups that divide over nodes), groups stay whole, once
        on the nodes where the map in use has them, and once packed anew by load.
Step 2  Candidates, for either: the map in use; SwiftBalance from it, which moves little; simulated annealing, the start
        of poise's search that decides balance; the engine's own algorithm (EPLB). Empty slots get the least loaded
        expert that is not on the device. Devices that are interchangeable are numbered to fetch least.
Step 3  Layer by layer the cheapest, ``horizon * seconds of a step + seconds to fetch what moves``, on modelled seconds.
        The map in use costs no fetch: where nothing gains enough, it stays. A candidate with an expert twice on a rank
        is not taken where that can be avoided.
Step 4  Experts that stay on their rank keep their slot: engines move weights by slot.

Nothing here looks at a clock, and no sum depends on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.control.align import aligned
from poise.cost.step import batch_cost
from poise.engines.plugins.settings import PolicySettings
from poise.engines.slots import full_table, trivial_row
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import UNIT, UPDATES_PER_SECOND, Budget
from poise.planning.methods import swift_balance
from poise.planning.methods.eplb import balanced_packing, rebalance_experts
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.anneal import PROPOSALS, annealed
from poise.planning.solve.search import PROPOSALS_PER_SECOND
from poise.routing.batch import RoutingBatch

EXPERT_TOKENS = 512.0
"""Mean tokens of an expert in a step where none is named: what a step costs against what moves cost."""
LINEAR = 128.0
"""Such steps are priced by this many at a time, so that every expert is bound by arithmetic: tokens count."""
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class _Shape:
    """Groups, nodes that hold groups whole (1: none does), ranks."""

    groups: int
    nodes: int
    ranks: int


def plan(
    load_LE: NDArray[np.float64], base_LS: NDArray[np.int64], known: bool, numbers: tuple[int, int, int],
    cluster: Cluster, settings: PolicySettings,
) -> NDArray[np.int64]:  # fmt: skip
    """The map, int64 [L, S], of layers with load; ``known``: the base is the map in use."""
    shape = _Shape(*numbers)
    layers, experts = load_LE.shape
    model = settings.model or ModelSpec.generic(experts, 1, np.arange(layers))
    pairs, steps = EXPERT_TOKENS * experts * LINEAR, settings.horizon_steps / LINEAR
    if settings.tokens_per_step is not None:
        pairs, steps = float(settings.tokens_per_step * model.top_k), settings.horizon_steps
    problem = _problem(load_LE * (pairs / load_LE.sum(axis=1))[:, None], cluster, model, base_LS.shape[1])
    found = [base_LS, *_candidates(problem, base_LS, known, shape, settings)]
    slots = base_LS.shape[1]
    maps, _, _ = rebalance_experts(load_LE, slots, shape.groups, shape.nodes, shape.ranks, sums="double")
    found.append(maps)
    if known:  # step 4
        before = _placement(base_LS, problem)
        found[1:] = [
            _same_slots(base_LS, aligned(before, _placement(table, problem), cluster, whole=False))
            for table in found[1:]
        ]
    score = np.stack([_score_L(problem, table, base_LS, known, steps) for table in found])
    for row, table in zip(score[1:], found[1:], strict=True):
        if slots // shape.ranks <= experts:
            row[(_placement(table, problem).count_LED() > 1).any(axis=(1, 2))] = np.inf
    best = np.argmin(score, axis=0)
    best[score.min(axis=0) >= score[0] * (1 - ROUNDING)] = 0
    return np.stack(found)[best, np.arange(layers)]


def _problem(load_LE: NDArray[np.float64], cluster: Cluster, model: ModelSpec, slots: int) -> PlacementProblem:
    layers, devices = len(load_LE), cluster.num_devices
    batch = RoutingBatch(load_LE[None].copy(), np.ones(1), model.top_k, np.arange(layers, dtype=np.int32))
    return PlacementProblem(batch, cluster, model, np.full(devices, slots // devices))


def _placement(table_LS: NDArray[Any], problem: PlacementProblem) -> Placement:
    devices = problem.num_devices
    device_S = np.repeat(np.arange(devices, dtype=np.int32), table_LS.shape[1] // devices)
    return Placement(table_LS.astype(np.int32), device_S, problem.batch.num_experts, devices)


def _candidates(
    problem: PlacementProblem, base_LS: NDArray[np.int64], known: bool, shape: _Shape, settings: PolicySettings
) -> list[NDArray[np.int64]]:
    """SwiftBalance from the base (if known) and annealing, node by node, [L, S] each."""
    load = problem.batch.load_LE()
    packed_LNX = _packed(load, shape)
    kept_LNX, whole_L = _kept(base_LS, packed_LNX, shape)
    groupings = [packed_LNX]
    if known and not np.array_equal(kept_LNX, packed_LNX):
        groupings.insert(0, kept_LNX)
    proposals = settings.time_limit_s * PROPOSALS_PER_SECOND / len(groupings)
    out = [_by_node(problem, base_LS, grouping, settings, shape, proposals=proposals) for grouping in groupings]
    if known:
        out.insert(0, _by_node(problem, base_LS, kept_LNX, settings, shape, whole_L=whole_L))
    return out


def _by_node(
    problem: PlacementProblem, base_LS: NDArray[np.int64], expert_LNX: NDArray[np.int64], settings: PolicySettings,
    shape: _Shape, *, proposals: float = 0.0, whole_L: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:  # fmt: skip
    """A map, int64 [L, S], in which every node holds its ``expert_LNX``.

    Annealed; or, given the layers in which the base holds them so, moved to from the base.
    """
    load = problem.batch.load_LE()
    layers, nodes, each = expert_LNX.shape
    slots, ranks = base_LS.shape[1] // nodes, shape.ranks // nodes
    out = np.empty_like(base_LS)
    setting = swift_balance.SwiftBalanceSetting(share="even", max_transfers=slots // ranks, one_mean=False)
    each_layer = max(1, int(min(PROPOSALS, proposals / (layers * nodes))))
    for node in range(nodes):
        ids_LX, here = expert_LNX[:, node], slice(node * slots, (node + 1) * slots)
        part = _problem(
            np.take_along_axis(load, ids_LX, axis=1),
            problem.cluster if nodes == 1 else _one_node(problem.cluster, node),
            replace(problem.model, num_experts=each, top_k=min(problem.model.top_k, each)), slots,
        )  # fmt: skip
        if whole_L is not None:
            local_LE = np.zeros(load.shape, np.int64)
            np.put_along_axis(local_LE, ids_LX, np.broadcast_to(np.arange(each), ids_LX.shape), axis=1)
            base = np.tile(trivial_row(each, slots).astype(np.int64), (layers, 1))
            base[whole_L] = np.take_along_axis(local_LE, base_LS[:, here], axis=1)[whole_L]
            part = replace(part, current=_placement(base, part))
            work = settings.time_limit_s * UPDATES_PER_SECOND / UNIT  # a clock would end elsewhere on another rank
            made = swift_balance.plan(
                part, time_limit_s=Budget(settings.time_limit_s, work=work), setting=setting
            ).placement
        else:
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


def _same_slots(base_LS: NDArray[np.int64], after: Placement) -> NDArray[np.int64]:
    """Step 4: the table of ``after`` with every expert that stays on its rank in the slot it has."""
    per_rank = after.num_slots // after.num_devices
    out = np.empty_like(base_LS)
    for layer, count_ED in enumerate(after.count_LED()):
        for device, want_E in enumerate(count_ED.T.copy()):
            first = device * per_rank
            row = out[layer, first : first + per_rank]
            open_slots = []
            for slot, expert in enumerate(base_LS[layer, first : first + per_rank].tolist()):
                if want_E[expert] > 0:
                    row[slot] = expert
                    want_E[expert] -= 1
                else:
                    open_slots.append(slot)
            row[open_slots] = np.repeat(np.arange(want_E.size), want_E)
    return out


def _score_L(
    problem: PlacementProblem, table_LS: NDArray[np.int64], base_LS: NDArray[np.int64], known: bool, steps: float
) -> NDArray[np.float64]:
    """Step 3: seconds of so many steps, and of the moves before them, float64 [L]."""
    cluster, model = problem.cluster, problem.model
    count = _placement(table_LS, problem).count_LED()
    cost = batch_cost(problem.batch, count, cluster, model, traffic="home", split="even")
    seconds = steps * cost.seconds_BL[0]
    if known:
        fetched_LED = (count > 0) & (_placement(base_LS, problem).count_LED() == 0)
        seconds += fetched_LED.sum(axis=1).max(axis=1) * model.expert_bytes / cluster.inter_bytes_per_s
    return seconds
