"""GRACE-MoE (arXiv 2509.25041, text of 2026), its offline phase: grouping and replication. Per layer:

Step 1  Profile (section 4): affinity A[i, j], tokens that choose both experts; load of every expert.
Step 2  Across nodes (4.1): spectral clustering of A into N fully non-uniform groups.
Step 3  Inside a node: spectral clustering into G groups, then controlled non-uniform sizes (algorithm 2): with
        E = floor(n / G) and delta = max(1, round(E * r)), sizes within [max(1, E - delta), E + delta]. A group that is
        too large keeps the experts with most affinity to it, the others go where they have most (algorithm 1); then
        the weakest experts of groups that can spare them fill groups that are too small.
Step 4  r: of U(r), the share of affinity inside groups (equation 1), over S(r), the standard deviation of sizes
        (equation 2), the knee.
Step 5  Replication (4.2): rho = heaviest / mean device load, n = min(max(1, floor(rho)), D - 1) (equation 3); of the
        heaviest device, the hottest experts until their load exceeds heaviest * n / (1 + n) get a replica on the n
        least loaded devices.

Routing among replicas (4.3) is the engine's and no part of a placement.

Where the source is under-specified, and what was chosen:

- Which spectral clustering: Ng, Jordan and Weiss's, with k-means++ and ten seeded starts.
- The knee: one r for all layers, from :data:`RATIOS`, with U and S averaged over layers and scaled to 0..1, at the
  largest U - S; at the first r if U or S does not vary.
- Slots: the paper has no limit. Node groups must fit their node and leave every device an expert; device groups must
  fit their slots, and where algorithm 2's bounds leave no room for all experts, slots alone bound the sizes. Larger
  groups go to nodes and devices with more slots. A replica whose device is full goes to the next least loaded one with
  room, or nowhere.
- "Those whose cumulative load exceeds": the shortest list of the hottest experts with more load than that.
- A layer without co-activation (top-1 models): groups balanced by load alone (LPT); ``details["grouping"]`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.planning.budget import Budget, Limit
from poise.planning.methods.lpt import pack
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.routing.profile import coactivation_LEE

RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
KMEANS_STARTS = 10
KMEANS_ROUNDS = 50


def spectral_groups(affinity: NDArray[Any], groups: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Ng-Jordan-Weiss spectral clustering, int [n]: group of each expert; a group may stay empty."""
    if groups == 1:
        return np.zeros(len(affinity), np.int64)
    degree = affinity.sum(axis=1).astype(np.float64)
    root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1.0)), 0.0)
    _, vectors = np.linalg.eigh(affinity * root[:, None] * root)
    points = vectors[:, -min(groups, len(affinity)) :]
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    best, least = np.zeros(len(affinity), np.int64), np.inf
    for _ in range(KMEANS_STARTS):
        label, spread = _kmeans(points, groups, rng)
        if spread < least - 1e-12:
            best, least = label, spread
    return best


def _kmeans(points: NDArray[np.float64], groups: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], float]:
    """Lloyd's algorithm from k-means++ centres: label of each point and the sum of squared distances."""
    centre = points[rng.integers(len(points))][None]
    while len(centre) < groups:
        near = ((points[:, None] - centre) ** 2).sum(axis=2).min(axis=1)
        odds = near / near.sum() if near.sum() > 1e-12 else np.full(len(points), 1 / len(points))
        centre = np.vstack([centre, points[rng.choice(len(points), p=odds)]])
    label = np.full(len(points), -1)
    for _ in range(KMEANS_ROUNDS):
        far = (points**2).sum(axis=1)[:, None] - 2 * points @ centre.T + (centre**2).sum(axis=1)
        before, label = label, far.argmin(axis=1)
        if (before == label).all():
            break
        one_hot = np.eye(groups)[label]
        size = one_hot.sum(axis=0)
        centre = np.where(size[:, None] > 0, one_hot.T @ points / np.maximum(size, 1)[:, None], centre)
    return label, float(((points - centre[label]) ** 2).sum())


def fit_groups(
    affinity: NDArray[Any], label: NDArray[Any], least_G: NDArray[np.int64], most_G: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Algorithm 2 from given clusters: group of each expert, int [n], with sizes within ``least_G`` and ``most_G``.

    Clusters are given to groups by size, the largest to the one with most room. The bounds must leave a solution:
    sum of ``least_G`` <= n <= sum of ``most_G``.
    """
    groups = len(most_G)
    clusters = np.argsort(-np.bincount(label, minlength=groups), kind="stable")
    group = np.empty(groups, np.int64)
    group[clusters] = np.argsort(-most_G, kind="stable")
    cluster = group[label]
    out = cluster.copy()
    near = affinity @ np.eye(groups)[cluster]
    for g in range(groups):
        member = np.flatnonzero(cluster == g)
        keep = member[np.argsort(-near[member, g], kind="stable")]
        out[keep[most_G[g] :]] = -1
    size = np.bincount(out[out >= 0], minlength=groups)
    for e in np.flatnonzero(out < 0):
        score = np.where(size < most_G, affinity[e] @ (out[:, None] == np.arange(groups)), -1.0)
        g = int(np.lexsort((size, -score))[0])
        out[e] = g
        size[g] += 1
    while (size < least_G).any():
        near = affinity @ (out[:, None] == np.arange(groups))
        spare = np.flatnonzero(size[out] > least_G[out])
        e = spare[np.argmin(near[spare, out[spare]])]
        needy = np.flatnonzero(size < least_G)
        g = needy[np.argmax(near[e, needy])]
        size[out[e]] -= 1
        size[g] += 1
        out[e] = g
    return out


def size_bounds(experts: int, room_G: NDArray[np.int64], ratio: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Algorithm 2's least and most experts of each group, int [G] each, where the room of each group allows them."""
    groups = len(room_G)
    ideal = experts // groups
    delta = max(1, round(ideal * ratio))
    most = np.minimum(room_G, ideal + delta)
    if most.sum() < experts:
        most = np.minimum(room_G, experts)
    least = np.minimum(most, max(1, ideal - delta))
    while least.sum() > experts:
        least[int(least.argmax())] -= 1
    return least, most


def knee(uses: NDArray[np.float64], deviations: NDArray[np.float64]) -> int:
    """Step 4: index of the candidate at the knee of U over S."""
    wide, high = np.ptp(deviations), np.ptp(uses)
    if wide <= 1e-12 or high <= 1e-12:
        return 0
    return int(((uses - uses.min()) / high - (deviations - deviations.min()) / wide).argmax())


def affinity_inside(affinity: NDArray[Any], group_E: NDArray[Any]) -> float:
    """U of equation 1: share of the affinity between experts of one group."""
    total = float(affinity.sum())
    return float(affinity[group_E[:, None] == group_E].sum()) / total if total > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Clusters:
    """Steps 2 and 3 before sizes are known: node of each expert, and the clusters of the experts of each node."""

    affinity: NDArray[Any]
    node_E: NDArray[np.int64]
    label_E: NDArray[np.int64]

    def devices(self, node_D: NDArray[Any], room_D: NDArray[np.int64], ratio: float) -> NDArray[np.int64]:
        """Step 3 for a ratio: the device of each expert, int [E]."""
        out = np.empty(len(self.node_E), np.int64)
        for node in range(int(node_D[-1]) + 1):
            member, device = np.flatnonzero(self.node_E == node), np.flatnonzero(node_D == node)
            least, most = size_bounds(len(member), room_D[device], ratio)
            out[member] = device[fit_groups(self.affinity[np.ix_(member, member)], self.label_E[member], least, most)]
        return out


def _cluster(
    affinity: NDArray[Any], node_D: NDArray[Any], room_D: NDArray[np.int64], rng: np.random.Generator
) -> _Clusters:
    nodes = int(node_D[-1]) + 1
    room_N = np.array([int(room_D[node_D == n].sum()) for n in range(nodes)])
    least_N = np.minimum(room_N, np.bincount(node_D[room_D > 0], minlength=nodes))
    while least_N.sum() > len(affinity):
        least_N[int(least_N.argmax())] -= 1
    node_E = fit_groups(affinity, spectral_groups(affinity, nodes, rng), least_N, np.minimum(room_N, len(affinity)))
    label = np.zeros(len(affinity), np.int64)
    for node in range(nodes):
        member = np.flatnonzero(node_E == node)
        if member.size:
            groups = int((node_D == node).sum())
            label[member] = spectral_groups(affinity[np.ix_(member, member)], groups, rng)
    return _Clusters(affinity, node_E, label)


def replicate_hot(count_ED: NDArray[np.int32], load_E: NDArray[np.float64], slots_D: NDArray[np.int64]) -> int:
    """Step 5, in place; returns the replicas made."""
    devices = len(slots_D)
    each = load_E / count_ED.sum(axis=1)
    load_D = each @ count_ED
    top = int(load_D.argmax())
    copies = min(max(1, int(load_D[top] / max(float(load_D.mean()), 1e-300) + 1e-9)), devices - 1)
    if copies == 0 or load_D[top] <= 0:
        return 0
    member = np.flatnonzero(count_ED[:, top])
    member = member[np.argsort(-each[member], kind="stable")]
    moved = np.cumsum(each[member])
    hot = member[: int((moved <= load_D[top] * copies / (1 + copies)).sum()) + 1]
    order = [int(d) for d in np.argsort(load_D, kind="stable") if d != top]
    made = 0
    for e in hot:
        fits = [d for d in order if count_ED[e, d] == 0 and count_ED[:, d].sum() < slots_D[d]][:copies]
        count_ED[e, fits] = 1
        made += len(fits)
    return made


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """Grouping and replication of GRACE-MoE; layers that the clock cuts off go by load alone.

    Raises
    ------
    NoResultError : the batch has loads only.
    """
    batch, node_D, budget = problem.batch, problem.cluster.node_D, Budget.of(time_limit_s)
    experts, devices = batch.num_experts, problem.num_devices
    experts_TLK = problem.tokens_for("GRACE-MoE")
    slots = np.minimum(problem.slots_D, experts)
    load_LE = batch.load_LE()
    affinity_LEE = coactivation_LEE(experts_TLK, experts)
    affinity_LEE[:, np.arange(experts), np.arange(experts)] = 0
    rng = np.random.default_rng(seed)
    clusters: list[_Clusters | None] = []
    for layer, affinity in enumerate(affinity_LEE):
        useful = affinity.any() and not budget.over("grace-moe")
        clusters.append(_cluster(affinity, node_D, slots, rng) if useful else None)
        if progress:
            progress("spectral clustering", (layer + 1) / batch.num_layers)
    grouped = [c for c in clusters if c is not None]
    ratio = RATIOS[0]
    curve: list[dict[str, float]] = []
    for r in RATIOS if grouped else ():
        layouts = [c.devices(node_D, slots, r) for c in grouped]
        inside = [affinity_inside(c.affinity, d) for c, d in zip(grouped, layouts, strict=True)]
        sizes = np.array([np.bincount(d, minlength=devices) for d in layouts])
        deviation = np.sqrt(((sizes - experts / devices) ** 2).mean(axis=1))
        curve.append({"r": r, "U": float(np.mean(inside)), "S": float(deviation.mean())})
    if curve:
        ratio = RATIOS[knee(np.array([c["U"] for c in curve]), np.array([c["S"] for c in curve]))]
    count_LED = np.zeros((batch.num_layers, experts, devices), np.int32)
    made = 0
    for count, load, cluster in zip(count_LED, load_LE, clusters, strict=True):
        if cluster is None:
            count[:] = pack(load, np.ones(experts, np.int64), slots, np.ones(devices))
        else:
            count[np.arange(experts), cluster.devices(node_D, slots, ratio)] = 1
        made += replicate_hot(count, load, slots)
    plain = batch.num_layers - len(grouped)
    grouping = "spectral" if not plain else f"load only in {plain} of {batch.num_layers} layers: no co-activation"
    inside = [affinity_inside(c.affinity, c.devices(node_D, slots, ratio)) for c in grouped]
    details: dict[str, Any] = {
        "ratio": ratio, "curve": curve, "grouping": grouping, "replicas": made,
        "affinity_inside_groups": float(np.mean(inside)) if inside else None,
    }  # fmt: skip
    return MethodResult(problem.placed(count_LED, "grace-moe"), details)
