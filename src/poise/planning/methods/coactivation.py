"""Swaps by co-activation after EPLB: expert-affinity-aware EPLB (https://github.com/antgroup/sglang/pull/2).

Step 1  Co-activation of two experts of a layer: tokens that choose both.
Step 2  EPLB places replicas (:mod:`poise.planning.methods.eplb`) for balance.
Step 3  Affinity of two devices: the co-activation of their hottest experts (largest load / replicas).
Step 4  In every layer, at most 20 times, the two devices of different nodes whose exchange raises the affinity inside
        nodes most exchange all their experts. Loads of devices go along, so balance is kept.

The published code exchanges blocks of E / groups slots instead of devices and adds up its gain with the sign that
*lowers* the affinity inside nodes; its description is followed here. On one node step 4 has nothing to exchange.

Settings beyond the published one (:data:`GRID`): ``affinity="all"`` counts the pairs of all experts of two devices;
``unit="expert"`` exchanges single replicas, the hottest ``hot`` of each device (0: all) against any other, between
nodes or, ``scope="device"``, between devices. ``tolerance`` is what the heaviest device's load / speed may exceed
EPLB's by, as a share. ``start="cooccurrence"`` takes the place of EPLB's packing by that of TensorRT-LLM (Apache-2.0,
examples/ep_load_balancer of an older branch): replica counts as in EPLB; each rank in turn takes the hottest replica
left, then the ones with the largest co-activation with what it holds, up to ``fill`` of its slots and of the mean load;
the rest go, hottest first, to the least loaded rank.

Our own choices: co-activation with replicas is its expectation if every replica is as likely; EPLB may put an expert
twice on a device: the second replica changes places with one elsewhere (least load), or goes; unequal slots and speeds
are kept. Top-1 models have no co-activation: EPLB's placement is returned, and ``details["note"]`` says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.planning.budget import Budget, Limit
from poise.planning.methods import eplb
from poise.planning.methods.lpt import replicate
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.routing.profile import coactivation_LEE


@dataclass(frozen=True, slots=True)
class CoactivationSetting:
    """What may be varied; see the module.

    Parameters
    ----------
    unit : what changes places.
    affinity : of two devices, by their hottest experts or by all.
    scope : where co-activated experts should meet (on one node it is always the device).
    tolerance : share by which the heaviest device may grow.
    hot : experts of a device that are tried, hottest first; 0 = all.
    rounds : most exchanges a layer.
    start, fill : where swaps start from.
    """

    unit: Literal["device", "expert"] = "device"
    affinity: Literal["hottest", "all"] = "hottest"
    scope: Literal["node", "device"] = "node"
    tolerance: float = 0.0
    hot: int = 1
    rounds: int = 20
    start: Literal["eplb", "cooccurrence"] = "eplb"
    fill: float = 0.8


PUBLISHED = CoactivationSetting()
GRID: tuple[CoactivationSetting, ...] = (
    PUBLISHED,
    CoactivationSetting(affinity="all"),
    *(
        CoactivationSetting(unit="expert", affinity="all", scope=scope, tolerance=tolerance, hot=hot, rounds=200)
        for scope in ("node", "device")
        for tolerance, hot in ((0.0, 1), (0.02, 0), (0.1, 0))
    ),
    CoactivationSetting(start="cooccurrence", rounds=0),
    CoactivationSetting(start="cooccurrence", affinity="all"),
)


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


def cooccurrence_start(
    load_E: NDArray[np.float64],
    pairs_EE: NDArray[Any],
    slots_D: NDArray[np.int64],
    speed_D: NDArray[np.float64],
    fill: float,
) -> NDArray[np.int32]:
    """TensorRT-LLM's variant for one layer, int32 [E, D] of 0 and 1; a replica that fits nowhere is left out."""
    experts, devices = pairs_EE.shape[0], len(slots_D)
    replicas = replicate(load_E, int(slots_D.sum()) - experts, devices)
    each, left = load_E / replicas, replicas.copy()
    count, load_D = np.zeros((experts, devices), np.int32), np.zeros(devices)
    mean_D = load_E.sum() * speed_D / speed_D.sum()
    for d in range(devices):
        while count[:, d].sum() + 1 <= slots_D[d] * fill:
            free = np.flatnonzero((left > 0) & (count[:, d] == 0))
            if not free.size:
                break
            held = count[:, d] > 0
            score = pairs_EE[held][:, free].sum(axis=0) if held.any() else each[free]
            e = free[np.lexsort((free, -each[free], -score))[0]]
            if load_D[d] + each[e] > mean_D[d] * fill:
                break
            count[e, d] += 1
            left[e] -= 1
            load_D[d] += each[e]
    # Experts without any slot go first: replicas may not take the room of the last of them.
    order = sorted(np.flatnonzero(left).tolist(), key=lambda e: (bool(count[e].any()), -each[e], e))
    late = [e for e in order for _ in range(int(left[e]))]
    first = [e for e in order if not count[e].any()]
    for e in first:
        late.remove(e)
    for e in [*first, *late]:
        fits = np.flatnonzero((count.sum(axis=0) < slots_D) & (count[e] == 0))
        if fits.size:
            d = fits[np.argmin(load_D[fits] / speed_D[fits])]
            count[e, d] = 1
            load_D[d] += each[e]
    return count


def exchange_devices(
    count_ED: NDArray[np.int32],
    load_E: NDArray[np.float64],
    pairs_EE: NDArray[Any],
    problem: PlacementProblem,
    setting: CoactivationSetting,
) -> int:
    """Steps 3 and 4 for one layer, in place; returns the number of exchanges."""
    node_D, speed_D = problem.cluster.node_D, problem.cluster.speed_D
    each = load_E / count_ED.sum(axis=1)
    if setting.affinity == "all":
        share = count_ED / count_ED.sum(axis=1, keepdims=True)
        affinity = share.T @ pairs_EE @ share
    else:
        # An empty device has no hottest expert and no affinity.
        used: NDArray[np.bool_] = count_ED.sum(axis=0) > 0
        top = np.where(count_ED > 0, each[:, None], -1.0).argmax(axis=0)
        affinity = pairs_EE[np.ix_(top, top)] * (used[:, None] & used)
    np.fill_diagonal(affinity, 0)
    held, load_D = count_ED.sum(axis=0), device_load(count_ED, load_E)
    cap = float((load_D / speed_D).max()) * (1 + setting.tolerance) * (1 + 1e-12)
    fits = (held[:, None] <= problem.slots_D) & (load_D[:, None] <= cap * speed_D)
    content = np.arange(len(node_D))  # which device's experts each device has
    one_hot = np.eye(int(node_D[-1]) + 1)[node_D]
    done = 0
    while done < setting.rounds:
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


def exchange_experts(
    count_ED: NDArray[np.int32],
    load_E: NDArray[np.float64],
    pairs_EE: NDArray[Any],
    group_D: NDArray[Any],
    speed_D: NDArray[np.float64],
    setting: CoactivationSetting,
) -> int:
    """Single replicas change places while that keeps more pairs in their group, in place; the number of exchanges.

    A replica of e on d and one of f on another device: with s the shares of experts in the two groups, the gain is
    w_f M[f] - w_e M[e] over (group of d - group of the other) - 2 w_e w_f A[e, f], M = A s, w = 1 / replicas.
    """
    pairs = np.array(pairs_EE, dtype=np.float64)
    np.fill_diagonal(pairs, 0.0)
    weight = 1.0 / count_ED.sum(axis=1)
    each = load_E * weight
    cap = float((each @ count_ED / speed_D).max()) * (1 + setting.tolerance) * (1 + 1e-12)
    met = pairs @ _shares(count_ED, group_D)
    for done in range(setting.rounds):
        load_D = each @ count_ED
        f, fd = np.nonzero(count_ED)
        e, ed = f, fd
        if setting.hot:
            order = np.lexsort((f, -each[f], fd))
            place = np.arange(len(order)) - np.searchsorted(fd[order], fd[order])
            pick = np.sort(order[place < setting.hot])
            e, ed = f[pick], fd[pick]
        g, h = group_D[ed], group_D[fd]
        met_f, met_e = met[f] * weight[f][:, None], met[e] * weight[e][:, None]
        gain = met_f[:, g].T - met_f[np.arange(len(f)), h]
        gain -= met_e[np.arange(len(e)), g][:, None] - met_e[:, h]
        gain -= 2 * (pairs[e] * weight[e][:, None] * weight)[:, f]
        moved = each[e][:, None] - each[f]
        held = count_ED > 0
        allowed = (g[:, None] != h) & ~held[e][:, fd] & ~held[f][:, ed].T
        allowed &= moved >= (load_D - cap * speed_D)[ed][:, None]
        allowed &= moved <= (cap * speed_D - load_D)[fd]
        gain = np.where(allowed, gain, 0.0)
        if not gain.size or gain.max() <= 1e-9 * max(1.0, float(pairs.max())):
            return done
        x, y = np.unravel_index(int(gain.argmax()), gain.shape)
        for who, old, new in ((e[x], ed[x], fd[y]), (f[y], fd[y], ed[x])):
            count_ED[who, old] -= 1
            count_ED[who, new] += 1
            met[:, group_D[old]] -= pairs[:, who] * weight[who]
            met[:, group_D[new]] += pairs[:, who] * weight[who]
    return setting.rounds


def plan(
    problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None,
    setting: CoactivationSetting = PUBLISHED,
) -> MethodResult:  # fmt: skip
    """EPLB, then swaps by co-activation; layers the time limit cuts off stay as they were. The seed plays no part.

    Raises
    ------
    NoResultError : the batch has loads only.
    """
    batch, cluster = problem.batch, problem.cluster
    pairs_LEE = coactivation_LEE(problem.tokens_for("co-activation"), batch.num_experts)
    budget = Budget.of(time_limit_s)
    load_LE = batch.load_LE()
    pairs_LEE[:, np.arange(batch.num_experts), np.arange(batch.num_experts)] = 0
    slots = np.minimum(problem.slots_D, batch.num_experts)
    details: dict[str, Any] = {"setting": asdict(setting)}
    if setting.start == "eplb":
        first = eplb.plan(problem, time_limit_s=budget, seed=seed)
        count_LED = np.array(first.placement.count_LED())
        details["eplb"] = first.details
    else:
        count_LED = np.stack([cooccurrence_start(load, pairs, slots, cluster.speed_D, setting.fill)
                              for load, pairs in zip(load_LE, pairs_LEE, strict=True)])  # fmt: skip
    details["replicas_dropped"] = sum(
        spread(count, load, slots, cluster.speed_D) for count, load in zip(count_LED, load_LE, strict=True)
    )
    device = np.arange(cluster.num_devices)
    group = device if setting.scope == "device" or cluster.num_nodes == 1 else cluster.node_D
    total = max(float(pairs_LEE.sum()) / 2, 1.0)

    def shares(name: str, groups: NDArray[Any]) -> None:
        met = sum(kept(count, pairs, groups) for count, pairs in zip(count_LED, pairs_LEE, strict=True))
        details[name] = met / total

    shares("kept_on_device_before", device)
    shares("kept_on_node_before", cluster.node_D)
    if batch.top_k == 1:
        details["note"] = "top-1: no co-activation, so nothing to swap for"
    elif setting.unit == "device" and cluster.num_nodes == 1:
        details["note"] = "one node: no devices to exchange between nodes"
    exchanges = left_out = 0
    for layer, (count, load, pairs) in enumerate(zip(count_LED, load_LE, pairs_LEE, strict=True)):
        if budget.over("coactivation"):
            left_out += 1
        elif setting.unit == "device":
            exchanges += exchange_devices(count, load, pairs, problem, setting)
        else:
            exchanges += exchange_experts(count, load, pairs, group, cluster.speed_D, setting)
        if progress:
            progress("swaps", (layer + 1) / batch.num_layers)
    shares("kept_on_device", device)
    shares("kept_on_node", cluster.node_D)
    details.update(exchanges=exchanges, layers_cut_off=left_out)
    return MethodResult(problem.placed(count_LED, "coactivation"), details)
