"""Home ranks: equal tokens a rank in every step, requests that stay where they are for as long as there is room."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import few_or

from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.util.errors import OptionError, TraceError


def batch_of(rng, sizes, requests, homes="equal"):
    total = int(sum(sizes))
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return RoutingBatch(np.ones((len(sizes), 1, 2)), np.full(len(sizes), 1 / len(sizes)), 1, np.zeros(1, np.int32),
                        np.zeros((total, 1, 1), np.int16), start, rng.integers(requests, size=total).astype(np.int32),
                        homes=homes)  # fmt: skip


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_homes_are_equal_and_requests_stay(seed, devices):
    rng = np.random.default_rng(seed)
    batch = batch_of(rng, rng.integers(0, 30, rng.integers(1, 6)), int(rng.integers(1, 12)))
    home_T = batch.home_of_tokens(devices)
    assert batch.fullest_home(devices) <= 1.0 + 1e-12
    first: dict[int, int] = {}
    for b in range(batch.num_steps):
        rows = slice(*batch.start_B[b : b + 2])
        count = np.bincount(home_T[rows], minlength=devices)
        assert count.max() - count.min() <= 1
        room = count.copy()
        for request, rank in zip(batch.request_T[rows].tolist(), home_T[rows].tolist(), strict=True):
            own = first.setdefault(request, rank)
            assert rank == own or room[own] == 0  # only what has no room goes elsewhere
            room[rank] -= 1
    total = np.bincount(home_T, minlength=devices)
    assert total.max() - total.min() <= 1 + batch.num_steps


def test_request_numbers_may_be_large():
    batch = batch_of(np.random.default_rng(0), [40], 5)
    far = RoutingBatch(batch.load_BLE, batch.weight_B, 1, batch.layer_ids_L, batch.experts_TLK, batch.start_B,
                       batch.request_T * 400_000_000)  # fmt: skip
    np.testing.assert_array_equal(far.home_of_tokens(4), batch.home_of_tokens(4))


def test_by_request_is_as_uneven_as_requests_are():
    trace = zipf_trace(num_tokens=2000, num_layers=1, num_experts=4, top_k=1, seed=1)
    even, uneven = (make_batch(trace, tokens_per_step=400, homes=homes) for homes in (None, "by-request"))
    assert even.fullest_home(4) == 1.0 and even.order.endswith("homes equal")
    assert uneven.fullest_home(4) > 1.0 and uneven.order.endswith("homes by request")
    np.testing.assert_array_equal(uneven.home_of_tokens(4), uneven.request_T % 4)
    np.testing.assert_array_equal(even.experts_TLK, uneven.experts_TLK)  # steps are the same


def test_recorded_homes_are_kept_unless_others_are_asked_for():
    trace = zipf_trace(num_tokens=600, num_layers=1, num_experts=4, top_k=1, seed=1)
    trace = replace(trace, home=np.zeros(600, np.int32))
    kept = make_batch(trace, tokens_per_step=100)
    assert kept.fullest_home(4) == 4.0 and kept.order.endswith("homes as recorded")
    assert make_batch(trace, tokens_per_step=100, homes="equal").fullest_home(4) == 1.0
    with pytest.raises(OptionError, match="unknown homes"):
        make_batch(trace, homes="random")


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
@settings(max_examples=few_or(200, 30), deadline=None)
def test_evened_homes_are_equal_and_wishes_with_room_are_kept(seed, devices):
    rng = np.random.default_rng(seed)
    batch = batch_of(rng, rng.integers(0, 30, rng.integers(1, 6)), 5)
    wish_T = rng.choice(devices, size=len(batch.experts_TLK), p=rng.dirichlet(np.ones(devices))).astype(np.int32)
    even = replace(batch, home_T=wish_T).evened(devices)
    home_T, total = even.home_of_tokens(devices), np.zeros(devices, np.int64)
    for b in range(batch.num_steps):
        rows = slice(*batch.start_B[b : b + 2])
        count = np.bincount(home_T[rows], minlength=devices)
        assert count.max() - count.min() <= 1
        for rank in range(devices):
            wants = wish_T[rows] == rank
            kept = wants & (home_T[rows] == rank)
            assert kept.sum() == min(wants.sum(), count[rank])
            assert kept[wants][: kept.sum()].all()  # those that come first
        total += count
    assert total.max() - total.min() <= 1  # the rest of steps that do not divide goes to ranks in turn
    again = even.evened(devices)
    np.testing.assert_array_equal(again.home_of_tokens(devices), home_T)
    np.testing.assert_array_equal(even.experts_TLK, batch.experts_TLK)


def test_only_recorded_homes_can_be_evened():
    batch = batch_of(np.random.default_rng(0), [6], 3)
    with pytest.raises(TraceError, match="no home ranks are recorded"):
        batch.evened(2)
    with pytest.raises(TraceError, match="reach 2"):
        replace(batch, home_T=np.full(6, 2, np.int32)).evened(2)
