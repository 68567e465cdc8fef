"""What the kernels compute, by their numpy mirrors: optimal against a maximum flow, and as numba has it."""

import numpy as np
import pytest
from tests.cost.test_quota import feasible
from tests.helpers import few_or
from tests.runtime.device import mirror
from tests.runtime.device.cases import random_case

from poise.cost.route import rows_into
from poise.cost.split import exact_quota
from poise.stepwise.host_kernels import HostKernels
from poise.stepwise.kernels import PRICES, prices
from poise.stepwise.methods.split import even_quota

CASES = few_or(10_000, 200)


def checked_split(case, slack=0):
    """A mirror's split, whole, of the holders only, and with a fullest device that no split of those holders beats."""
    got = mirror.split(case.load_SE, case.expert_DS, case.table.turn_DS, case.table.node_D, slack=slack)
    quota_ED = mirror.dense(got.quota_DS, case.expert_DS, case.table.num_experts)
    holds = case.table.holders(case.expert_DS)
    load_E = case.load_SE.sum(axis=0).astype(np.int64)
    assert (quota_ED.sum(axis=1) == load_E).all() and (quota_ED[~holds] == 0).all() and quota_ED.min() >= 0
    top = int(quota_ED.sum(axis=0).max())
    assert top <= got.bound + got.bound * slack // 1000
    assert got.bound == 0 or not feasible(load_E, holds, got.bound - 1), "no lower bound"
    assert slack or feasible(load_E, holds, got.bound), "a bound that nothing attains"
    return quota_ED


def test_the_split_is_exact_and_rows_are_those_of_numba():
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        case = random_case(rng, most=int(rng.choice([3, 40, 4000])))
        quota_ED = checked_split(case)
        devices, experts = case.load_SE.shape
        load, node = case.load_SE.astype(np.int64), case.table.node_D.astype(np.int64)
        speed = np.ones(devices)
        assert (
            quota_ED.sum(axis=0).max()
            == exact_quota(load.sum(axis=0), case.table.holders(case.expert_DS), speed).sum(axis=0).max()
        )
        want, work = np.zeros((devices, experts, devices), np.int64), np.zeros((2, devices), np.int64)
        rows_into(load, quota_ED, node, -1, work[0], work[1], want)
        for source in range(devices):
            np.testing.assert_array_equal(mirror.rows(load, quota_ED, node, source), want[source])


def test_slack_bounds_the_loss_and_left_alone_is_the_even_split():
    rng = np.random.default_rng(1)
    for _ in range(CASES // 3):
        case = random_case(rng)
        quota_ED = checked_split(case, slack=10)
        best = (
            exact_quota(case.load_E, case.table.holders(case.expert_DS), np.ones(len(case.load_SE))).sum(axis=0).max()
        )
        assert quota_ED.sum(axis=0).max() <= best + best * 10 // 1000
        left = mirror.split(case.load_SE, case.expert_DS, case.table.turn_DS, case.table.node_D, leave=True)
        static = case.table.holders(case.table.expert_DS)
        got = mirror.dense(left.quota_DS, case.expert_DS, case.table.num_experts)
        np.testing.assert_array_equal(got, even_quota(case.load_E.astype(np.int64), static))


def test_the_fill_keeps_static_slots_and_the_split_over_it_is_exact():
    rng, gain, numba = np.random.default_rng(2), [], []
    for _ in range(CASES):
        case = random_case(rng, filled=0.3 if rng.integers(2) else 0.0)
        got = mirror.fill(case.load_E, case.expert_DS, case.table.turn_DS, most_turns=32)
        static = case.table.turn_DS >= 0
        np.testing.assert_array_equal(got.expert_DS[static], case.table.expert_DS[static])
        assert (got.expert_DS[case.table.turn_DS == -2] == -1).all()
        held = case.table.holders(got.expert_DS)
        assert held.sum() == (got.expert_DS >= 0).sum(), "an expert twice on a device"
        quota_ED = mirror.dense(got.quota_DS, got.expert_DS, case.table.num_experts)
        assert (quota_ED.sum(axis=1) == case.load_E).all() and quota_ED.min() >= 0
        devices = len(case.load_SE)
        tops = [
            exact_quota(case.load_E, each, np.ones(devices)).sum(axis=0).max()
            for each in (case.table.holders(case.expert_DS), held)
        ]
        assert tops[1] == quota_ED.sum(axis=0).max() == got.bound
        if case.pairs and case.table.turn_DS.min() < 0:
            host = HostKernels(case.table, case.price).fill(case.load_E, case.expert_DS)
            theirs = exact_quota(case.load_E, case.table.holders(host), np.ones(devices)).sum(axis=0).max()
            gain.append(tops[1] / tops[0])
            numba.append(tops[1] / theirs)
    assert np.mean(gain) < 0.97 and np.mean(numba) < 1.05, (np.mean(gain), np.mean(numba))


def test_the_decision_is_priced_as_numba_prices_it():
    rng, left = np.random.default_rng(3), []
    for _ in range(CASES):
        case = random_case(rng, most=int(rng.choice([40, 4000, 40_000])))
        price = dict(zip(PRICES, prices(case.price, 0.03).tolist(), strict=True))
        table = case.table
        quota = mirror.split(case.load_SE, case.expert_DS, table.turn_DS, table.node_D).quota_DS
        got = mirror.decide(case.load_E, case.expert_DS, table.turn_DS, quota, table.node_D, price)
        host = HostKernels(table, case.price)
        quota_ED = mirror.dense(quota, case.expert_DS, table.num_experts)
        planned, passive = (1e12 * each for each in host.seconds(case.load_E, case.expert_DS, quota_ED))
        one = len(table.expert_DS[0]) * sum(price[each] for each in PRICES[:3]) + len(case.load_E) * sum(
            price[each] for each in PRICES[4:8]
        )
        part = sum(price[each] for each in PRICES[4:8]) / len(table.node_D)  # ports are counted in D-ths of a token
        assert got.planned_ps == pytest.approx(planned, rel=1e-4, abs=100 + part)  # prices are rounded to picoseconds
        assert abs(got.passive_ps - passive) <= one + 1e-4 * passive, "more than a token in every slot"
        left.append(got.leave)
        if abs(planned - passive * 0.97 + 0.03 * price["wire_start"]) > one + 1e-4 * passive:
            assert got.leave == bool(host.decide(case.load_E, case.expert_DS, quota_ED)[0])
    assert 0.05 < np.mean(left) < 0.95, "one answer to all"


def test_a_wrong_cap_a_wrong_distance_and_a_lost_token_are_seen(monkeypatch):
    case = random_case(np.random.default_rng(4), experts=12, nodes=[2, 2], step_slots=2, most=400)
    checked_split(case)
    monkeypatch.setattr(mirror, "capped", lambda bound, slack: bound + 1)
    with pytest.raises(AssertionError):
        for seed in range(50):
            checked_split(random_case(np.random.default_rng(seed)))
    monkeypatch.undo()
    whole = mirror.shared
    monkeypatch.setattr(mirror, "shared", lambda tokens, slots, among: whole(tokens - (tokens > 0), slots, among))
    with pytest.raises(AssertionError):
        for seed in range(50):
            checked_split(random_case(np.random.default_rng(seed)))
    monkeypatch.undo()
    monkeypatch.setattr(mirror, "FAR", 1)  # nothing is reached: what is stuck is not, and its mean no bound
    with pytest.raises(AssertionError):
        for seed in range(50):
            checked_split(random_case(np.random.default_rng(seed)))
