"""A start for the split ``near``: presence of experts on nodes first, packing on devices second.

Under ``near`` a node that holds an expert keeps all of its own tokens of it, so what crosses the network is decided by
which nodes hold which experts, and what a device computes by how its node's part is packed.

Step 1  Need: the seconds of work that each node's tokens are for each expert. By the node's size, for other requests
        have other homes; only where homes are recorded as they are.
Step 2  A share of the redundant slots is for presence: the largest needs of nodes beside each expert's neediest one.
        Experts with such nodes get those and the neediest; the others, largest first, the node with least work for its
        slots. A node without an expert gives its tokens to those that hold it.
Step 3  Inside each node: a replica for every slot left, to the largest work / replicas, and LPT.
Step 4  Of five shares, from no presence beyond one node to nothing else, layer by layer the fastest on a few steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.machine.cluster import Cluster
from poise.planning.methods.lpt import pack_all
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.effort import some_steps
from poise.routing.batch import RoutingBatch
from poise.routing.trace import NO_EXPERT

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the redundant slots that are for presence on further nodes."""
PRICED = 4
"""Steps that step 4 looks at."""


def node_first(problem: PlacementProblem) -> Placement:
    """A placement with all slots filled that it can fill; slots are counted by layer."""
    cluster, slots_D = problem.cluster, problem.layer_slots_D
    need_LEN = _need(problem)
    few = some_steps(problem, PRICED, problem.batch.num_steps)
    options = [np.stack([_layer(need_EN, slots_D, cluster, share) for need_EN in need_LEN]) for share in SHARES]
    return problem.placed(few.fastest_layers(options), "node-first")


def _need(problem: PlacementProblem) -> NDArray[np.float64]:
    """Step 1, float64 [L, E, N]."""
    batch, cluster = problem.batch, problem.cluster
    work_LE = problem.work_LE()
    part_LEN = np.tile(cluster.devices_per_node_N / cluster.num_devices, (*work_LE.shape, 1))
    if batch.home_T is not None:
        known_LEN = _tokens_of_nodes(batch, cluster)
        sum_LE = known_LEN.sum(axis=2, keepdims=True)
        part_LEN = np.where(sum_LE > 0, known_LEN / np.maximum(sum_LE, 1e-300), part_LEN)
    need: NDArray[np.float64] = work_LE[:, :, None] * part_LEN
    return need


def _tokens_of_nodes(batch: RoutingBatch, cluster: Cluster) -> NDArray[np.float64]:
    """Tokens of a step that each node's devices have for each expert, float64 [L, E, N]."""
    assert batch.experts_TLK is not None
    nodes, shape = cluster.num_nodes, (batch.num_experts, cluster.num_nodes)
    node_T = cluster.node_D[batch.home_of_tokens(cluster.num_devices)]
    weight_T = batch.weight_T()
    out = np.empty((batch.num_layers, *shape))
    for layer in range(batch.num_layers):
        ids_TK = batch.experts_TLK[:, layer].astype(np.int64)
        token, pick = np.nonzero(ids_TK != NO_EXPERT)
        flat = ids_TK[token, pick] * nodes + node_T[token]
        out[layer] = np.bincount(flat, weights=weight_T[token], minlength=shape[0] * nodes).reshape(shape)
    return out


def _layer(
    need_EN: NDArray[np.float64], slots_D: NDArray[np.int64], cluster: Cluster, share: float
) -> NDArray[np.int32]:
    """Steps 2 and 3, int32 [E, D] of 0 and 1."""
    held_EN = _presence(need_EN, slots_D, cluster, share)
    away_E = np.where(held_EN, 0.0, need_EN).sum(axis=1) / held_EN.sum(axis=1)
    out = np.zeros((len(need_EN), cluster.num_devices), np.int32)
    for node in range(cluster.num_nodes):
        experts, devices = np.flatnonzero(held_EN[:, node]), np.flatnonzero(cluster.node_D == node)
        if not experts.size:
            continue
        work_E = need_EN[experts, node] + away_E[experts]
        room_D = np.minimum(slots_D[devices], experts.size)
        out[np.ix_(experts, devices)] = pack_all(work_E, room_D, cluster.speed_D[devices])
    return out


def _presence(
    need_EN: NDArray[np.float64], slots_D: NDArray[np.int64], cluster: Cluster, share: float
) -> NDArray[np.bool_]:
    """Step 2, bool [E, N]."""
    experts, nodes = need_EN.shape
    room_N = np.bincount(cluster.node_D, weights=slots_D, minlength=nodes).astype(np.int64)
    room_N = np.minimum(room_N, experts)
    speed_N = np.bincount(cluster.node_D, weights=cluster.speed_D, minlength=nodes)
    most = int(share * (int(room_N.sum()) - experts))
    order_EN = np.argsort(-need_EN, axis=1, kind="stable")
    later_EN = np.take_along_axis(need_EN, order_EN[:, 1:], axis=1)
    wanted = np.argsort(-later_EN, axis=None, kind="stable")[:most]
    further = np.zeros((experts, nodes), bool)
    expert, turn = np.divmod(wanted, nodes - 1)
    further[expert, order_EN[expert, 1 + turn]] = True
    held = np.zeros((experts, nodes), bool)
    work_N, left = np.zeros(nodes), experts
    first: NDArray[np.bool_] = further.max(axis=1, initial=False)
    for e in np.lexsort((-need_EN.sum(axis=1), ~first)).tolist():
        open_N = room_N - held.sum(axis=0)
        mine = further[e].copy()
        mine[order_EN[e, 0]] |= bool(first[e])
        mine &= open_N > 0
        if int(open_N.sum()) - int(mine.sum()) < left - 1:  # the others need a slot each
            mine[:] = False
        if not mine.any():
            level_N = np.where(open_N > 0, (work_N + need_EN[e].sum()) / speed_N, np.inf)
            mine[int(np.argmin(level_N))] = True
        held[e] = mine
        left -= 1
        work_N += np.where(mine, need_EN[e] + need_EN[e][~mine].sum() / mine.sum(), 0.0)
    return held
