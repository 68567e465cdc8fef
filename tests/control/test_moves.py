"""Move lists: a simulator that shares nothing with them runs every one; bounded plans against all valid ones."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import few_or, load_batch, random_slots, tiny_batch, tiny_cluster, tiny_model

from poise.control.moves import FROM_CHECKPOINT, Move, MoveList, Round, move_list
from poise.control.payback import bounded, same_slots
from poise.cost.step import batch_cost
from poise.machine.cluster import Cluster
from poise.planning.engine_rules import ANY, NONE, hold
from poise.planning.placement import EMPTY, Placement
from poise.planning.problem import PlacementProblem
from poise.util.errors import OptionError, PlacementError


def random_placement(rng, layers, experts, slots_D, *, fill=1.0, twice=False) -> Placement:
    """A valid placement: every expert once, then copies into a share of the free slots, some twice on a device."""
    count = np.zeros((layers, experts, len(slots_D)), np.int64)
    for layer in range(layers):
        slot_device = rng.permutation(np.repeat(np.arange(len(slots_D)), slots_D))
        np.add.at(count[layer], (rng.permutation(experts), slot_device[:experts]), 1)
        for d in slot_device[experts:]:
            e = rng.integers(experts)
            if rng.random() < fill and (twice or not count[layer, e, d]):
                count[layer, e, d] += 1
    return Placement.from_counts(count, slots_D=slots_D)


def random_pair(seed):
    rng = np.random.default_rng(seed)
    devices, experts = int(rng.integers(2, 7)), int(rng.integers(2, 12))
    most = experts * devices - experts
    slots = random_slots(rng, experts, devices, int(rng.integers(0, min(8, most) + 1)))
    layers, twice = int(rng.integers(1, 4)), rng.random() < 0.3
    fills = rng.choice([0.0, 0.5, 1.0], 2)
    pair = [random_placement(rng, layers, experts, slots, fill=fill, twice=twice) for fill in fills]
    return rng, pair[0], pair[1]


def simulate(before: Placement, moves: MoveList, staging: int) -> list[np.ndarray]:
    """Slots [L, S] after every round, with every invariant asserted on the way."""
    return simulate_slots(before.slot_expert_LS.copy(), before.slot_device_S, moves, staging)


def simulate_slots(slots, device, moves: MoveList, staging: int) -> list[np.ndarray]:
    states = []
    for each in moves.rounds:
        assert each.moves or each.drops
        buffers = np.zeros(moves.result.num_devices, int)
        touched = set()
        after = slots.copy()
        for move in each.moves:
            assert device[move.slot] == move.to_device and (move.layer, move.slot) not in touched
            touched.add((move.layer, move.slot))
            # The sender holds the expert for as long as the round lasts: old slots serve until the flip.
            holders = np.unique(device[slots[move.layer] == move.expert]).tolist()
            assert move.from_device in (holders or [FROM_CHECKPOINT])
            assert move.staged == (slots[move.layer, move.slot] != EMPTY)
            buffers[move.to_device] += move.staged
            after[move.layer, move.slot] = move.expert
        for layer, slot in each.drops:
            assert (layer, slot) not in touched and slots[layer, slot] != EMPTY
            touched.add((layer, slot))
            after[layer, slot] = EMPTY
        assert buffers.max() <= staging
        for old, new in zip(slots, after, strict=True):
            assert set(old.tolist()) - {EMPTY} <= set(new.tolist())
        slots = after
        states.append(slots.copy())
    return states


@pytest.mark.parametrize("part", range(4))
def test_every_state_on_the_way_serves_and_nothing_is_fetched_twice(part):
    for seed in range(part * 800, part * 800 + few_or(800, 80)):
        rng, before, after = random_pair(seed)
        staging = int(rng.integers(1, 4))
        node = np.sort(rng.integers(0, 3, before.num_devices))
        moves = move_list(before, after, expert_bytes=7.0, staging=staging, node_D=node)
        states = simulate(before, moves, staging)
        reached = Placement(states[-1] if states else before.slot_expert_LS, before.slot_device_S, before.num_experts,
                            before.num_devices)  # fmt: skip
        np.testing.assert_array_equal(reached.count_LED(), after.count_LED())
        np.testing.assert_array_equal(reached.slot_expert_LS, moves.result.slot_expert_LS)
        assert moves.fetched == before.diff(after).fetched and moves.moved_bytes == 7.0 * moves.fetched
        if (before.count_LED() == after.count_LED()).all():
            assert not moves.rounds


def random_change(seed):
    """Placements of other devices and slots; which devices are lost; slots before, on the devices and slots of both."""
    rng = np.random.default_rng(seed)
    experts, layers = int(rng.integers(2, 10)), int(rng.integers(1, 4))
    pair = []
    for devices in rng.integers(1, 7, 2).tolist():
        slots = random_slots(rng, experts, devices, int(rng.integers(0, min(8, experts * (devices - 1)) + 1)))
        pair.append(random_placement(rng, layers, experts, slots, fill=rng.choice([0.0, 0.5, 1.0])))
    before, after = pair
    lost = list(range(after.num_devices, before.num_devices)) if rng.random() < 0.5 else []
    devices = max(before.num_devices, after.num_devices)
    rooms = [[int((p.slot_device_S == d).sum()) for p in pair] for d in range(devices)]
    start = [[] for _ in range(layers)]
    for d, room in enumerate(rooms):
        for layer, row in enumerate(start):
            held = before.slot_expert_LS[layer, before.slot_device_S == d].tolist() if d not in lost else []
            row += held + [EMPTY] * (max(room) - len(held))
    return rng, before, after, lost, np.array(start), np.repeat(np.arange(devices), [max(room) for room in rooms])


@pytest.mark.parametrize("part", range(2))
def test_devices_join_leave_or_are_lost(part):
    kinds = set()
    for seed in range(part * 200, part * 200 + few_or(200, 80)):
        rng, before, after, lost, start, device = random_change(seed)
        staging, node = int(rng.integers(1, 4)), np.sort(rng.integers(0, 3, max(before.num_devices, after.num_devices)))
        moves = move_list(before, after, expert_bytes=7.0, staging=staging, node_D=node, lost=lost)
        np.testing.assert_array_equal(moves.result.slot_device_S, device)
        states = [start, *simulate_slots(start.copy(), device, moves, staging)]
        np.testing.assert_array_equal(states[-1], moves.result.slot_expert_LS)
        for layer in range(before.num_layers):
            for d in range(moves.result.num_devices):
                held = sorted(set(states[-1][layer, device == d].tolist()) - {EMPTY})
                assert held == (sorted(after.experts_of(layer, d)) if d < after.num_devices else [])
        diff = before.diff(after)
        assert moves.fetched + moves.read == diff.fetched
        unheld = {
            (x, int(e)) for x, row in enumerate(start) for e in set(range(before.num_experts)) - set(row.tolist())
        }
        assert unheld == ({tuple(row) for row in diff.leaving_O2.tolist()} if lost else set())
        assert {(m.layer, m.expert) for r in moves.rounds for m in r.moves if m.from_device < 0} == unheld
        stays = np.bincount(after.slot_device_S, minlength=moves.result.num_devices) > 0
        for state, each in zip(states, moves.rounds, strict=False):
            for move in (m for m in each.moves if m.from_device not in (m.to_device, FROM_CHECKPOINT)):
                last = [(node[s] != node[move.to_device], not stays[s])
                        for s in (move.from_device, *device[state[move.layer] == move.expert].tolist())]  # fmt: skip
                assert last[0] == min(last)
        # who leaves keeps all it holds until the last flip
        for d in range(after.num_devices, before.num_devices):
            assert all((state[:, device == d] == start[:, device == d]).all() for state in states[:-1])
        kinds.add((np.sign(after.num_devices - before.num_devices), bool(moves.read), bool(lost)))
    assert len(kinds) >= 5


def test_what_nobody_holds_is_read_before_all_else_and_counts_apart():
    slots, device = np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), np.array([0, 1, 2, 3])
    before, after = (
        Placement(slots, device, 4, 4),
        Placement(np.array([[1, 3, 0, 2, 3, EMPTY]] * 2), np.repeat([0, 1, 2], 2), 4, 3),
    )
    moves = move_list(before, after, expert_bytes=7.0, lost=[3])
    assert {(m.layer, m.expert) for m in moves.rounds[0].moves if m.from_device == FROM_CHECKPOINT} == {(0, 3), (1, 3)}
    assert moves.moved_bytes == 7.0 * moves.fetched and moves.fetched == before.diff(after).fetched - moves.read
    # layer 0 has four moves through the one buffer of devices 0 and 1; expert 3 of layer 1 still is first
    device = np.repeat([0, 1, 2], 2)
    before = Placement(np.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 1, 3, EMPTY]]), device, 4, 3)
    after = Placement(np.array([[2, 3, 0, 1], [0, 1, 2, 3]]), device[:4], 4, 2)
    first, *others = move_list(before, after, expert_bytes=7.0, lost=[2]).rounds
    assert (1, 3, FROM_CHECKPOINT) in {(m.layer, m.expert, m.from_device) for m in first.moves} and others
    cluster = Cluster.uniform(1, 3)
    only = MoveList((Round((Move(0, 3, 1, FROM_CHECKPOINT, 0, False),), ()),), moves.result, 7.0, 1)
    assert only.seconds(cluster) == 0.0 and (only.fetched, only.read) == (0, 1)


def fewest_rounds(before, after, staging):
    """No schedule can do with less: a device takes in ``staging`` experts a round beside those that fit empty slots."""
    fetched = ((after.count_LED() > 0) & (before.count_LED() == 0)).sum(axis=(0, 1))
    slots = np.bincount(before.slot_device_S, minlength=before.num_devices) * before.num_layers
    free = slots - before.count_LED().sum(axis=(0, 1))
    return int(np.ceil(np.maximum(fetched - free, 0) / staging).max())


@pytest.mark.parametrize("staging", [1, 2, 4])
def test_rounds_are_few(staging):
    rng = np.random.default_rng(staging)
    ratios = []
    for _ in range(40):
        slots = np.full(8, 5)
        before, after = (random_placement(rng, 4, 32, slots, fill=1.0) for _ in range(2))
        moves = move_list(before, after, expert_bytes=1.0, staging=staging)
        ratios.append(len(moves.rounds) / fewest_rounds(before, after, staging))
    assert np.mean(ratios) < 1.3 and max(ratios) < 2.0


def test_a_swap_of_two_full_devices_is_one_round_and_a_cycle_too():
    for size in (2, 3, 5):
        before = Placement(np.arange(size)[None], np.arange(size), size, size)
        after = Placement(np.roll(np.arange(size), 1)[None], np.arange(size), size, size)
        moves = move_list(before, after, expert_bytes=1.0)
        assert len(moves.rounds) == 1 and moves.fetched == size
        assert all(move.staged for move in moves.rounds[0].moves)


def test_empty_slots_need_no_staging():
    before = Placement(np.array([[0, 1, 2, EMPTY, EMPTY, EMPTY]]), np.repeat([0, 1], 3), 3, 2)
    after = Placement(np.array([[0, 1, 2, 0, 1, 2]]), np.repeat([0, 1], 3), 3, 2)
    moves = move_list(before, after, expert_bytes=1.0)
    assert len(moves.rounds) == 1 and moves.fetched == 3 and not any(move.staged for move in moves.rounds[0].moves)


def test_senders_are_near_and_take_turns():
    # expert 0 is held by devices 0 (node 0), 2 and 3 (node 1); devices 1 (node 0), 4 and 5 (node 1) fetch it
    before = Placement(np.array([[0, EMPTY, 0, 0, EMPTY, EMPTY, 1]]), np.array([0, 1, 2, 3, 4, 5, 5]), 2, 6)
    after = Placement(np.array([[0, 0, 0, 0, 0, 0, 1]]), np.array([0, 1, 2, 3, 4, 5, 5]), 2, 6)
    near = move_list(before, after, expert_bytes=1.0, node_D=np.array([0, 0, 1, 1, 1, 1]))
    assert {move.to_device: move.from_device for move in near.rounds[0].moves} == {1: 0, 4: 2, 5: 3}
    rng = np.random.default_rng(3)
    for _ in range(200):
        _, a, b = random_pair(int(rng.integers(1e9)))
        node = np.sort(rng.integers(0, 2, a.num_devices))
        for each, held in zip(*rounds_and_holders(a, b, node), strict=True):
            for move in each.moves:
                if node[move.from_device] != node[move.to_device]:
                    assert not held[move.layer, move.expert, node == node[move.to_device]].any()


def rounds_and_holders(before, after, node):
    moves = move_list(before, after, expert_bytes=1.0, node_D=node)
    states = [before.slot_expert_LS, *simulate(before, moves, 1)]
    held = [
        Placement(s, before.slot_device_S, before.num_experts, before.num_devices).count_LED() > 0 for s in states[:-1]
    ]
    return list(moves.rounds), held


def test_seconds_are_those_of_the_fullest_port():
    cluster = Cluster(np.array([0, 0, 1, 1]), np.ones(4), 1.0, 1.0, 1.0, 10.0, 5.0, nic_shared=True,
                      intra_latency_s=0.5, inter_latency_s=0.25)  # fmt: skip
    placement = Placement(np.array([[0, 1, 2, 3]]), np.arange(4), 4, 4)

    def one(*pairs):
        return Round(tuple(Move(0, 0, b, a, b, True) for a, b in pairs), ())

    def seconds(*rounds):
        return MoveList(rounds, placement, 20.0, 1).seconds(cluster)

    assert seconds() == 0.0 and seconds(one((1, 1))) == 0.0
    assert seconds(one((0, 1))) == pytest.approx(20 / 10 + 0.75)
    assert seconds(one((0, 2))) == pytest.approx(20 / 5 + 0.75)
    assert seconds(one((0, 2), (1, 3))) == pytest.approx(2 * 20 / 5 + 0.75)  # one port a node
    assert seconds(one((0, 1), (0, 2))) == pytest.approx(20 / 5 + 0.75)
    assert seconds(one((0, 1)), one((0, 2))) == pytest.approx(20 / 10 + 20 / 5 + 1.5)


def test_what_does_not_fit_is_refused():
    a = Placement(np.array([[0, 1, 2, EMPTY]]), np.array([0, 0, 1, 1]), 3, 2)
    with pytest.raises(PlacementError, match="2 slots before and 1 after"):
        same_slots(a, Placement(np.array([[0, 1, 2, EMPTY]]), np.array([0, 1, 1, 1]), 3, 2))
    with pytest.raises(PlacementError, match="2 devices before and 3 after"):
        same_slots(a, a.on_devices(3))
    with pytest.raises(PlacementError, match="cannot be compared"):
        move_list(a, Placement(np.array([[0, 1, 1, EMPTY]]), np.array([0, 0, 1, 1]), 2, 2), expert_bytes=1.0)
    for wrong in ({"staging": 0}, {"expert_bytes": 0.0}, {"expert_bytes": np.nan}, {"node_D": np.zeros(3, int)}):
        with pytest.raises(OptionError):
            move_list(a, a, **{"expert_bytes": 1.0, **wrong})


def drawn_problem(seed, traffic, engine):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng)
    batch = load_batch(rng) if traffic == "home" and seed % 2 else tiny_batch(rng, devices=3)
    slots = random_slots(rng, 4, 3, int(rng.integers(0, 3)))
    problem = PlacementProblem(batch, cluster, tiny_model(batch), slots, traffic, "even", engine=engine)
    before, after = (random_placement(rng, 2, 4, slots, fill=f) for f in rng.choice([0.0, 0.7, 1.0], 2))
    return problem, hold(before, engine)[0], hold(after, engine)[0]


def step_seconds(problem, count_LED):
    cost = batch_cost(problem.batch, count_LED, problem.cluster, problem.model, traffic=problem.traffic, split="even")
    return float(problem.batch.weight_B @ cost.seconds_BL.sum(axis=1))


def between(before, after, slots, most, full):
    """Every valid placement that takes each (layer, expert, device) from one or the other, with its fetches."""
    a, b = before.count_LED() > 0, after.count_LED() > 0
    cells = np.argwhere(a != b)
    for choice in product([False, True], repeat=len(cells)):
        count = a.copy()
        count[tuple(cells[list(choice)].T)] ^= True
        fetched = int((count & ~a).sum())
        used = count.sum(axis=1)
        if fetched <= most and count.any(axis=2).all() and (used == slots if full else used <= slots).all():
            yield count.astype(np.int32), fetched


@pytest.mark.parametrize("engine", [NONE, ANY], ids=lambda rules: rules.name)
@pytest.mark.parametrize("traffic", ["home", "home_node_dedup", "stay"])
def test_bounded_against_every_plan_between(traffic, engine):
    """An engine that knows no empty slot gets none on the way either."""
    shares, full = [], engine is ANY
    for seed in range(few_or(40, 15)):
        problem, before, after = drawn_problem(seed, traffic, engine)
        if not 0 < int((before.count_LED() != after.count_LED()).sum()) <= 9:
            continue
        for most in (0, 1, 2, 4):
            got = bounded(before, after, problem, most)
            problem.check(got)
            assert before.diff(got).fetched <= most
            assert not full or (got.slot_expert_LS != EMPTY).all()
            a, b, c = (p.count_LED() for p in (before, after, got))
            assert ((c == a) | (c == b)).all()
            now, then = step_seconds(problem, a), step_seconds(problem, c)
            every = between(before, after, problem.slots_D, most, full)
            best = min(step_seconds(problem, count) for count, _ in every)
            assert best - 1e-9 <= then <= now + 1e-9
            if best < now * (1 - 1e-6):
                shares.append((now - then) / (now - best))
    assert len(shares) > few_or(20, 5) and np.mean(shares) > 0.8, shares


@given(st.integers(0, 10_000), st.sampled_from(["home", "stay"]), st.integers(1, 3), st.sampled_from([NONE, ANY]))
@settings(max_examples=few_or(40, 15), deadline=None)
def test_bounded_again_and_again_arrives_or_stays_better(seed, traffic, most, engine):
    problem, before, after = drawn_problem(seed, traffic, engine)
    here, seconds, fetched = before, step_seconds(problem, before.count_LED()), 0
    for _ in range(30):
        there = bounded(here, after, problem, most)
        if (there.count_LED() == here.count_LED()).all():
            break
        now = step_seconds(problem, there.count_LED())
        assert now < seconds + 1e-9
        fetched += here.diff(there).fetched
        simulate(here, move_list(here, there, expert_bytes=1.0), 1)
        here, seconds = there, now
    else:
        pytest.fail("never at rest")
    assert fetched <= before.diff(after).fetched
    whole = bounded(before, after, problem, before.diff(after).fetched)
    ends = [step_seconds(problem, p.count_LED()) for p in (before, after, whole)]
    assert ends[2] <= min(ends[:2]) + 1e-9
