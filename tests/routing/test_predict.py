"""Predictors see the past only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import token_batch

from poise.routing.predict import PREDICTORS, RequestMix, SlidingMean
from poise.util.errors import OptionError


def batch_of(rng, steps=6, tokens=12, experts=5, least=0):
    ids = rng.integers(least, experts, (steps * tokens, 2, 1))
    return token_batch(ids, [tokens] * steps, experts, request_T=rng.integers(0, 4, steps * tokens))


@pytest.mark.parametrize("name", PREDICTORS)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([0, -1]))
@settings(max_examples=30, deadline=None)
def test_what_comes_later_changes_nothing(name, seed, cut, least):
    """Nor how many picks of a step compute nothing, which its gates alone know."""
    rng = np.random.default_rng(seed)
    one = batch_of(rng, least=least)
    ids = one.experts_TLK.copy()
    ids[one.start_B[cut] :] = rng.integers(least, 5, ids[one.start_B[cut] :].shape)
    two = token_batch(ids, np.diff(one.start_B), 5, request_T=one.request_T)
    a, b = (PREDICTORS[name].predict_BLE(batch) for batch in (one, two))
    np.testing.assert_allclose(a[: cut + 1], b[: cut + 1])
    if least == 0:
        np.testing.assert_allclose(a.sum(axis=2), one.load_BLE.sum(axis=2))
    else:
        seen = (one.experts_TLK[: one.start_B[cut], :, 0] >= 0).mean(axis=0)
        np.testing.assert_allclose(SlidingMean().predict_BLE(one)[cut].sum(axis=1), 12 * seen)
    assert a.min() >= 0


def test_sliding_mean_by_hand():
    batch = batch_of(np.random.default_rng(0))
    got = SlidingMean(window=2).predict_BLE(batch)
    np.testing.assert_allclose(got[3], batch.load_BLE[1:3].mean(axis=0))
    prior = np.ones((2, 5))
    prior[:, 0] = 6
    np.testing.assert_allclose(SlidingMean().predict_BLE(batch, prior)[0, 0], [7.2, 1.2, 1.2, 1.2, 1.2])
    with pytest.raises(OptionError, match="prior"):
        SlidingMean().predict_BLE(batch, np.ones((1, 5)))


def test_requests_that_alternate_are_told_apart():
    """Request 0 always uses expert 0, request 1 expert 1; who is in the step decides its load."""
    who = np.repeat([0, 1] * 6, 10)
    batch = token_batch(who[:, None, None], [10] * 12, 2, request_T=who)
    mine = RequestMix(prior_tokens=1.0).predict_BLE(batch)
    mean = SlidingMean().predict_BLE(batch)
    assert np.abs(mine[6:] - batch.load_BLE[6:]).mean() < 0.2 * np.abs(mean[6:] - batch.load_BLE[6:]).mean()
