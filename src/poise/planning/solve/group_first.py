"""Groups to places first, devices within them second: the start where routing groups lie whole, and a move of groups.

Step 1  An assignment of groups to places (:mod:`poise.planning.groups`) takes the seconds of the fullest ones,

            sum_b w[b] max_p work[b, p] / speed[p]  +  max_p copies[p] * seconds a copy[p],

        in at most 8 scenarios b. Copies that come into a place: tokens with an expert in it, where tokens are known and
        the data flow sends one copy for several experts; else pairs of token and expert.
Step 2  From LPT by work, and from assignments at random, two groups change places, or one goes where there is room for
        more, while the seconds fall. How many groups a place can have: :meth:`WholeGroups.room`.
Step 3  Each result is packed within places: a replica for every slot, to the largest work / replicas, and LPT. Layer by
        layer the one that is fastest on a few steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.planning.groups import WholeGroups
from poise.planning.methods.lpt import pack, pack_all
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.anneal import scenarios
from poise.planning.solve.complete import fill_layer
from poise.planning.solve.effort import some_steps
from poise.routing.batch import RoutingBatch
from poise.routing.trace import NO_EXPERT
from poise.util.compiled import compiled

RESTARTS = 4
"""Assignments at random that step 2 starts from, beside LPT."""
PRICED = 4
"""Steps that step 3 looks at."""
MOST_PATTERNS = 62
"""Groups up to which a token's groups are told apart."""


class _LayerSums(NamedTuple):
    """What an assignment of a layer is judged by. ``hit_XG``: groups that go together, ``count_X``: how many copies."""

    work_BG: NDArray[np.float64]
    weight_B: NDArray[np.float64]
    hit_XG: NDArray[np.bool_]
    count_X: NDArray[np.float64]
    speed_P: NDArray[np.float64]
    copy_s_P: NDArray[np.float64]
    least_P: NDArray[np.int64]
    most_P: NDArray[np.int64]


@compiled(nogil=True)
def assignment_seconds(sums: _LayerSums, place_G: NDArray[np.int64]) -> float:
    """Step 1."""
    places, groups = sums.speed_P.size, place_G.size
    out, at_P = 0.0, np.zeros(places)
    for b in range(sums.weight_B.size):
        at_P[:] = 0.0
        for g in range(groups):
            at_P[place_G[g]] += sums.work_BG[b, g] / sums.speed_P[place_G[g]]
        out += sums.weight_B[b] * at_P.max()
    at_P[:] = 0.0
    hit_P = np.zeros(places, np.bool_)
    for x in range(sums.count_X.size):
        hit_P[:] = False
        for g in range(groups):
            if sums.hit_XG[x, g]:
                hit_P[place_G[g]] = True
        for p in range(places):
            if hit_P[p]:
                at_P[p] += sums.count_X[x] * sums.copy_s_P[p]
    return out + at_P.max()


@compiled(nogil=True)
def _improve(sums: _LayerSums, place_G: NDArray[np.int64]) -> float:
    """Step 2 from one assignment, in place."""
    places, groups = sums.speed_P.size, place_G.size
    count_P = np.zeros(places, np.int64)
    for g in range(groups):
        count_P[place_G[g]] += 1
    best = assignment_seconds(sums, place_G)
    while True:
        before = best
        for g in range(groups):
            for h in range(g + 1, groups):
                p, q = place_G[g], place_G[h]
                if p == q:
                    continue
                place_G[g], place_G[h] = q, p
                now = assignment_seconds(sums, place_G)
                if now < best * (1.0 - 1e-9):
                    best = now
                else:
                    place_G[g], place_G[h] = p, q
            for q in range(places):
                p = place_G[g]
                if p == q or count_P[q] >= sums.most_P[q] or count_P[p] <= sums.least_P[p]:
                    continue
                place_G[g] = q
                now = assignment_seconds(sums, place_G)
                if now < best * (1.0 - 1e-9):
                    best = now
                    count_P[p] -= 1
                    count_P[q] += 1
                else:
                    place_G[g] = p
        if best >= before:
            return best


def _dealt(sums: _LayerSums, order_G: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each group, int64 [G]: in the given order to the place with least work, each place its least first."""
    work_G = sums.weight_B @ sums.work_BG
    place_G, count_P, work_P = (
        np.zeros(len(order_G), np.int64),
        np.zeros(len(sums.most_P), np.int64),
        0.0 * sums.speed_P,
    )
    for turn, g in enumerate(order_G):
        lacks_P = np.maximum(sums.least_P - count_P, 0)
        able_P = lacks_P > 0 if lacks_P.sum() >= len(order_G) - turn else count_P < sums.most_P
        p = int(np.argmin(np.where(able_P, (work_P + work_G[g]) / sums.speed_P, np.inf)))
        place_G[g] = p
        count_P[p] += 1
        work_P[p] += work_G[g]
    return place_G


def group_sums(problem: PlacementProblem, whole: WholeGroups) -> list[_LayerSums]:
    """What step 1 knows of each layer."""
    batch, cluster, model = problem.batch, problem.cluster, problem.model
    work_BLE, weight_B = scenarios(problem)
    work_BLG = work_BLE.reshape(*work_BLE.shape[:2], whole.num_groups, whole.size).sum(axis=3)
    least_P, most_P = whole.room(problem.layer_slots_D, filled=not problem.engine.empty_slots)
    devices_P = np.bincount(whole.place_D)
    speed_P = np.bincount(whole.place_D, weights=cluster.speed_D).astype(np.float64)
    ways = (
        (cluster.dispatch_wire, model.dispatch_bytes_per_token),
        (cluster.combine_wire, model.combine_bytes_per_token),
    )
    if cluster.num_nodes > 1:
        each = sum(size / wire.inter_bytes_per_s for wire, size in ways)
        ports_P = devices_P / (cluster.devices_per_node_N.max() if cluster.nic_shared else 1)
    else:
        each, ports_P = sum(size / wire.intra_bytes_per_s for wire, size in ways), devices_P.astype(np.float64)
    copy_s_P: NDArray[np.float64] = each * (1 - devices_P / cluster.num_devices) / ports_P
    together = batch.has_tokens and problem.traffic != "home" and whole.num_groups <= MOST_PATTERNS
    load_LG = batch.load_LE().reshape(batch.num_layers, whole.num_groups, whole.size).sum(axis=2)
    alone = np.eye(whole.num_groups, dtype=bool)
    out = []
    for layer in range(batch.num_layers):
        hit_XG, count_X = _patterns(batch, layer, whole) if together else (alone, load_LG[layer])
        work_BG = np.ascontiguousarray(work_BLG[:, layer])
        out.append(_LayerSums(work_BG, weight_B, hit_XG, count_X, speed_P, copy_s_P, least_P, most_P))
    return out


def _patterns(
    batch: RoutingBatch, layer: int, whole: WholeGroups
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:  # fmt: skip
    """Groups that tokens take together, bool [X, G], and how many tokens of a step do, float64 [X]."""
    assert batch.experts_TLK is not None
    ids_TK = batch.experts_TLK[:, layer].astype(np.int64)
    bit_TK = np.where(ids_TK == NO_EXPERT, 0, np.int64(1) << (np.maximum(ids_TK, 0) // whole.size))
    weight_T = batch.weight_T()
    pattern_X, which_T = np.unique(np.bitwise_or.reduce(bit_TK, axis=1), return_inverse=True)
    hit_XG = (pattern_X[:, None] >> np.arange(whole.num_groups)) & 1 > 0
    return hit_XG, np.bincount(which_T, weights=weight_T).astype(np.float64)


def assigned(sums: _LayerSums, seed: int = 0) -> NDArray[np.int64]:
    """Distinct results of step 2, int64 [at most 1 + RESTARTS, G], the one with least seconds first."""
    rng = np.random.default_rng(seed)
    groups = sums.work_BG.shape[1]
    orders = [np.argsort(-(sums.weight_B @ sums.work_BG), kind="stable")]
    orders += [rng.permutation(groups) for _ in range(RESTARTS)]
    found: dict[float, NDArray[np.int64]] = {}
    for order_G in orders:
        place_G = _dealt(sums, order_G)
        seconds = float(_improve(sums, place_G))
        found.setdefault(round(seconds, 12 - int(np.floor(np.log10(max(seconds, 1e-300))))), place_G)
    return np.stack([found[seconds] for seconds in sorted(found)])


def packed(
    problem: PlacementProblem, place_E: NDArray[np.int64], work_E: NDArray[np.float64], places: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Step 3 of one layer in some places, bool [E, D]; without replicas where slots may stay empty."""
    slots_D, place_D, speed_D = problem.layer_slots_D, problem.place_D, problem.cluster.speed_D
    held_ED = np.zeros((len(work_E), len(slots_D)), bool)
    for p in places:
        experts, devices = np.flatnonzero(place_E == p), np.flatnonzero(place_D == p)
        if not experts.size:
            continue
        room_D = np.minimum(slots_D[devices], experts.size)
        if problem.engine.empty_slots:
            made = pack(work_E[experts], np.ones(experts.size, np.int64), room_D, speed_D[devices])
        else:
            made = pack_all(work_E[experts], room_D, speed_D[devices])
            held = made > 0
            fill_layer(held, room_D - held.sum(axis=0), work_E[experts], True, np.zeros(devices.size, np.int64))
            made = held.astype(np.int32)
        held_ED[np.ix_(experts, devices)] = made > 0
    return held_ED


def moved_groups(
    problem: PlacementProblem, held_ED: NDArray[np.bool_], work_E: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.bool_] | None:
    """One layer, bool [E, D], after two groups at random have changed places, or one has gone where there is room, both
    places packed anew; None if the group that is drawn can go nowhere.
    """
    whole = problem.whole
    assert whole is not None
    least_P, most_P = whole.room(problem.layer_slots_D, filled=not problem.engine.empty_slots)
    place_G = whole.slots_LGP(held_ED[None])[0].argmax(axis=1)
    count_P, g = np.bincount(place_G, minlength=whole.num_places), int(rng.integers(whole.num_groups))
    p = int(place_G[g])
    others = np.flatnonzero(place_G != p)
    open_ = (
        np.flatnonzero((count_P < most_P) & (np.arange(whole.num_places) != p))
        if count_P[p] > least_P[p]
        else others[:0]
    )
    if not others.size + open_.size:
        return None
    pick = int(rng.integers(others.size + open_.size))
    if pick < others.size:
        h = others[pick]
        q, place_G[h] = int(place_G[h]), p
    else:
        q = int(open_[pick - others.size])
    place_G[g] = q
    out = packed(problem, np.repeat(place_G, whole.size), work_E, np.array([p, q]))
    stay_D = (whole.place_D != p) & (whole.place_D != q)
    out[:, stay_D] = held_ED[:, stay_D]
    return out


def group_first(problem: PlacementProblem, *, seed: int = 0) -> Placement:
    """A placement with groups whole; slots are counted by layer."""
    batch, whole = problem.batch, problem.whole
    assert whole is not None
    work_LE = problem.work_LE()
    options = [assigned(sums, seed + layer) for layer, sums in enumerate(group_sums(problem, whole))]
    few, every = some_steps(problem, PRICED, batch.num_steps), np.arange(whole.num_places)
    counts = []
    for turn in range(max(len(option) for option in options)):
        place_LG = np.stack([option[min(turn, len(option) - 1)] for option in options])
        place_LE = np.repeat(place_LG, whole.size, axis=1)
        made: list[NDArray[Any]] = [packed(problem, place_E, work_E, every)
                                    for place_E, work_E in zip(place_LE, work_LE, strict=True)]  # fmt: skip
        counts.append(np.stack(made))
    return problem.placed(few.fastest_layers(counts), "group-first")
