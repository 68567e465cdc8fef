"""The token split over replicas: exact against every integer split, and against linear and integer programmes."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from tests.helpers import random_count, split_share_BED

from poise.cost.split import even_share, exact_quota

SEEDS = st.integers(0, 2**32 - 1)


def integer_splits(load, holders, devices):
    """Every way to divide ``load`` tokens over the holders, int [D] each."""
    for parts in product(range(load + 1), repeat=len(holders) - 1):
        if sum(parts) <= load:
            row = np.zeros(devices, np.int64)
            row[list(holders)] = [*parts, load - sum(parts)]
            yield row


def check_quota(quota, load, count):
    assert quota.dtype == np.int64 and quota.min() >= 0
    np.testing.assert_array_equal(quota.sum(axis=1), load)
    assert not quota[count == 0].any()


def programme(load, count, speed):
    """Columns: tokens of each (expert, holder), then the time; rows: loads to give out, time of each device."""
    expert, device = np.nonzero(count)
    pairs = len(expert)
    give = np.zeros((len(load), pairs + 1))
    give[expert, np.arange(pairs)] = 1
    below = np.zeros((len(speed), pairs + 1))
    below[device, np.arange(pairs)] = 1 / speed[device]
    below[:, pairs] = -1
    return give, below, np.eye(pairs + 1)[pairs]


@given(SEEDS, st.booleans(), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_no_integer_split_is_better(seed, equal, experts, devices):
    rng = np.random.default_rng(seed)
    load, count = rng.integers(0, 7, experts), random_count(rng, 1, experts, devices, 0.5)[0]
    speed = np.ones(devices) if equal else rng.choice([0.3, 0.5, 1.0, 1.7, 2.0], devices)
    quota = exact_quota(load, count, speed)
    check_quota(quota, load, count)
    totals = {tuple([0] * devices)}
    for e in range(experts):
        rows = list(integer_splits(int(load[e]), np.flatnonzero(count[e]), devices))
        totals = {tuple(np.add(total, row).tolist()) for total in totals for row in rows}
    best = min((np.array(total) / speed).max() for total in totals)
    assert (quota.sum(axis=0) / speed).max() == pytest.approx(best, rel=1e-12)


@given(SEEDS, st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_equal_devices_reach_the_linear_optimum_rounded_up(seed, most):
    rng = np.random.default_rng(seed)
    experts, devices = int(rng.integers(2, 24)), int(rng.integers(2, 9))
    load = (most * rng.random(experts) ** 4).astype(np.int64)
    count = random_count(rng, 1, experts, devices, rng.choice([0.05, 0.2, 0.5]))[0]
    quota = exact_quota(load, count, np.ones(devices))
    check_quota(quota, load, count)
    give, below, time = programme(load, count, np.ones(devices))
    least = linprog(time, A_ub=below, b_ub=np.zeros(devices), A_eq=give, b_eq=load).fun
    assert quota.sum(axis=0).max() == int(np.ceil(least - 1e-6))


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_unequal_devices_reach_the_integer_optimum(seed):
    rng = np.random.default_rng(seed)
    experts, devices = int(rng.integers(2, 13)), int(rng.integers(2, 6))
    load = rng.integers(0, 60, experts)
    speed = rng.choice([0.25, 0.5, 0.9, 1.0, 1.3, 2.0, 4.0], devices)
    count = random_count(rng, 1, experts, devices, 0.25)[0]
    quota = exact_quota(load, count, speed)
    check_quota(quota, load, count)
    give, below, time = programme(load, count, speed)
    whole = np.append(np.ones(give.shape[1] - 1), 0)
    rows = [LinearConstraint(give, load, load), LinearConstraint(below, -np.inf, 0.0)]
    best = milp(time, constraints=rows, integrality=whole, bounds=Bounds(0, np.inf), options={"mip_rel_gap": 0.0})
    assert (quota.sum(axis=0) / speed).max() == pytest.approx(best.fun, rel=1e-6, abs=1e-6)


@given(SEEDS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_shares_are_distributions_over_the_holders(seed, fractions):
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 9, (3, 5)) * (0.37 if fractions else 1.0)
    count, speed = random_count(rng, 1, 5, 3, 0.5)[0], rng.choice([0.5, 1.0, 2.0], 3)
    for split in ("even", "exact"):
        share = split_share_BED(load, count, speed, split)
        np.testing.assert_allclose(share.sum(axis=2), 1.0, rtol=1e-12)
        assert share.min() >= 0 and not share[:, count == 0].any()
        if split == "exact" and not fractions:
            for b in range(len(share)) if len(share) > 1 else ():
                quota = exact_quota(load[b], count, speed)
                np.testing.assert_allclose(load[b][:, None] * share[b], quota, rtol=1e-12)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_exact_is_never_slower_than_even_by_more_than_rounding(seed):
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 200, (2, 8)).astype(float)
    count, speed = random_count(rng, 1, 8, 4, 0.4)[0], rng.choice([0.5, 1.0, 2.0], 4)
    time = {
        split: (np.einsum("be,bed->bd", load, np.broadcast_to(share, (2, 8, 4))) / speed).max(axis=1)
        for split in ("even", "exact")
        for share in [split_share_BED(load, count, speed, split)]
    }
    assert (time["exact"] <= time["even"] + 8 / speed.min()).all()


def test_even_counts_every_slot():
    count = np.array([[2, 1, 0], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(even_share(count), [[2 / 3, 1 / 3, 0], [0, 0, 1], [0, 0, 0]])


def test_a_fast_device_takes_more():
    count = np.ones((1, 3), int)
    assert exact_quota(np.array([70]), count, np.array([1.0, 2.0, 4.0])).tolist() == [[10, 20, 40]]
    assert exact_quota(np.array([1]), count, np.array([1.0, 2.0, 4.0])).tolist() == [[0, 0, 1]]
