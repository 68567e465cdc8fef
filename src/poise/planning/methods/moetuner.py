"""MoETuner (arXiv 2502.06643): two integer programmes, as published and with equal cluster sizes.

Step 1  Profile (section 4.1): P[l, e], tokens of an expert; R[l, e1, e2], tokens that go from e1 of layer l to e2 of
        l + 1, all K * K pairs of a token.
Step 2  ILP 1, per layer (balance): experts into G clusters, min sum_c |T[c] - mean|, no cluster empty. As printed the
        sizes are free; engines with fixed slots need ``plan_equal``.
Step 3  C[l, c1, c2]: tokens that go from a cluster to a cluster of the next layer.
Step 4  ILP 2 (communication): one cluster to one GPU in every layer, min sum_l max_{g1, g2} C / B over pairs of
        different GPUs, and every GPU holds E * L / G experts over all layers together.

ILP 1 is solved to an absolute gap of 0.25 % of the layer's tokens: its linear relaxation is 0 on flat loads, so a
relative gap would never close. A combinatorial bound and a local search often prove that without the solver; HiGHS
does the rest. ILP 2 is a path through the G! permutations of every layer (G <= 5), solved to 2.5 %: by dynamic
programming where sizes are equal, else by HiGHS with the memory equalities as side rows. For more GPUs: descent, with
a weak bound.

Neither programme uses redundant slots (they stay empty) nor device speeds: the paper knows neither.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from poise.cost.entries import HeldEntries
from poise.machine.cluster import Cluster
from poise.planning.budget import Budget, Limit
from poise.planning.problem import MethodResult, PlacementProblem, Progress, equal_sizes
from poise.planning.solve.milp import INF, Milp
from poise.routing.profile import affinity_LEE
from poise.util.compiled import compiled
from poise.util.errors import InfeasibleError, NoResultError

ILP1_GAP = 0.0025
ILP2_GAP = 0.025
MAX_PATH_GPUS = 5


def deviation(load_E: NDArray[np.float64], cluster_E: NDArray[Any], num_clusters: int) -> float:
    """ILP 1's objective: sum over clusters of |tokens - mean|."""
    total = np.bincount(cluster_E, weights=load_E, minlength=num_clusters)
    return float(np.abs(total - load_E.sum() / num_clusters).sum())


def deviation_bound(load_E: NDArray[np.float64], num_clusters: int, sizes: NDArray[np.int64] | None) -> float:
    """No clustering has less: what lies above the mean in the clusters of the j heaviest experts, twice.

    Those are m <= j clusters; with fixed sizes they hold at least the lightest experts besides.
    """
    down = -np.sort(-load_E)
    mean = down.sum() / num_clusters
    heavy = np.cumsum(down)
    best = 0.0
    if sizes is None:
        above = down[:num_clusters] - mean
        return float(2 * above[above > 0].sum())
    small = np.cumsum(np.sort(sizes))
    big = np.cumsum(-np.sort(-sizes))
    light = np.concatenate([[0.0], np.cumsum(down[::-1])])
    for j in range(1, num_clusters + 1):
        least = np.inf
        for m in range(1, j + 1):
            if big[m - 1] >= j:
                least = min(least, heavy[j - 1] + light[max(0, small[m - 1] - j)] - m * mean)
        best = max(best, 2 * least)
    return float(best)


@compiled
def _descend(load, cluster, num_clusters, fixed_sizes, power):  # type: ignore[no-untyped-def]
    """Swaps (and moves, if sizes are free) that lower sum |T - mean| ** power, in place."""
    experts = load.size
    total = np.zeros(num_clusters)
    size = np.zeros(num_clusters, np.int64)
    for e in range(experts):
        total[cluster[e]] += load[e]
        size[cluster[e]] += 1
    mean = total.sum() / num_clusters
    better = True
    while better:
        better = False
        for e in range(experts):
            for f in range(-num_clusters, experts):
                a = cluster[e]
                if f < 0:  # move e to cluster -f - 1
                    c = -f - 1
                    if fixed_sizes or c == a or size[a] == 1:
                        continue
                    delta = load[e]
                else:
                    c = cluster[f]
                    delta = load[e] - load[f]
                    if c == a or delta == 0.0:
                        continue
                old = abs(total[a] - mean) ** power + abs(total[c] - mean) ** power
                new = abs(total[a] - delta - mean) ** power + abs(total[c] + delta - mean) ** power
                if new < old * (1.0 - 1e-9) - 1e-12:
                    total[a] -= delta
                    total[c] += delta
                    cluster[e] = c
                    if f < 0:
                        size[a] -= 1
                        size[c] += 1
                    else:
                        cluster[f] = a
                    better = True


def _greedy(load_E: NDArray[np.float64], num_clusters: int, sizes: NDArray[np.int64] | None) -> NDArray[np.int64]:
    room = np.full(num_clusters, len(load_E)) if sizes is None else sizes.copy()
    total, count = np.zeros(num_clusters), np.zeros(num_clusters, np.int64)
    cluster = np.zeros(len(load_E), np.int64)
    for rank, e in enumerate(np.argsort(-load_E, kind="stable")):
        empty = np.flatnonzero((count == 0) & (room > 0))
        fits = empty if len(load_E) - rank <= empty.size else np.flatnonzero(room > 0)
        c = fits[np.argmin(total[fits])]
        cluster[e] = c
        total[c] += load_E[e]
        room[c] -= 1
        count[c] += 1
    return cluster


def ilp1(
    load_E: NDArray[np.float64], num_clusters: int, sizes: NDArray[np.int64] | None, *, time_limit_s: Limit
) -> tuple[NDArray[np.int64], float, float, str]:
    """Step 2 for one layer.

    Returns
    -------
    cluster of each expert int [E], objective, lower bound, and who proved it (``bound`` or ``highs``).
    """
    if num_clusters > len(load_E):
        raise InfeasibleError(f"{len(load_E)} experts cannot fill {num_clusters} clusters, and none may be empty")
    tolerance = ILP1_GAP * float(load_E.sum())
    bound = deviation_bound(load_E, num_clusters, sizes)
    best = _greedy(load_E, num_clusters, sizes)
    _descend(load_E, best, num_clusters, sizes is not None, 2.0)
    _descend(load_E, best, num_clusters, sizes is not None, 1.0)
    value = deviation(load_E, best, num_clusters)
    if value - bound <= tolerance or num_clusters == 1:
        return best, value, bound, "bound"
    order = np.argsort(-load_E, kind="stable")
    milp = Milp()
    x = milp.columns(np.zeros((num_clusters, len(load_E))))
    above = milp.columns(np.ones(num_clusters), upper=INF, integer=False)
    mean = float(load_E.sum()) / num_clusters
    for e in range(len(load_E)):
        milp.row(1, x[:, e], 1.0, 1)
    for c in range(num_clusters):
        milp.row(1, x[c], 1.0, INF) if sizes is None else milp.row(sizes[c], x[c], 1.0, sizes[c])
        milp.row(-INF, [*x[c], above[c]], [*load_E, -1.0], mean)
        milp.row(mean, [*x[c], above[c]], [*load_E, 1.0], INF)
    milp.row(bound, above, 1.0, INF)
    if sizes is None or (sizes == sizes[0]).all():  # clusters are alike: the i-th heaviest expert uses the first i + 1
        for rank in range(min(num_clusters - 1, len(load_E))):
            milp.row(0, x[rank + 1 :, order[rank]], 1.0, 0)
        rename: dict[int, int] = {}
        for e in order:
            rename.setdefault(int(best[e]), len(rename))
        best = np.array([rename[int(c)] for c in best])
    start = np.zeros(milp.size)
    start[x[best, np.arange(len(load_E))]] = 1.0
    start[above] = np.abs(np.bincount(best, weights=load_E, minlength=num_clusters) - mean)
    try:
        got = milp.solve(budget=Budget.of(time_limit_s), stage="moetuner", abs_gap=tolerance, start=start)
    except NoResultError:
        return best, value, bound, "highs"
    found = got.values[x].argmax(axis=0)
    bound = max(bound, got.bound)
    if deviation(load_E, found, num_clusters) < value:
        best, value = found, deviation(load_E, found, num_clusters)
    return best, value, bound, "highs"


def pair_bandwidth(cluster: Cluster) -> NDArray[np.float64]:
    """B[g1, g2], bytes/s [D, D]: the narrower port class on the way; infinite on the diagonal (no traffic)."""
    out = np.where(cluster.same_node_DD, cluster.intra_bytes_per_s, cluster.inter_bytes_per_s)
    np.fill_diagonal(out, np.inf)
    return out


def ilp2_objective(flow_LCC: NDArray[Any], gpu_LC: NDArray[Any], bandwidth_GG: NDArray[np.float64]) -> float:
    """Sum over layer boundaries of the largest flow / bandwidth over GPU pairs; ``gpu_LC`` = GPU of each cluster."""
    total = 0.0
    for layer, flow in enumerate(flow_LCC):
        total += float((flow / bandwidth_GG[np.ix_(gpu_LC[layer], gpu_LC[layer + 1])]).max())
    return total


def _path_costs(
    flow: NDArray[np.float64], perms: NDArray[np.int64], bandwidth: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cost of every pair of permutations of two neighbouring layers, [G!, G!]."""
    out = np.zeros((len(perms), len(perms)))
    for i, first in enumerate(perms):
        out[i] = (flow[None] / bandwidth[first[:, None], perms[:, None, :]]).max(axis=(1, 2))
    return out


def ilp2(
    flow_LCC: NDArray[np.float64],
    size_LC: NDArray[np.int64],
    bandwidth_GG: NDArray[np.float64],
    *,
    time_limit_s: Limit,
    seed: int = 0,
) -> tuple[NDArray[np.int64], float, float]:
    """Step 4: the GPU of each cluster int [L, G], the objective and a lower bound.

    ``flow_LCC`` is [L - 1, G, G]; all zeros leave only the memory equalities.

    Raises
    ------
    InfeasibleError : no assignment gives every GPU E * L / G experts over all layers.
    """
    layers, num = size_LC.shape
    total = int(size_LC.sum())
    if total % num:
        raise InfeasibleError(
            f"{total} experts over all layers cannot be shared equally by {num} GPUs", hint="use method moetuner-equal"
        )
    equal, budget = bool((size_LC == size_LC[:, :1]).all()), Budget.of(time_limit_s)
    if num <= MAX_PATH_GPUS and flow_LCC.any():
        return _ilp2_path(flow_LCC, size_LC, bandwidth_GG, equal, budget)
    gpu_LC = np.tile(np.arange(num), (layers, 1)) if equal else _equal_memory(size_LC, budget.part(1.0, until=0.5))
    if flow_LCC.any():
        _descend_gpus(flow_LCC, size_LC, bandwidth_GG, gpu_LC, budget.part(0.5, until=1.0), seed)
    return gpu_LC, ilp2_objective(flow_LCC, gpu_LC, bandwidth_GG), _ilp2_bound(flow_LCC, bandwidth_GG)


def _ilp2_path(
    flow_LCC: NDArray[np.float64],
    size_LC: NDArray[np.int64],
    bandwidth: NDArray[np.float64],
    equal: bool,
    budget: Budget,
) -> tuple[NDArray[np.int64], float, float]:
    layers, num = size_LC.shape
    perms = np.array(list(permutations(range(num))))
    costs = [_path_costs(flow, perms, bandwidth) for flow in flow_LCC]
    to_go = np.zeros((layers, len(perms)))
    for layer in range(layers - 2, -1, -1):
        to_go[layer] = (costs[layer] + to_go[layer + 1]).min(axis=1)
    path = [int(to_go[0].argmin())]
    for layer in range(layers - 1):
        path.append(int((costs[layer][path[-1]] + to_go[layer + 1]).argmin()))
    bound = float(to_go[0].min())
    memory = np.zeros(num, np.int64)
    for layer, index in enumerate(path):
        memory[perms[index]] += size_LC[layer]
    if equal or (memory == memory[0]).all():
        return perms[path], bound, bound
    milp = Milp()
    scale = 1.0 / max(bound, 1e-300)
    first = milp.columns(np.zeros(len(perms)))
    arcs = [milp.columns(cost * scale, integer=False) for cost in costs]
    picks = [first, *(milp.columns(np.zeros(len(perms))) for _ in costs)]
    milp.row(1, first, 1.0, 1)
    for layer, arc in enumerate(arcs):
        for i in range(len(perms)):
            milp.row(0, [*arc[i], picks[layer][i]], [*np.ones(len(perms)), -1.0], 0)
            milp.row(0, [*arc[:, i], picks[layer + 1][i]], [*np.ones(len(perms)), -1.0], 0)
    want = int(size_LC.sum()) // num
    for gpu in range(num):
        held = np.array(
            [[size_LC[layer, int(np.flatnonzero(perm == gpu)[0])] for perm in perms] for layer in range(layers)]
        )
        milp.row(want, np.stack(picks), held, want)
    try:
        got = milp.solve(budget=budget, stage="moetuner", rel_gap=ILP2_GAP, needed=True)
    except InfeasibleError:
        raise _no_equal_memory(size_LC) from None
    path = [int(got.values[pick].argmax()) for pick in picks]
    gpu_LC = perms[path]
    return gpu_LC, ilp2_objective(flow_LCC, gpu_LC, bandwidth), max(bound, got.bound / scale)


def _no_equal_memory(size_LC: NDArray[np.int64]) -> InfeasibleError:
    want = int(size_LC.sum()) // size_LC.shape[1]
    return InfeasibleError(
        f"ILP 1's cluster sizes leave no assignment with {want} experts on each of {size_LC.shape[1]} GPUs",
        hint="use method moetuner-equal",
    )


def _equal_memory(size_LC: NDArray[np.int64], budget: Budget) -> NDArray[np.int64]:
    """Any assignment [L, G] that meets the memory equalities."""
    layers, num = size_LC.shape
    milp = Milp()
    y = milp.columns(np.zeros((layers, num, num)))
    want = int(size_LC.sum()) // num
    for layer in range(layers):
        for c in range(num):
            milp.row(1, y[layer, c], 1.0, 1)
            milp.row(1, y[layer, :, c], 1.0, 1)
    for gpu in range(num):
        milp.row(want, y[:, :, gpu], size_LC, want)
    try:
        got = milp.solve(budget=budget, stage="moetuner", needed=True)
    except InfeasibleError:
        raise _no_equal_memory(size_LC) from None
    return got.values[y].argmax(axis=2)


def _descend_gpus(
    flow_LCC: NDArray[np.float64],
    size_LC: NDArray[np.int64],
    bandwidth: NDArray[np.float64],
    gpu_LC: NDArray[np.int64],
    budget: Budget,
    seed: int,
) -> None:
    """Exchange the GPUs of two clusters of one size in a layer while that helps, in place."""
    layers, num = size_LC.shape

    def near(layer: int) -> float:
        cost = 0.0
        for l0 in (layer - 1, layer):
            if 0 <= l0 < layers - 1:
                cost += float((flow_LCC[l0] / bandwidth[np.ix_(gpu_LC[l0], gpu_LC[l0 + 1])]).max())
        return cost

    better = True
    while better and not budget.over("moetuner"):
        better = False
        for layer in np.random.default_rng(seed).permutation(layers):
            if budget.over("moetuner"):
                break
            cost = near(layer)
            for a in range(num):
                for b in range(a + 1, num):
                    if size_LC[layer, a] != size_LC[layer, b]:
                        continue
                    gpu_LC[layer, [a, b]] = gpu_LC[layer, [b, a]]
                    trial = near(layer)
                    if trial < cost * (1 - 1e-9):
                        cost, better = trial, True
                    else:
                        gpu_LC[layer, [a, b]] = gpu_LC[layer, [b, a]]


def _ilp2_bound(flow_LCC: NDArray[np.float64], bandwidth: NDArray[np.float64]) -> float:
    """What must leave its GPU at least (assignment), spread over all ordered pairs at the widest bandwidth."""
    num = len(bandwidth)
    total = 0.0
    for flow in flow_LCC:
        kept = flow[linear_sum_assignment(-flow)].sum()
        total += (
            float(flow.sum() - kept)
            / max(1, num * (num - 1))
            / float(bandwidth[np.isfinite(bandwidth)].max(initial=1.0))
        )
    return total


def _solve(
    problem: PlacementProblem, name: str, equal: bool, budget: Budget, seed: int, progress: Progress | None
) -> MethodResult:
    batch, num = problem.batch, problem.num_devices
    load_LE = batch.load_LE()
    sizes = equal_sizes(batch.num_experts, problem.slots_D) if equal else None
    clusters: list[NDArray[np.int64]] = []
    notes: list[dict[str, Any]] = []
    for layer, load in enumerate(load_LE):
        share = budget.part(0.8 / len(load_LE), until=0.8 * (layer + 1) / len(load_LE))
        cluster, value, bound, by = ilp1(load, num, sizes, time_limit_s=share)
        clusters.append(cluster)
        tokens = max(float(load.sum()), 1e-300)
        notes.append({"layer": int(batch.layer_ids_L[layer]), "objective": value, "bound": bound,
                      "gap_of_tokens": (value - bound) / tokens, "proved_by": by})  # fmt: skip
        if progress:
            progress("ILP 1", (layer + 1) / len(load_LE))
    cluster_LE = np.stack(clusters)
    x = np.eye(num)[cluster_LE]
    flow = np.zeros((batch.num_layers - 1, num, num))
    if batch.experts_TLK is not None:
        affinity = affinity_LEE(batch.experts_TLK, batch.num_experts).astype(np.float64)
        flow = np.einsum("lec,lef,lfd->lcd", x[:-1], affinity, x[1:], optimize=True)
    size_LC = x.sum(axis=1).astype(np.int64)
    left = budget.part(0.8, until=1.0)
    uneven = equal and not bool((size_LC == size_LC[:, :1]).all())
    if uneven:  # sizes follow the devices' slots: cluster c belongs to a device with as many
        gpu_LC, value, bound = np.tile(np.arange(num), (batch.num_layers, 1)), 0.0, 0.0
        _descend_gpus(flow, size_LC, pair_bandwidth(problem.cluster), gpu_LC, left, seed)
        value = ilp2_objective(flow, gpu_LC, pair_bandwidth(problem.cluster))
    else:
        gpu_LC, value, bound = ilp2(flow, size_LC, pair_bandwidth(problem.cluster), time_limit_s=left, seed=seed)
    if progress:
        progress("ILP 2", 1.0)
    device_LE = np.take_along_axis(gpu_LC, cluster_LE, axis=1)
    held = HeldEntries.of_devices(device_LE, num)
    used_D = held.used_LD().sum(axis=0)
    if problem.pooled and (used_D > problem.slots_D * batch.num_layers).any():
        d = int(np.argmax(used_D - problem.slots_D * batch.num_layers))
        raise InfeasibleError(
            f"MoETuner puts {used_D[d]} experts on device {d}, which has {problem.slots_D[d] * batch.num_layers} slots "
            "over all layers: its memory constraint knows only equal devices"
        )
    details: dict[str, Any] = {
        "ilp1": notes,
        "ilp1_worst_gap_of_tokens": max(note["gap_of_tokens"] for note in notes),
        "ilp2_objective": value,
        "ilp2_bound": bound,
        "ilp2": "as published" if batch.has_tokens else "no token-level routing: only the memory equalities",
    }
    return MethodResult(problem.placed(held, name), details)


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """As published: cluster sizes are free in a layer, equal over all layers together. Needs ``problem.pooled``.

    Raises
    ------
    InfeasibleError : the memory equalities of ILP 2 cannot be met for ILP 1's sizes, or by a device's slots.
    """
    return _solve(problem, "moetuner", False, Budget.of(time_limit_s), seed, progress)


def plan_equal(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """The variant that fixed-slot engines need: the same number of experts on every device in every layer."""
    return _solve(problem, "moetuner-equal", True, Budget.of(time_limit_s), seed, progress)
