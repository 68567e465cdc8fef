"""The way in the order of pay-back: what each leg saves, no better order, rounds that do not collide, where it ends."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from tests.control.test_moves import drawn_problem, random_placement, simulate, step_seconds
from tests.helpers import few_or
from tests.planning.test_groups import problem as grouped_problem

from poise import api
from poise.api import planned as planned_by
from poise.control import payback
from poise.control.moves import move_list
from poise.control.payback import Leg, _in_order, bounded, migration, paid_back
from poise.control.price import PortTraffic, share_of
from poise.cost.links import PortLoad
from poise.cost.step import layer_works
from poise.machine.cluster import Cluster, from_preset
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.engine_rules import ANY, ENGINES, NONE
from poise.planning.groups import groups_of
from poise.planning.placement import EMPTY, Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.complete import as_held
from poise.planning.solve.solve import solve
from poise.routing.batch import RoutingBatch
from poise.routing.trace import LoadProfile
from poise.util.errors import OptionError, PlacementError

FLOWS = ("home", "home_node_dedup", "stay")


def drawn_way(seed):
    """Every flow in turn; where the engine knows no empty slot, none is empty on the way."""
    problem, before, after = drawn_problem(seed, FLOWS[seed % 3], (NONE, ANY)[seed // 3 % 2])
    if problem.engine is NONE and seed % 5 == 0:  # experts twice on a device, as in some engines' own maps
        rng = np.random.default_rng(seed)
        before, after = (random_placement(rng, 2, 4, problem.slots_D, twice=True) for _ in range(2))
    return problem, migration(before, after, problem)


@pytest.mark.parametrize("part", range(4))
def test_every_leg_serves_and_saves_what_it_says(part):
    """The figures against the cost model, the order against every other order of the legs of each layer."""
    pooled = 0
    for seed in range(part * 250, part * 250 + few_or(250, 12)):
        problem, made = drawn_way(seed)
        seconds = [step_seconds(problem, made.before.count_LED())]
        for count in range(1, len(made.legs) + 1):
            there = made.placement(count)
            problem.check(there)
            assert problem.engine is NONE or (there.slot_expert_LS != EMPTY).all()
            assert made.before.diff(there).fetched == made.fetched_K[count]
            seconds.append(step_seconds(problem, there.count_LED()))
        np.testing.assert_allclose(seconds[0] - np.array(seconds), made.gain_K, rtol=1e-7, atol=1e-9)
        np.testing.assert_array_equal(made.placement(len(made.legs)).count_LED(), made.after.count_LED())
        if problem.traffic == "stay":
            continue
        paying = [leg for leg in made.legs if leg.gain_s > 0]
        assert list(made.legs[: len(paying)]) == paying, "what lowers nothing is last"
        assert all(one.rate >= other.rate for one, other in pairwise(paying))
        chains = [[leg for leg in paying if leg.layer == layer] for layer in range(2)]
        every = [
            (sum(leg.fetched for leg in some), sum(leg.gain_s for leg in some))
            for cut in product(*(range(len(chain) + 1) for chain in chains))
            for some in [[leg for chain, end in zip(chains, cut, strict=True) for leg in chain[:end]]]
        ]
        for count in range(len(paying) + 1):
            if count < len(paying) and not paying[count].fetched:
                continue  # what takes no fetch is yet to come
            best = max(gain for fetched, gain in every if fetched <= made.fetched_K[count])
            assert made.gain_K[count] >= best - 1e-9
        pooled += len(paying)
    assert pooled > 3


def test_a_leg_that_pays_only_for_what_follows_is_one_with_it():
    none = np.zeros((1, 1))

    def legs(*rows):
        return [Leg(layer, fetched, gain, none) for layer, fetched, gain in rows]

    def told(made):
        return [(leg.layer, leg.fetched, leg.gain_s) for leg in made]

    assert told(_in_order(legs((0, 1, 5.0), (0, 1, 1.0), (0, 1, 3.0), (1, 1, 2.5)))) == [
        (0, 1, 5.0), (1, 1, 2.5), (0, 2, 4.0)
    ]  # fmt: skip
    assert told(_in_order(legs((0, 1, 1.0), (0, 1, 2.0), (0, 1, 6.0)))) == [(0, 3, 9.0)]
    assert told(_in_order(legs((1, 2, 4.0), (0, 0, 0.1)))) == [(0, 0, 0.1), (1, 2, 4.0)]


@pytest.mark.parametrize("part", range(4))
def test_rounds_in_that_order_serve_and_do_not_collide(part):
    """Random pairs of maps: every state serves, no slot is overwritten while it holds a last copy (the simulator), no two
    transfers of a turn meet, and turns are the fewest.
    """
    turns, fewest = 0, 0
    for seed in range(part * 250, part * 250 + few_or(250, 25)):
        problem, made = drawn_way(seed)
        staging, node_D = 1 + seed % 3, problem.cluster.node_D
        moves = move_list(
            made.before,
            made.after,
            expert_bytes=1.0,
            staging=staging,
            node_D=node_D,
            migration=made if seed % 4 else None,
        )
        states = simulate(made.before, moves, staging)
        end = states[-1] if states else made.before.slot_expert_LS
        np.testing.assert_array_equal(_counts(end, made.before), made.after.count_LED())
        assert moves.fetched == made.before.diff(made.after).fetched
        for each in moves.rounds:
            some = each.turns(made.before.num_devices)
            assert sorted(move for one in some for move in one) == sorted(each.fetches)
            for one in some:
                assert len({m.from_device for m in one}) == len({m.to_device for m in one}) == len(one) > 0
            assert len(some) == _degree(each.fetches)
        assert moves.turns == sum(_degree(each.fetches) for each in moves.rounds)
        assert moves.fewest_turns == _degree([move for each in moves.rounds for move in each.fetches])
        turns, fewest = turns + moves.turns, fewest + moves.fewest_turns
    assert fewest <= turns <= 1.3 * fewest


def _degree(moves):
    """Most that one device sends, or receives."""
    ends = [[move[way] for move in moves] for way in (3, 4)]
    return max((max(map(one.count, one)) for one in ends if one), default=0)


def _counts(slots_LS, like):
    return Placement(slots_LS, like.slot_device_S, like.num_experts, like.num_devices).count_LED()


def skewed(seed, traffic="home"):
    """Eight devices, four layers, hot experts: from contiguous to longest-first. Some layers are far more uneven."""
    rng = np.random.default_rng(seed)
    load = rng.pareto(1.0, (4, 4, 24)) * np.array([1.0, 5.0, 25.0, 2.0])[None, :, None] + 1.0
    batch = RoutingBatch(load, np.full(4, 0.25), 2, np.arange(4, dtype=np.int32))
    cluster = from_preset([4, 4], "h100", flops_per_s=1e10, intra_latency_s=0.0, inter_latency_s=0.0)
    problem = PlacementProblem(batch, cluster, ModelSpec.generic(24, 2, batch.layer_ids_L), np.full(8, 4), traffic)
    return problem, *(solve(problem, method=name).placement for name in ("contiguous", "lpt"))


@pytest.mark.parametrize("seed", range(few_or(8, 2)))
def test_what_pays_most_comes_first(seed):
    """Seconds of the steps between rounds: below those of the order of fewest rounds, at few rounds more."""
    problem, before, after = skewed(seed)
    made = migration(before, after, problem)
    assert made.gain_K[-1] > 0 and len(made.legs) > 12
    half = np.interp(0.5 * made.gain_K[-1], np.maximum.accumulate(made.gain_K), made.fetched_K)
    assert made.fetched_K[np.searchsorted(made.gain_K, 0.5 * made.gain_K[-1])] == made.fetches_for(0.5)
    assert half < 0.35 * made.fetched_K[-1], "half of the gain comes with few fetches"
    late, rounds = [], []
    for ordered in (made, None):
        moves = move_list(before, after, expert_bytes=1.0, node_D=problem.cluster.node_D, migration=ordered)
        states = [before.slot_expert_LS, *simulate(before, moves, 1)]
        over = [
            step_seconds(problem, _counts(state, before)) - step_seconds(problem, after.count_LED()) for state in states
        ]
        late.append(sum(over))
        rounds.append(len(moves.rounds))
    assert late[0] < 0.85 * late[1] and rounds[0] <= 1.3 * rounds[1] + 1


def test_the_way_ends_where_the_rest_does_not_pay():
    problem, before, after = skewed(3)
    made = migration(before, after, problem)
    traffic = PortTraffic.of(problem.batch, before, problem.pricing)
    size = problem.model.expert_bytes
    delay_K = made.delay_K(traffic, size)
    assert delay_K[0] == 0 and (np.diff(delay_K) >= 0).all() and delay_K[-1] > 0
    whole = move_list(before, after, expert_bytes=size, staging=100, node_D=problem.cluster.node_D)
    assert len(whole.rounds) == 1
    assert delay_K[-1] == pytest.approx(whole.delay_R(traffic).sum(), rel=0.5), "other senders, same ports"
    seen = set()
    for horizon in (0.0, *np.geomspace(1e-3, 1e6, 12) * delay_K[-1] / made.gain_K[-1]):
        count = made.pays(traffic, size, horizon)
        net = [horizon * gain - delay for gain, delay in zip(made.gain_K, delay_K, strict=True)]
        assert net[count] == max(net)
        part = made.upto(count)
        assert (part.after.count_LED() == made.placement(count).count_LED()).all() and len(part.legs) == count
        simulate(before, move_list(before, part.after, expert_bytes=size, migration=part), 1)
        seen.add(count)
    assert 0 in seen and max(seen) == int(np.argmax(made.gain_K)) and len(seen) > 3


def test_a_way_between_other_placements_is_refused():
    problem, before, after = skewed(0)
    made = migration(before, after, problem)
    with pytest.raises(OptionError, match="the way goes from"):
        move_list(after, before, expert_bytes=1.0, migration=made)
    with pytest.raises(OptionError, match="the way goes from"):
        move_list(before, after, expert_bytes=1.0, migration=made, lost=[1])


def test_a_way_of_few_fetches_ends_where_bounded_does():
    problem, before, after = skewed(1)
    for most in (0, 3, 9):
        made = migration(before, after, problem, max_moves=most)
        assert made.fetched_K[-1] <= most and (made.gain_K >= 0).all() and (most == 0) == (not made.legs)


def test_after_the_fine_legs_layers_go_as_a_whole(monkeypatch):
    problem, before, after = skewed(2)
    many = len(migration(before, after, problem).legs)
    monkeypatch.setattr(payback, "FINE", 2 * before.diff(after).fetched * 24 * 8)
    some = migration(before, after, problem)
    assert 4 < len(some.legs) < many
    monkeypatch.setattr(payback, "FINE", 1)
    made = migration(before, after, problem)
    assert len(made.legs) <= 4
    assert made.gain_K[-1] == pytest.approx(
        step_seconds(problem, before.count_LED()) - step_seconds(problem, after.count_LED())
    )


def grouped_way(seed, engine="any"):
    """Two placements that keep groups whole on two nodes, replicas or none."""
    keep = "nodes" if engine == "any" else None
    problem = grouped_problem(
        seed, (2, 2), (2 + seed % 2,) * 4, 4, 2, keep=keep or "ids", engine=ENGINES[engine], layers=3
    )
    rng = np.random.default_rng(seed)
    return problem, *(as_held(problem, random_placement(rng, 3, 8, problem.slots_D)) for _ in range(2))


@pytest.mark.parametrize("seed", range(few_or(60, 8)))
def test_where_groups_must_lie_whole_they_do_at_every_stop(seed):
    problem, before, after = grouped_way(seed)
    made = migration(before, after, problem)
    for count in range(len(made.legs) + 1):
        problem.check_groups(made.placement(count))
    for most in (2, 5, 9):
        problem.check_groups(got := bounded(before, after, problem, most))
        assert before.diff(got).fetched <= most
    free = replace(problem, whole=None)
    torn = as_held(free, random_placement(np.random.default_rng(seed), 3, 8, problem.slots_D))
    with pytest.raises(PlacementError, match="several places"):
        problem.check_groups(torn)
    clock = Budget(1e3, now=lambda: 0.0)
    assert paid_back(problem, before, after, clock, named=True)["pays"] is None  # moving is free
    problem = replace(problem, migration_steps=1e3)
    assert paid_back(problem, before, after, clock, named=True)["pays"] is not None
    told = paid_back(problem, torn, after, clock, named=True)
    assert told["pays"] is None and told["fetched"][-1] == torn.diff(after).fetched


def test_new_expert_ids_are_no_way_of_a_running_engine():
    problem, before, after = grouped_way(0, "checkpoint")
    clock = Budget(1e3, now=lambda: 0.0)
    assert paid_back(problem, before, after, clock, named=True) is None
    any_engine = replace(problem, engine=ANY, whole=groups_of("nodes", 8, 4, problem.cluster.node_D))
    before, after = (as_held(any_engine, each) for each in (before, after))
    assert paid_back(any_engine, before, after, clock, named=True) is not None


@pytest.fixture
def priced(monkeypatch):
    """Steps and layers of every pricing, as they come."""
    out, real = [], payback._seconds

    def seconds(problem, count_LED, first, last):
        out.append((problem.batch.num_steps, last - first))
        return real(problem, count_LED, first, last)

    monkeypatch.setattr(payback, "_seconds", seconds)
    return out


def test_what_is_said_of_the_way_keeps_to_a_budget(priced, monkeypatch):
    problem, before, after = skewed(0)
    now = [0.0]
    whole = paid_back(problem, before, after, Budget(1e3, now=lambda: now[0]), named=True)
    many = len(priced)
    assert "priced_on" not in whole and "cut_by_clock" not in whole and many > 100
    priced.clear()
    some = paid_back(problem, before, after, Budget(1e-4, now=lambda: now[0]), named=True)
    assert {steps for steps, _ in priced} == {1} and some["priced_on"] == "1 of 4 steps"
    priced.clear()
    late = Budget(1e3, now=lambda: now[0])
    now[0] = 2e3
    coarse = paid_back(problem, before, after, late, named=True)
    assert coarse["cut_by_clock"] and len(coarse["fetched"]) <= 5 and len(priced) <= 5 * 4
    assert coarse["gain_seconds"][-1] == pytest.approx(whole["gain_seconds"][-1])

    priced.clear()
    asked, real = Budget(1e3, now=lambda: 0.0), payback._seconds

    def interrupted(*args):
        if len(priced) == 30:
            asked.stop()
        return real(*args)

    monkeypatch.setattr(payback, "_seconds", interrupted)
    assert paid_back(problem, before, after, asked, named=True)["fetched"][-1] == whole["fetched"][-1]
    assert 30 < len(priced) < many / 2
    priced.clear()
    assert paid_back(problem, before, after, asked, named=True) is None and not priced


def test_under_stay_a_budget_that_is_over_leaves_layers_in_their_order(priced):
    problem, before, after = next(found for seed in range(99) if (found := drawn_problem(seed, "stay", NONE)) and
                                  (found[1].count_LED() != found[2].count_LED()).any(axis=(1, 2)).all())  # fmt: skip
    over = Budget(1.0, now=lambda: 0.0)
    over.stop()
    made = migration(before, after, problem, budget=over)
    assert [leg.layer for leg in made.legs] == [0, 1] and len(priced) == 4
    assert made.fetched_K[-1] == before.diff(after).fetched


@pytest.mark.parametrize("steps", [float("inf"), float("nan"), -1.0])
def test_migration_steps_that_are_no_number_of_steps_are_refused(steps):
    problem, before, _ = skewed(0)
    with pytest.raises(OptionError, match="migration steps must be at least 0 and finite"):
        replace(problem, current=before, migration_steps=steps)


def test_a_plan_tells_the_way_by_its_own_budget(monkeypatch):
    """A tenth of it, which the search has not; with work it comes on top. Nothing once it was stopped."""
    problem, before, _ = skewed(0)
    loads = LoadProfile(problem.batch.load_BLE, top_k=2)
    seen, searches = [], []
    real, real_search = planned_by.paid_back, planned_by.plan_and_fewer
    monkeypatch.setattr(planned_by, "paid_back", lambda *args, **more: seen.append(args[3]) or real(*args, **more))
    monkeypatch.setattr(planned_by, "plan_and_fewer", lambda *args: searches.append(args[2]) or real_search(*args))

    def planned(budget, **more):
        return api.plan(loads, problem.cluster, redundant=8, method="lpt", current=before, time_limit_s=budget, **more)

    budget = Budget(10.0)
    told = planned(budget).details["payback"]
    assert told["fetched"][-1] > 0 and told["pays"] is None  # no model was named
    assert seen[0].seconds == pytest.approx(1.0) and searches[0].seconds == pytest.approx(9.0)
    searches[0].stop()
    assert seen[0].stopped and "payback" not in planned(budget).details
    planned(counted := Budget(1.0, work=10.0))
    assert searches[2] is counted and seen[2].seconds == pytest.approx(0.1 * counted.seconds)


def fluid(moved_s, busy_s, exchange_s, rest_s, cycles=400):
    """Seconds that steps are longer while so much passes, by small turns of computing and exchange on one port."""
    left, longer = moved_s, 0.0
    while left > 0:
        left -= rest_s / cycles
        tokens, spent, tick = busy_s / cycles, 0.0, exchange_s / cycles / 50
        while spent < exchange_s / cycles - 1e-15 or tokens > 1e-15:
            both = left > 0 and tokens > 1e-15
            tokens -= tick * (0.5 if both else 1.0)
            left -= tick * (0.5 if both else 1.0)
            spent += tick
        longer += spent - exchange_s / cycles
    return longer


@pytest.mark.parametrize(("busy", "exchange", "rest"), [(1, 1, 2), (0.8, 1, 0.5), (0.5, 1, 1), (0.2, 1, 3), (1, 1, 0)])
def test_the_price_is_that_of_a_port_that_both_share(busy, exchange, rest):
    cluster = Cluster.uniform(1, 2)
    busy_PD, longer_PD = np.zeros((2, 4, 2))
    busy_PD[0, 0], longer_PD[0, 0] = busy, max(0, 2 * busy - exchange)
    traffic = PortTraffic(cluster, share_of(exchange + rest, busy_PD, longer_PD))
    moved = np.array([0.3, 0.9, 2.5])
    load = np.zeros((4, 3, 2))
    load[0, :, 0] = moved * cluster.intra_bytes_per_s
    got = traffic.delay_s(PortLoad(*load), 1.0)
    want = [fluid(each, busy, exchange, rest) for each in moved]
    np.testing.assert_allclose(got, want, rtol=0.05, atol=0.02)
    load[1, :, 1] = load[0, :, 0]
    np.testing.assert_array_equal(got, traffic.delay_s(PortLoad(*load), 1.0))


def test_under_stay_results_come_to_the_first_expert():
    """A token at home on rank 0, its experts on ranks 1 and 2: sent 0 to 1 and 2, joined 2 to 1; nothing else is full."""
    first, one = np.zeros(2, np.int64), np.ones(1)
    experts = np.array([[[1, 2]]], np.int16)
    batch = RoutingBatch(np.array([[[0.0, 1, 1]]]), one, 2, np.arange(1, dtype=np.int32), experts, np.arange(2), None,
                         first[:1])  # fmt: skip
    cluster = from_preset([3], "h100", flops_per_s=1e10, intra_latency_s=0.0)
    problem = PlacementProblem(batch, cluster, ModelSpec.generic(3, 2, batch.layer_ids_L), np.ones(3), "stay")
    place = Placement.from_devices(np.arange(3)[None], 3)
    share_PD = PortTraffic.of(batch, place, problem.pricing).share_PD
    assert {(p, d) for p, d in np.argwhere(share_PD > 0).tolist()} == {(0, 0), (0, 2), (1, 1)}


@pytest.mark.parametrize("seed", range(12))
def test_busy_ports_are_those_of_the_tokens(seed):
    problem, before, _ = drawn_problem(seed, FLOWS[seed % 3], NONE)
    there = (0, 1, 2, 3)
    again = there if problem.traffic == "stay" else (1, 0, 3, 2)
    cluster = problem.cluster
    traffic = PortTraffic.of(problem.batch, before, problem.pricing)
    busy_PD, longer_PD = np.zeros((2, 4, cluster.num_devices))
    works = layer_works(problem.batch, before.count_LED(), cluster, traffic=problem.traffic, split="even")
    ways = [(problem.model.dispatch_bytes_per_token, cluster.dispatch_wire, "out", there),
            (problem.model.combine_bytes_per_token, cluster.combine_wire, "back", again)]  # fmt: skip
    for (steps, _), work in works:
        for (size, wire, name, order), (at, b) in product(
            ways, enumerate(range(*steps.indices(len(problem.batch.weight_B))))
        ):
            load, weight = getattr(work, name), problem.batch.weight_B[b]
            port = [load.intra_out_BD, load.intra_in_BD, load.net_out_BD, load.net_in_BD]
            seconds = np.zeros((4, cluster.num_devices))
            for p, d in np.ndindex(seconds.shape):
                mine = cluster.node_D == cluster.node_D[d] if p > 1 and cluster.nic_shared else [d]
                rate = wire.inter_bytes_per_s if p > 1 else wire.intra_bytes_per_s
                seconds[order[p], d] = port[p][at, mine].sum() * size / rate
            busy_PD += weight * seconds
            longer_PD += weight * np.maximum(0, 2 * seconds - seconds.max())
    passes_PD = step_seconds(problem, before.count_LED()) + longer_PD - busy_PD
    np.testing.assert_allclose(traffic.share_PD, longer_PD / passes_PD, atol=1e-12)
    assert (busy_PD > 0).any() and (longer_PD > 0).any()
