"""Swaps by co-activation after EPLB: expert-affinity-aware EPLB (https://github.com/antgroup/sglang/pull/2).

Step 1  Co-activation of two experts of a layer: tokens that choose both.
Step 2  EPLB places replicas (:mod:`poise.planning.methods.eplb`) for balance.
Step 3  Affinity of two devices: the co-activation of their hottest experts (largest load / replicas).
Step 4  In every layer, at most 20 times, the two devices of different nodes whose exchange raises the affinity inside
        nodes most exchange all their experts. Loads of devices go along, so balance is kept.

The published code exchanges blocks of E / groups slots instead of devices and adds up its gain with the sign that
*lowers* the affinity inside nodes; its description is followed here. On one node step 4 has nothing to exchange.

Our own choices: co-activation with replicas is its expectation if every replica is as likely; EPLB may put an expert
twice on a device: the second replica changes places with one elsewhere (least load), or goes; unequal slots and speeds
are kept. Top-1 models have no co-activation: EPLB's placement is returned, and ``details["note"]`` says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.planning.budget import Budget, Limit
from poise.planning.methods import eplb
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.routing.profile import coactivation_LEE

MOST_EXCHANGES = 20
"""A layer."""


def device_load(count_ED: NDArray[Any], load_E: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tokens of each device if every replica is as likely, float64 [D]."""
    return (load_E / np.maximum(count_ED.sum(axis=1), 1)) @ count_ED


def kept(count_ED: NDArray[Any], pairs_EE: NDArray[Any], group_D: NDArray[Any]) -> float:
    """Expected co-activated pairs that meet in one group of devices, every replica being as likely."""
    share_EG = _shares(count_ED, group_D)
    return float(np.einsum("eg,ef,fg->", share_EG, pairs_EE, share_EG, optimize=True)) / 2


def _shares(count_ED: NDArray[Any], group_D: NDArray[Any]) -> NDArray[np.float64]:
    one_hot = np.eye(int(group_D.max()) + 1)[group_D]
    return (count_ED @ one_hot) / count_ED.sum(axis=1, keepdims=True)


def spread(
    count_ED: NDArray[Any], load_E: NDArray[np.float64], slots_D: NDArray[np.int64], speed_D: NDArray[np.float64]
) -> int:
    """Make every device hold an expert at most once, in place; returns the replicas that had to go.

    A second replica takes a free slot of a device without its expert, or changes places with a replica there.
    """
    dropped = 0
    for e, d in np.argwhere(count_ED > 1):
        while count_ED[e, d] > 1:
            each = load_E / np.maximum(count_ED.sum(axis=1), 1)
            load_D = each @ count_ED
            best, move = np.inf, None
            for other in np.flatnonzero(count_ED[e] == 0):
                if count_ED[:, other].sum() < slots_D[other]:
                    options = [(each[e], -1)]
                else:
                    options = [(each[e] - each[f], int(f)) for f in np.flatnonzero(count_ED[:, other])
                               if count_ED[f, d] == 0]  # fmt: skip
                for delta, f in options:
                    worst = max((load_D[d] - delta) / speed_D[d], (load_D[other] + delta) / speed_D[other])
                    if worst < best:
                        best, move = worst, (int(other), f)
            count_ED[e, d] -= 1
            if move is None:
                dropped += 1
                continue
            to, back = move
            count_ED[e, to] += 1
            if back >= 0:
                count_ED[back, to] -= 1
                count_ED[back, d] += 1
    return dropped


def exchange_devices(
    count_ED: NDArray[np.int32],
    load_E: NDArray[np.float64],
    pairs_EE: NDArray[Any],
    problem: PlacementProblem,
    most: int = MOST_EXCHANGES,
) -> int:
    """Steps 3 and 4 for one layer, in place; returns the number of exchanges."""
    node_D, speed_D = problem.cluster.node_D, problem.cluster.speed_D
    each = load_E / count_ED.sum(axis=1)
    # An empty device has no hottest expert and no affinity.
    used: NDArray[np.bool_] = count_ED.sum(axis=0) > 0
    top = np.where(count_ED > 0, each[:, None], -1.0).argmax(axis=0)
    affinity = pairs_EE[np.ix_(top, top)] * (used[:, None] & used)
    np.fill_diagonal(affinity, 0)
    held, load_D = count_ED.sum(axis=0), device_load(count_ED, load_E)
    cap = float((load_D / speed_D).max()) * (1 + 1e-12)
    fits = (held[:, None] <= problem.slots_D) & (load_D[:, None] <= cap * speed_D)
    content = np.arange(len(node_D))  # which device's experts each device has
    one_hot = np.eye(int(node_D[-1]) + 1)[node_D]
    done = 0
    while done < most:
        a = affinity[np.ix_(content, content)]
        near = a @ one_hot
        own = near[np.arange(len(node_D)), node_D]
        gain = near[:, node_D] + near[:, node_D].T - own[:, None] - own - 2 * a
        room = fits[content]
        allowed = room & room.T & (node_D[:, None] != node_D)
        gain = np.where(allowed, gain, 0.0)
        x, y = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[x, y] <= 1e-9 * max(1.0, float(a.sum())):
            break
        content[[x, y]] = content[[y, x]]
        done += 1
    count_ED[:] = count_ED[:, content]
    return done


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
) -> MethodResult:
    """EPLB, then swaps by co-activation; layers the time limit cuts off stay as they were. The seed plays no part.

    Raises
    ------
    NoResultError : the batch has loads only.
    """
    batch, cluster = problem.batch, problem.cluster
    pairs_LEE = coactivation_LEE(problem.tokens_for("co-activation"), batch.num_experts)
    pairs_LEE[:, np.arange(batch.num_experts), np.arange(batch.num_experts)] = 0
    budget, load_LE, slots = Budget.of(time_limit_s), batch.load_LE(), np.minimum(problem.slots_D, batch.num_experts)
    first = eplb.plan(problem, time_limit_s=budget, seed=seed)
    count_LED = np.array(first.placement.count_LED())
    details: dict[str, Any] = {"eplb": first.details}
    details["replicas_dropped"] = sum(
        spread(count, load, slots, cluster.speed_D) for count, load in zip(count_LED, load_LE, strict=True)
    )
    device = np.arange(cluster.num_devices)
    total = max(float(pairs_LEE.sum()) / 2, 1.0)

    def shares(name: str, groups: NDArray[Any]) -> None:
        met = sum(kept(count, pairs, groups) for count, pairs in zip(count_LED, pairs_LEE, strict=True))
        details[name] = met / total

    shares("kept_on_device_before", device)
    shares("kept_on_node_before", cluster.node_D)
    if batch.top_k == 1:
        details["note"] = "top-1: no co-activation, so nothing to swap for"
    elif cluster.num_nodes == 1:
        details["note"] = "one node: no devices to exchange between nodes"
    exchanges = left_out = 0
    for layer, (count, load, pairs) in enumerate(zip(count_LED, load_LE, pairs_LEE, strict=True)):
        if budget.over("coactivation"):
            left_out += 1
        else:
            exchanges += exchange_devices(count, load, pairs, problem)
        if progress:
            progress("swaps", (layer + 1) / batch.num_layers)
    shares("kept_on_device", device)
    shares("kept_on_node", cluster.node_D)
    details.update(exchanges=exchanges, layers_cut_off=left_out)
    return MethodResult(problem.placed(count_LED, "coactivation"), details)
