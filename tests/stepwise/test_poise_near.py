"""``poise-near``: spreads against the readable evaluators, batches by their rules, and never slower than doing nothing."""

from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import few_or, tiny_cluster

from poise.cost.links import port_seconds
from poise.cost.machine import expert_work, make_machine
from poise.cost.traffic import Copies, port_load
from poise.cost.weights import StepPrice, compiled_price, fetch_seconds, step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.replay.serving import FastLoop, replay_steps
from poise.replay.static import replay
from poise.routing.batch import RoutingBatch
from poise.stepwise.driver import LayerDriver
from poise.stepwise.methods.split import spread_evenly
from poise.stepwise.poise import near, outlook, ways
from poise.stepwise.poise.batches import Way, next_batch, one_fetch_seconds
from poise.stepwise.poise.host import look_seconds
from poise.stepwise.poise.near import PoiseNear
from poise.stepwise.poise.outlook import Site, descended, expected_loads, site_of
from poise.stepwise.poise.shares import deal_rows, planned_shares
from poise.stepwise.poise.spread import (
    LEAST_MOVE,
    Slots,
    TokenMove,
    _norm,
    begin,
    descend,
    even_seconds,
    make_spread,
    norm_after,
    spread_seconds,
)
from poise.stepwise.poise.ways import FirstBatch
from poise.stepwise.protocol import LayerView

SEEDS = st.integers(0, 2**32 - 1)
MANY = few_or(200, 40)


def case(seed, *, experts=None, nodes=None):
    """A machine, and a random layer on it: its price, static holders and more of them, tokens on those."""
    rng = np.random.default_rng(seed)
    nodes = nodes or [int(n) for n in rng.integers(1, 4, rng.integers(1, 4))]
    cluster = tiny_cluster(rng, nodes, measured=False)
    devices, experts = sum(nodes), experts or int(rng.integers(2, 9))
    model = replace(ModelSpec.generic(experts, 1, np.arange(1)), hidden_size=4, expert_intermediate_size=4)
    static = np.zeros((experts, devices), bool)
    static[np.arange(experts), rng.integers(0, devices, experts)] = True
    held = static | (rng.random(static.shape) < rng.choice([0.0, 0.2, 0.6]))
    tokens = np.where(held, rng.exponential(20.0, held.shape) * (rng.random(held.shape) < 0.7), 0.0)
    return SimpleNamespace(
        rng=rng, cluster=cluster, model=model, static=static, held=held, tokens=tokens,
        machine=make_machine(cluster, model), price=StepPrice(cluster, model, float(rng.uniform(0.1, 30.0)), float(rng.uniform(0, 5.0))),
    )  # fmt: skip


def exchange(pairs_DD, made):
    """Seconds of dispatch and combine, by the readable evaluator."""
    load, model, cluster = port_load(Copies(pairs_DD[None]), made.cluster), made.model, made.cluster
    return (port_seconds(load, model.dispatch_bytes_per_token, cluster, cluster.dispatch_wire)
            + port_seconds(load, model.combine_bytes_per_token, cluster, cluster.combine_wire))[0]  # fmt: skip


def slowest(tokens, made):
    """Seconds of the slowest device."""
    work = np.array([[expert_work(n, made.machine) for n in row] for row in tokens])
    return (work.sum(axis=0) / made.cluster.speed_D).max()


# ---- spreads -----------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=MANY, deadline=None)
def test_a_spread_costs_what_its_shares_send(seed):
    """Every row worked out, every copy booked on its ports."""
    made = case(seed)
    experts, devices = made.tokens.shape
    rows, share = np.zeros((devices, experts, devices)), np.zeros(devices)
    for e, s in product(range(experts), range(devices)):
        if made.tokens[e].sum() > 0:
            planned_shares(made.tokens[e], s, made.machine, share)
            assert share.min() >= 0 and share.sum() == pytest.approx(1.0)
            rows[s, e] = share * made.tokens[e].sum() / devices
            own = min(made.tokens[e, s], made.tokens[e].sum() / devices)
            assert rows[s, e, s] == pytest.approx(own)  # what can stay does
    np.testing.assert_allclose(rows.sum(axis=0), made.tokens, atol=1e-9)
    spread = make_spread(made.tokens.copy(), made.held, made.machine)
    assert spread_seconds(spread, made.machine) == pytest.approx(
        slowest(made.tokens, made) + exchange(rows.sum(axis=1), made)
    )


@given(SEEDS)
@settings(max_examples=MANY, deadline=None)
def test_tokens_leave_a_node_only_where_it_has_no_place_for_them(seed):
    made = case(seed)
    devices, node = made.tokens.shape[1], made.cluster.node_D
    for tokens in made.tokens[made.tokens.sum(axis=1) > 0]:
        sent = np.zeros((devices, devices))
        for s in range(devices):
            planned_shares(tokens, s, made.machine, sent[s])
        sent *= tokens.sum() / devices
        for n in range(node.max() + 1):
            inside = sent[np.ix_(node == n, node == n)].sum()
            need = tokens.sum() / devices * (node == n).sum()
            assert inside == pytest.approx(min(need, tokens[node == n].sum()))


@given(SEEDS)
@settings(max_examples=MANY, deadline=None)
def test_the_engines_split_costs_what_it_sends(seed):
    made = case(seed)
    load = made.tokens.sum(axis=1)
    tokens = made.held / made.held.sum(axis=1, keepdims=True) * load[:, None]
    pairs = np.tile(tokens.sum(axis=0) / len(made.cluster.node_D), (len(made.cluster.node_D), 1))
    assert even_seconds(load, made.held, made.machine) == pytest.approx(slowest(tokens, made) + exchange(pairs, made))


@given(SEEDS)
@settings(max_examples=MANY, deadline=None)
def test_a_move_is_what_the_sums_of_all_devices_say(seed):
    made = case(seed)
    spread = make_spread(made.tokens.copy(), made.held, made.machine)
    descent = begin(spread, made.machine)
    for _ in range(6):
        e, b = int(made.rng.integers(len(made.held))), int(made.rng.integers(made.held.shape[1]))
        having = np.flatnonzero(spread.tokens_ED[e])
        if not len(having) or having[0] == b:
            continue
        a = int(having[0])
        move = TokenMove(e, a, b, spread.tokens_ED[e, a] * float(made.rng.choice([1.0, 0.3])))
        tokens = spread.tokens_ED.copy()
        said = norm_after(descent, move, False)
        np.testing.assert_array_equal(tokens, spread.tokens_ED)
        assert norm_after(descent, move, True) == said
        tokens[e, a] -= move.tokens
        tokens[e, b] += move.tokens
        anew = begin(make_spread(tokens, made.held, made.machine), made.machine)._replace(scale=descent.scale)
        for name in ("tokens_ED", "work_D", "port_PD", "flow_EPD"):
            np.testing.assert_allclose(getattr(spread, name), getattr(anew.spread, name), atol=1e-6)
        sums = begin(spread, made.machine)
        np.testing.assert_allclose(
            descent.sum_2N, sums.sum_2N * (sums.scale / descent.scale) ** 16, rtol=1e-4, atol=1e-9
        )


@given(SEEDS, st.booleans())
@settings(max_examples=MANY, deadline=None)
def test_a_descent_keeps_tokens_slots_and_holders(seed, grows):
    made = case(seed)
    free = made.rng.integers(0, 3, made.held.shape[1]) if grows else np.zeros(made.held.shape[1], np.int64)
    fixed = made.static if grows else made.held
    spread = make_spread(made.tokens.copy(), made.held.copy(), made.machine)
    descent = begin(spread, made.machine)
    before = _norm(descent.sum_2N[0].sum(), descent.sum_2N[1].sum())
    slots = Slots(free.copy(), fixed)
    descend(spread, slots, 20, made.machine)
    np.testing.assert_allclose(spread.tokens_ED.sum(axis=1), made.tokens.sum(axis=1))
    assert (spread.tokens_ED >= 0).all() and not spread.tokens_ED[~spread.held_ED].any()
    assert (spread.held_ED >= fixed).all()
    np.testing.assert_array_equal(spread.held_ED.sum(axis=0) + slots.free_D, made.held.sum(axis=0) + free)
    assert slots.free_D.min() >= 0
    after = begin(spread, made.machine)
    ended = _norm(*(after.sum_2N.sum(axis=1) * (after.scale / descent.scale) ** 16))
    assert ended <= before * (1 + 1e-6) + LEAST_MOVE


@pytest.mark.parametrize("seed", range(few_or(60, 20)))
def test_a_descent_ends_near_the_best_of_all_spreads(seed):
    """Two experts on three devices, every way to deal them in tenths: at most 5 % above."""
    made = case(seed, experts=2, nodes=[(3,), (2, 1), (1, 1, 1)][seed % 3])
    load = made.rng.exponential(40.0, 2)
    held = np.ones((2, 3), bool)
    ways_to_deal = [np.array(cut) / 10 for cut in product(range(11), repeat=3) if sum(cut) == 10]
    best = min(spread_seconds(make_spread(np.stack([a * load[0], b * load[1]]), held, made.machine), made.machine)
               for a in ways_to_deal for b in ways_to_deal)  # fmt: skip
    site = Site(held.tobytes(), 0, made.price)
    assert descended(site, held, load)[0] <= 1.05 * best


# ---- rows --------------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=MANY, deadline=None)
def test_a_source_needs_its_own_tokens_only(seed):
    made = case(seed)
    experts, devices = made.held.shape
    load = made.rng.poisson(float(made.rng.choice([0.3, 5.0, 300.0])), (devices, experts)).astype(np.int64)
    rows = deal_rows(load, made.tokens, made.held, made.machine)
    assert (rows.sum(axis=2) == load).all() and rows.min() >= 0 and not rows.sum(axis=0)[~made.held].any()
    for source in range(devices):
        alone = np.zeros_like(load)
        alone[source] = load[source]
        np.testing.assert_array_equal(deal_rows(alone, made.tokens, made.held, made.machine)[source], rows[source])
    share = np.zeros(devices)
    for e, s in product(range(experts), range(devices)):
        if made.tokens[e].sum() > 0:
            planned_shares(made.tokens[e], s, made.machine, share)
            assert (np.abs(rows[s, e] - share * load[s, e]) < 1 + 1e-6).all()


def test_what_does_not_divide_goes_to_all_holders():
    """A hundred sources with a token each, three holders elsewhere: none has fewer than a fifth of them."""
    made = case(0, experts=1, nodes=(103,))
    held = np.zeros((1, 103), bool)
    held[0, 100:] = True
    load = np.zeros((103, 1), np.int64)
    load[:100] = 1
    tokens = np.where(held, 34.0, 0.0)
    assert (deal_rows(load, tokens, held, made.machine).sum(axis=(0, 1))[100:] >= 20).all()


# ---- batches -----------------------------------------------------------------------------------------------------


@given(SEEDS, st.booleans())
@settings(max_examples=MANY, deadline=None)
def test_a_batch_takes_no_longer_than_one_fetch(seed, far):
    made = case(seed)
    experts, devices = made.held.shape
    node, price = made.cluster.node_D, compiled_price(made.price)
    target = made.static | (made.rng.random(made.held.shape) < 0.4)
    slots = made.held.sum(axis=0) + made.rng.integers(0, 2, devices)
    way = Way(target, made.rng.random(made.held.shape), made.static, slots)
    coming, dropped = next_batch(made.held, way, far, price)
    assert not (coming & (made.held | ~target)).any()
    assert not (dropped & (made.static | target | ~made.held)).any()
    after = (made.held & ~dropped) | coming
    assert (after.sum(axis=0) <= slots).all() and (made.held & ~dropped).any(axis=1).all()
    limit = one_fetch_seconds(far, price.machine)
    assert not coming.any() or fetch_seconds(made.held & ~dropped, coming, made.price) <= limit * (1 + 1e-6)
    here = np.array([[made.held[e, node == n].any() for n in range(node.max() + 1)] for e in range(experts)])
    came = np.array([[coming[e, node == n].sum() for n in range(node.max() + 1)] for e in range(experts)])
    assert (came[~here] <= (1 if far else 0)).all()  # once into a node; its devices have it from there later
    for e, d in np.argwhere(target & ~made.held & ~coming):  # nothing is left out that would fit
        n = node[d]
        room = after[:, d].sum() < slots[d] or (after[:, d] & ~target[:, d] & ~made.static[:, d] & ~coming[:, d]).any()
        if room and (here[e, n] or (far and not came[e, n])):
            more = coming.copy()
            more[e, d] = True
            assert fetch_seconds(made.held & ~dropped, more, made.price) > limit * (1 - 1e-6)


def test_batches_double():
    """One expert for eight nodes: one holder, then two, four, eight."""
    made = case(3, experts=1, nodes=(1,) * 8)
    held = np.zeros((1, 8), bool)
    held[0, 0] = True
    way = Way(np.ones((1, 8), bool), np.ones((1, 8)), held.copy(), np.ones(8, np.int64))
    many = [1]
    while many[-1] < 8:
        held |= next_batch(held, way, True, compiled_price(made.price))[0]
        many.append(int(held.sum()))
    assert many == [1, 2, 4, 8]


def test_a_node_takes_an_expert_from_the_network_once():
    """Two holders in other nodes could send to both devices of a third; the second has it from the first, later."""
    made = case(3, experts=1, nodes=(1, 1, 2))
    held = np.array([[True, True, False, False]])
    way = Way(np.ones((1, 4), bool), np.ones((1, 4)), held.copy(), np.ones(4, np.int64))
    for want in ([False, False, True, False], [False, False, False, True]):
        coming, _ = next_batch(held, way, True, compiled_price(made.price))
        assert coming[0].tolist() == want
        held |= coming


def test_an_exposed_fetch_has_to_pay_sooner_than_it_would_come_by_itself():
    none = np.zeros((1, 1), bool)
    assert FirstBatch(none, none, gain_s=2.0, exposed_s=9.0, steps=10).at_once(100)
    assert not FirstBatch(none, none, gain_s=1.0, exposed_s=9.0, steps=10).at_once(100)
    assert not FirstBatch(none, none, gain_s=2.0, exposed_s=9.0, steps=10).at_once(8)  # what is left of the horizon
    assert not FirstBatch(none, none, gain_s=2.0, exposed_s=-1.0, steps=1).at_once(100)  # hidden anyway


# ---- loads -------------------------------------------------------------------------------------------------------


def test_noise_is_no_skew():
    rng = np.random.default_rng(0)
    noise = rng.poisson(0.5, (24, 128)).astype(float)
    got = expected_loads(noise)
    assert got.sum() == pytest.approx(noise.mean(axis=0).sum())
    assert got.std() < 0.35 * noise.mean(axis=0).std()
    hot = noise.copy()
    hot[:, 7] += 40
    assert expected_loads(hot)[7] > 0.97 * hot[:, 7].mean()
    assert expected_loads(np.full((3, 4), 2.0)).tolist() == [2.0] * 4


# ---- the policy --------------------------------------------------------------------------------------------------


def runs(made, policy, load_BE, step_slots=2):
    """Every outcome of a driver over loads of [B, E], sources alike."""
    driver = LayerDriver(policy, made.static, step_slots=step_slots, layer=0)
    for step, load_E in enumerate(load_BE):
        known = load_BE[:step].astype(float)
        view = driver.view(step, driver.predict(known, load_E.sum()), known, made.price)
        yield driver.finish(view, driver.choose(view), spread_evenly(load_E, made.held.shape[1])), driver


def loads(made, steps, *, noise):
    """Loads of a popularity that stays, int64 [B, E]."""
    share = made.rng.dirichlet(np.full(len(made.held), 0.4))
    total = int(made.rng.choice([60, 3000]))
    return (
        made.rng.multinomial(total, share, steps) if noise else np.tile(made.rng.multinomial(total, share), (steps, 1))
    )


@given(SEEDS)
@settings(max_examples=few_or(60, 15), deadline=None)
def test_holders_and_slots_hold_and_every_rank_decides_alike(seed):
    made = case(seed)
    load_BE, policy = loads(made, 24, noise=True), PoiseNear(horizon=50.0, margin=0.0, refresh=3)
    first = [done for done, _ in runs(made, policy, load_BE)]
    for cached in (ways.first_batch, outlook.best_sending, outlook.planned_tokens):
        cached.cache_clear()
    for (again, driver), done in zip(runs(made, policy, load_BE), first, strict=True):
        used = driver.held_ED | driver.coming_ED
        assert (used >= made.static).all() and (used.sum(axis=0) <= done.view.slots_D).all()
        np.testing.assert_array_equal(again.plan.holders_ED, done.plan.holders_ED)
        np.testing.assert_array_equal(again.plan.quota_ED, done.plan.quota_ED)
        assert again.plan.passive == done.plan.passive == driver.needs_no_loads(done.view, done.early_ED)
        if done.plan.passive:
            load_SE = spread_evenly(load_BE[done.view.step], made.held.shape[1])
            for source in range(made.held.shape[1]):
                row = driver.unaided_row(done.view, done.early_ED, load_SE[source], source)
                assert (row is None) == (done.plan.rows_SED is None)
                assert row is None or np.array_equal(row, done.plan.rows_SED[source])


@given(SEEDS, st.integers(2, 40))
@settings(max_examples=few_or(80, 25), deadline=None)
def test_never_slower_than_nothing_over_the_horizon(seed, horizon):
    """Loads that stay: whole steps of the replay, fetches, windows and control priced, against the static map."""
    made = case(seed)
    load_BE = loads(made, horizon, noise=False) * 40
    batch = RoutingBatch(load_BE[:, None].astype(float), np.full(horizon, 1 / horizon), 1, np.arange(1, dtype=np.int32))
    static = Placement.from_counts(made.static[None].astype(np.int64))
    nothing = replay(batch, static, made.cluster, made.model, traffic="home", split="even")
    loop = FastLoop(PoiseNear(horizon=float(horizon), margin=0.0, refresh=4), 2, window_s=made.price.window_s * 9,
                    control_s=made.price.control_s)  # fmt: skip
    got = replay_steps(batch, static, loop, made.cluster, made.model, traffic="home", warm_up=0)
    assert got.step_seconds_B.sum() <= nothing.step_seconds_B.sum() * 1.001


def test_it_gains_where_there_is_much_to_gain():
    """One hot expert on two nodes: settled steps take less than 0.7 of the static map's."""
    made = case(11, experts=8, nodes=(2, 2))
    made.static[:] = np.repeat(np.eye(4, dtype=bool), 2, axis=0)
    load_BE = np.tile(np.array([4000, 10, 10, 10, 10, 10, 10, 10]), (60, 1))
    batch = RoutingBatch(load_BE[:, None].astype(float), np.full(60, 1 / 60), 1, np.arange(1, dtype=np.int32))
    static = Placement.from_counts(made.static[None].astype(np.int64))
    nothing = replay(batch, static, made.cluster, made.model, traffic="home", split="even").step_seconds_B
    loop = FastLoop(PoiseNear(), 2, window_s=20.0, control_s=1.0)
    got = replay_steps(batch, static, loop, made.cluster, made.model, traffic="home", warm_up=0).step_seconds_B
    assert got[-1] < 0.7 * nothing[-1]


def test_counts_are_exchanged_where_loads_change_with_every_step():
    """Two holders of each expert, whose loads swap at random: shares of a plan miss them, an exact split does not."""
    made = case(5, experts=6, nodes=(3,))
    made.static[:] = True
    made.price = replace(made.price, control_s=0.0)
    load_BE = np.stack([made.rng.permutation([30000, 10, 10, 10, 10, 10]) for _ in range(40)])
    how = [done.plan.passive for done, _ in runs(made, PoiseNear(refresh=1), load_BE, step_slots=0)]
    assert how[0] and not all(how[8:])
    dear = replace(made.price, control_s=1e6)
    made.price = dear
    assert all(done.plan.passive for done, _ in runs(made, PoiseNear(refresh=1), load_BE, step_slots=0))


def test_loads_are_those_of_the_look_in_force():
    """Looks come so many steps apart, each is in force when it has ended, and knows no load of its own step or later."""
    made = case(2, experts=4, nodes=(2,))
    policy = PoiseNear(refresh=4)
    loads_HE = np.arange(1.0, 61.0)[:, None] * np.ones(4)
    looks = policy.plans_beside(made.price, 4, 8.0)
    driver = LayerDriver(policy, made.static, step_slots=2, layer=0)
    newest = []
    for step in range(60):
        for _ in range(2):  # asked twice, as an evaluation does
            view = driver.view(step, np.full(4, 2.0), loads_HE[:step], made.price)
        newest.append(int(view.seen_HE[-1, 0]) if len(view.seen_HE) else 0)
        assert len(view.seen_HE) <= policy.recent and newest[-1] <= max(0, step - looks.late)
        if len(view.seen_HE):
            assert policy._loads(view).sum(axis=1).mean() == pytest.approx(8.0)
        else:
            assert not len(policy._loads(view)) and not view.settled
    change = np.flatnonzero(np.diff(newest)) + 1
    assert [newest[step] for step in change] == [step - looks.late for step in change]
    gaps, known = np.diff(change), change[:-1] - looks.late
    assert looks.every == 4 > looks.soonest == 1 and len(change) > 8
    np.testing.assert_array_equal(gaps, np.where(known >= looks.every, looks.every, looks.soonest))


def test_a_rank_has_time_for_the_looks_at_its_layers():
    """Between two looks at a layer no less passes than its rank needs for all of its layers, on any machine and batch."""
    model, far = ModelSpec.parse("llama-4-maverick"), {}
    for nodes, pairs in product((1, 2, 8), (64, 4096, 65536)):
        price = step_price(pairs, 128, Cluster.parse(f"{nodes}x8:h200"), model)
        devices, looks = 8 * nodes, PoiseNear().plans_beside(price, 128, pairs)
        best_s = price.window_s + even_seconds(np.full(128, pairs / 128), np.ones((128, devices), bool),
                                               compiled_price(price).machine)  # fmt: skip
        step_s, own = model.num_moe_layers * best_s, -(-model.num_moe_layers // devices)
        busy = own * look_seconds(128, devices) / (looks.every * step_s)
        assert own * look_seconds(128, devices) <= 1.2 * looks.soonest * step_s
        assert busy <= 1.2 and looks.every >= looks.soonest >= looks.late >= 1 and looks.every >= PoiseNear().refresh
        far[nodes, pairs] = looks
    assert far[8, 64].every > 8 and far[8, 64].late > far[1, 65536].late == 1


def test_a_way_goes_on_only_once_a_look_has_seen_its_batch_come():
    """What comes within a step comes at most once a look, and the next look is one that began after that."""
    made = case(11, experts=8, nodes=(2, 2))
    made.static[:] = np.repeat(np.eye(4, dtype=bool), 2, axis=0)
    made.price = replace(made.price, window_s=1e9)
    load_BE = np.tile(np.array([4000, 900, 10, 10, 10, 10, 10, 10]), (90, 1))
    starts = [step for step, (done, _) in enumerate(runs(made, PoiseNear(refresh=16), load_BE))
              if done.started_ED is not None]  # fmt: skip
    late = PoiseNear().plans_beside(made.price, 8, float(load_BE[0].sum())).late
    assert len(starts) >= 2 and all(b - late > a for a, b in pairwise(starts))


def test_sites_of_views_that_plan_alike_are_one():
    made = case(4)
    view = LayerView(made.static, made.held, np.ones(len(made.held)), np.zeros((0, len(made.held))),
                     np.zeros_like(made.static), 2, 7, 3, made.price)  # fmt: skip
    site = site_of(view)
    assert site == site_of(replace(view, step=8, layer=1)) and (site.slots_D == view.slots_D).all()
    assert (site.static_ED == made.static).all() and near.SLACK > 0
