"""Requests -> steps: invariants of every order, and loads against counting by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.routing.test_trace import random_trace

from poise.routing.batching import default_tokens_per_step, make_batch
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import OptionError


def served_trace(seed: int, requests: int, prefill: int, decode: int) -> RoutingTrace:
    """Rows that can be told apart: expert of layer 0 and 1 spell the row number in base 101."""
    rng = np.random.default_rng(seed)
    lengths = [(int(rng.integers(0, prefill + 1)), int(rng.integers(1, decode + 1))) for _ in range(requests)]
    request = np.repeat(np.arange(requests) * 3, [p + d for p, d in lengths])
    is_decode = np.concatenate([np.arange(p + d) >= p for p, d in lengths])
    row = np.arange(request.size)
    mix = np.argsort(rng.random(requests))[request // 3].argsort(kind="stable")  # requests in another order
    return RoutingTrace(np.stack([row // 101, row % 101], axis=1), 101, request=request[mix], is_decode=is_decode[mix])


def rows_of(batch) -> np.ndarray:
    """Row of the trace that each token of the batch is."""
    return batch.experts_TLK[:, 0, 0].astype(int) * 101 + batch.experts_TLK[:, 1, 0]


def counted_load(batch) -> np.ndarray:
    """Loads counted token by token."""
    load = np.zeros(batch.load_BLE.shape)
    for b in range(batch.num_steps):
        for token in batch.experts_TLK[batch.start_B[b] : batch.start_B[b + 1]]:
            for layer, chosen in enumerate(token):
                for expert in chosen:
                    load[b, layer, expert] += 1
    return load


ORDERS = st.sampled_from(["interleaved", "file"])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 70), order=ORDERS, live=st.none() | st.integers(1, 90))
def test_loads_are_the_tokens_counted_by_hand(seed, n, order, live):
    batch = make_batch(random_trace(seed), tokens_per_step=n, order=order, live_requests=live)
    assert np.array_equal(batch.load_BLE, counted_load(batch))
    assert np.diff(batch.start_B).max() <= n and batch.weight_B.sum() == pytest.approx(1)
    assert batch.start_B[-1] == len(batch.experts_TLK) == len(batch.request_T) == len(batch.home_T)
    assert f"{n}" in batch.order and batch.top_k == 2 and batch.layer_ids_L.tolist() == [1, 4, 6]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 40), requests=st.integers(1, 12))
def test_interleaved_steps_serve_requests_in_order(seed, n, requests):
    trace = served_trace(seed, requests, 6, 9)
    batch = make_batch(trace, tokens_per_step=n, live_requests=requests, seed=seed)
    rows = rows_of(batch)
    numbers = {int(r): int(n) for r, n in zip(trace.request[rows], batch.request_T, strict=True)}
    assert [numbers[int(r)] for r in trace.request[rows]] == batch.request_T.tolist()
    assert sorted(numbers.values()) == list(range(len(numbers)))
    of_request = {r: np.flatnonzero(trace.request == r) for r in np.unique(trace.request)}
    for step in range(batch.num_steps):
        here = rows[batch.start_B[step] : batch.start_B[step + 1]]
        assert len(here), "no step is empty while requests are live"
        decoding = trace.is_decode[here]
        assert not (np.diff(decoding.astype(int)) > 0).any(), "decode tokens come before prefill chunks"
    for r, own in of_request.items():  # a service goes to the last token, from the first, or at the start from amid
        seen = np.zeros(own.size + 1, int)
        jumped = set()
        for place in np.searchsorted(own, rows[trace.request[rows] == r]):
            if place and seen[place - 1] <= seen[place]:
                jumped.add(int(place))
                assert trace.is_decode[own[place]], "only an answer is met amid"
            seen[place] += 1
        assert len(jumped) <= -(-requests // len(of_request)), "a token was served before the one ahead of it"


def test_each_request_is_drawn_once_before_any_is_drawn_again():
    trace = served_trace(3, 12, 4, 6)
    batch = make_batch(trace, tokens_per_step=5, live_requests=3, seed=1)
    rows = rows_of(batch)
    starts = [int(trace.request[r]) for r in rows if r == np.flatnonzero(trace.request == trace.request[r])[0]]
    assert len(set(starts[:12])) == min(12, len(starts)) and len(starts) > 3


@pytest.mark.parametrize(("n", "live"), [(1, 3), (2, 3), (3, 5)])
def test_more_live_requests_than_places_take_turns(n, live):
    trace = RoutingTrace(np.zeros((40 * live, 1), int), 1, request=np.repeat(np.arange(live), 40),
                         is_decode=np.ones(40 * live, bool))  # fmt: skip
    batch = make_batch(trace, tokens_per_step=n, live_requests=live, max_steps=2 * live)
    assert np.bincount(batch.request_T, minlength=live).tolist() == [2 * n] * live


def test_the_seed_decides_and_is_named():
    trace = served_trace(5, 30, 4, 9)
    one, again, other = (make_batch(trace, tokens_per_step=8, live_requests=8, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.experts_TLK, again.experts_TLK) and one.order == again.order
    assert not np.array_equal(one.experts_TLK, other.experts_TLK) and "seed 2" in other.order


@pytest.mark.parametrize("n", [1, 7, 16, 60, 100])
def test_file_order_is_consecutive_rows_with_the_rest_last(n):
    trace = random_trace(0)
    batch = make_batch(trace, tokens_per_step=n, order="file")
    assert np.array_equal(batch.experts_TLK, trace.experts)
    assert np.diff(batch.start_B).tolist() == [n] * (60 // n) + [60 % n] * (60 % n > 0)
    short = make_batch(trace, tokens_per_step=n, order="file", max_steps=2)
    assert short.num_steps == min(2, batch.num_steps)
    assert np.array_equal(short.experts_TLK, trace.experts[: min(60, 2 * n)])


def test_recorded_steps_are_kept():
    trace = random_trace(2)
    batch = make_batch(trace)
    assert "recorded steps" in batch.order and batch.num_steps == np.unique(trace.step).size
    for b, step in enumerate(np.unique(trace.step)):
        here = slice(batch.start_B[b], batch.start_B[b + 1])
        assert np.array_equal(batch.experts_TLK[here], trace.experts[trace.step == step])
        assert np.array_equal(batch.home_T[here], trace.home[trace.step == step])
    assert "recorded steps" not in make_batch(trace, tokens_per_step=10).order
    assert make_batch(trace, max_steps=1).num_steps == 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), tokens=st.none() | st.integers(1, 5000), top_k=st.integers(1, 3))
def test_recorded_loads_are_scaled_alike_and_keep_their_shape(seed, tokens, top_k):
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 50, (4, 3, 5)) * 10.0 ** rng.integers(0, 4, (4, 1, 1))
    load[:, :, 0] += 1
    batch = make_batch(LoadProfile(load, top_k=top_k), tokens_per_step=tokens)
    assert not batch.has_tokens and batch.num_steps == 4
    mass = batch.load_BLE.sum(axis=2).max(axis=1)
    assert mass == pytest.approx(np.full(4, mass[0]))
    assert tokens is None or mass[0] == pytest.approx(tokens * top_k)
    assert batch.load_BLE / mass[:, None, None] == pytest.approx(load / load.sum(axis=2).max(axis=1)[:, None, None])


def test_defaults_and_options_out_of_range():
    assert [default_tokens_per_step(t) for t in (1, 60, 1600, 10**6)] == [1, 60, 100, 4096]
    trace = random_trace(0)
    for bad in (dict(tokens_per_step=0), dict(live_requests=-1), dict(max_steps=0), dict(order="random")):
        with pytest.raises(OptionError, match=r"\w"):
            make_batch(trace, **bad)
