"""``exact``: the proven joint optimum over equal-size placements under linear ``stay`` traffic.

A dynamic programme over the layer chain. A layer of E experts on D devices, E / D each, has
E! / (E/D)!^D placements (8 on 4: 2,520). The objective is a sum over neighbouring layers, so the chain is a shortest
path with the placements of a layer as its nodes:

    sum_l  max_d compute(d) of the mean load  +  sum_l sum_{e1, e2} tokens[l, e1, e2] * seconds(device e1, device e2)

tokens[l, e1, e2] counts tokens whose heaviest expert of layer l is e1 and that use e2 in layer l + 1 (ExFlow's flow). A
copy costs its bytes over the narrowest port on its way, divided by D: the mean port, which is linear where the true
cost, the fullest port, is not.
"""

from __future__ import annotations

from math import factorial, prod

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds
from poise.cost.entries import HeldEntries
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget, Limit
from poise.planning.methods.exflow import expected_affinity_LEE
from poise.planning.problem import MethodResult, PlacementProblem, Progress, equal_sizes
from poise.util.errors import NoResultError

MAX_PLACEMENTS = 6_000
PAIRS_PER_SECOND = 1e8
"""Pairs of placements of two layers that are tried in a nominal second."""


def copy_seconds_DD(cluster: Cluster, model: ModelSpec) -> NDArray[np.float64]:
    """Seconds of one token copy between two devices, as a share of the mean port, [D, D]."""
    out = np.where(cluster.same_node_DD, 1 / cluster.intra_bytes_per_s, 1 / cluster.inter_bytes_per_s)
    np.fill_diagonal(out, 0.0)
    return out * model.dispatch_bytes_per_token / cluster.num_devices


def all_placements(sizes_D: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every way to put sum(sizes) experts on devices with these sizes, int [n, E]."""
    rows = np.zeros((1, 0), np.int64)
    used = np.zeros((1, len(sizes_D)), np.int64)
    for _ in range(int(sizes_D.sum())):
        parts = []
        for d, size in enumerate(sizes_D):
            ok = used[:, d] < size
            grown = used[ok].copy()
            grown[:, d] += 1
            parts.append((np.column_stack([rows[ok], np.full(int(ok.sum()), d)]), grown))
        rows, used = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    return rows


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """The proven optimum of the linear objective; ``details["linear_stay_objective"]`` is its value.

    Redundant slots stay empty.

    Raises
    ------
    NoResultError : a layer has more than 6,000 placements, or the budget does not reach.
    """
    batch, devices = problem.batch, problem.num_devices
    sizes = equal_sizes(batch.num_experts, problem.slots_D)
    number = factorial(batch.num_experts) // prod(factorial(int(s)) for s in sizes)
    if number > MAX_PLACEMENTS:
        raise NoResultError(
            f"a layer of {batch.num_experts} experts on {devices} devices has 10^{len(str(number)) - 1} placements, "
            f"exact takes {MAX_PLACEMENTS}", hint="use method poise",
        )  # fmt: skip
    budget, seconds = Budget.of(time_limit_s), number**2 * batch.num_layers / PAIRS_PER_SECOND
    if seconds > 2 * budget.seconds:
        raise NoResultError(f"exact takes about {seconds:.1f} s here, the limit is {budget.seconds:.1f} s",
                            hint="raise --time-limit")  # fmt: skip
    options = all_placements(sizes)
    one_hot = np.eye(devices)[options]
    work = expert_seconds(batch.load_LE(), problem.cluster, problem.model)
    move = copy_seconds_DD(problem.cluster, problem.model)
    flow = expected_affinity_LEE(batch, picks=batch.top_k)
    flat = one_hot.reshape(len(options), -1)
    compute = (np.einsum("ned,le->lnd", one_hot, work) / problem.cluster.speed_D).max(axis=2)
    cost = compute[0]
    came = np.zeros((batch.num_layers, len(options)), np.int64)
    for layer in range(1, batch.num_layers):
        if budget.over("exact"):
            raise NoResultError(f"the clock ended exact in layer {layer} of {batch.num_layers}",
                                hint="raise --time-limit")  # fmt: skip
        sent = np.einsum("ef,ned,dc->nfc", flow[layer - 1], one_hot, move, optimize=True).reshape(len(options), -1)
        total = sent @ flat.T + cost[:, None]
        came[layer] = total.argmin(axis=0)
        cost = total[came[layer], np.arange(len(options))] + compute[layer]
        if progress:
            progress("dynamic programme", layer / batch.num_layers)
    path = [int(cost.argmin())]
    for layer in range(batch.num_layers - 1, 0, -1):
        path.append(int(came[layer, path[-1]]))
    placement = problem.placed(HeldEntries.of_devices(options[path[::-1]], devices), "exact")
    value = float(cost.min()) / batch.num_layers
    return MethodResult(placement, {"linear_stay_objective": value, "linear_stay_bound": value, "placements": number})
