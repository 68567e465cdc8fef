"""LPLB: the published topologies, the programme against an independent one, whole tokens, and replicas placed once."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from tests.stepwise.step_cases import passes_replay, random_case, run, view_of

from poise.stepwise.methods.lplb import Lplb, neighbours, put_replicas, solve_shares, whole_tokens
from poise.stepwise.methods.split import exact_split
from poise.util.errors import OptionError

SEEDS = st.integers(0, 2**32 - 1)
CUBE = [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]
HYPERCUBE = [
    [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14],
    [12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
]


def test_step_1_published_topologies():
    np.testing.assert_array_equal(neighbours(8, 8, 2).T, CUBE)
    np.testing.assert_array_equal(neighbours(16, 8, 2).T, HYPERCUBE)
    np.testing.assert_array_equal(neighbours(16, 8, 2, "cube").T, np.hstack([CUBE, np.add(CUBE, 8)]))
    np.testing.assert_array_equal(neighbours(8, 8, 1).T, [[1, 2, 3, 4, 5, 6, 7, 0]])
    torus = neighbours(32, 4, 2)  # 8 x 4
    for row in range(8):
        for column in range(4):
            expected = [(row + 1) % 8 * 4 + column, row * 4 + (column + 1) % 4]
            assert torus[row * 4 + column].tolist() == expected


@given(
    st.integers(1, 40), st.integers(0, 8), st.integers(1, 3), st.sampled_from(["auto", "cube", "hypercube", "torus"])
)
def test_every_device_is_copied_once_a_column(devices, node_size, slots, topology):
    for column in neighbours(devices, node_size, slots, topology).T:
        assert sorted(column) == list(range(devices))


def test_step_2_the_hottest_go_over_the_edges():
    static = np.eye(4, dtype=bool).repeat(2, axis=0)
    weight = np.array([1, 2, 8, 4, 3, 3, 5, 9.0])
    r2o = neighbours(4, 2, 2, "torus")  # device 0 copies from 2 (the other node) and 1 (its own)
    assert r2o.tolist() == [[2, 1], [3, 0], [0, 3], [1, 2]]
    new = put_replicas(static, weight, r2o, 2) & ~static
    # slot 0 holds the hottest of the first neighbour, slot 1 the second hottest of the second
    assert [np.flatnonzero(new[:, d]).tolist() for d in range(4)] == [[3, 4], [0, 7], [1, 6], [2, 5]]
    three = put_replicas(static, weight, r2o, 3) & ~static  # devices have two experts: a third slot stays empty
    np.testing.assert_array_equal(three, new)


def parts(held_ED):
    """Devices that shared experts join, as sets."""
    groups = [{d} for d in range(held_ED.shape[1])]
    for row in held_ED:
        joined = [g for g in groups if g & set(np.flatnonzero(row))]
        groups = [g for g in groups if g not in joined] + [set().union(*joined)]
    return [sorted(g) for g in groups]


def programme(load_E, held_ED, devices):
    """Least largest load of these devices; one variable for every (expert, holder)."""
    expert, device = np.nonzero(held_ED[:, devices])
    pairs = len(expert)
    give, below = np.zeros((len(load_E), pairs + 1)), np.zeros((len(devices), pairs + 1))
    give[expert, np.arange(pairs)] = 1
    below[device, np.arange(pairs)] = 1
    below[:, -1] = -1
    own = held_ED[:, devices].any(axis=1)
    cost = np.eye(pairs + 1)[-1]
    result = linprog(cost, below, np.zeros(len(devices)), give[own], load_E[own], method="highs")
    return result.fun


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_step_3_every_part_reaches_its_optimum(seed):
    rng = np.random.default_rng(seed)
    view, load = random_case(rng)
    held = view.static_ED
    load_E = load.sum(axis=0)
    shares = solve_shares(load_E, held, view.owner_E) if (held.sum(axis=1) > 1).any() else None
    if shares is None:
        return
    assert (shares.share_H >= 0).all() and shares.load_D.sum() == pytest.approx(load_E.sum())
    np.testing.assert_allclose(np.bincount(shares.expert_H, shares.share_H)[np.unique(shares.expert_H)], 1.0)
    assert held[shares.expert_H, shares.device_H].all()
    assert shares.expert_H.size == held[held.sum(axis=1) > 1].sum()
    for devices in parts(held):
        best = programme(load_E, held, devices)
        assert shares.load_D[devices].max() == pytest.approx(best, rel=1e-6, abs=1e-6)
    assert exact_split(load, held, np.ones(held.shape[1])).sum(axis=0).max() == np.ceil(shares.load_D.max() - 1e-6)


def originals_get_the_floor(view, load, plan):
    shares = solve_shares(load.sum(axis=0), plan.holders_ED, view.owner_E)
    for e in np.unique(shares.expert_H):
        original = int(view.owner_E[e])
        share = float(shares.share_H[(shares.expert_H == e) & (shares.device_H == original)].item())
        np.testing.assert_array_equal(plan.rows_SED[:, e, original], np.floor(load[:, e] * share + 1e-6))


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_plans_hold_and_whole_tokens_stay_near_the_programme(seed):
    rng = np.random.default_rng(seed)
    view, load = random_case(rng)
    held, load_E = view.static_ED, load.sum(axis=0)
    many = held.sum(axis=1) > 1
    for rounding in ("total", "source"):
        plan = run(Lplb(rounding=rounding), view, load)
        np.testing.assert_array_equal(plan.holders_ED, held)
        assert plan.passive == (not many.any())
        if plan.passive:
            continue
        shares = solve_shares(load_E, held, view.owner_E)
        ideal = shares.share_H * load_E[shares.expert_H]
        off = np.abs(plan.quota_ED[shares.expert_H, shares.device_H] - ideal)
        if rounding == "total":
            assert plan.rows_SED is None and (off <= 1 + 1e-6).all()
            continue
        assert (off <= held.shape[1] + 1e-3).all()
        originals_get_the_floor(view, load, plan)


def test_step_4_by_hand():
    static = np.array([[1, 1], [1, 0], [0, 1]], bool)
    load = np.array([[5, 2, 0], [5, 0, 0]])  # 12 tokens: device 0 keeps 4 of the 10
    shares = solve_shares(load.sum(axis=0), static, np.array([0, 0, 1]))
    np.testing.assert_allclose(shares.share_H, [0.4, 0.6])
    np.testing.assert_allclose(shares.load_D, [6, 6])
    assert whole_tokens(load, shares, 2, nearest=False)[:, 0].tolist() == [[2, 3], [2, 3]]
    view = view_of(static, load, 0)
    assert run(Lplb(rounding="total"), view, load).quota_ED.tolist() == [[4, 6], [2, 0], [0, 0]]
    # a token a source: the original gets floor(0.4) = 0 of each
    few = np.array([[1, 1, 0], [1, 0, 1]])
    plan = run(Lplb(), view_of(static, few, 0), few)
    assert plan.rows_SED[:, 0].tolist() == [[0, 1], [0, 1]] and plan.quota_ED.sum(axis=0).tolist() == [1, 3]


def test_replicas_are_placed_once_by_history():
    static = np.eye(2, dtype=bool).repeat(2, axis=0)
    load = np.array([[10, 90, 0, 0], [0, 0, 20, 10]])
    seen = [[5, 50, 10, 8], [9, 60, 12, 11]]
    for step in range(4):
        assert run(Lplb(), view_of(static, load, 1, step=step, recent_HE=seen[:step]), load).passive
    view = view_of(static, load, 1, step=4, recent_HE=seen)
    held = Lplb().before_gate(view)
    np.testing.assert_array_equal(held & ~static, [[0, 0], [0, 1], [1, 0], [0, 0]])
    plan = run(Lplb(rounding="total"), view, load)
    # device 0: 10 + part of 90 + part of 20; device 1: the rest + 10; all 130 can be halved
    assert plan.quota_ED.sum(axis=0).tolist() == [65, 65] and not plan.passive
    later = replace(view, before_ED=held, step=5, recent_HE=np.array([[0, 0, 0, 99.0]]))
    np.testing.assert_array_equal(Lplb().before_gate(later), held)
    at_once = view_of(static, load, 1, predicted_E=np.array([9.0, 1, 1, 9]))
    np.testing.assert_array_equal(
        Lplb(history_steps=0).before_gate(at_once) & ~static, [[0, 1], [0, 0], [0, 0], [1, 0]]
    )


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_step_slots_take_the_topology_only_where_nothing_is_redundant(seed):
    rng = np.random.default_rng(seed)
    view, load = random_case(rng)
    view = replace(view, step=9, recent_HE=rng.random((3, view.static_ED.shape[0])))
    policy = Lplb(
        topology=str(rng.choice(["auto", "cube", "torus", "ring"])), rounding=str(rng.choice(["total", "source"]))
    )
    held = policy.before_gate(view)
    plan = run(policy, view, load)
    np.testing.assert_array_equal(plan.holders_ED, held)
    if plan.rows_SED is not None:
        originals_get_the_floor(view, load, plan)
    if (view.static_ED.sum(axis=1) > 1).any():
        np.testing.assert_array_equal(held, view.static_ED)
    else:
        assert held.sum(axis=1).max() <= 2  # an expert is shared by two devices at most
        assert (held & ~view.static_ED).any() or view.step_slots == 0 or held.shape[1] == 1 or held.shape[0] == 1


@pytest.mark.parametrize("seed", range(4))
def test_replay(seed):
    passes_replay(Lplb(), seed)


@pytest.mark.parametrize("wrong", [{"topology": "cubee"}, {"rounding": "sum"}, {"history_steps": -1}])
def test_settings_out_of_range(wrong):
    with pytest.raises(OptionError):
        Lplb(**wrong)
