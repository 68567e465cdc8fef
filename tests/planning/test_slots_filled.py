"""What works on lists of slots is what plain passes over experts and devices say."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import few_or, random_count

from poise.cost.bound_compute import _least_filled
from poise.planning.methods.swift_balance import _redundancy, keep_slots
from poise.planning.solve.complete import fill_layer

SEEDS = st.integers(0, 2**32 - 1)


def filled_plainly(held_ED, free_D, load_E, relief, place_D):
    """Steps as :func:`fill_layer` has them, every sum anew."""
    held, free = held_ED.copy(), free_D.copy()
    place_E = place_D[held.argmax(axis=1)]
    while free.any():
        each = load_E / held.sum(axis=1)
        load_D = np.array([sum((each[e] for e in np.flatnonzero(on)), 0.0) for on in held.T])
        to = int(np.argmin(np.where(free > 0, load_D, np.inf)))
        may = ~held[:, to] & (place_E == place_D[to])
        best = int(np.argmax(np.where(may, each, -1.0)) if relief else np.argmin(np.where(may, each, np.inf)))
        held[best, to] = True
        free[to] -= 1
    return held


@given(SEEDS, st.booleans(), st.booleans())
@settings(max_examples=few_or(200, 40), deadline=None)
def test_slots_are_filled_as_by_sums_made_anew(seed, relief, places):
    rng = np.random.default_rng(seed)
    held = random_count(rng, 1, 6, 4, 0.2)[0] > 0
    place_D = np.array([0, 0, 1, 1]) if places else np.zeros(4, np.int64)
    if places:  # an expert lies in one place
        first = place_D[held.argmax(axis=1)]
        held &= first[:, None] == place_D
    mine = (first[:, None] == place_D).sum(axis=0) if places else np.full(4, 6)
    free = rng.integers(0, mine - held.sum(axis=0) + 1)
    load = rng.choice([0.0, 0.3, 1.0, 1.0, 2.5, 7.0], 6)
    wanted = filled_plainly(held, free, load, relief, place_D)
    fill_layer(held, free.copy(), load, relief, place_D)
    np.testing.assert_array_equal(held, wanted)


def least_plainly(seconds_ER, spare):
    """By dynamic programming over all numbers of replicas."""
    best = [0.0] + [np.inf] * spare
    for column in seconds_ER:
        best = [min(best[used - r] + column[r] for r in range(min(used, len(column) - 1) + 1))
                for used in range(spare + 1)]  # fmt: skip
    return best[spare]


@given(SEEDS, st.sampled_from(["any", "rising", "steps", "roofline"]))
@settings(max_examples=few_or(400, 80), deadline=None)
def test_the_least_of_filled_slots_is_exact(seed, kind):
    """Columns that are convex, and such as are not, where hulls alone give less."""
    rng = np.random.default_rng(seed)
    experts, columns = int(rng.integers(1, 6)), int(rng.integers(1, 9))
    if kind == "any":
        seconds = rng.random((experts, columns)) + 1.0
    elif kind == "roofline":
        seconds = np.maximum(rng.uniform(0, 5, (experts, 1)), 0.7 * np.arange(1, columns + 1))
    else:
        seconds = np.cumsum(rng.random((experts, columns)) * (rng.random((experts, columns)) < 0.4 + (kind == "rising")), axis=1)  # fmt: skip
    spare = int(rng.integers(0, experts * (columns - 1) + 1))
    wanted = least_plainly(seconds, spare)
    np.testing.assert_allclose(_least_filled(seconds, spare), wanted, rtol=1e-11)


@given(SEEDS)
@settings(max_examples=few_or(200, 40), deadline=None)
def test_experts_that_stay_keep_their_slot(seed):
    rng = np.random.default_rng(seed)
    room = rng.integers(1, 4, 3)
    old = np.full((3, int(room.max())), -1)
    for d, slots in enumerate(room):
        held = rng.choice(6, int(rng.integers(0, slots + 1)), replace=False)
        old[d, rng.permutation(slots)[: len(held)]] = held
    holds = np.zeros((3, 6), bool)
    for d, slots in enumerate(room):
        holds[d, rng.choice(6, int(rng.integers(0, slots + 1)), replace=False)] = True
    table = keep_slots(old, holds, room)
    for d, slots in enumerate(room):
        wanted = [e if e >= 0 and holds[d, e] else -1 for e in old[d].tolist()]
        for e in np.flatnonzero(holds[d]).tolist():
            if e not in wanted:
                wanted[wanted[:slots].index(-1)] = e
        assert table[d].tolist() == wanted


@given(SEEDS, st.sampled_from(["published", "even"]))
@settings(max_examples=few_or(200, 40), deadline=None)
def test_a_replica_goes_to_the_last_of_the_heaviest(seed, share):
    rng = np.random.default_rng(seed)
    load, devices = rng.choice([0.0, 1.0, 2.0, 3.0, 6.0], 5), int(rng.integers(1, 4))
    slots = int(rng.integers(0, 12))
    extra, weight = np.zeros(5, int), load.copy()
    for _ in range(slots):
        may = extra + 1 < devices
        if not may.any():
            break
        expert = int(np.flatnonzero(may & (weight == weight[may].max()))[-1])
        extra[expert] += 1
        parts = extra[expert] + (share == "published")
        weight[expert] = weight[expert] * parts / (parts + 1)
    got = _redundancy(load, slots, devices, share)
    np.testing.assert_array_equal(got[0], extra)
    np.testing.assert_array_equal(got[1], weight.astype(np.float32))
