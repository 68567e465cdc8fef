"""Exact token split, compiled: integer quotas that minimise the largest ``tokens / speed`` (DESIGN 3.3).

A min-max bipartite flow from experts to the devices that hold them.

Step 1  Experts with one holder are loads that cannot move.
Step 2  Start. From counts per source: every token stays on its device, or in its node, where that holds its expert.
        What is left of each replicated expert, heaviest first, fills its holders to one level (water-filling).
Step 3  Every device gets the largest lower bound (mean, fixed loads) as its cap. Tokens above a cap flow to devices
        below theirs along shared experts (Dinic's level graph and blocking flows).
Step 4  When none can flow any more, the devices reached from those above their cap hold tokens that no device outside
        can take: their mean is a larger lower bound (Newton's step on the minimum cut). Back to step 3 with it; the
        end is a split that attains a lower bound.

With equal speeds the maximum is the linear programme's rounded up. Exact in tokens; under the roofline a heuristic.
Nothing is allocated: :class:`Holders` is made once a placement, :class:`Scratch` once a size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.util.compiled import compiled


class Holders(NamedTuple):
    """A placement as compiled code reads it. Entries h in H are (expert, device) pairs, sorted by expert.

    ``ptr_E`` int64 [E + 1], ``device_H``, ``expert_H`` int64 [H]; ``on_ptr_D`` int64 [D + 1] and ``on_X`` int64 list
    the entries of replicated experts on each device; ``shared_Y`` int64 [Y] the replicated experts.
    """

    ptr_E: NDArray[np.int64]
    device_H: NDArray[np.int64]
    expert_H: NDArray[np.int64]
    on_ptr_D: NDArray[np.int64]
    on_X: NDArray[np.int64]
    shared_Y: NDArray[np.int64]


class Scratch(NamedTuple):
    """Working memory of :func:`balance`."""

    load_D: NDArray[np.int64]
    cap_D: NDArray[np.int64]
    level_D: NDArray[np.int64]
    next_D: NDArray[np.int64]
    queue_D: NDArray[np.int64]
    path_D: NDArray[np.int64]
    level_E: NDArray[np.int64]
    next_E: NDArray[np.int64]
    order_E: NDArray[np.int64]


@compiled
def compile_holders(holds_ED: NDArray[np.bool_], room: Holders) -> Holders:
    """:class:`Holders` of a bool [E, D] placement, as views into ``room`` (of :func:`holders_room`)."""
    experts, devices = holds_ED.shape
    count, shared = 0, 0
    room.on_ptr_D[:] = 0
    for e in range(experts):
        room.ptr_E[e] = count
        for d in range(devices):
            if holds_ED[e, d]:
                room.device_H[count] = d
                room.expert_H[count] = e
                count += 1
        if count - room.ptr_E[e] > 1:
            room.shared_Y[shared] = e
            shared += 1
            for h in range(room.ptr_E[e], count):
                room.on_ptr_D[room.device_H[h] + 1] += 1
    room.ptr_E[experts] = count
    for d in range(devices):
        room.on_ptr_D[d + 1] += room.on_ptr_D[d]
    on = room.on_ptr_D[devices]
    for i in range(shared):
        e = room.shared_Y[i]
        for h in range(room.ptr_E[e], room.ptr_E[e + 1]):
            d = room.device_H[h]
            room.on_X[room.on_ptr_D[d]] = h
            room.on_ptr_D[d] += 1
    for d in range(devices, 0, -1):
        room.on_ptr_D[d] = room.on_ptr_D[d - 1]
    room.on_ptr_D[0] = 0
    return Holders(room.ptr_E, room.device_H[:count], room.expert_H[:count], room.on_ptr_D, room.on_X[:on],
                   room.shared_Y[:shared])  # fmt: skip


def holders_room(num_experts: int, num_devices: int, num_entries: int) -> Holders:
    """Memory for placements of these sizes with at most ``num_entries`` (expert, device) pairs."""
    sizes = (num_experts + 1, num_entries, num_entries, num_devices + 1, num_entries, num_experts)
    return Holders(*(np.zeros(size, np.int64) for size in sizes))


def make_holders(holds_ED: NDArray[Any]) -> Holders:
    """Compile a placement, bool or int [E, D]; slots beyond one per (expert, device) do not matter."""
    holds = np.asarray(holds_ED) > 0
    return compile_holders(holds, holders_room(holds.shape[0], holds.shape[1], int(holds.sum())))


def holders_of(
    expert_H: NDArray[np.int64], device_H: NDArray[np.int64], num_experts: int, num_devices: int
) -> Holders:  # fmt: skip
    """Compile a placement given as its (expert, device) pairs, int64 [H] each, sorted by expert."""
    copies_E = np.bincount(expert_H, minlength=num_experts)
    shared_X = np.flatnonzero(copies_E[expert_H] > 1)
    on_X = shared_X[np.argsort(device_H[shared_X], kind="stable")]
    on_ptr_D = np.searchsorted(device_H[on_X], np.arange(num_devices + 1))
    ptr_E = np.concatenate([[0], np.cumsum(copies_E)])
    return Holders(ptr_E, device_H, expert_H, on_ptr_D, on_X, np.flatnonzero(copies_E > 1))


def make_scratch(num_experts: int, num_devices: int) -> Scratch:
    """Working memory for these sizes."""
    devices, experts = np.zeros((6, num_devices), np.int64), np.zeros((3, num_experts), np.int64)
    return Scratch(*devices, *experts)


@compiled
def near_start(
    load_SE: NDArray[np.int64], holders: Holders, node_D: NDArray[np.int64], local_H: NDArray[np.int64]
) -> None:
    """Fill ``local_H`` (int64 [H]) with tokens that need not leave their device or, failing that, their node.

    Tokens whose own device holds no copy are shared by the holders of their node; what does not divide is left out.
    """
    for e in range(holders.ptr_E.size - 1):
        first, last = holders.ptr_E[e], holders.ptr_E[e + 1]
        start = first
        while start < last:  # holders are sorted by device, so those of a node lie together
            node = node_D[holders.device_H[start]]
            end = start
            own = 0
            while end < last and node_D[holders.device_H[end]] == node:
                local_H[end] = load_SE[holders.device_H[end], e]
                own += local_H[end]
                end += 1
            others = -own
            for d in range(node_D.size):
                if node_D[d] == node:
                    others += load_SE[d, e]
            for h in range(start, end):
                local_H[h] += others // (end - start)
            start = end


@compiled
def _fill(first, last, amount, quota_H, holders, load_D, speed_D, order):  # type: ignore[no-untyped-def]
    """Add ``amount`` tokens to entries first..last so that the fullest of their devices stays as low as it can."""
    count = last - first
    if count == 2:
        a, b = holders.device_H[first], holders.device_H[first + 1]
        even = (amount + load_D[a] + load_D[b]) * speed_D[a] / (speed_D[a] + speed_D[b]) - load_D[a]
        to_a = min(amount, max(0, np.int64(np.floor(even + 0.5))))
        quota_H[first] += to_a
        quota_H[first + 1] += amount - to_a
        load_D[a] += to_a
        load_D[b] += amount - to_a
        return
    for i in range(count):
        order[i] = first + i
    gap = count // 2
    while gap > 0:  # Shell sort by load / speed
        for i in range(gap, count):
            h = order[i]
            key = load_D[holders.device_H[h]] / speed_D[holders.device_H[h]]
            j = i
            while j >= gap:
                other = holders.device_H[order[j - gap]]
                if load_D[other] / speed_D[other] <= key:
                    break
                order[j] = order[j - gap]
                j -= gap
            order[j] = h
        gap //= 2
    tokens, speed, level, used = float(amount), 0.0, 0.0, 0
    for i in range(count):
        d = holders.device_H[order[i]]
        if i > 0 and load_D[d] / speed_D[d] >= level:
            break
        tokens += load_D[d]
        speed += speed_D[d]
        level = tokens / speed
        used = i + 1
    left = amount
    for i in range(used):
        h = order[i]
        d = holders.device_H[h]
        give = min(left, max(0, np.int64(level * speed_D[d]) - load_D[d]))
        quota_H[h] += give
        load_D[d] += give
        left -= give
    i = 0
    while left > 0:
        h = order[i % used]
        quota_H[h] += 1
        load_D[holders.device_H[h]] += 1
        left -= 1
        i += 1


@compiled
def _levels(quota_H, holders, cap_D, scratch):  # type: ignore[no-untyped-def]
    """Breadth first from all devices above their cap over shared experts; True if one below its cap is reached."""
    load_D, level_D, level_E, queue = scratch.load_D, scratch.level_D, scratch.level_E, scratch.queue_D
    level_D[:] = -1
    level_E[:] = -1
    tail = 0
    for d in range(cap_D.size):
        if load_D[d] > cap_D[d]:
            level_D[d] = 0
            queue[tail] = d
            tail += 1
    head, found = 0, 1 << 60
    while head < tail:
        d = queue[head]
        head += 1
        if level_D[d] >= found:
            break
        for x in range(holders.on_ptr_D[d], holders.on_ptr_D[d + 1]):
            h = holders.on_X[x]
            e = holders.expert_H[h]
            if quota_H[h] == 0 or level_E[e] >= 0:
                continue
            level_E[e] = level_D[d]
            for h2 in range(holders.ptr_E[e], holders.ptr_E[e + 1]):
                d2 = holders.device_H[h2]
                if level_D[d2] < 0:
                    level_D[d2] = level_D[d] + 1
                    queue[tail] = d2
                    tail += 1
                    if load_D[d2] < cap_D[d2]:
                        found = min(found, level_D[d2])
    return found < 1 << 60


@compiled
def _block(quota_H, holders, cap_D, scratch):  # type: ignore[no-untyped-def]
    """Depth first along the levels until no device above its cap has a path left (Dinic's blocking flow)."""
    load_D, level_D, level_E = scratch.load_D, scratch.level_D, scratch.level_E
    next_D, next_E, path_D = scratch.next_D, scratch.next_E, scratch.path_D
    for d in range(cap_D.size):
        next_D[d] = holders.on_ptr_D[d]
    for e in holders.shared_Y:
        next_E[e] = holders.ptr_E[e]
    for source in range(cap_D.size):
        while load_D[source] > cap_D[source]:
            depth, d = 0, source
            while True:
                if load_D[d] < cap_D[d]:
                    break
                step = -1
                while next_D[d] < holders.on_ptr_D[d + 1]:
                    h = holders.on_X[next_D[d]]
                    e = holders.expert_H[h]
                    if quota_H[h] > 0 and level_E[e] == level_D[d]:
                        while next_E[e] < holders.ptr_E[e + 1]:
                            if level_D[holders.device_H[next_E[e]]] == level_D[d] + 1:
                                step = next_E[e]
                                break
                            next_E[e] += 1
                        if step >= 0:
                            break
                    next_D[d] += 1
                if step >= 0:
                    path_D[depth] = d
                    depth += 1
                    d = holders.device_H[step]
                elif depth == 0:
                    break
                else:  # a dead end: take it out of the level graph and step back
                    level_D[d] = -2
                    depth -= 1
                    d = path_D[depth]
            if depth == 0:
                break
            amount = min(load_D[source] - cap_D[source], cap_D[d] - load_D[d])
            for i in range(depth):
                amount = min(amount, quota_H[holders.on_X[next_D[path_D[i]]]])
            for i in range(depth):
                h = holders.on_X[next_D[path_D[i]]]
                quota_H[h] -= amount
                quota_H[next_E[holders.expert_H[h]]] += amount
            load_D[source] -= amount
            load_D[d] += amount


@compiled
def _caps(bound, speed_D, cap_D):  # type: ignore[no-untyped-def]
    for d in range(cap_D.size):
        cap_D[d] = np.int64(np.floor(bound * speed_D[d] * (1.0 + 1e-12) + 1e-9))


@compiled
def _raise_bound(speed_D, bound, scratch):  # type: ignore[no-untyped-def]
    """The least bound under which the devices reached by :func:`_levels` can hold what they hold now."""
    load_D, level_D, cap_D = scratch.load_D, scratch.level_D, scratch.cap_D
    tokens, speed = 0, 0.0
    for d in range(cap_D.size):
        if level_D[d] >= 0:
            tokens += load_D[d]
            speed += speed_D[d]
    bound = max(bound, tokens / speed)
    while True:
        _caps(bound, speed_D, cap_D)
        room, after = 0, np.inf
        for d in range(cap_D.size):
            if level_D[d] >= 0:
                room += cap_D[d]
                after = min(after, (cap_D[d] + 1) / speed_D[d])
        if room >= tokens:
            return bound
        bound = after


@compiled
def _fullest(load_D, speed_D):  # type: ignore[no-untyped-def]
    most = 0.0
    for d in range(speed_D.size):
        most = max(most, load_D[d] / speed_D[d])
    return most


class QuotaProblem(NamedTuple):
    """What :func:`balance` splits.

    Parameters
    ----------
    load_E : int64 [E], tokens of each expert.
    speed_D : float64 [D], of the devices.
    local_H : int64 [H], tokens of the entry's expert whose home is the entry's device, or size 0: how step 2 starts.
    base_D : int64 [D], tokens that are there already, or size 0.
    slack : it is enough to come within (1 + slack) times the lower bound: fewer tokens leave their home.
    """

    load_E: NDArray[np.int64]
    speed_D: NDArray[np.float64]
    local_H: NDArray[np.int64]
    base_D: NDArray[np.int64]
    slack: float


@compiled
def balance(problem: QuotaProblem, holders: Holders, quota_H: NDArray[np.int64], scratch: Scratch) -> float:
    """Fill ``quota_H`` (int64 [H]); returns the largest tokens / speed."""
    load_E, speed_D, local_H, base_D = problem.load_E, problem.speed_D, problem.local_H, problem.base_D
    experts, devices = load_E.size, speed_D.size
    load_D, order = scratch.load_D, scratch.order_E
    load_D[:] = 0
    total = 0
    if base_D.size:
        for d in range(devices):
            load_D[d] = base_D[d]
            total += base_D[d]
    for e in range(experts):
        first, last = holders.ptr_E[e], holders.ptr_E[e + 1]
        total += load_E[e]
        if last - first == 1:
            quota_H[first] = load_E[e]
            load_D[holders.device_H[first]] += load_E[e]
    bound = max(total / speed_D.sum(), _fullest(load_D, speed_D)) * (1.0 + problem.slack)
    shared = holders.shared_Y
    count = shared.size
    for i in range(count):  # heaviest first
        e = shared[i]
        j = i
        while j > 0 and load_E[order[j - 1]] < load_E[e]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = e
    rank = scratch.queue_D
    if local_H.size:
        for i in range(count):
            e = order[i]
            for h in range(holders.ptr_E[e], holders.ptr_E[e + 1]):
                quota_H[h] = local_H[h]
                load_D[holders.device_H[h]] += local_H[h]
    for i in range(count):
        e = order[i]
        first, last = holders.ptr_E[e], holders.ptr_E[e + 1]
        left = load_E[e]
        for h in range(first, last):
            if local_H.size:
                left -= quota_H[h]
            else:
                quota_H[h] = 0
        _fill(first, last, left, quota_H, holders, load_D, speed_D, rank)
    scratch.level_D[:] = 0
    bound = _raise_bound(speed_D, bound, scratch)  # all devices: the least whole-token bound
    _caps(bound, speed_D, scratch.cap_D)
    for _ in range(1_000_000):
        if _levels(quota_H, holders, scratch.cap_D, scratch):
            _block(quota_H, holders, scratch.cap_D, scratch)
            continue
        above = False
        for d in range(devices):
            above = above or load_D[d] > scratch.cap_D[d]
        if not above:
            break
        bound = _raise_bound(speed_D, bound, scratch)
    return _fullest(load_D, speed_D)
