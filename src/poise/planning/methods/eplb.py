"""DeepSeek EPLB (https://github.com/deepseek-ai/EPLB), hierarchical and global, in numpy.

``rebalance_experts`` gives the maps of the published function. Steps as published:

Step 1  groups -> nodes: balanced packing of the groups' loads.
Step 2  inside a node, replicas one at a time to the expert with the largest load / replicas.
Step 3  replicas -> devices of the node: balanced packing.

Global: the same with one node and one group. Loads, shares and the sums of packs are float32, as published; the copies
in SGLang 0.5.23 and vLLM 0.33 add up packs in double precision: ``sums="double"``. Ties: the published code sorts with
torch, vLLM's with numpy, which for equal loads keep no stated order; here the lower index comes first, as with torch's
stable sort.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.planning.budget import Limit
from poise.planning.methods.lpt import pack_layers
from poise.planning.placement import Placement
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.util.compiled import compiled
from poise.util.errors import OptionError

Sums = Literal["single", "double"]


@compiled
def _fill_packs(weight, order, packs):  # type: ignore[no-untyped-def]
    """Each item, in the given order, to the lightest pack that is not full; returns pack and rank in it, [X, n]."""
    rows, items = weight.shape
    per_pack = items // packs
    pack_index = np.zeros((rows, items), np.int64)
    rank = np.zeros((rows, items), np.int64)
    for x in range(rows):
        total = np.zeros(packs, weight.dtype)
        size = np.zeros(packs, np.int64)
        for i in order[x]:
            best = -1
            for p in range(packs):
                if size[p] < per_pack and (best < 0 or total[p] < total[best]):
                    best = p
            pack_index[x, i] = best
            rank[x, i] = size[best]
            total[best] += weight[x, i]
            size[best] += 1
    return pack_index, rank


def balanced_packing(
    weight: NDArray[Any], num_packs: int, sums: Sums = "single"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack n items into equal packs of n / num_packs, float [X, n] -> pack and rank within it, int [X, n] each."""
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    items = weight.shape[1]
    if items == num_packs:
        return np.broadcast_to(np.arange(items), weight.shape).copy(), np.zeros(weight.shape, np.int64)
    order = np.argsort(-weight, axis=1, kind="stable")
    return _fill_packs(weight.astype(np.float64) if sums == "double" else weight, order, num_packs)


@compiled
def _replicate(weight, num_physical):  # type: ignore[no-untyped-def]
    rows, experts = weight.shape
    phy2log = np.zeros((rows, num_physical), np.int64)
    rank = np.zeros((rows, num_physical), np.int64)
    count = np.ones((rows, experts), np.int64)
    for x in range(rows):
        for i in range(num_physical):
            if i < experts:
                phy2log[x, i] = i
                continue
            best = 0
            value = weight[x, 0] / np.float32(count[x, 0])
            for e in range(1, experts):
                other = weight[x, e] / np.float32(count[x, e])
                if other > value:
                    best, value = e, other
            phy2log[x, i] = best
            rank[x, i] = count[x, best]
            count[x, best] += 1
    return phy2log, rank, count


def replicate_experts(
    weight: NDArray[Any], num_physical: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Replicas one at a time to the largest load / replicas: phy2log, replica rank [X, P], count [X, E]."""
    return _replicate(np.ascontiguousarray(weight, dtype=np.float32), num_physical)


def _inverse(permutation: NDArray[np.int64]) -> NDArray[np.int64]:
    inverse = np.empty_like(permutation)
    np.put_along_axis(inverse, permutation, np.broadcast_to(np.arange(permutation.shape[1]), permutation.shape), 1)
    return inverse


def _hierarchical(
    weight: NDArray[np.float32], physical: int, groups: int, nodes: int, gpus: int, sums: Sums
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    layers, experts = weight.shape
    group_size, groups_per_node, per_gpu = experts // groups, groups // nodes, physical // gpus
    # Step 1
    per_group = weight.reshape(layers, groups, group_size).sum(-1)
    group_pack, group_rank = balanced_packing(per_group, nodes, sums)
    log2mlog = (((group_pack * groups_per_node + group_rank) * group_size)[..., None] + np.arange(group_size)).reshape(
        layers, experts
    )
    mlog2log = _inverse(log2mlog)
    # Step 2
    per_node = np.take_along_axis(weight, mlog2log, 1).reshape(-1, experts // nodes)
    phy2mlog, replica, count = replicate_experts(per_node, physical // nodes)
    # Step 3
    per_physical = np.take_along_axis(per_node, phy2mlog, 1) / np.take_along_axis(count, phy2mlog, 1).astype(np.float32)
    gpu_pack, gpu_rank = balanced_packing(per_physical, gpus // nodes, sums)
    pphy2phy = _inverse(gpu_pack * per_gpu + gpu_rank)
    in_node = np.take_along_axis(phy2mlog, pphy2phy, 1).reshape(layers, nodes, -1)
    pphy2mlog = (in_node + np.arange(0, experts, experts // nodes)[None, :, None]).reshape(layers, -1)
    pphy2log = np.take_along_axis(mlog2log, pphy2mlog, 1)
    pphy_rank = np.take_along_axis(replica, pphy2phy, 1).reshape(layers, -1)
    logcnt = np.take_along_axis(count.reshape(layers, -1), log2mlog, 1)
    return pphy2log, pphy_rank, logcnt


def rebalance_experts(
    weight: NDArray[Any], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, *, sums: Sums = "single"
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The published function.

    Parameters
    ----------
    weight : [L, E], load of each expert.
    num_replicas : physical experts in all, a multiple of ``num_gpus``.
    num_groups, num_nodes, num_gpus : expert groups, nodes, devices in all.
    sums : precision in which the loads of packs are added up: as published, or as SGLang and vLLM do.

    Returns
    -------
    phy2log [L, R]; log2phy [L, E, X], padded with -1; logcnt [L, E].

    Raises
    ------
    OptionError : a number does not divide another.
    """
    load = np.asarray(weight, dtype=np.float32)
    layers, experts = load.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for what, of, by in (
        ("experts", experts, num_groups), ("groups", num_groups, num_nodes), ("devices", num_gpus, num_nodes),
        ("replicas", num_replicas, num_gpus),
    ):  # fmt: skip
        if of % by:
            raise OptionError(f"EPLB needs {what} divisible: {of} is not a multiple of {by}")
    if num_replicas < experts:
        raise OptionError(f"{num_replicas} replicas cannot hold {experts} experts")
    phy2log, rank, logcnt = _hierarchical(load, num_replicas, num_groups, num_nodes, num_gpus, sums)
    log2phy = np.full((layers, experts, int(logcnt.max())), -1, np.int64)
    layer = np.broadcast_to(np.arange(layers)[:, None], phy2log.shape)
    log2phy[layer, phy2log, rank] = np.arange(num_replicas)
    return phy2log, log2phy, logcnt


def _plan(problem: PlacementProblem, groups: int, nodes: int, name: str) -> MethodResult:
    batch, cluster = problem.batch, problem.cluster
    load, slots = batch.load_LE(), np.minimum(problem.slots_D, batch.num_experts)
    per_node = cluster.devices_per_node_N
    total = int(problem.slots_D.sum())
    if (problem.slots_D == problem.slots_D[0]).all() and (per_node == per_node[0]).all() and not problem.pooled:
        hierarchical = groups % nodes == 0 and batch.num_experts % groups == 0
        phy2log, _, _ = rebalance_experts(load, total, groups if hierarchical else 1, nodes if hierarchical else 1,
                                          cluster.num_devices)  # fmt: skip
        slot_device = np.repeat(np.arange(cluster.num_devices), problem.slots_D)
        placement = Placement(phy2log.astype(np.int32), slot_device.astype(np.int32), batch.num_experts,
                              cluster.num_devices, batch.layer_ids_L, name)  # fmt: skip
        return MethodResult(placement, {"hierarchical": bool(hierarchical and nodes > 1)})
    held = pack_layers(load, slots, cluster.speed_D)
    why = f"the published packing needs equal slots and nodes, got {problem.slots_D.tolist()} on {per_node.tolist()}"
    return MethodResult(problem.placed(held, name), {"adapted": why})


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """Hierarchical where groups and nodes divide (groups of the model, else one group a node), else global.

    Slots or nodes that are not equal, which the published packing cannot take, are packed by LPT on the same
    replica counts; ``details["adapted"]`` says so.
    """
    nodes = problem.cluster.num_nodes
    groups = problem.model.num_expert_groups
    if groups == 1 and problem.batch.num_experts % nodes == 0:
        groups = nodes
    return _plan(problem, groups, nodes, "eplb")


def plan_global(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """The global policy: nodes and groups ignored."""
    return _plan(problem, 1, 1, "eplb-global")
