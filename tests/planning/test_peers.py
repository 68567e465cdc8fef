"""FlashLB, SwiftBalance and EPLB against the engines' own: maps of the originals, and what their unit tests assert.

The assertions are those of vLLM's test_eplb_algo and test_eplb_flashlb (pull request 37656) and of vllm-ascend's
test_policy_factory, test_policy_swift_balancer (pull request 16000) and test_flashlb_selection, written anew.
"""

import json

import numpy as np
import pytest
from tests.helpers import tiny_cluster, tiny_model
from tests.planning.peers import ANSWERS, CASES, contents, digest

from poise.planning.methods import flash_lb, swift_balance
from poise.planning.methods.eplb import rebalance_experts
from poise.planning.methods.flash_lb import FlashLBSetting
from poise.planning.methods.swift_balance import SwiftBalanceSetting
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.routing.batch import RoutingBatch
from poise.util.errors import OptionError

FROZEN = json.loads(ANSWERS.read_text("utf-8"))


def problem_of(load_TLE, table_LDK=None, *, devices=None, slots=None) -> PlacementProblem:
    steps, layers, experts = load_TLE.shape
    batch = RoutingBatch(
        np.asarray(load_TLE, float), np.full(steps, 1 / steps), 1, np.arange(layers, dtype=np.int32)
    )  # fmt: skip
    current = None
    if table_LDK is not None:
        devices, slots = table_LDK.shape[1:]
        current = Placement(table_LDK.reshape(layers, -1), np.repeat(np.arange(devices), slots), experts, devices)
    cluster = tiny_cluster(np.random.default_rng(0), [devices], equal=True)
    return PlacementProblem(batch, cluster, tiny_model(batch), np.full(devices, slots), current=current)


def tables_of(method, problem, **named):
    placement = method.plan(problem, time_limit_s=60.0, **named).placement
    return placement.slot_expert_LS.reshape(problem.batch.num_layers, problem.num_devices, -1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", [flash_lb, swift_balance], ids=["flash_lb", "swift_balance"])
def test_devices_hold_what_the_originals_give_them(name, method):
    case, frozen = CASES[name], FROZEN[name]
    load, table = case.load_TLE(), case.table_LDK()
    assert (digest(load), digest(table)) == (frozen["loads"], frozen["table"]), "other loads than the original's"
    theirs = frozen[method.__name__.rsplit(".", 1)[1]]
    assert [contents(one) for one in tables_of(method, problem_of(load, table))] == theirs


def imbalance(table_LDK, load_LE) -> float:
    out = []
    for table, load in zip(table_LDK, load_LE, strict=True):
        share = load / np.bincount(table.ravel(), minlength=len(load))
        on = share[table].sum(axis=1)
        out.append(on.max() / on.mean())
    return float(np.mean(out))


def factory():
    """58 layers of 32 ranks with 9 slots, 100 steps of loads with a heavy tail a slot."""
    rng = np.random.default_rng(42)
    table = np.stack([rng.permutation(np.r_[np.arange(256), rng.integers(0, 256, 32)]) for _ in range(58)])
    slot_load = (rng.random((100, 58, 288)) ** 10 * 999 + 1).astype(np.int64)
    load = np.zeros((100, 58, 256), np.int64)
    np.add.at(load, (slice(None), np.arange(58)[:, None], table), slot_load)
    return table.reshape(58, 32, 9), load


def test_the_factory_s_assertions():
    table, load = factory()
    for method, steps, most in ((swift_balance, load.sum(axis=0)[None], 1.08), (flash_lb, load, 1.1)):
        made = tables_of(method, problem_of(steps, table))
        full = np.where(made < 0, table, made)  # a second copy, dropped in a layer that stays
        assert imbalance(full, load.sum(axis=0)) <= most


@pytest.mark.parametrize(("redundant", "released", "corrected"), [(1, 80.0, 60.0), (2, 60.0, 40.0)])
def test_replicas_carry_what_the_release_says_or_what_its_correction_says(redundant, released, corrected):
    for share, each in (("published", released), ("even", corrected)):
        extra, weight = swift_balance._redundancy(np.array([120.0]), redundant, 4, share)
        assert extra.tolist() == [redundant] and weight[0] == pytest.approx(each)
    assert (redundant + 1) * corrected == 120.0
    assert SwiftBalanceSetting().share == "published"


@pytest.mark.parametrize(("loads", "changed"), [([[1, 1, 1, 1]], []), ([[10, 9, 1, 1]], [0])])
def test_only_layers_that_gain_are_laid_out_anew(loads, changed):
    table = np.array([[[0, 1], [2, 3]]])
    made = tables_of(flash_lb, problem_of(np.array(loads)[None], table))
    assert np.flatnonzero((made != table).any(axis=(1, 2))).tolist() == changed


WEIGHT = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)


def by_eplb(weight, replicas, groups, nodes, ranks):
    return rebalance_experts(weight, replicas, groups, nodes, ranks)[0]


def by_flash(weight, replicas, groups, nodes, ranks):
    if replicas % ranks:
        raise OptionError(f"{replicas} replicas do not divide over {ranks} ranks")
    problem = problem_of(weight[None], devices=ranks, slots=replicas // ranks)
    return tables_of(flash_lb, problem).reshape(len(weight), -1)


def counts(table_LS, experts):
    return np.stack([np.bincount(row[row >= 0], minlength=experts) for row in table_LS])


# Loads, replicas, groups, nodes, ranks, and whether the hottest expert must have another replica.
SMALL = [
    (WEIGHT, 16, 4, 2, 8, False), ([[10, 20, 30, 40]], 4, 1, 1, 1, False), ([[50] * 8], 16, 2, 2, 4, False),
    ([[1000] + [1] * 7], 12, 2, 2, 4, True),
    ([[10, 20, 30, 40, 50, 60], [60, 50, 40, 30, 20, 10], [25] * 6], 8, 2, 2, 4, False),
    ([[10, 20, 30, 40]], 8, 3, 2, 4, False), ([[100, 50, 200, 75, 150, 25, 300, 80]], 12, 4, 2, 4, True),
    ([[10, 20, 30, 40, 50, 60]], 8, 3, 2, 4, False), ([[10, 20, 30, 40]], 6, 2, 1, 2, False),
    ([[200, 150, 100, 50, 25, 12], [12, 25, 50, 100, 150, 200]], 10, 3, 1, 2, True),
]  # fmt: skip


@pytest.mark.parametrize("make", [by_eplb, by_flash])
def test_maps_of_small_cases(make):
    for loads, replicas, groups, nodes, ranks, more in SMALL:
        weight = np.array(loads)
        table = make(weight, replicas, groups, nodes, ranks)
        count = counts(table, weight.shape[1])
        assert table.shape == (len(weight), replicas) and table.max() < weight.shape[1]
        assert (count >= 1).all() and (count.sum(axis=1) == replicas).all()
        if more:
            assert (count[np.arange(len(weight)), weight.argmax(axis=1)] >= 2).all()
        if (weight == 50).all():
            assert (count == 2).all()
    with pytest.raises(OptionError):  # theirs is an AssertionError
        make(np.array([[10, 20, 30, 40]]), 7, 2, 2, 4)


def test_eplbs_expected_map():
    expected = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
    for sums in ("single", "double"):
        assert rebalance_experts(WEIGHT, 16, 4, 2, 8, sums=sums)[0].tolist() == expected


def test_replica_counts_that_vllms_flashlb_expects():
    """Its search has two groups; the four of vllm-ascend's release give the first layer others, less balanced."""
    expected = [[1, 1, 1, 2, 1, 2, 1, 1, 2, 1, 2, 1], [1, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1]]
    problem = problem_of(WEIGHT[None], devices=8, slots=2)
    two = tables_of(flash_lb, problem, setting=FlashLBSetting(depth=2, added=0.0))
    assert counts(two.reshape(2, -1), 12).tolist() == expected


def test_no_expert_twice_on_a_rank_and_those_that_stay_keep_their_slots():
    rng = np.random.default_rng(27)
    load = rng.integers(1, 1000, (1, 3, 256))
    start = np.stack([[(np.arange(8 * d, 8 * d + 9)) % 256 for d in range(32)]] * 3)
    made = tables_of(flash_lb, problem_of(load, start))
    for old, new in zip(start.reshape(-1, 9), made.reshape(-1, 9), strict=True):
        assert np.unique(new).size == 9
        stays = np.isin(new, old)
        np.testing.assert_array_equal(new[stays], old[stays])
    assert all(np.unique(layer).size == 256 for layer in made)
