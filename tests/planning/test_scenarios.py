"""Drawn steps: tokens of the traffic, whole blocks of requests, as large as the steps given; who is unknown is idle now and then."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, token_batch

from poise.planning.solve.scenarios import LEAST_REQUESTS, UNSEEN, can_be_drawn, drawn_steps


def batch_of(rng, sizes, requests, experts=6):
    total, top_k = int(sum(sizes)), 2
    ids = np.stack([[rng.permutation(experts)[:top_k] for _ in range(2)] for _ in range(total)]).astype(np.int16)
    return token_batch(ids, sizes, experts, request_T=rng.integers(requests, size=total))


@given(st.integers(0, 2**32 - 1), st.integers(16, 40), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_drawn_steps_are_made_of_the_traffic(seed, requests, steps):
    rng = np.random.default_rng(seed)
    batch = batch_of(rng, rng.integers(20, 40, 3).tolist(), requests)
    assert can_be_drawn(batch) == (np.unique(batch.request_T).size >= LEAST_REQUESTS)
    got = drawn_steps(batch, steps, seed)
    size = max(1, round(float(batch.weight_B @ np.diff(batch.start_B))))
    assert got.num_steps == steps and (np.diff(got.start_B) == size).all()
    rows = batch.experts_TLK.reshape(len(batch.request_T), -1).tolist()
    known = {(r, *row) for r, row in zip(batch.request_T.tolist(), rows, strict=True)}
    drawn = zip(got.request_T.tolist(), got.experts_TLK.reshape(len(got.request_T), -1).tolist(), strict=True)
    assert all((r, *row) in known for r, row in drawn)
    np.testing.assert_allclose(got.load_BLE.sum(axis=2), size * batch.top_k)
    for b in range(steps):
        rows = got.experts_TLK[got.start_B[b] : got.start_B[b + 1], 0]
        count = np.bincount(rows.ravel(), minlength=6)
        mass = count.sum()
        beside = [(n, np.abs(got.load_BLE[b, 0] * (mass + n) / mass - count)) for n in range(40)]
        assert any(np.allclose(extra, np.rint(extra), atol=1e-9) and round(extra.sum()) == n for n, extra in beside)
    again = drawn_steps(batch, steps, seed)
    np.testing.assert_array_equal(again.experts_TLK, got.experts_TLK)


def test_steps_differ_more_than_by_counting():
    """Requests have weights of their own: an expert that one of forty requests uses alone is far from evenly there."""
    total, requests = 4000, 40
    request = np.repeat(np.arange(requests), total // requests)
    ids = (request == 0).astype(np.int16)[:, None, None] * np.ones((1, 1, 1), np.int16)
    batch = token_batch(ids, [total // 4] * 4, 2, request_T=request)
    share = drawn_steps(batch, 400, 0).load_BLE[:, 0, 1] / (total // 4)
    assert share.mean() == pytest.approx(1 / requests, abs=0.006)
    assert share.std() > 5 * np.sqrt(1 / requests / (total // 4))


def test_who_is_unknown_is_idle_now_and_then():
    """As often as a Poisson draw of the mean says, and on average as much as the mean: neither idle for good nor read in
    every step. Fails if the mean itself is mixed in, or nothing."""
    ids = np.tile(np.arange(4, dtype=np.int16), 500)[:, None, None]  # experts 4 and 5 are never picked
    batch = token_batch(ids, [1000, 1000], 6, request_T=np.repeat(np.arange(100), 20))
    load = drawn_steps(batch, 4000, 0).load_BLE[:, 0]
    mean = UNSEEN * 1000 / 2000
    for expert in (4, 5):
        assert (load[:, expert] == 0).mean() == pytest.approx(np.exp(-mean), abs=0.03)
        assert load[:, expert].mean() == pytest.approx(mean * 1000 / (1000 + 6 * mean), rel=0.06)


def test_what_cannot_be_drawn():
    rng = np.random.default_rng(0)
    assert not can_be_drawn(load_batch(rng))
    tokens = batch_of(rng, [50, 50], LEAST_REQUESTS - 1)
    assert not can_be_drawn(tokens)
    homes = token_batch(tokens.experts_TLK, [50, 50], 6, request_T=np.arange(100), home_T=np.zeros(100, int))
    assert not can_be_drawn(homes)  # where requests live was recorded, and is kept
