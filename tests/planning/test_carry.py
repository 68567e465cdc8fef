"""Which rank is which, and placements carried over to other devices and slots."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, random_count, random_slots, tiny_batch, tiny_model

from poise.machine.cluster import Cluster
from poise.planning.elastic import RankMap
from poise.planning.methods import carry, lpt
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import solve
from poise.util.errors import OptionError


def lists(ranks):
    return ranks.new_O.tolist(), ranks.stay, ranks.join, ranks.leave


def test_ranks_keep_their_numbers_unless_told():
    assert lists(RankMap.parse(None, 2, 4)) == ([0, 1], [0, 1], [2, 3], [])
    assert lists(RankMap.parse(None, 4, 2)) == ([0, 1, -1, -1], [0, 1], [], [2, 3])
    lost = ([0, 1, -1, 2], [0, 1, 2], [], [2])
    assert lists(RankMap.parse("0:0,1:1,3:2", 4, 3)) == lists(RankMap.parse("0-1:0-1, 3:2", 4, 3)) == lost
    assert lists(RankMap.parse("1:0", 2, 2)) == ([-1, 0], [0], [1], [0])


@pytest.mark.parametrize(
    ("text", "said"),
    [("0", "OLD:NEW"), ("", "OLD:NEW"), ("a:b", "OLD:NEW"), ("-1:0", "OLD:NEW"), ("0:0,0:1", "old rank 0"), ("0:1,1:1", "new rank 1"),
     ("0:3", "3 ranks, the new one 2"), ("3:0", "3 ranks, the new one 2"), ("0-1:0", "2 old ranks and 1 new"), ("2-1:0", "0 old ranks")],
)  # fmt: skip
def test_wrong_ranks_are_named(text, said):
    with pytest.raises(OptionError, match=said):
        RankMap.parse(text, 3, 2)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_every_frame_gives_the_same_change(seed):
    """Old ranks as sets of experts; whatever the numbering, each new rank fetches what its old one lacks."""
    rng = np.random.default_rng(seed)
    old_n, new_n = rng.integers(1, 6, 2)
    old, new = (Placement.from_counts(random_count(rng, 2, 5, int(n))) for n in (old_n, new_n))
    staying = int(rng.integers(0, min(old_n, new_n) + 1))
    pairs = list(zip(rng.permutation(old_n)[:staying].tolist(), rng.permutation(new_n)[:staying].tolist(), strict=True))
    if not pairs:
        return
    ranks = RankMap.parse(",".join(f"{a}:{b}" for a, b in pairs), int(old_n), int(new_n))
    was = {b: a for a, b in pairs}
    want = {
        (x, e, d) for x in range(2) for d in range(new_n) for e in new.experts_of(x, d)
        if d not in was or e not in old.experts_of(x, was[d])
    }  # fmt: skip
    clusters = [None, Cluster.uniform(1, int(new_n)), *([Cluster.uniform(1, int(old_n))] if not ranks.join else [])]
    for cluster in clusters:
        frame = ranks.frame(cluster)
        diff = frame.before(old).diff(frame.after(new))
        assert {(x, e, int(frame.new_F[f])) for x, e, f in diff.fetches_F3.tolist()} == want
        if frame.cluster is not None:
            assert frame.cluster.num_devices == len(frame.new_F)
    number = ranks.number(old).diff(new)
    assert {tuple(row) for row in number.fetches_F3.tolist()} == want
    assert number.fetched_D.shape == (new_n,)


def test_ranks_that_leave_are_where_the_cluster_says_or_on_further_nodes():
    ranks = RankMap.parse("0:0,2:1", 4, 2)
    old = ranks.frame(Cluster.parse("2x2"))
    assert old.new_F.tolist() == [0, -1, 1, -1] and not old.assumed
    new = ranks.frame(Cluster.parse("1x2"))
    assert new.old_F.tolist() == [0, 2, 1, 3] and new.cluster.node_D.tolist() == [0, 0, 1, 1] and new.assumed
    with pytest.raises(OptionError, match="3 devices, the placements need 2 or, with those that leave, 4"):
        ranks.frame(Cluster.parse("1x3"))
    with pytest.raises(OptionError, match="2 devices, the placements need 4"):
        RankMap.keep(2, 4).frame(Cluster.parse("1x2"))


def drawn(seed):
    rng = np.random.default_rng(seed)
    experts, devices, before = int(rng.integers(2, 9)), int(rng.integers(1, 6)), int(rng.integers(1, 6))
    batch = load_batch(rng, experts=experts)
    cluster = Cluster.uniform(1, devices)
    cluster = replace(cluster, speed_D=rng.choice([0.5, 1.0, 2.0], devices))
    slots = random_slots(rng, experts, devices, int(rng.integers(0, experts * (devices - 1) + 1)))
    current = Placement.from_counts(random_count(rng, 2, experts, before))
    return PlacementProblem(batch, cluster, tiny_model(batch), slots, current=current)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_what_is_carried_over_fits_and_fetches_no_more_than_a_plan_from_nothing(seed):
    problem = drawn(seed)
    old = problem.current
    few, free = (carry.carried(old, problem, bias=bias) for bias in (100.0, 0.0))
    for placement in (few, free, *carry.starts(problem)):
        problem.check(placement)
        assert not placement.has_duplicates
    none = lpt.plan(problem, time_limit_s=1.0).placement
    assert old.diff(few).fetched <= old.diff(none).fetched + problem.num_devices
    if carry.fits(old, problem):
        assert [old.diff(each).fetched for each in carry.starts(problem)] == [0]


def test_the_bias_saves_fetches():
    problems = [drawn(seed) for seed in range(60)]
    total = [
        sum(p.current.diff(carry.carried(p.current, p, bias=bias)).fetched for p in problems) for bias in (0, 0.1, 1.0)
    ]
    assert total[2] < total[1] < total[0]


def test_growth_fills_the_new_ranks_and_leaves_the_old_ones_theirs():
    rng = np.random.default_rng(0)
    batch = replace(load_batch(rng, experts=16, layers=2, steps=1), load_BLE=np.ones((1, 2, 16)))
    old = Placement.from_devices(np.tile(np.repeat(np.arange(2), 8), (2, 1)), 2)
    problem = PlacementProblem(batch, Cluster.uniform(1, 4), tiny_model(batch), np.full(4, 4), current=old)
    got = carry.carried(old, problem)
    assert old.diff(got).fetched_D.tolist() == [0, 0, 8, 8] and "mapped to 4 devices" in got.method
    shrunk = PlacementProblem(batch, Cluster.uniform(1, 2), tiny_model(batch), np.full(2, 8), current=got)
    assert got.diff(carry.carried(got, shrunk)).fetched_D.tolist() == [8, 8]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (5, 3)])
@pytest.mark.parametrize("traffic", ["home", "stay"])
def test_every_method_plans_from_a_placement_for_other_devices(before, after, traffic):
    rng = np.random.default_rng(before)
    batch = tiny_batch(rng, devices=after)
    current = Placement.from_counts(random_count(rng, 2, 4, before))
    slots = random_slots(rng, 4, after, 2)
    problem = PlacementProblem(batch, Cluster.uniform(1, after), tiny_model(batch), slots, traffic, current=current,
                               migration_steps=10.0)  # fmt: skip
    for method in ("swift-balance", "flash-lb", "poise"):
        got = solve(problem, method=method, work=6)
        wire = problem.cluster.intra_bytes_per_s
        assert problem.migration_seconds(got.placement) == pytest.approx(
            current.diff(got.placement).fetched_D.max() * problem.model.expert_bytes / wire / 10 / 2
        )
        if method == "poise":
            assert any("mapped to" in name for name in got.details["starts"])
        else:
            assert "mapped to" in got.details["adapted"]


def test_a_plan_from_fewer_slots_than_are_held_is_no_error():
    rng = np.random.default_rng(1)
    batch = load_batch(rng, experts=6)
    current = Placement.from_counts(np.ones((2, 6, 2), int))
    problem = PlacementProblem(batch, Cluster.uniform(1, 2), tiny_model(batch), np.array([3, 3]), current=current)
    got = solve(problem, work=6)
    assert current.diff(got.placement).fetched == 0


def test_other_layers_or_experts_are_refused():
    problem = drawn(3)
    for other in (Placement.from_devices([[0, 0]], 1), Placement.from_devices(np.zeros((3, 5), int), 1)):
        with pytest.raises(OptionError, match="layers, experts"):
            replace(problem, current=other)
        with pytest.raises(OptionError, match="layers, experts"):
            carry.carried(other, problem)
