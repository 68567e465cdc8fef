"""Copies of tokens that go to a device once, from pairs, and their price."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.cost.compute import tokens_per_pair
from poise.cost.traffic import independent_copies
from poise.cost.weights import training_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.stepwise.step_seconds import exchange_seconds, once_seconds


@given(st.lists(st.lists(st.integers(0, 2**20), min_size=3, max_size=3), min_size=3, max_size=3), st.integers(1, 9))
def test_copies_are_the_expectation_in_whole_numbers(pairs, top_k):
    """Tokens of a device, times the chance that one of K independent draws falls on the other."""
    found = independent_copies(np.array(pairs), top_k)
    assert found.dtype == np.int64
    for row, got in zip(pairs, found, strict=True):
        total = sum(row)
        for one, copies in zip(row, got, strict=True):
            chance = 1 - (1 - Fraction(one, total)) ** top_k if total else 0
            exact = Fraction(total, top_k) * chance
            assert abs(int(copies) - exact) <= Fraction(1, 2) + Fraction(total, 2**27)
            assert copies <= one + 1


@pytest.mark.parametrize("devices", [1, 2, 5])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_even_pairs_are_the_uniform_case_of_compute(devices, top_k):
    pairs = np.full((devices, devices), top_k * 10**6)
    found = independent_copies(pairs, top_k)
    np.testing.assert_allclose(found.sum() / pairs.sum(), tokens_per_pair(top_k, devices), rtol=1e-6)


def test_many_pairs_do_not_overflow():
    pairs = np.full((2, 2), 2**33 - 1)
    np.testing.assert_allclose(independent_copies(pairs, 2), 0.75 * pairs, rtol=1e-7)


def test_a_copy_carries_its_weights_and_every_pair_is_told_of():
    """By hand: over one link each way, forward and back."""
    cluster = Cluster(np.array([0, 1]), np.ones(2), 1e9, 1e9, 1e9, 1e9, 1e9)
    model, top_k, pairs = (
        ModelSpec("m", 1, (0,), 4, 2, 8, 2, dispatch_bytes=2.0, combine_bytes=4.0),
        2,
        np.array([[0, 4000], [0, 0]]),
    )
    price = training_price(4000, 4, cluster, model)
    wide = model.expert_width + top_k / 2  # behind a token in two of the four exchanges
    rows = price.exchange_passes * 2000 * wide * (model.dispatch_bytes + model.combine_bytes)
    starts = 2 * price.exchange_passes * cluster.dispatch_wire.start_s  # as many as pairs have, and one to tell
    seconds = starts + cluster.dispatch_wire.start_s + (rows + 8 * 4000) / cluster.inter_bytes_per_s
    assert once_seconds(pairs, top_k, price) == pytest.approx(seconds, rel=1e-12)
    narrow = price.exchange_passes * 4000 * model.expert_width * (model.dispatch_bytes + model.combine_bytes)
    assert exchange_seconds(pairs, price) == pytest.approx(starts + narrow / cluster.inter_bytes_per_s)
