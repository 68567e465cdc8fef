"""Drawn steps: tokens of the traffic, whole blocks of requests, as large as the steps given; who is unknown is idle now and then."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, token_batch

from poise.planning.solve.scenarios import LEAST_REQUESTS, UNSEEN, can_be_drawn, drawn_steps
from poise.routing.batching import make_batch
from poise.routing.trace import RoutingTrace


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


def test_steps_differ_by_domain_where_domains_are_known():
    """Two domains of fifty requests each that use an expert of their own: steps are of any mix of both, and as many of each in
    the mean; not told, all are near a half. Fails if the domain of a request is another's, or weights are of requests alone.
    """
    request = np.repeat(np.random.default_rng(0).permutation(100), 40)
    domain_R = (np.arange(100) >= 50).astype(np.int16)
    batch = token_batch(domain_R[request][:, None, None], [2000, 2000], 2, request_T=request)
    apart = drawn_steps(replace(batch, domain_R=domain_R), 600, 0).load_BLE[:, 0, 1] / 2000
    mixed = drawn_steps(batch, 600, 0).load_BLE[:, 0, 1] / 2000
    assert mixed.mean() == pytest.approx(0.5, abs=0.02) and mixed.std() < 0.1
    assert apart.mean() == pytest.approx(0.5, abs=0.05)
    assert np.quantile(apart, [0.1, 0.25, 0.75, 0.9]) == pytest.approx([0.1, 0.25, 0.75, 0.9], abs=0.06)  # uniform


def test_one_domain_is_none():
    """The steps of before, draw for draw."""
    batch = batch_of(np.random.default_rng(1), [30, 40], 20)
    told = replace(batch, domain_R=np.full(20, 3, np.int16))  # as of a part of a trace
    np.testing.assert_array_equal(drawn_steps(told, 5, 2).experts_TLK, drawn_steps(batch, 5, 2).experts_TLK)


def test_a_batch_knows_the_domain_of_each_request():
    """Whatever order steps take requests in. Fails if domains follow the file and not the batch's own numbers."""
    rng = np.random.default_rng(4)
    domain = np.repeat(rng.integers(0, 3, 40), 25).astype(np.int16)
    ids = domain[:, None, None] * np.ones((1, 2, 1), np.int16)  # an expert for each domain
    trace = RoutingTrace(
        ids, 3, request=np.repeat(rng.permutation(40), 25), domain=domain, domain_names=("a", "b", "c")
    )
    batch = make_batch(trace, tokens_per_step=100)
    np.testing.assert_array_equal(batch.domain_R[batch.request_T], batch.experts_TLK[:, 0, 0])
    later = batch.part(slice(3, 6))
    np.testing.assert_array_equal(later.domain_R[later.request_T], later.experts_TLK[:, 0, 0])
    assert make_batch(replace(trace, domain=None, domain_names=()), tokens_per_step=100).domain_R is None
