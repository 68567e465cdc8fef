"""Few moves away from a map: each the best there is, never worse, and no more than pay."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.engines.plugins.nudge import nudged


def tables(draw_seed, ranks, each, experts):
    """A row in which every expert is held, and their loads."""
    rng = np.random.default_rng(draw_seed)
    row = np.concatenate([np.arange(experts), rng.integers(0, experts, ranks * each - experts)])
    return rng.permutation(row), rng.integers(1, 100, experts).astype(float) ** 2


def fullest(load, row, ranks, rate=None):
    share = load[row] / np.bincount(row, minlength=len(load))[row]
    return (share.reshape(ranks, -1).sum(axis=1) * (np.ones(ranks) if rate is None else rate)).max()


def neighbours(row, ranks, experts):
    """Rows one change away: two slots of two ranks swapped, or a copy replaced by another expert."""
    each, count = len(row) // ranks, np.bincount(row, minlength=experts)
    for i, j in itertools.combinations(range(len(row)), 2):
        if i // each != j // each and row[i] != row[j]:
            out = row.copy()
            out[i], out[j] = row[j], row[i]
            yield out
    for i, e in itertools.product(range(len(row)), range(experts)):
        if count[row[i]] > 1 and e != row[i]:
            out = row.copy()
            out[i] = e
            yield out


def once(row, ranks):
    """No rank has an expert twice."""
    return all(len(set(held)) == len(held) for held in row.reshape(ranks, -1).tolist())


@pytest.mark.parametrize("seed", range(12))
def test_one_change_is_the_best_that_lowers_the_fullest_rank(seed):
    """Brute force over all rows one change away; the fullest rank after it is the least there is."""
    ranks, each, experts = 3, 3, 6
    row, load = tables(seed, ranks, each, experts)
    if not once(row, ranks):
        row = np.array([0, 1, 2, 3, 4, 5, 0, 2, 4])
    got = row.copy()
    changes = nudged(load, got, np.ones(ranks), np.zeros(ranks, np.int64), 1, 1.0, 0.0)
    others = [one for one in neighbours(row, ranks, experts) if once(one, ranks)]
    best = min(fullest(load, one, ranks) for one in others)
    before = fullest(load, row, ranks)
    assert fullest(load, got, ranks) == pytest.approx(min(best, before))
    assert changes == int(best < before * (1 - 1e-6))


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1), st.floats(0, 3000))
def test_maps_stay_valid_and_what_is_paid_comes_back(seed, ranks, each, share, price):
    experts = max(1, int(ranks * each * (1 - share / 2)))
    row, load = tables(seed, ranks, each, experts)
    rate = np.random.default_rng(seed).uniform(0.5, 2, ranks)
    got = row.copy()
    nudged(load, got, rate, np.zeros(ranks, np.int64), 16, 1.0, price)
    assert set(got.tolist()) == set(range(experts))
    moved = [len(set(b) - set(a)) for a, b in zip(row.reshape(ranks, -1).tolist(), got.reshape(ranks, -1).tolist(),
                                                  strict=True)]  # fmt: skip
    paid = fullest(load, got, ranks, rate) + price * max(moved)
    assert paid <= fullest(load, row, ranks, rate) * (1 + 1e-9)


def test_moves_that_cost_more_than_they_bring_are_left():
    row, load = tables(3, 4, 4, 12)
    got = row.copy()
    assert nudged(load, got, np.ones(4), np.zeros(4, np.int64), 64, 1.0, 1e9) == 0
    assert (got == row).all()
    free = nudged(load, got, np.ones(4), np.zeros(4, np.int64), 64, 1.0, 0.0)
    assert free > 1
    prices = (0.01, 0.03, 0.1, 0.2)
    some = [nudged(load, row.copy(), np.ones(4), np.zeros(4, np.int64), 64, 1.0, price * fullest(load, row, 4))
            for price in prices]  # fmt: skip
    assert sorted(some, reverse=True) == some and 0 < min(one for one in some if one) < free


def test_experts_stay_in_their_place():
    """Two nodes of two ranks: what a node holds it holds afterwards."""
    row = np.array([0, 1, 2, 3, 0, 2, 4, 5, 6, 7, 4, 6])
    load = np.array([900.0, 1, 800, 1, 700, 1, 1, 1])
    for place in ([0, 0, 1, 1], [0, 1, 2, 3]):
        got = row.copy()
        nudged(load, got, np.ones(4), np.array(place), 32, 1.0, 0.0)
        held = [set(got.reshape(4, 3)[np.array(place) == one].ravel().tolist()) for one in sorted(set(place))]
        was = [set(row.reshape(4, 3)[np.array(place) == one].ravel().tolist()) for one in sorted(set(place))]
        assert held == was
    assert fullest(load, got, 4) == fullest(load, row, 4)  # alone on its node a rank has no partner
