"""Routing groups kept whole: against all assignments of groups and all packings of tiny machines, and what is refused."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from benchmarks.group_trace import grouped_trace
from tests.helpers import few_or, tiny_cluster, tiny_model

from poise.machine.cluster import Cluster, from_preset
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.engine_rules import ENGINES, NONE
from poise.planning.groups import WholeGroups, gathered, groups_of
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.group_first import assigned, assignment_seconds, group_first, group_sums, moved_groups
from poise.planning.solve.solve import METHODS, solve, without_redundant
from poise.replay.rows import groups_unseen, plan_and_fewer
from poise.replay.surviving import Survival
from poise.routing.batching import make_batch
from poise.routing.trace import NO_EXPERT, RoutingTrace
from poise.util.errors import NoResultError, OptionError, PlacementError

FLOWS = ("home", "home_device_dedup", "home_node_dedup", "stay")


def grouped_batch(seed, groups, size, *, layers=1, tokens=48, picked=2, top_k=2, step=24):
    share = np.random.default_rng(seed).normal(size=(layers, groups * size))
    trace = grouped_trace(num_tokens=tokens, num_groups=groups, groups_per_token=picked, top_k=top_k,
                          log_share_LE=share, tokens_per_request=tokens, seed=seed)  # fmt: skip
    return make_batch(trace, tokens_per_step=step)


def problem(seed, nodes, slots, groups, size, traffic="home", *, keep="nodes", engine=None, cluster=None, **more):
    batch = grouped_batch(seed, groups, size, **more)
    machine = cluster or tiny_cluster(np.random.default_rng(seed), nodes)
    model = replace(tiny_model(batch), num_expert_groups=groups, groups_per_token=2)
    whole = groups_of(keep, groups * size, groups, machine.node_D)
    return PlacementProblem(
        batch, machine, model, np.asarray(slots), traffic, engine=engine or ENGINES["any"], whole=whole
    )


def partitions(groups, least, most):
    """Every place of every group, tuples of places."""
    for place in product(range(len(most)), repeat=groups):
        count = np.bincount(place, minlength=len(most))
        if (count <= most).all() and (count >= least).all():
            yield place


def packings(experts, slots):
    """Every way to fill devices with so many slots from some experts, each of which has one: lists of sets."""
    for chosen in product(*(combinations(experts, each) for each in slots)):
        if set().union(*chosen) == set(experts):
            yield chosen


def whole_placements(some):
    """Every placement of one layer with all slots filled and groups whole, int32 [1, E, D]."""
    whole, slots = some.whole, some.layer_slots_D
    least, most = whole.room(slots, filled=True)
    for place in partitions(whole.num_groups, least, most):
        place_E = np.repeat(place, whole.size)
        ways = [list(packings(np.flatnonzero(place_E == p).tolist(), slots[whole.place_D == p].tolist()))
                for p in range(whole.num_places)]  # fmt: skip
        for chosen in product(*ways):
            count = np.zeros((1, len(place_E), len(slots)), np.int32)
            for d, experts in enumerate(sum(chosen, ())):
                count[0, list(experts), d] = 1
            yield count


CASES = [
    ((2, 2), (2, 2, 2, 2), 4, 2, "nodes", "home"), ((2, 2), (2, 2, 2, 2), 4, 2, "nodes", "home_node_dedup"),
    ((2, 2), (3, 3, 3, 3), 4, 2, "nodes", "home_device_dedup"), ((2, 1), (2, 2, 4), 4, 2, "nodes", "stay"),
    ((2, 2), (2, 2, 2, 2), 2, 4, "ids", "home_node_dedup"), ((1, 1, 1), (2, 4, 2), 4, 2, "nodes", "home"),
]  # fmt: skip


@pytest.mark.parametrize("nodes, slots, groups, size, keep, traffic", CASES)
def test_no_placement_with_groups_whole_is_faster(nodes, slots, groups, size, keep, traffic):
    for seed in range(few_or(12, 2)):
        some = problem(seed, nodes, slots, groups, size, traffic, keep=keep)
        costs = [some.pricing.cost(some.batch, count).seconds_BL for count in whole_placements(some)]
        least = min(float(some.batch.weight_B @ cost.mean(axis=1)) for cost in costs)
        got = solve(some, work=3)
        assert not some.whole.torn_LG(got.placement.count_LED()).any()
        assert got.objective == pytest.approx(least, rel=1e-9), (len(costs), got.details["starts"])
        assert got.lower_bound <= least * (1 + 1e-9)


def test_no_assignment_of_groups_is_faster_by_its_own_sum():
    """Steps 1 and 2 of the start: seconds counted token by token, and all assignments tried."""
    exact = 0
    for seed in range(few_or(60, 12)):
        traffic = FLOWS[seed % 3]
        cluster = tiny_cluster(np.random.default_rng(seed), (2, 2, 1), equal=seed % 2 == 0)
        some = problem(seed, None, (2, 2, 3, 3, 4), 6, 2, traffic, cluster=cluster, picked=3, top_k=3)
        sums = group_sums(some, some.whole)[0]
        least, most = some.whole.room(some.layer_slots_D, filled=True)
        every = [np.array(place) for place in partitions(6, least, most)]
        seconds = [assignment_seconds(sums, place) for place in every]
        place = every[seed % len(every)]
        work, copies = np.zeros((len(sums.weight_B), 3)), np.zeros(3)
        for g, p in enumerate(place):
            work[:, p] += sums.work_BG[:, g] / sums.speed_P[p]
        start = some.batch.start_B
        for b, weight in enumerate(some.batch.weight_B):
            for token in some.batch.experts_TLK[start[b] : start[b + 1], 0]:
                picks = [int(place[e // 2]) for e in token if e != NO_EXPERT]
                for p in picks if traffic == "home" else set(picks):
                    copies[p] += weight
        want = sums.weight_B @ work.max(axis=1) + (copies * sums.copy_s_P).max()
        assert seconds[seed % len(every)] == pytest.approx(want)
        found = assigned(sums, seed)
        first = assignment_seconds(sums, found[0])
        assert min(seconds) * (1 - 1e-9) <= first <= min(seconds) * 1.05
        exact += first <= min(seconds) * (1 + 1e-9)
        for place in found:
            count = np.bincount(place, minlength=3)
            assert (least <= count).all() and (count <= most).all()
    assert exact >= few_or(50, 10)


def test_gathering_keeps_as_many_slots_as_can_be():
    rng = np.random.default_rng(0)
    for trial in range(few_or(200, 40)):
        slots_D = rng.integers(3, 6, 4) if trial % 2 else np.full(4, 2)
        whole = WholeGroups.on_nodes(8, 4, np.array([0, 0, 1, 1], np.int32))
        held = np.zeros((1, 8, 4), np.int32)
        held[0, rng.permutation(8), np.arange(8) % 4] = 1
        for d in range(4):
            free = np.flatnonzero(held[0, :, d] == 0)
            held[0, rng.choice(free, slots_D[d] - held[0, :, d].sum(), replace=False), d] = 1
        try:
            least, most = whole.room(slots_D, filled=True)
        except OptionError:
            continue
        load = rng.random((1, 8))
        got = gathered(held, whole, slots_D, filled=True, load_LE=load)
        assert not whole.torn_LG(got).any() and (got.sum(axis=2) > 0).all() and (got.sum(axis=1) <= slots_D).all()
        count = np.bincount(whole.place_LE(got)[0, ::2], minlength=2)
        assert (least <= count).all() and (count <= most).all()

        def stay(place, held=held):
            return sum(int(held[0, 2 * g : 2 * g + 2, [2 * p, 2 * p + 1]].sum()) for g, p in enumerate(place))

        most_stay = max(stay(place) for place in partitions(4, least, most))
        assert stay(whole.place_LE(got)[0, ::2]) == most_stay
        if (slots_D == 2).all():
            assert (got & held).sum() == most_stay
        again = gathered(got, whole, slots_D, filled=True, load_LE=load)
        np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("engine", few_or(["any", "none"], ["any"]))
def test_every_method_has_its_groups_gathered(engine):
    some = problem(3, (2, 2), (4, 4, 4, 4), 4, 3, layers=2, engine=ENGINES[engine])
    best = solve(some, work=3)
    for name in METHODS:
        try:
            other = solve(some, method=name, work=3)
        except NoResultError:
            continue
        assert not some.whole.torn_LG(other.placement.count_LED()).any(), name
        assert other.details["groups"]["whole_layers"] == 2
        assert best.objective <= other.objective * (1 + 1e-9), name
    near = solve(replace(some, split="near"), work=3)
    assert near.details["groups"]["whole_layers"] == 2


def test_the_search_itself_tears_no_group():
    """Before anything is gathered: no move that it makes takes an expert out of its place."""
    for seed in range(3):
        some = problem(seed, (2, 2), (3, 3, 3, 3), 4, 2)
        found = METHODS["poise"].plan(some, time_limit_s=Budget(1.0, work=0.02), seed=seed)
        assert not some.whole.torn_LG(found.placement.count_LED()).any()


def test_a_move_of_groups_keeps_them_whole_and_slots_filled():
    rng = np.random.default_rng(1)
    some = problem(5, (2, 2, 1), (2, 2, 3, 3, 4), 6, 2)
    place, seen = group_first(some).count_LED()[0] > 0, set()
    least, most = some.whole.room(some.layer_slots_D, filled=True)
    work = rng.random(12)
    for _ in range(40):
        after = moved_groups(some, place, work, rng)
        if after is None:
            continue
        assert not some.whole.torn_LG(after[None]).any() and (after.sum(axis=0) == some.layer_slots_D).all()
        count = np.bincount(some.whole.place_LE(after[None])[0, ::2], minlength=3)
        assert after.any(axis=1).all() and (least <= count).all() and (count <= most).all()
        seen.add(tuple(count))
        place = after
    assert len(seen) > 1, "groups also go where there is room for one more"


def paired_batch(seed, groups=8, size=6, layers=3, tokens=512, top_k=6):
    """Tokens that take all their experts from two groups, which are always the same two."""
    rng = np.random.default_rng(seed)
    experts = np.empty((tokens, layers, top_k), np.int16)
    for layer in range(layers):
        pair_XG = rng.permutation(groups).reshape(-1, 2)
        pair_T = rng.integers(len(pair_XG), size=tokens)
        ids_TX = (pair_XG[pair_T][:, :, None] * size + np.arange(size)).reshape(tokens, -1)
        experts[:, layer] = np.take_along_axis(ids_TX, rng.random(ids_TX.shape).argsort(axis=1), axis=1)[:, :top_k]
    return make_batch(RoutingTrace(experts, groups * size), tokens_per_step=256)


def paying(seed, keep, traffic="home_node_dedup"):
    """Four nodes of two H100 with a slow network."""
    cluster, batch = from_preset([2, 2, 2, 2], "h100-100g"), paired_batch(seed)
    model = replace(ModelSpec.generic(48, 6, batch.layer_ids_L), num_expert_groups=8, groups_per_token=2)
    return PlacementProblem(batch, cluster, model, np.full(8, 6), traffic, whole=groups_of(keep, 48, 8, cluster.node_D))


def test_whole_where_it_pays_is_never_slower_and_where_it_does_it_is_so():
    for seed in range(few_or(4, 1)):
        free = solve(paying(seed, None), work=1, seed=seed)
        soft = solve(paying(seed, "pays"), work=1, seed=seed)
        hard = solve(paying(seed, "nodes"), work=1, seed=seed)
        assert soft.objective <= min(free.objective, hard.objective) * (1 + 1e-9)
        about = soft.details["groups"]
        assert about["without_s"] == pytest.approx(free.objective) and about["whole_s"] == pytest.approx(hard.objective)
        assert about["taken_s"] == pytest.approx(soft.objective)
        assert soft.objective < 0.97 * free.objective and about["whole_layers"] == 3, "a planted case in which it pays"
        kept = ~paying(0, "nodes").whole.torn_LG(soft.placement.count_LED()).any(axis=1)
        assert kept.sum() == about["whole_layers"]
    home = solve(paying(0, "pays", "home"), work=3)
    assert home.objective <= solve(paying(0, None, "home"), work=3).objective * (1 + 1e-9)
    both = solve(replace(paying(0, "pays"), risk="worst"), work=2)
    assert both.details["groups"]["taken_s"] <= both.details["groups"]["without_s"]
    one = replace(
        paying(0, None), cluster=Cluster.uniform(1, 8), whole=WholeGroups.on_nodes(48, 8, np.zeros(8, int), must=False)
    )
    assert "whole_s" not in solve(one, work=1).details["groups"], "on one node there is nothing to weigh"


def test_what_cannot_be_whole_is_refused_with_its_numbers():
    node_D = np.repeat(np.arange(3), 2).astype(np.int32)
    with pytest.raises(OptionError, match="10 experts cannot be 4 equal"):
        groups_of("nodes", 10, 4, node_D)
    with pytest.raises(OptionError, match="1 routing group of 8 experts: there is nothing"):
        groups_of("pays", 8, 1, node_D)
    with pytest.raises(OptionError, match="unknown way 'node' to keep groups"):
        groups_of("node", 8, 4, node_D)
    with pytest.raises(OptionError, match="devices of 2 experts and routing groups of 3 do not line up"):
        groups_of("ids", 12, 4, node_D)
    whole = groups_of("nodes", 24, 4, node_D)
    with pytest.raises(OptionError, match="on 3 nodes with 24 slots: those have room for 1 each, 3 in all") as caught:
        whole.room(np.full(6, 4), filled=True)
    assert "12 redundant slots" in caught.value.hint and whole.room(np.full(6, 6), filled=True)[1].sum() >= 4
    least, most = whole.room(np.array([6, 6, 3, 3, 3, 3]), filled=True)
    assert least.tolist() == [1, 1, 1] and most.tolist() == [2, 1, 1]
    two = groups_of("nodes", 24, 2, node_D)
    with pytest.raises(OptionError, match="each of 3 nodes needs 1 each to fill its slots, 3 in all"):
        two.room(np.full(6, 6), filled=True)
    assert two.room(np.full(6, 6), filled=False)[0].sum() == 0 and not two.fits(np.full(6, 6), filled=True)
    with pytest.raises(OptionError, match="node 0 has a device of 7 slots, which only 2 groups fill, and room for 1"):
        groups_of("nodes", 24, 4, node_D).room(np.array([7, 4, 9, 9, 9, 9]), filled=True)
    some = problem(0, (2, 2), (2, 2, 2, 2), 4, 2)
    for change, text in (
        ({"pooled": True, "engine": NONE}, "layer by layer"),
        ({"whole": groups_of("nodes", 24, 4, node_D)}, r"groups of \[experts, devices\] \(24, 6\), the problem has"),
        ({"engine": ENGINES["checkpoint"]}, "checkpoint takes new expert ids"),
    ):
        with pytest.raises(OptionError, match=text):
            replace(some, **change)
    with pytest.raises(OptionError, match="4 routing groups lie whole"):
        Survival(some, "device", 0.02)
    torn = Placement.from_devices(np.array([[0, 2, 0, 1, 1, 3, 2, 3]]), 4)
    with pytest.raises(PlacementError, match="layer 0: routing group 0 lies in several places, and 2 of 4"):
        some.check_groups(torn)


def test_engines_that_take_new_ids_keep_groups_by_themselves():
    some = problem(0, (2, 2), (2, 2, 2, 2), 2, 4, keep=None, engine=ENGINES["megatron"])
    assert some.whole.where == "ids" and some.place_D.tolist() == [0, 0, 1, 1]
    assert replace(some, model=replace(some.model, num_expert_groups=1), whole=None).whole is None
    with pytest.raises(OptionError, match="do not line up"):
        problem(0, (2, 1), (4, 4, 4), 4, 3, keep=None, engine=ENGINES["deepspeed"])


def test_what_loads_cannot_show_is_said():
    some = problem(0, (2, 2), (2, 2, 2, 2), 4, 2)
    assert groups_unseen(some) == []
    loads = replace(some, batch=replace(some.batch, experts_TLK=None, start_B=None, request_T=None, home_T=None))
    (said,) = groups_unseen(loads)
    assert "a copy is priced for each of its 2" in said and "at most 2 of 2 nodes" in said
    assert groups_unseen(replace(loads, whole=None)) == []


def test_groups_that_only_may_lie_whole_need_not_fit():
    """Three nodes of 8 slots have no room for 4 groups of 6: the plan is the one without the rule, and says why."""
    free = problem(0, (2, 2, 2), (4,) * 6, 4, 6, keep=None)
    whole = groups_of("pays", 24, 4, free.cluster.node_D)
    soft = replace(free, whole=whole)
    assert "room for 1 each, 3 in all" in groups_unseen(soft)[0]
    with pytest.raises(OptionError, match="3 in all"):
        replace(free, whole=replace(whole, must=True))
    one, other = solve(free, work=0.05), solve(soft, work=0.05)
    assert (one.placement.count_LED() == other.placement.count_LED()).all()
    assert "whole_s" not in other.details["groups"]
    wide = replace(free, slots_D=np.full(6, 6))
    assert without_redundant(replace(wide, whole=whole)).slots_D.sum() == 24, "fewer slots, in which groups do not fit"
    assert without_redundant(replace(wide, whole=replace(whole, must=True))) is None
    fewer = plan_and_fewer(replace(wide, whole=whole), "poise", Budget(1.0, work=0.05), 0)[1]
    assert fewer is None or fewer.placement.num_slots == 24


def test_what_gathering_takes_away_is_counted():
    some = problem(3, (2, 2), (4, 4, 4, 4), 4, 3, layers=2)
    found = solve(some, method="round-robin", work=0.05)
    made = METHODS["round-robin"].plan(some, time_limit_s=1.0).placement
    stayed = (made.count_LED() > 0) & (found.placement.count_LED() > 0)
    assert found.details["groups"]["gathered"] == (made.count_LED() > 0).sum() - stayed.sum() > 0
    again = solve(replace(some, current=found.placement), method="contiguous", work=0.05)
    torn = some.whole.torn_LG(METHODS["contiguous"].plan(some, time_limit_s=1.0).placement.count_LED())
    assert (again.details["groups"]["gathered"] > 0) == torn.any()
