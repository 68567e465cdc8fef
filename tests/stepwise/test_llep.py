"""LLEP: each step by hand, a plain re-telling of the published loop, and what the loop promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stepwise.step_cases import passes_replay, random_case, run, view_of

from poise.stepwise.methods.llep import Llep, spill
from poise.util.errors import OptionError

SEEDS = st.integers(0, 2**32 - 1)
PAIRS = np.eye(2, dtype=bool).repeat(2, axis=0)
"""Experts 0 and 1 on device 0, 2 and 3 on device 1."""


def loads(*tokens, devices=2):
    """All tokens from the last device."""
    out = np.zeros((devices, len(tokens)), np.int64)
    out[-1] = tokens
    return out


@given(SEEDS)
@settings(max_examples=150, deadline=None)
def test_plans_hold_in_any_case(seed):
    rng = np.random.default_rng(seed)
    view, load = random_case(rng)
    policy = Llep(float(rng.choice([1.0, 1.1, 1.5])), int(rng.choice([1, 8, 1024])), float(rng.choice([0.0, 1.3, 2.0])))
    plan = run(policy, view, load)
    even = np.zeros(view.static_ED.shape[1])
    for e, tokens in enumerate(load.sum(axis=0)):
        held = np.flatnonzero(view.static_ED[e])
        even[held] += [tokens // held.size + (i < tokens % held.size) for i in range(held.size)]
    if even.max() * even.size < policy.threshold * even.sum():
        np.testing.assert_array_equal(plan.quota_ED.sum(axis=0), even)
        assert plan.passive == (view.static_ED.sum(axis=1) == 1).all()
    elif view.step_slots or (view.static_ED.sum(axis=1) > 1).any():
        assert not plan.passive


@given(SEEDS)
@settings(max_examples=150, deadline=None)
def test_with_room_for_every_chunk_no_device_exceeds_its_limit(seed):
    rng = np.random.default_rng(seed)
    view, load = random_case(rng, slots=12)
    alpha = float(rng.choice([1.0, 1.1, 1.5]))
    devices, total = view.static_ED.shape[1], int(load.sum())
    limit = int(alpha * (total // devices))
    plan = run(Llep(alpha, 1, 0.0), view, load)
    if limit * devices >= total:
        assert plan.quota_ED.sum(axis=0).max() <= limit


def told_again(load, home, devices, limit, least):
    """The published loop for one native device each and memory without end; tuples (expert, device, tokens)."""
    given = [0] * devices
    coming = [int(load[home == d].sum()) for d in range(devices)]
    out = []
    for e in sorted(range(len(load)), key=lambda e: (-load[e], e)):
        left, native = int(load[e]), int(home[e])
        coming[native] -= left
        take = max(0, min(left, limit - given[native] - coming[native]))
        if take:
            out.append((e, native, take))
            given[native] += take
            left -= take
        others = [d for d in range(devices) if d != native]
        while left:
            ranked = sorted(others, key=lambda d: given[d] + coming[d])
            chunks = [(d, min(left, limit - given[d] - coming[d])) for d in ranked]
            good = [(d, c) for d, c in chunks if c > 0 and (c >= least or c == left)]
            to, chunk = good[0] if good else ((ranked or [native])[0], left)
            out.append((e, to, chunk))
            given[to] += chunk
            left -= chunk
    return out


@given(SEEDS, st.sampled_from([1, 5, 40, 1024]), st.sampled_from([1.0, 1.1, 1.5]))
@settings(max_examples=200, deadline=None)
def test_the_same_as_the_published_loop(seed, least, alpha):
    rng = np.random.default_rng(seed)
    view, load = random_case(rng, replicas=False, slots=12)
    load_E, home, devices = load.sum(axis=0), view.owner_E, view.static_ED.shape[1]
    mean = int(load_E.sum()) // devices
    limit = max(1, int(alpha * mean) if mean else int(load_E.sum()))
    expected = np.zeros_like(view.static_ED, dtype=np.int64)
    for e, d, tokens in told_again(load_E, home, devices, limit, least):
        expected[e, d] += tokens
    np.testing.assert_array_equal(run(Llep(alpha, least, 0.0), view, load).quota_ED, expected)


def test_step_1_mild_imbalance_is_left_alone():
    view = view_of(PAIRS, load := loads(60, 4, 30, 6), 1)  # 64 and 36: 1.28 times the mean
    plan = run(Llep(), view, load)
    assert plan.passive and plan.quota_ED.sum(axis=0).tolist() == [64, 36]
    assert not run(Llep(threshold=1.28), view, load).passive


def test_step_1_with_static_replicas_the_even_split_is_a_plan():
    static = PAIRS.copy()
    static[0, 1] = True
    plan = run(Llep(), view_of(static, load := loads(60, 20, 18, 2), 1), load)
    assert not plan.passive and plan.quota_ED[0].tolist() == [30, 30]


def test_steps_2_to_4_overflow_spills_to_the_least_loaded():
    # mean 100, limit 110. Expert 0 (180): device 0 still awaits 20, takes 90; 90 left; device 1 expects 20, device 2 80
    static = np.zeros((4, 3), bool)
    static[[0, 1, 2, 3], [0, 0, 1, 2]] = True
    load = loads(180, 20, 20, 80, devices=3)
    plan = run(Llep(min_tokens=16), view_of(static, load, 1), load)
    assert plan.quota_ED.tolist() == [[90, 90, 0], [20, 0, 0], [0, 20, 0], [0, 0, 80]]


def test_step_4_small_chunks_are_skipped_unless_they_are_all():
    # mean 100, limit 110: expert 0 (235) keeps 110; 125 left: 75 to device 1 (expects 35), 50 to device 2 (30 expected)
    static = np.eye(3, dtype=bool)
    load = loads(235, 35, 30, devices=3)
    view = view_of(static, load, 1)
    assert run(Llep(min_tokens=16), view, load).quota_ED[0].tolist() == [110, 45, 80]
    # nothing of 125 goes in a chunk of 81 or more, so step 5 sends all of it to device 2
    assert run(Llep(min_tokens=81), view, load).quota_ED[0].tolist() == [110, 0, 125]


def test_step_5_without_a_slot_anywhere_tokens_stay():
    static = np.eye(2, dtype=bool)
    static[1, 0] = True  # so that the method runs at all: expert 1 is native on both
    load = loads(90, 10)
    quota = run(Llep(), view_of(static, load, 0), load).quota_ED
    assert quota.tolist() == [[90, 0], [0, 10]]


def test_native_replicas_come_first():
    static = np.array([[1, 0, 1], [1, 0, 0], [0, 1, 0]], bool)
    load = loads(150, 60, 90, devices=3)  # limit 110: device 2 takes 110 of expert 0, device 0 the other 40
    plan = run(Llep(min_tokens=1), view_of(static, load, 2), load)
    assert plan.quota_ED.tolist() == [[40, 0, 110], [60, 0, 0], [0, 90, 0]]
    np.testing.assert_array_equal(plan.holders_ED, static)


def test_slots_limit_helpers():
    load = np.array([100, 90, 5, 5])
    home = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    quota = spill(load, home, load[:, None] * home, np.array([0, 1]), 110, 1)
    # expert 0: 90 are to come, 20 fit; 80 to device 1 in its one slot. Expert 1: 90 fit
    assert quota.tolist() == [[20, 80], [90, 0], [0, 5], [0, 5]]
    quota = spill(load, home, load[:, None] * home, np.array([0, 0]), 110, 1)
    assert quota.tolist() == [[100, 0], [90, 0], [0, 5], [0, 5]]


def test_natives_stand_beside_helpers_once_slots_are_short():
    load, home = np.array([230, 170]), np.array([[1, 0, 0, 0], [0, 0, 0, 1]], bool)
    quota = spill(load, home, load[:, None] * home, np.array([0, 2, 0, 0]), 110, 1)
    # device 1 fills up with expert 0 and takes 10 too many; expert 1 then stays where less is, on its own device
    assert quota.tolist() == [[110, 120, 0, 0], [0, 0, 0, 170]]


@pytest.mark.parametrize("seed", range(4))
def test_replay(seed):
    passes_replay(Llep(), seed)


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"min_tokens": 0}, {"threshold": -1.0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(OptionError):
        Llep(**wrong)
