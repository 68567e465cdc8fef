"""Requests -> steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.routing.batching import make_batch
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import OptionError


def numbered(requests, prompt, new, seed=0):
    """A trace whose token t chose expert t: a step's tokens can be read off its experts."""
    rng = np.random.default_rng(seed)
    size = [int(rng.integers(1, prompt + 1)) + int(rng.integers(0, new + 1)) for _ in range(requests)]
    decode = []
    for total in size:
        first = int(rng.integers(1, total + 1))
        decode += [False] * first + [True] * (total - first)
    ids = np.arange(sum(size))[:, None]
    return RoutingTrace(ids, len(ids), request=np.repeat(np.arange(requests), size), is_decode=np.array(decode))


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 6), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_interleaved_steps_obey_the_rules(requests, prompt, new, per_step, seed):
    trace = numbered(requests, prompt, new, seed)
    batch = make_batch(trace, tokens_per_step=per_step, seed=seed)
    size = np.diff(batch.start_B)
    assert (size <= per_step).all() and size.sum() == len(batch.experts_TLK)
    decode, request = trace.is_decode, trace.request
    seen: set[int] = set()
    for b in range(batch.num_steps):
        tokens = batch.experts_TLK[batch.start_B[b] : batch.start_B[b + 1], 0, 0].tolist()
        for t in tokens:  # a request goes on where it was, starts, or (once) is met in the middle of its answer
            started = t == np.flatnonzero(request == request[t])[0]
            assert started or t - 1 in seen or decode[t]
            seen.add(t)
        kinds = [bool(decode[t]) for t in tokens]
        assert kinds == sorted(kinds, reverse=True)  # decoding requests first


def test_a_decoding_request_gives_one_token_a_step():
    trace = numbered(6, 1, 8, 3)
    batch = make_batch(trace, tokens_per_step=6, live_requests=3)
    for b in range(batch.num_steps):
        tokens = batch.experts_TLK[batch.start_B[b] : batch.start_B[b + 1], 0, 0]
        decoding = [int(trace.request[t]) for t in tokens if trace.is_decode[t]]
        assert max((decoding.count(r) for r in set(decoding)), default=0) <= 2


def test_file_order_and_recorded_steps():
    trace = numbered(5, 4, 4)
    batch = make_batch(trace, tokens_per_step=7, order="file")
    np.testing.assert_array_equal(batch.experts_TLK[:, 0, 0], np.arange(trace.num_tokens))
    assert np.diff(batch.start_B)[:-1].tolist() == [7] * (batch.num_steps - 1)
    stepped = RoutingTrace(trace.experts, trace.num_experts, step=np.arange(trace.num_tokens) % 3)
    got = make_batch(stepped)
    assert got.num_steps == 3 and "recorded" in got.order
    assert set(got.experts_TLK[: got.start_B[1], 0, 0].tolist()) == set(range(0, trace.num_tokens, 3))


def test_a_trace_that_decodes_is_met_decoding():
    decode = np.tile([False] * 4 + [True] * 36, 50)
    trace = RoutingTrace(np.arange(2000)[:, None] % 7, 7, request=np.repeat(np.arange(50), 40), is_decode=decode)
    batch = make_batch(trace, tokens_per_step=64)
    assert len(set(batch.request_T.tolist())) == batch.request_T.max() + 1
    first = batch.experts_TLK[: batch.start_B[1], 0, 0]
    assert first.size == 64 and np.bincount(first, minlength=7).max() < 30


def test_loads_are_what_the_tokens_say_and_the_seed_decides():
    trace = numbered(8, 5, 5)
    a, b, c = (make_batch(trace, tokens_per_step=8, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(a.experts_TLK, b.experts_TLK)
    assert not np.array_equal(a.experts_TLK, c.experts_TLK)
    for step in range(a.num_steps):
        tokens = a.experts_TLK[a.start_B[step] : a.start_B[step + 1], 0, 0]
        np.testing.assert_array_equal(a.load_BLE[step, 0], np.bincount(tokens, minlength=trace.num_experts))


def test_profiles_weigh_the_same():
    batch = make_batch(LoadProfile(np.array([[[1.0, 3]], [[100, 100]]])), tokens_per_step=40)
    np.testing.assert_allclose(batch.load_BLE[:, 0], [[10, 30], [20, 20]])
    assert make_batch(LoadProfile(np.array([[1.0, 3]]))).load_BLE.sum() == 4


@pytest.mark.parametrize("sum_", [1, 8, 100])
def test_shares_of_tokens_are_no_tokens(sum_):
    """Also rounded as tables print them; counts that happen to add up so, and means that do not, are tokens."""
    load = np.random.default_rng(0).gamma(1, 1, (2, 3, 16))
    load *= sum_ / load.sum(axis=2, keepdims=True)
    for shares in (load, load.round(4)):
        with pytest.raises(OptionError, match=r"tokens\nhint: .*--tokens-per-step"):
            make_batch(LoadProfile(shares))
        assert make_batch(LoadProfile(shares), tokens_per_step=512).load_BLE[0, 0].sum() == pytest.approx(512, rel=1e-3)
    make_batch(LoadProfile(np.eye(4)[:, None] * 100))
    make_batch(LoadProfile(load * 8.37))


def test_options_are_checked():
    trace = numbered(2, 2, 2)
    with pytest.raises(OptionError, match="at least 1, got 0"):
        make_batch(trace, tokens_per_step=0)
    with pytest.raises(OptionError, match="unknown order"):
        make_batch(trace, order="random")
