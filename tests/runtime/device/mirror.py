"""What each Triton kernel computes, in numpy: the same integers, step by step (src/poise/runtime/device/)."""

from typing import NamedTuple

import numpy as np
import torch

from poise.stepwise.kernels import PRICES, prices

FAR = 1 << 20
KEYS = 4096
MUCH = 3


class Slots(NamedTuple):
    """Entries of a slot table int [D, S]: is it held, its expert (0 where not), its device."""

    held: np.ndarray
    expert: np.ndarray
    device: np.ndarray


class Split(NamedTuple):
    quota_DS: np.ndarray
    bound: int
    rounds: int


def slots_of(expert_DS) -> Slots:
    held = expert_DS >= 0
    device = np.broadcast_to(np.arange(len(expert_DS))[:, None], expert_DS.shape)
    return Slots(held, np.where(held, expert_DS, 0), device)


def scattered(how, size, slots, mask, value, empty):
    """One number an expert from entries under a mask: the sum, least or largest."""
    out = np.full(size, empty, np.int64)
    how.at(out, slots.expert[mask], np.broadcast_to(value, mask.shape)[mask])
    return out


def capped(bound, slack):
    return bound + bound * slack // 1000


def flow(quota, slots, bound, slack, most_rounds, experts) -> Split:
    held, expert, device = slots
    rounds = 0
    load, cap = quota.sum(axis=1), capped(bound, slack)
    while (load > cap).any() and rounds < most_rounds:
        rounds += 1
        over = load > cap
        distance, distance_E, level, lost, more = np.where(load < cap, 0, FAR), np.full(experts, FAR), 0, 1, True
        while more:
            at = held & (distance[:, None] == level)
            distance_E = np.minimum(distance_E, scattered(np.minimum, experts, slots, at, level, FAR))
            new = (distance == FAR) & (np.where(held & (quota > 0), distance_E[expert], FAR).min(axis=1) == level)
            level += 1
            distance = np.where(new, level, distance)
            lost = (over & (distance == FAR)).sum()
            more = lost > 0 and new.any()
        if lost:
            stuck = distance == FAR
            bound = int(-(-load[stuck].sum() // stuck.sum()))
            cap = capped(bound, slack)
            continue
        room, excess = np.maximum(cap - load, 0)[:, None], np.maximum(load - cap, 0)[:, None]
        leaves = held & (quota > 0) & over[:, None] & (distance_E[expert] == distance[:, None] - 1)
        takes = held & (distance_E[expert] == distance[:, None])
        last = KEYS - 1 - device
        source = scattered(np.maximum, experts, slots, leaves, np.minimum(excess, quota) * KEYS + last, -1)[expert]
        target = scattered(np.maximum, experts, slots, takes, room * KEYS + last, -1)[expert]
        leaves = leaves & (source % KEYS == last)
        takes = takes & (target >= 0) & (target % KEYS == last)
        fits = target // KEYS
        most = np.where(leaves, np.where(fits > 0, np.minimum(quota, fits), quota), 0)
        offer = np.clip(excess - (np.cumsum(most, axis=1) - most), 0, most)
        comes = np.where(takes, scattered(np.add, experts, slots, leaves, offer, 0)[expert], 0)
        kept = np.clip(room - (np.cumsum(comes, axis=1) - comes), 0, comes)
        comes = np.where(room > 0, kept, comes)
        quota = quota + comes - np.where(leaves, scattered(np.add, experts, slots, takes, comes, 0)[expert], 0)
        load = quota.sum(axis=1)
    return Split(quota, bound, rounds)


def started(load_SE, slots, node_D):
    held, expert, device = slots
    nodes, experts = int(node_D.max()) + 1, load_SE.shape[1]
    node = node_D[device]
    of_NE = np.zeros((3, nodes, experts), np.int64)
    np.add.at(of_NE[0], node_D, load_SE)
    own = np.where(held, load_SE[device, expert], 0)
    np.add.at(of_NE[1], (node[held], expert[held]), own[held])
    np.add.at(of_NE[2], (node[held], expert[held]), 1)
    others = of_NE[0, node, expert] - of_NE[1, node, expert]
    near = np.where(held, own + others // np.maximum(of_NE[2, node, expert], 1), 0)
    left = load_SE.sum(axis=0) - scattered(np.add, experts, slots, held, near, 0)
    return np.where(held, near + shared(left, slots, held), 0)


def shared(tokens_E, slots, among):
    """Equal parts to an expert's entries among some; what does not divide to the first device."""
    experts = len(tokens_E)
    holders = np.maximum(scattered(np.add, experts, slots, among, 1, 0), 1)
    first = scattered(np.minimum, experts, slots, among, slots.device, len(slots.held))
    part, rest = (each[slots.expert] for each in np.divmod(tokens_E, holders))
    return np.where(among, part + np.where(first[slots.expert] == slots.device, rest, 0), 0)


def split(load_SE, expert_DS, turn_DS, node_D, *, leave=False, slack=0, most_rounds=4096) -> Split:
    load_SE, slots = load_SE.astype(np.int64), slots_of(expert_DS)
    if leave:
        return Split(even(load_SE.sum(axis=0), slots, turn_DS), 0, 0)
    quota = started(load_SE, slots, node_D)
    bound = -(-int(quota.sum()) // len(quota))
    return flow(quota, slots, bound, slack, most_rounds, load_SE.shape[1])


def even(load_E, slots, turn_DS):
    static = slots.held & (turn_DS >= 0)
    holders = np.maximum(scattered(np.add, len(load_E), slots, static, 1, 0), 1)
    part, rest = (each[slots.expert] for each in np.divmod(load_E, holders))
    return np.where(static, part + (turn_DS < rest), 0)


def dense(quota_DS, expert_DS, experts):
    out_ED = np.zeros((experts, len(expert_DS)), np.int64)
    held, expert, device = slots_of(expert_DS)
    out_ED[expert[held], device[held]] = quota_DS[held]
    return out_ED


def rows(load_SE, quota_ED, node_D, source):
    """One source's tokens, int64 [E, D]; sources and places lie on one line a node, then on one line in all."""
    have, free = load_SE.T.astype(np.int64), quota_ED.astype(np.int64)
    mine = np.arange(have.shape[1]) == source
    stay = np.minimum(have, free)
    row, have, free = np.where(mine, stay, 0), have - stay, free - stay
    have_left, free_left = np.zeros_like(have), np.zeros_like(free)
    for node in np.unique(node_D):
        at = node_D == node
        before = [np.cumsum(each[:, at], axis=1) - each[:, at] for each in (have, free)]
        if node == node_D[source]:
            start = before[0][:, mine[at]]
            row[:, at] += covered(before[1], free[:, at], start, start + have[:, mine])
        wholes = [each[:, at].sum(axis=1, keepdims=True) for each in (have, free)]
        have_left[:, at] = have[:, at] - covered(before[0], have[:, at], 0, wholes[1])
        free_left[:, at] = free[:, at] - covered(before[1], free[:, at], 0, wholes[0])
    have_before, free_before = (np.cumsum(each, axis=1) - each for each in (have_left, free_left))
    start = have_before[:, mine]
    return row + covered(free_before, free_left, start, start + have_left[:, mine])


def covered(start, amount, low, high):
    return np.maximum(np.minimum(start + amount, high) - np.maximum(start, low), 0)


class Filled(NamedTuple):
    expert_DS: np.ndarray
    quota_DS: np.ndarray
    bound: int
    turns: int


def fill(work_E, expert_DS, turn_DS, *, most_turns, most_rounds=4096) -> Filled:
    """Replicas into step slots: those whose turn is below -1 are not there, -1 are step slots, others static."""
    expert_DS, experts, devices = expert_DS.copy(), len(work_E), len(expert_DS)
    work_E, slots = work_E.astype(np.int64), slots_of(expert_DS)
    quota = shared(work_E, slots, slots.held)
    mean = -(-int(quota.sum()) // devices)
    split = flow(quota, slots, mean, 0, most_rounds, experts)
    turns = 0
    while turns < most_turns:
        quota, load = split.quota_DS, split.quota_DS.sum(axis=1)
        if load.max() * 1000 <= mean * 1002:
            break
        quota, expert_DS, added = filled_once(quota, load, expert_DS, turn_DS, mean, experts)
        if not added:
            break
        turns += 1
        split = flow(quota, slots_of(expert_DS), mean, 0, most_rounds, experts)
    return Filled(expert_DS, split.quota_DS, split.bound, turns)


def filled_once(quota, load, expert_DS, turn_DS, mean, experts):
    held, expert, device = slots = slots_of(expert_DS)
    devices, width = expert_DS.shape
    each, slot = np.arange(devices), np.arange(width)
    excess = np.maximum(load - mean, 0)
    free, kept = (turn_DS == -1) & ~held, (turn_DS == -1) & held
    room = np.where((free | kept).any(axis=1), np.maximum(mean - load, 0), 0)
    room = np.where(room * 4 >= room.max() * MUCH, room, 0)
    best = np.max(np.where(held, quota * KEYS + KEYS - 1 - slot, -1), axis=1)
    gives, give_slot = np.minimum(excess, best // KEYS), KEYS - 1 - best % KEYS
    gift = np.where(gives > 0, expert_DS[each, np.minimum(give_slot, width - 1)], -1)
    key, room_key = gives * KEYS + KEYS - 1 - each, room * KEYS + KEYS - 1 - each
    start = np.where(key > key[:, None], gives, 0).sum(axis=1)
    place = np.where(room_key > room_key[:, None], room, 0).sum(axis=1)
    lacks = (gives > 0) & (room > 0)[:, None] & ~(held[:, :, None] & (expert_DS[:, :, None] == gift)).any(axis=1)
    meets = lacks & (start <= place[:, None]) & (place[:, None] < start + gives)
    choice = np.max(np.where(lacks, np.where(meets, FAR * FAR, key), -1), axis=1)
    chosen = lacks & (np.where(meets, FAR * FAR, key) == choice[:, None])
    giver = np.max(np.where(chosen, each, -1), axis=1)
    wants = np.max(np.where(chosen, gift, -1), axis=1)
    earlier = (room_key > room_key[:, None]) & (giver == giver[:, None])
    left = (chosen * gives).sum(axis=1) - np.where(earlier, room, 0).sum(axis=1)
    amount = np.where(wants >= 0, np.clip(left, 0, room), 0)
    amount = np.where(amount * 4 >= amount.max() * MUCH, amount, 0)
    first_free = np.min(np.where(free, slot, KEYS), axis=1)
    least = np.min(np.where(kept, quota * KEYS + slot, FAR * FAR), axis=1)
    evicts = (first_free == KEYS) & (2 * (least // KEYS) < amount)
    to = np.where(first_free < KEYS, first_free, np.where(evicts, least % KEYS, KEYS))
    amount = np.where(to < KEYS, amount, 0)
    lands = (slot == to[:, None]) & (amount > 0)[:, None]
    index = device * width + slot
    home = scattered(np.minimum, experts, slots, held & (turn_DS >= 0), index, FAR)
    back = scattered(np.add, experts, slots, lands & held, quota, 0)
    taken = (chosen * amount[:, None]).sum(axis=0)
    quota = quota + np.where(held & (index == home[expert]), back[expert], 0)
    quota = quota - np.where(slot == give_slot[:, None], taken[:, None], 0)
    return np.where(lands, amount[:, None], quota), np.where(lands, wants[:, None], expert_DS), bool((amount > 0).any())


class Decision(NamedTuple):
    leave: bool
    planned_ps: int
    passive_ps: int


def decide(load_E, expert_DS, turn_DS, quota_DS, node_D, price) -> Decision:
    """``price``: the numbers of poise.runtime.device.decide.PRICES."""
    load_E, quota_DS = load_E.astype(np.int64), quota_DS.astype(np.int64)
    slots = slots_of(expert_DS)
    planned = layer_ps(quota_DS, load_E, slots, node_D, price) + price["control"]
    passive = layer_ps(even(load_E, slots, turn_DS), load_E, slots, node_D, price)
    below = passive * (1000 - price["margin"]) - price["margin"] * price["wire_start"]
    return Decision(planned * 1000 > below, planned, passive)


def layer_ps(quota, load_E, slots, node_D, price) -> int:
    devices, nodes = len(quota), int(node_D.max()) + 1
    work = np.maximum(quota * price["compute"], np.minimum(quota, 1) * price["read"]) + quota * price["activation"]
    compute = int(work.sum(axis=1).max()) + price["start"]
    if devices == 1:
        return compute
    amount = quota * devices
    stay = np.minimum(amount, np.where(slots.held, load_E[slots.expert], 0)).sum(axis=1)
    leaves, comes = load_E.sum() - stay, amount.sum(axis=1) - stay
    inside = between = 0
    for n in range(nodes):
        at = node_D == n
        size = int(at.sum())
        place = scattered(np.add, len(load_E), slots, slots.held & at[:, None], amount, 0)
        kept = np.minimum(load_E * size, place)
        away = [int((load_E * size - kept).sum()), int((place - kept).sum())] if nodes > 1 else [0, 0]
        between = max(between, *(each // (1 if price["nic_shared"] else size) for each in away))
        for passes, gone in zip((leaves[at], comes[at]), away, strict=True):
            inside = max(inside, int(passes.max()) * (int(passes.sum()) - gone) // max(int(passes.sum()), 1))
    there = max(inside * price["out_intra"], between * price["out_inter"])
    return compute + (there + max(inside * price["back_intra"], between * price["back_inter"])) // devices


class MirrorKernels:
    """The layer's calls (poise.stepwise.kernels.StepKernels) on tensors of the host, by the mirrors."""

    def __init__(self, table, price, margin=0.03):
        self.table, self.price = table, dict(zip(PRICES, prices(price, margin).tolist(), strict=True))

    def prepare(self, load_E, expert_DS):
        turn_DS, node_D = self.table.turn_DS, self.table.node_D
        got = fill(load_E.numpy(), expert_DS.numpy(), turn_DS, most_turns=32)
        found = decide(load_E.numpy(), got.expert_DS, turn_DS, got.quota_DS, node_D, self.price)
        return whole(got.expert_DS), whole([found.leave])

    def split(self, load_SE, expert_DS, leave):
        table = self.table
        given = load_SE.numpy(), expert_DS.numpy(), table.turn_DS, table.node_D
        got = split(*given, leave=bool(leave.numpy()[0]))
        return whole(dense(got.quota_DS, given[1], table.num_experts))

    def rows(self, load_SE, quota_ED, source):
        return whole(rows(load_SE.numpy(), quota_ED.numpy(), self.table.node_D, source))


def whole(array):
    return torch.from_numpy(np.array(array, np.int32, order="C"))
