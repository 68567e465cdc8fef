"""MoonEP: the exact balance and its bound on slots, each step by hand, and the truncated form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stepwise.step_cases import passes_replay, random_case, run, view_of

from poise.stepwise.methods.moon_ep import MoonEp, choose_receivers, equal_capacity

SEEDS = st.integers(0, 2**32 - 1)


def home_tokens(view, load_SE):
    out = np.zeros(view.static_ED.shape[1], np.int64)
    np.add.at(out, view.owner_E, load_SE.sum(axis=0))
    return out


def foreign(view, plan):
    """(experts that a device computes but is not the home of, their homes) for every device."""
    for d in range(view.static_ED.shape[1]):
        experts = [e for e in np.flatnonzero(plan.quota_ED[:, d]) if view.owner_E[e] != d]
        yield d, experts, {int(view.owner_E[e]) for e in experts}


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_published_form_is_exactly_balanced_within_its_slots(seed):
    rng = np.random.default_rng(seed)
    view, load = random_case(rng, slots=0, nodes=[int(rng.integers(1, 9))], experts=int(rng.integers(1, 25)))
    devices = view.static_ED.shape[1]
    group_D = np.bincount(view.owner_E, minlength=devices)
    view = view_of(view.static_ED, load, int(group_D.max()))
    plan = run(MoonEp(bool(rng.integers(2))), view, load)
    assert plan.details["published"]
    tokens_D = plan.quota_ED.sum(axis=0)
    assert tokens_D.max() - tokens_D.min() <= 1
    for _, experts, homes in foreign(view, plan):
        assert len(homes) <= 1
        assert len(experts) <= max([group_D[h] for h in homes], default=0)


@given(st.integers(1, 8), st.integers(1, 6), SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_rank_needs_at_most_e_over_d_slots(devices, each, seed):
    rng = np.random.default_rng(seed)
    static = np.eye(devices, dtype=bool).repeat(each, axis=0)[rng.permutation(devices * each)]
    load = rng.multinomial(300, rng.dirichlet(np.full(devices * each, 0.2)), devices).astype(np.int64)
    view = view_of(static, load, each)
    plan = run(MoonEp(), view, load)
    assert plan.quota_ED.sum(axis=0).tolist() == [300] * devices  # the same tokens from every source: exactly S * K
    assert (plan.holders_ED & ~static).sum(axis=0).max() <= each


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_truncated_form(seed):
    rng = np.random.default_rng(seed)
    view, load = random_case(rng)
    plan = run(MoonEp(), view, load)
    if plan.passive:
        assert view.step_slots == 0 and (view.static_ED.sum(axis=1) == 1).all()
        return
    home_D, tokens_D = home_tokens(view, load), plan.quota_ED.sum(axis=0)
    capacity_D = equal_capacity(home_D)
    assert (tokens_D <= np.maximum(home_D, capacity_D)).all()
    for d, _, homes in foreign(view, plan):
        assert len(homes) <= 1
        assert not homes or tokens_D[d] <= capacity_D[d]
    wide = run(MoonEp(), view_of(view.static_ED, load, 12), load)
    if (wide.holders_ED & ~view.static_ED).sum(axis=0).max() <= view.step_slots:
        np.testing.assert_array_equal(plan.quota_ED, wide.quota_ED)
    else:
        assert tokens_D.max() >= wide.quota_ED.sum(axis=0).max()


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_unbounded_runs_nothing_that_does_not_fit(seed):
    view, load = random_case(np.random.default_rng(seed))
    fits = view.step_slots >= np.bincount(view.owner_E).max()
    plan = run(MoonEp(bounded=False), view, load)
    assert plan.passive == (not fits)


def test_step_1_capacity():
    assert equal_capacity(np.array([3, 9, 5, 6])).tolist() == [5, 6, 6, 6]


def test_step_2_the_most_overloaded_fills_the_roomiest():
    # surpluses 50, 10, -20, -40: group 0 fills rank 3 (40), then groups 0 and 1 have 10 each: group 0 gives 20 to rank
    # 2 and is 10 short, which group 1 gives
    give, last = choose_receivers(np.array([150, 110, 80, 60]), np.full(4, 100))
    expected = np.zeros((4, 4), int)
    expected[0, 3], expected[0, 2], expected[1, 0] = 40, 20, 10
    np.testing.assert_array_equal(give, expected)
    assert last.tolist() == [2, 3, 0, 0]


def test_step_3_fullest_expert_to_the_largest_quota():
    static = np.eye(4, dtype=bool).repeat(2, axis=0)
    load = np.zeros((4, 8), np.int64)
    load[2] = [60, 90, 80, 30, 40, 40, 60, 0]
    plan = run(MoonEp(), view_of(static, load, 2), load)
    # rank 3 takes 40 of expert 1 (50 left); rank 2 takes 20 of expert 0; rank 0 gets 10 of expert 2
    expected = np.zeros((8, 4), int)
    expected[0], expected[1] = [40, 0, 20, 0], [50, 0, 0, 40]
    expected[2], expected[3] = [10, 70, 0, 0], [0, 30, 0, 0]
    expected[4, 2], expected[5, 2], expected[6, 3] = 40, 40, 60
    np.testing.assert_array_equal(plan.quota_ED, expected)


def test_truncated_receiver_stops_at_its_slots():
    static = np.eye(2, dtype=bool)[[0, 0, 0, 1]]
    load = np.zeros((2, 4), np.int64)
    load[0] = [30, 30, 40, 0]  # rank 1 should take 50: all of expert 2 and 10 of expert 0
    assert run(MoonEp(), view_of(static, load, 2), load).quota_ED.sum(axis=0).tolist() == [50, 50]
    plan = run(MoonEp(), view_of(static, load, 1), load)
    assert plan.quota_ED[:, 1].tolist() == [0, 0, 40, 0] and not plan.details["published"]
    assert run(MoonEp(bounded=False), view_of(static, load, 2), load).passive


def test_a_static_copy_needs_no_slot():
    static = np.array([[1, 1], [1, 0]], bool)
    load = np.array([[40, 20], [40, 20]])
    assert run(MoonEp(), view_of(static, load, 0), load).quota_ED.tolist() == [[20, 60], [40, 0]]


@pytest.mark.parametrize("seed", range(4))
def test_replay(seed):
    passes_replay(MoonEp(), seed)
