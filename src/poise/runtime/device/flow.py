"""Min-max flow of whole tokens in one program: what :func:`poise.cost.quota.balance` does, in steps that are vectors.

State: ``quota`` int32 [D, S], tokens in every slot. ``bound``, at first the mean: a lower bound of the fullest
device.

Step 1  Distances, from the devices with room under the cap backwards: an expert is as far as the nearest of its
        holders, a device one more than the nearest expert that it has tokens of.
Step 2  A device above the cap from which no room can be reached holds, with all others of its kind, tokens that must
        stay among them: their mean, rounded up, is a larger lower bound. Back to step 1.
Step 3  Else every device above the cap pushes along experts that are one nearer: each expert from one device to one
        (the fullest, the roomiest; of equals the first). What does not fit under the cap of one with room stays.

Step 3 is push-relabel with exact distances: none falls while the cap stays, and every round moves a token nearer, so it
ends. The end is a split whose fullest device attains a lower bound: the optimum. With ``slack`` (thousandths) the cap
lies that much above the bound, and so does, at most, the end: fewer rounds.

Every combination of threads' results is a sum, a minimum or a maximum of integers: the order in which they come does
not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 20)
"""Farther than any device."""
KEYS = tl.constexpr(4096)
"""Keys are value * KEYS + (KEYS - 1 - index): the largest value wins, of equals the first index."""
ARRAYS = 5
"""int64 [E] arrays of working memory that :func:`flow` takes: distance, source, target, offered, accepted."""


@triton.jit
def capped(bound, slack):
    """The cap above a bound, int32."""
    return (bound.to(tl.int64) + bound.to(tl.int64) * slack // 1000).to(tl.int32)


@triton.jit
def turned(index):
    """Part of a key: the first index is the largest."""
    return -index + (KEYS - 1)


@triton.jit
def flow(quota, expert, held, bound, slack, most_rounds, room_ptr, E: tl.constexpr, E_PAD: tl.constexpr):
    """Quotas at the optimum (slack: near it), the lower bound and the rounds.

    Parameters
    ----------
    quota, expert, held : int32, int32, bool [D_PAD, S_PAD]; nothing is held in what is padded.
    bound, slack, most_rounds : int32 scalars; a lower bound that no device need be above, thousandths, and rounds after
        which it gives up, with a split that is whole but not proven.
    room_ptr : int64 [ARRAYS * E].
    """
    distance_ptr, source_ptr, target_ptr = room_ptr, room_ptr + E, room_ptr + 2 * E
    offered_ptr, accepted_ptr = room_ptr + 3 * E, room_ptr + 4 * E
    each = tl.arange(0, E_PAD)
    here = each < E
    device = tl.arange(0, quota.shape[0])[:, None] + tl.zeros(quota.shape, tl.int32)
    load = tl.sum(quota, axis=1)
    cap = capped(bound, slack)
    rounds = tl.zeros((), tl.int32)
    while (tl.max(load, axis=0) > cap) & (rounds < most_rounds):
        rounds += 1
        tl.debug_barrier()
        tl.store(distance_ptr + each, tl.full((E_PAD,), FAR, tl.int64), mask=here)
        tl.store(source_ptr + each, tl.full((E_PAD,), -1, tl.int64), mask=here)
        tl.store(target_ptr + each, tl.full((E_PAD,), -1, tl.int64), mask=here)
        tl.store(offered_ptr + each, tl.zeros((E_PAD,), tl.int64), mask=here)
        tl.store(accepted_ptr + each, tl.zeros((E_PAD,), tl.int64), mask=here)
        tl.debug_barrier()
        over = load > cap
        distance = tl.where(load < cap, 0, FAR)
        level = tl.zeros((), tl.int32)
        lost = tl.sum(over.to(tl.int32), axis=0)
        more = lost > 0
        while more:
            at = tl.zeros(quota.shape, tl.int64) + level
            tl.atomic_min(distance_ptr + expert, at, mask=held & (distance[:, None] == level))
            tl.debug_barrier()
            nearest = tl.load(distance_ptr + expert, mask=held & (quota > 0), other=FAR).to(tl.int32)
            new = (distance == FAR) & (tl.min(nearest, axis=1) == level)
            level += 1
            distance = tl.where(new, level, distance)
            lost = tl.sum((over & (distance == FAR)).to(tl.int32), axis=0)
            more = (lost > 0) & (tl.sum(new.to(tl.int32), axis=0) > 0)
        if lost > 0:
            stuck = distance == FAR
            tokens, many = tl.sum(tl.where(stuck, load, 0), axis=0), tl.sum(stuck.to(tl.int32), axis=0)
            bound = (tokens + many - 1) // many
            cap = capped(bound, slack)
        else:
            room, excess = tl.maximum(cap - load, 0), tl.maximum(load - cap, 0)
            far_entry = tl.load(distance_ptr + expert, mask=held, other=FAR).to(tl.int32)
            leaves = held & (quota > 0) & over[:, None] & (far_entry == distance[:, None] - 1)
            takes = held & (far_entry == distance[:, None])
            could = tl.minimum(excess[:, None], quota).to(tl.int64)
            tl.atomic_max(source_ptr + expert, could * KEYS + turned(device), mask=leaves)
            wide = room[:, None].to(tl.int64) + tl.zeros(quota.shape, tl.int64)
            tl.atomic_max(target_ptr + expert, wide * KEYS + turned(device), mask=takes)
            tl.debug_barrier()
            source_key = tl.load(source_ptr + expert, mask=held, other=-1)
            target_key = tl.load(target_ptr + expert, mask=held, other=-1)
            leaves = leaves & (source_key % KEYS == turned(device))
            takes = takes & (target_key >= 0) & (target_key % KEYS == turned(device))
            fits = target_key // KEYS
            most = tl.where(leaves, quota, 0).to(tl.int64)
            most = tl.where(fits > 0, tl.minimum(most, fits), most).to(tl.int32)
            before = tl.cumsum(most, axis=1) - most
            offer = tl.minimum(tl.maximum(excess[:, None] - before, 0), most)
            tl.store(offered_ptr + expert, offer.to(tl.int64), mask=leaves)
            tl.debug_barrier()
            comes = tl.load(offered_ptr + expert, mask=takes, other=0).to(tl.int32)
            before = tl.cumsum(comes, axis=1) - comes
            kept = tl.minimum(tl.maximum(room[:, None] - before, 0), comes)
            comes = tl.where(room[:, None] > 0, kept, comes)
            tl.store(accepted_ptr + expert, comes.to(tl.int64), mask=takes)
            tl.debug_barrier()
            went = tl.load(accepted_ptr + expert, mask=leaves, other=0).to(tl.int32)
            quota = quota + comes - went
            load = tl.sum(quota, axis=1)
    return quota, bound, rounds
