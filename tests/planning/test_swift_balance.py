"""SwiftBalance: feasible on any slots, never less balanced than its start, and its moves are bounded."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, random_slots, tiny_cluster, tiny_model

from poise.planning.methods import contiguous, swift_balance
from poise.planning.methods.lpt import replicate
from poise.planning.methods.swift_balance import PUBLISHED, SwiftBalanceSetting
from poise.planning.placement import EMPTY, Placement
from poise.planning.problem import PlacementProblem
from poise.util.errors import OptionError

GRID = (
    PUBLISHED,
    SwiftBalanceSetting(share="even"),
    SwiftBalanceSetting(share="even", min_gain=0.0),
    SwiftBalanceSetting(share="even", min_gain=0.0, max_transfers=8),
)

SETTINGS = st.sampled_from(
    [
        *GRID, SwiftBalanceSetting(max_swaps=1), SwiftBalanceSetting(imbalance_threshold=1.5),
        SwiftBalanceSetting(one_mean=False), SwiftBalanceSetting(share="even", one_mean=False),
    ]
)  # fmt: skip


def random_current(rng, layers: int, experts: int, slots_D, *, leave_empty: float = 0.2) -> Placement:
    """Every expert somewhere, the other slots with random experts that the device lacks, or empty."""
    device_S = np.repeat(np.arange(len(slots_D)), slots_D)
    rows = np.full((layers, len(device_S)), EMPTY)
    for row in rows:
        where = rng.permutation(len(device_S))
        row[where[:experts]] = rng.permutation(experts)
        for slot in where[experts:]:
            lacks = np.setdiff1d(np.arange(experts), row[device_S == device_S[slot]])
            if lacks.size and rng.random() > leave_empty:
                row[slot] = rng.choice(lacks)
    return Placement(rows, device_S, experts, len(slots_D))


def random_problem(seed: int, *, spare: int | None = None, current: bool | None = None, steps: int = 3):
    rng = np.random.default_rng(seed)
    nodes = [[2, 1], [2, 2], [4], [3, 2], [1]][rng.integers(5)]
    experts, layers = int(rng.integers(max(sum(nodes), 2), 13)), int(rng.integers(1, 4))
    batch = load_batch(rng, experts=experts, layers=layers, steps=steps)
    slots_D = random_slots(rng, experts, sum(nodes), int(rng.integers(0, 6)) if spare is None else spare)
    with_current = bool(rng.integers(2)) if current is None else current
    return PlacementProblem(
        batch, tiny_cluster(rng, nodes, equal=bool(rng.integers(2))), tiny_model(batch), slots_D,
        current=random_current(rng, layers, experts, slots_D) if with_current else None,
    )  # fmt: skip


def start_of(problem: PlacementProblem) -> Placement:
    return problem.current or contiguous.plan(problem, time_limit_s=1.0).placement


def peaks_L(problem: PlacementProblem, placement: Placement) -> np.ndarray:
    """Largest load / speed of each layer under even split, replica by replica."""
    load_LE, out = problem.batch.load_LE(), []
    for layer, row in enumerate(placement.slot_expert_LS):
        load_D = np.zeros(problem.num_devices)
        for slot, expert in enumerate(row):
            if expert != EMPTY:
                load_D[placement.slot_device_S[slot]] += load_LE[layer, expert] / (row == expert).sum()
        out.append((load_D / problem.cluster.speed_D).max())
    return np.array(out)


@given(st.integers(0, 10**6), SETTINGS)
@settings(max_examples=120, deadline=None)
def test_fits_never_worse_and_stable(seed, setting):
    problem = random_problem(seed)
    start, result = start_of(problem), swift_balance.plan(problem, time_limit_s=1.0, setting=setting)
    placement = result.placement
    problem.check(placement)
    assert not placement.has_duplicates
    before, after = peaks_L(problem, start), peaks_L(problem, placement)
    mean_L = problem.batch.load_LE().sum(axis=1) / problem.cluster.speed_D.sum()
    unit_L = np.where((mean_L[0] > 0) & setting.one_mean, mean_L[0], mean_L)  # with the first layer's mean as the code
    some = mean_L > 0
    allowed = np.maximum(before, np.divide(before * unit_L, mean_L, out=before.copy(), where=some))
    assert (after <= allowed * (1 + 1e-6)).all()  # loads are added up in float32
    again = swift_balance.plan(problem, time_limit_s=9.0, seed=5, setting=setting)
    np.testing.assert_array_equal(placement.slot_expert_LS, again.placement.slot_expert_LS)
    # Experts that stay on their device keep their slot.
    np.testing.assert_array_equal(placement.slot_device_S, start.slot_device_S)
    for old, new in zip(start.slot_expert_LS, placement.slot_expert_LS, strict=True):
        for d in range(problem.num_devices):
            mine = placement.slot_device_S == d
            for expert in np.intersect1d(old[mine], new[mine]):
                if expert != EMPTY:
                    assert (np.flatnonzero(old[mine] == expert) == np.flatnonzero(new[mine] == expert)).all()


@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(0, 2))
@settings(max_examples=80, deadline=None)
def test_without_redundancy_a_pair_of_ranks_swaps_at_most_so_often(seed, max_swaps, max_transfers):
    problem = random_problem(seed, spare=0)
    setting = SwiftBalanceSetting(max_swaps=max_swaps, max_transfers=max_transfers, min_gain=0.0)
    start, result = start_of(problem), swift_balance.plan(problem, time_limit_s=1.0, setting=setting)
    before, after = start.count_LED(), result.placement.count_LED()
    fetched = start.diff(result.placement).fetched_L
    assert (fetched <= 2 * max_swaps).all()
    assert fetched.sum() == 2 * result.details["swaps"]  # what a rank received stays there: no move is undone
    for layer in range(problem.batch.num_layers):
        moved = np.einsum("ed,ef->df", before[layer], after[layer])
        np.fill_diagonal(moved, 0)
        assert moved.max(initial=0) <= max_transfers
        np.testing.assert_array_equal(moved, moved.T)


@given(st.integers(0, 10**6), SETTINGS)
@settings(max_examples=60, deadline=None)
def test_a_rank_fetches_at_most_one_expert_from_each_other_and_one_a_redundant_slot(seed, setting):
    problem = random_problem(seed)
    start, placement = start_of(problem), swift_balance.plan(problem, time_limit_s=1.0, setting=setting).placement
    old, new = start.count_LED() > 0, placement.count_LED() > 0
    owners = problem.batch.num_experts
    for layer in range(problem.batch.num_layers):
        fetched_D = (new[layer] & ~old[layer]).sum(axis=0)
        assert (fetched_D <= setting.max_transfers * (problem.num_devices - 1) + problem.slots_D).all()
        redundant = int(problem.slots_D.sum()) - owners
        assert fetched_D.sum() <= 2 * setting.max_swaps + redundant


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_first_swap_is_the_first_that_pays_from_the_coldest_up(seed):
    """One swap without redundancy against all pairs tried by hand."""
    problem = random_problem(seed, spare=0, current=True)
    setting = SwiftBalanceSetting(max_swaps=1, one_mean=False)
    got = swift_balance.plan(problem, time_limit_s=1.0, setting=setting).placement.count_LED()
    speed = problem.cluster.speed_D
    for layer, load in enumerate(problem.batch.load_LE()):
        holds = problem.current.count_LED()[layer].astype(float)
        time_D = load @ holds / speed
        mean = load.sum() / speed.sum()
        expected = time_D.max()
        if mean > 0 and time_D.max() / mean >= setting.imbalance_threshold:
            order = np.argsort(time_D, kind="stable")
            hot = order[-1]
            for cold in order[:-1]:
                best = time_D[hot]
                for a, b in product(np.flatnonzero(holds[:, hot]), np.flatnonzero(holds[:, cold])):
                    gain = load[b] - load[a]
                    best = min(best, max(time_D[hot] + gain / speed[hot], time_D[cold] - gain / speed[cold]))
                if best < time_D[hot] and time_D[hot] - best >= setting.min_gain * mean:
                    expected = max(best, np.delete(time_D, [hot, cold]).max(initial=0.0))
                    break
        after = (load @ got[layer] / speed).max()
        assert after == pytest.approx(min(expected, time_D.max()), rel=1e-6, abs=1e-12)


@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_redundancy_goes_to_the_largest_share(seed, slots, devices):
    load = np.random.default_rng(seed).random(7)
    extra, share = swift_balance._redundancy(load, slots, devices, "even")
    np.testing.assert_array_equal(extra + 1, replicate(load, slots, devices))
    np.testing.assert_allclose(share, load / (extra + 1), rtol=1e-6)
    extra, share = swift_balance._redundancy(load, slots, devices, "published")
    np.testing.assert_allclose(share, 2 * load / (extra + 2), rtol=1e-6)
    assert extra.sum() == min(slots, 7 * (devices - 1))


def test_loads_of_ranks_are_added_up_in_single_precision_slot_by_slot():
    rng = np.random.default_rng(0)
    table = rng.integers(-1, 40, (6, 30))
    weight = (rng.integers(1, 9999, 40) / 7).astype(np.float32)
    expected = np.zeros(6, np.float32)
    for d, row in enumerate(table):
        for expert in row[row >= 0]:
            expected[d] += weight[expert]
    got = swift_balance.slot_sums(table, weight)
    np.testing.assert_array_equal(got, expected)
    exact = np.where(table < 0, 0.0, weight.astype(float)[table]).sum(axis=1)
    assert got.dtype == np.float32 and (got != exact.astype(np.float32)).any()


def layer_problem(load_E, slots_D, rows) -> PlacementProblem:
    """One layer, equal devices; ``rows`` are the slots of the current placement."""
    rng = np.random.default_rng(0)
    batch = replace(load_batch(rng, experts=len(load_E), layers=1, steps=1), load_BLE=np.array([[load_E]], float))
    current = Placement(np.array([rows]), np.repeat(np.arange(len(slots_D)), slots_D), len(load_E), len(slots_D))
    cluster = tiny_cluster(rng, [len(slots_D)], equal=True)
    return PlacementProblem(batch, cluster, tiny_model(batch), np.array(slots_D), current=current)


def test_redundancy_by_hand():
    """Three free slots: two replicas of expert 0 at 5 each, one of expert 1 at 6.

    1 goes to the coldest device, 2. The first 0 may then not go there (its owner has sent already), so it goes to 1; the
    second fits nowhere, and the slot left on device 2 takes the largest exact share it lacks: 5.5 of expert 2.
    """
    problem = layer_problem([10, 9, 5.5, 0.5, 5.4], [2, 3, 3], [0, 1, 2, 4, -1, 3, -1, -1])
    table = swift_balance.start_table(problem)
    load = problem.batch.load_LE()[0]
    got = swift_balance._redeploy(load, table, 0, np.ones(3), PUBLISHED)
    assert [np.flatnonzero(row).tolist() for row in got.holds] == [[0, 1], [0, 2, 4], [1, 2, 3]]
    assert [np.flatnonzero(row).tolist() for row in got.received] == [[], [0], [1, 2]]
    np.testing.assert_array_equal(got.sent, [[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(got.weight, [5, 4.5, 2.75, 0.5, 5.4], rtol=1e-6)
    np.testing.assert_allclose(got.load_D, got.holds @ got.weight, rtol=1e-6)


def test_a_swap_that_gains_too_little_is_not_made():
    problem = layer_problem([5.2, 5.0, 5.0, 4.92], [2, 2], [0, 1, 2, 3])
    assert swift_balance.plan(problem, time_limit_s=1.0).details["swaps"] == 0  # 0.08 of a mean of 10.06
    free = swift_balance.plan(problem, time_limit_s=1.0, setting=SwiftBalanceSetting(min_gain=0.0))
    assert free.details["swaps"] == 1
    assert peaks_L(problem, free.placement)[0] == pytest.approx(10.12)


def test_the_first_layer_sets_the_mean_as_in_the_code():
    """A gain of 0.12: 1.2 % of the own mean of 10.06, 0.12 % of the first layer's, which the code compares with."""
    rng = np.random.default_rng(0)
    batch = load_batch(rng, experts=4, layers=2, steps=1)
    small = [5.24, 5.0, 5.0, 4.88]
    for first, changed in (([50.0, 50.0, 50.0, 50.0], False), ([5.0, 5.0, 5.0, 5.0], True), ([0.0] * 4, True)):
        load = np.array([[first, small]])
        current = Placement(np.array([[0, 1, 2, 3]] * 2), np.array([0, 0, 1, 1]), 4, 2)
        problem = PlacementProblem(replace(batch, load_BLE=load), tiny_cluster(rng, [2], equal=True),
                                   tiny_model(batch), np.array([2, 2]), current=current)  # fmt: skip
        assert (swift_balance.plan(problem, time_limit_s=1.0).details["swaps"] > 0) is changed
        own = swift_balance.plan(problem, time_limit_s=1.0, setting=SwiftBalanceSetting(one_mean=False))
        assert own.details["swaps"] == 1


def test_a_layer_below_the_threshold_is_left_alone_and_another_is_not():
    rng = np.random.default_rng(0)
    batch = load_batch(rng, experts=4, layers=2, steps=1)
    load = np.array([[[10.0, 0.0, 10.0, 0.1], [10.0, 10.0, 1.0, 1.0]]])
    batch = replace(batch, load_BLE=load)
    problem = PlacementProblem(batch, tiny_cluster(rng, [2], equal=True), tiny_model(batch), np.array([2, 2]))
    result = swift_balance.plan(problem, time_limit_s=1.0)
    assert result.placement.slot_expert_LS.tolist()[0] == [0, 1, 2, 3]
    assert result.details["swaps"] == result.details["changed_layers"] == 1
    assert peaks_L(problem, result.placement).tolist() == [10.1, 11.0]
    assert not result.details.get("adapted")


def test_a_current_placement_with_a_second_copy_or_other_slots():
    rng = np.random.default_rng(1)
    batch = load_batch(rng, experts=4, layers=1)
    cluster, model = tiny_cluster(rng, [2], equal=True), tiny_model(batch)
    twice = Placement(np.array([[0, 0, 1, 2, 3]]), np.array([0, 0, 0, 1, 1]), 4, 2)
    result = swift_balance.plan(PlacementProblem(batch, cluster, model, [3, 3], current=twice), time_limit_s=1.0)
    assert not result.placement.has_duplicates
    assert result.placement.num_slots == 6
    assert "second copies" in result.details["adapted"] and "[3, 2]" in result.details["adapted"]
    result = swift_balance.plan(PlacementProblem(batch, cluster, model, [1, 3], current=twice), time_limit_s=1.0)
    assert result.placement.num_slots == 4 and "mapped to 2 devices" in result.details["adapted"]


@pytest.mark.parametrize("with_current", [False, True])
def test_pooled_memory_is_kept(with_current):
    rng = np.random.default_rng(2)
    batch = load_batch(rng, experts=6, layers=3)
    device_LE = np.array([[0, 0, 0, 0, 1, 2], [0, 1, 1, 1, 1, 2], [2, 2, 2, 2, 0, 1]])
    problem = PlacementProblem(
        batch, tiny_cluster(rng, [3]), tiny_model(batch), np.full(3, 2), pooled=True,
        current=Placement.from_devices(device_LE, 3) if with_current else None,
    )  # fmt: skip
    placement = swift_balance.plan(problem, time_limit_s=1.0).placement
    problem.check(placement)
    np.testing.assert_array_equal(placement.count_LED().sum(axis=1), start_of(problem).count_LED().sum(axis=1))


def test_settings_out_of_range():
    assert GRID[0] == PUBLISHED == SwiftBalanceSetting()
    for bad in ({"imbalance_threshold": 0.9}, {"max_swaps": -1}, {"share": "half"}):
        with pytest.raises(OptionError):
            SwiftBalanceSetting(**bad)
