"""Kernels (c) and (d) in one launch: replicas for step slots from predicted work, and whether to use them. One program.

Work (whole units of each expert) is split exactly over the holders there are (:mod:`poise.runtime.device.flow`). Then,
in turns, until the fullest device is within 2 thousandths of the mean or nothing helps:

Step 1  Devices above the mean each offer the expert that they have most work of, up to what they have too much. Devices
        below it with a step slot to spare (free; else one whose replica does less than half as much) have room; those
        with much less room than the roomiest wait, so that no slot is spent on a rest.
Step 2  Offers and rooms, each from the largest on, lie on one line: a receiver takes from the offer in which its room
        begins, or, where it holds that expert, the largest offer that it can. No offer gives more than it has.
Step 3  The work moves with the replicas, that of replaced ones to a static holder, and is split anew.

Greedy, as :func:`poise.stepwise.poise.surplus.surplus_fill` is, but in few turns and not one replica at a time. The
split of the end is what :mod:`poise.runtime.device.decide` prices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from poise.runtime.device.decide import decided
from poise.runtime.device.flow import ARRAYS as FLOW_ARRAYS
from poise.runtime.device.flow import FAR, KEYS, flow, turned
from poise.runtime.device.slots import least_of, placed, sum_of

FLOW_ROOM = tl.constexpr(FLOW_ARRAYS)
ARRAYS = FLOW_ARRAYS + 2
"""int64 [E] arrays of working memory: as the flow, and two that sums over an expert's slots go through."""
LINES = 6
"""int64 [D] arrays: what every device has to see of every other."""
MUCH = tl.constexpr(3)
"""Quarters of the largest room, and of the largest piece taken, that others must have."""
MOST = tl.constexpr(1 << 40)


@triton.jit
def met(gives, gift, room, expert_ptr, line_ptr, D: tl.constexpr, S: tl.constexpr, D_PAD: tl.constexpr,
        COLUMNS: tl.constexpr):  # fmt: skip
    """Step 2: the expert each receiver takes, its giver (-1: none) and how much, int32 [D_PAD] each.

    Givers pass by a few columns at a time: a matrix of all pairs would not fit into registers.
    """
    each = tl.arange(0, D_PAD)
    key, room_key = gives * KEYS + turned(each), room.to(tl.int64) * KEYS + turned(each)
    tl.debug_barrier()
    tl.store(line_ptr + each, gives)
    tl.store(line_ptr + D_PAD + each, gift.to(tl.int64))
    tl.store(line_ptr + 2 * D_PAD + each, room.to(tl.int64))
    tl.debug_barrier()
    start, place = tl.zeros((D_PAD,), tl.int64), tl.zeros((D_PAD,), tl.int64)
    for column in range(0, D_PAD, COLUMNS):
        other = column + tl.arange(0, COLUMNS)
        their_gives, their_room = tl.load(line_ptr + other), tl.load(line_ptr + 2 * D_PAD + other)
        more = (their_gives * KEYS + turned(other))[None, :] > key[:, None]
        start += tl.sum(tl.where(more, their_gives[None, :], 0), axis=1)
        roomier = (their_room * KEYS + turned(other))[None, :] > room_key[:, None]
        place += tl.sum(tl.where(roomier, their_room[None, :], 0), axis=1)
    tl.store(line_ptr + 3 * D_PAD + each, start)
    tl.debug_barrier()
    worth, giver = tl.full((D_PAD,), -1, tl.int64), tl.full((D_PAD,), -1, tl.int32)
    wants, left = tl.full((D_PAD,), -1, tl.int32), tl.zeros((D_PAD,), tl.int64)
    for column in range(0, D_PAD, COLUMNS):
        other = column + tl.arange(0, COLUMNS)
        their_gives, their_gift = tl.load(line_ptr + other)[None, :], tl.load(line_ptr + D_PAD + other)[None, :]
        their_start = tl.load(line_ptr + 3 * D_PAD + other)[None, :]
        lacks = (their_gives > 0) & (room > 0)[:, None]
        for s in range(S):
            lacks = lacks & (tl.load(expert_ptr + each * S + s, mask=each < D, other=-1)[:, None] != their_gift)
        meets = lacks & (their_start <= place[:, None]) & (place[:, None] < their_start + their_gives)
        value = tl.where(meets, MOST, their_gives * KEYS + turned(other)[None, :])
        value = tl.where(lacks, value, -1)
        best = tl.max(value, axis=1)
        chosen = lacks & (value == best[:, None])
        better = best > worth
        giver = tl.where(better, tl.max(tl.where(chosen, other[None, :], -1), axis=1), giver)
        wants = tl.where(better, tl.max(tl.where(chosen, their_gift, -1), axis=1).to(tl.int32), wants)
        left = tl.where(better, tl.max(tl.where(chosen, their_gives, 0), axis=1), left)
        worth = tl.maximum(worth, best)
    tl.store(line_ptr + 4 * D_PAD + each, giver.to(tl.int64))
    tl.debug_barrier()
    for column in range(0, D_PAD, COLUMNS):
        other = column + tl.arange(0, COLUMNS)
        their_room, their_giver = tl.load(line_ptr + 2 * D_PAD + other), tl.load(line_ptr + 4 * D_PAD + other)
        roomier = (their_room * KEYS + turned(other))[None, :] > room_key[:, None]
        same = their_giver[None, :] == giver[:, None]
        left -= tl.sum(tl.where(roomier & same, their_room[None, :], 0), axis=1)
    amount = tl.where(giver >= 0, tl.minimum(tl.maximum(left, 0), room), 0).to(tl.int32)
    return wants, giver, amount


@triton.jit
def prepare_kernel(
    work_ptr, given_ptr, turn_ptr, node_of_ptr, size_ptr, price_ptr, room_ptr, expert_ptr, quota_ptr, status_ptr,
    leave_ptr, seconds_ptr, most_turns, most_rounds, D: tl.constexpr, S: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    D_PAD: tl.constexpr, S_PAD: tl.constexpr, E_PAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """See the module docstring; arrays as in :meth:`poise.runtime.device.planner.DeviceKernels.prepare`."""
    sums_ptr, other_ptr = room_ptr + FLOW_ROOM * E, room_ptr + (FLOW_ROOM + 1) * E
    line_ptr = room_ptr + (FLOW_ROOM + 2) * E
    shape: tl.constexpr = (D_PAD, S_PAD)
    each = tl.arange(0, D_PAD)
    device, slot, index, inside = placed(D_PAD, S_PAD, D, S)
    holds = tl.load(given_ptr + index, mask=inside, other=-1)
    turn = tl.load(turn_ptr + index, mask=inside, other=-2)
    tl.store(expert_ptr + index, holds, mask=inside)
    held = holds >= 0
    expert = tl.where(held, holds, 0)

    work = tl.load(work_ptr + expert, mask=held, other=0).to(tl.int64)
    one = tl.full(shape, 1, tl.int64)
    holders = tl.where(held, sum_of(sums_ptr, one, expert, held, E, E_PAD), 1)
    first = least_of(other_ptr, device, expert, held, D, E, E_PAD)
    quota = work // holders + tl.where(first == device, work % holders, 0)
    quota = tl.where(held, quota, 0).to(tl.int32)
    mean = (tl.sum(tl.sum(quota, axis=1), axis=0) + D - 1) // D
    quota, bound, rounds = flow(quota, expert, held, mean, 0, most_rounds, room_ptr, E, E_PAD)
    load = tl.sum(quota, axis=1)
    turns = tl.zeros((), tl.int32)
    go_on = (tl.max(load, axis=0).to(tl.int64) * 1000 > mean.to(tl.int64) * 1002) & (turns < most_turns)
    while go_on:
        excess, room = tl.maximum(load - mean, 0), tl.maximum(mean - load, 0)
        free, kept = (turn == -1) & (holds < 0), (turn == -1) & held
        first_free = tl.min(tl.where(free, slot, KEYS), axis=1)
        least = tl.min(tl.where(kept, quota.to(tl.int64) * KEYS + slot, MOST), axis=1)
        room = tl.where((first_free < KEYS) | (least < MOST), room, 0)
        room = tl.where(room.to(tl.int64) * 4 >= tl.max(room, axis=0).to(tl.int64) * MUCH, room, 0)
        best = tl.max(tl.where(held, quota.to(tl.int64) * KEYS + turned(slot), -1), axis=1)
        gives = tl.maximum(tl.minimum(excess.to(tl.int64), best // KEYS), 0)
        give_slot = turned(best % KEYS).to(tl.int32)
        gift = tl.sum(tl.where(slot == give_slot[:, None], holds, 0), axis=1)
        gift = tl.where(gives > 0, gift, -1)

        wants, giver, amount = met(gives, gift, room, expert_ptr, line_ptr, D, S, D_PAD, COLUMNS)
        amount = tl.where(amount.to(tl.int64) * 4 >= tl.max(amount, axis=0).to(tl.int64) * MUCH, amount, 0)
        evicts = (first_free == KEYS) & (2 * (least // KEYS) < amount)
        to = tl.where(first_free < KEYS, first_free, tl.where(evicts, (least % KEYS).to(tl.int32), KEYS))
        amount = tl.where(to < KEYS, amount, 0)

        lands = (slot == to[:, None]) & (amount > 0)[:, None]
        home = least_of(other_ptr, index, expert, held & (turn >= 0), FAR, E, E_PAD)
        returns = sum_of(sums_ptr, quota, expert, lands & held, E, E_PAD)
        tl.store(line_ptr + 5 * D_PAD + each, tl.zeros((D_PAD,), tl.int64))
        tl.debug_barrier()
        tl.atomic_add(line_ptr + 5 * D_PAD + giver, amount.to(tl.int64), mask=amount > 0)
        tl.debug_barrier()
        taken = tl.load(line_ptr + 5 * D_PAD + each)
        moved = quota + tl.where(held & (index == home), returns, 0)
        moved = moved - tl.where(slot == give_slot[:, None], taken[:, None], 0)
        quota = tl.where(lands, amount[:, None], moved).to(tl.int32)
        holds = tl.where(lands, wants[:, None], holds)
        held = holds >= 0
        expert = tl.where(held, holds, 0)
        tl.store(expert_ptr + index, holds, mask=inside)
        go_on = tl.max(amount, axis=0) > 0
        if go_on:
            turns += 1
            quota, bound, more_rounds = flow(quota, expert, held, mean, 0, most_rounds, room_ptr, E, E_PAD)
            rounds += more_rounds
            load = tl.sum(quota, axis=1)
            go_on = (tl.max(load, axis=0).to(tl.int64) * 1000 > mean.to(tl.int64) * 1002) & (turns < most_turns)
    tl.store(quota_ptr + index, quota, mask=inside)
    tl.store(status_ptr, tl.max(tl.sum(quota, axis=1), axis=0))
    tl.store(status_ptr + 1, bound)
    tl.store(status_ptr + 2, rounds)
    tl.store(status_ptr + 3, turns)
    decided(quota, expert, held, turn, work_ptr, node_of_ptr, size_ptr, price_ptr, sums_ptr, leave_ptr, seconds_ptr,
            D, E, N, D_PAD, E_PAD)  # fmt: skip
