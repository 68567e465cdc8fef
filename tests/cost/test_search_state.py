"""The search's running sums share no code with the cost: they must agree on any placement, after any changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import (
    FLOW_SPLITS,
    load_batch,
    random_count,
    tiny_batch,
    tiny_cluster,
    tiny_model,
    token_batch,
    with_unseen,
)

from poise.cost.compute import expert_times
from poise.cost.step import batch_cost
from poise.cost.traffic import DATA_FLOWS
from poise.planning.problem import PlacementProblem
from poise.planning.solve.state import (
    TIE_BREAK,
    change,
    layer_compute,
    layer_seconds,
    make_data,
    make_state,
    rebuild,
)

SEEDS = st.integers(0, 2**32 - 1)
NODES = st.sampled_from([(2, 1), (3,), (1, 1, 1), (1, 2, 2), (1,)])
LAYERS, EXPERTS = 3, 4
SEARCHED = [(flow, split) for flow, split in FLOW_SPLITS if split != "exact"]  # which searches as even


def make(seed, nodes, traffic, loads, *, top_k=2, pooled=False, max_rows=10**9, split="even"):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    devices = cluster.num_devices
    if loads:
        batch = load_batch(rng, layers=LAYERS, top_k=top_k)
    else:
        idle = (0.0, 0.4)[seed % 2]
        batch = tiny_batch(rng, devices=devices, layers=LAYERS, top_k=top_k, tokens=(9, 0, 5), idle=idle)
    if seed % 3 == 0:
        batch = with_unseen(batch)
    traffic = "home" if loads else traffic
    problem = PlacementProblem(batch, cluster, tiny_model(batch), np.full(devices, EXPERTS), traffic, split, pooled)
    data = make_data(problem, max_rows)
    state = make_state(data, problem, random_count(rng, LAYERS, EXPERTS, devices) > 0)
    return rng, problem, data, state


def by_the_cost(problem, held_LED, batch=None):
    """Seconds of each layer that the placement decides, and the tie break; float64 [L]."""
    batch, cluster = batch or problem.batch, problem.cluster
    cost = batch_cost(
        batch, held_LED.astype(np.int64), cluster, problem.model, traffic=problem.traffic, split=problem.split
    )
    times, one_way = expert_times(cluster, problem.model), problem.traffic == "stay" and batch.top_k == 1
    start = times.start_s + cluster.dispatch_wire.start_s + (0.0 if one_way else cluster.combine_wire.start_s)
    busy = batch.load_BLE.sum(axis=2) > 0
    longest = (times.compute_s + times.activation_s) * (cost.tokens_BLD / cluster.speed_D).max(axis=2)
    wanted = cost.compute_BL + cost.dispatch_BL + cost.combine_BL - start * busy + TIE_BREAK * longest
    return batch.weight_B @ wanted


def check(problem, data, state, rel=1e-9):
    got = [layer_seconds(data, state, layer) for layer in range(LAYERS)]
    assert got == pytest.approx(by_the_cost(problem, state.held_LED).tolist(), rel=rel, abs=1e-10)


def toggles(rng, state):
    """Experts and devices, int64 [n] each, of a random change that leaves every expert a device."""
    layer = int(rng.integers(LAYERS))
    while True:
        many = int(rng.integers(1, 5))
        experts, devices = rng.integers(EXPERTS, size=many), rng.integers(state.held_LED.shape[2], size=many)
        after = state.held_LED[layer].copy()
        for e, d in zip(experts, devices, strict=True):
            after[e, d] ^= True
        if after.any(axis=1).all():
            return layer, experts, devices, after


@given(SEEDS, st.sampled_from(SEARCHED), NODES, st.integers(1, 3), st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_a_fresh_state_is_the_cost(seed, priced, nodes, top_k, loads, pooled):
    _, problem, data, state = make(seed, nodes, priced[0], loads, top_k=top_k, pooled=pooled, split=priced[1])
    check(problem, data, state)


@given(SEEDS, st.sampled_from(SEARCHED), NODES, st.integers(1, 3), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_changes_leave_what_a_new_start_would_give(seed, priced, nodes, top_k, loads, pooled):
    rng, problem, data, state = make(seed, nodes, priced[0], loads, top_k=top_k, pooled=pooled, split=priced[1])
    for _ in range(12):
        layer, experts, devices, after = toggles(rng, state)
        others = np.delete(state.held_LED, layer, axis=0).copy()
        assert change(data, state, layer, experts, devices, np.inf)
        np.testing.assert_array_equal(state.held_LED[layer], after)
        np.testing.assert_array_equal(np.delete(state.held_LED, layer, axis=0), others)
    check(problem, data, state)
    fresh = make_state(data, problem, state.held_LED)
    for name in ("copies_LE", "used_LD", "room_GD"):
        np.testing.assert_array_equal(getattr(state, name), getattr(fresh, name), err_msg=name)
    np.testing.assert_array_equal(np.sort(state.hold_LED, axis=2), np.sort(fresh.hold_LED, axis=2))
    for name in ("compute_LBD", "tokens_LBD", "port_LFBPD"):
        np.testing.assert_allclose(getattr(state, name), getattr(fresh, name), rtol=1e-9, atol=1e-9, err_msg=name)
    for layer in range(LAYERS):
        rebuild(data, state, layer)
    for name in ("compute_LBD", "tokens_LBD", "port_LFBPD"):
        np.testing.assert_allclose(getattr(state, name), getattr(fresh, name), rtol=1e-12, atol=1e-12, err_msg=name)


@given(SEEDS, st.sampled_from(SEARCHED), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_change_above_the_limit_is_undone(seed, priced, loads):
    rng, problem, data, state = make(seed, (2, 1), priced[0], loads, split=priced[1])
    refused = 0
    for _ in range(12):
        layer, experts, devices, after = toggles(rng, state)
        held = state.held_LED.copy()
        ahead = held.copy()
        ahead[layer] = after
        new = layer_compute(data, make_state(data, problem, ahead), layer)
        limit = layer_compute(data, state, layer) * (1 + 1e-9)
        if abs(new - limit) <= 1e-6 * limit:
            continue
        assert change(data, state, layer, experts, devices, limit) == (new < limit)
        np.testing.assert_array_equal(state.held_LED, ahead if new < limit else held)
        refused += new > limit
    check(problem, data, state)
    fresh = make_state(data, problem, state.held_LED)
    for name in ("copies_LE", "used_LD", "room_GD"):
        np.testing.assert_array_equal(getattr(state, name), getattr(fresh, name), err_msg=name)


@pytest.mark.parametrize(("traffic", "split"), SEARCHED)
def test_forward_and_back_is_where_it_began(traffic, split):
    """What the search does to take a change back: the same toggles in reverse."""
    rng, _, data, state = make(7, (2, 1), traffic, False, split=split)
    began = [layer_seconds(data, state, layer) for layer in range(LAYERS)]
    for _ in range(30):
        layer, experts, devices, _ = toggles(rng, state)
        change(data, state, layer, experts, devices, np.inf)
        change(data, state, layer, experts[::-1].copy(), devices[::-1].copy(), np.inf)
    assert [layer_seconds(data, state, layer) for layer in range(LAYERS)] == pytest.approx(began, rel=1e-9)


@given(SEEDS, st.sampled_from(DATA_FLOWS), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_too_many_rows_leave_whole_steps_that_weigh_as_before(seed, traffic, keep):
    """A few evenly spaced steps stand for all, the first among them."""
    rng = np.random.default_rng(seed)
    cluster, sizes = tiny_cluster(rng), [3, 4, 3, 2, 4]
    whole = tiny_batch(rng, devices=3, layers=LAYERS, tokens=sizes)
    home = whole.home_of_tokens(3)
    problem = PlacementProblem(whole, cluster, tiny_model(whole), np.full(3, EXPERTS), traffic)
    rows = sum(sizes) * LAYERS
    data = make_data(problem, int(np.ceil(keep * rows / len(sizes))))
    steps = np.unique(np.linspace(0, len(sizes) - 1, keep).round().astype(int))
    assert data.weight_B.size == len(steps) <= keep and data.weight_B.sum() == pytest.approx(1)
    tokens = np.concatenate([np.arange(whole.start_B[b], whole.start_B[b + 1]) for b in steps])
    weight = whole.weight_B[steps]
    part = token_batch(whole.experts_TLK[tokens], [sizes[b] for b in steps], EXPERTS, home_T=home[tokens],
                       weight_B=weight / weight.sum())  # fmt: skip
    state = make_state(data, problem, random_count(rng, LAYERS, EXPERTS, 3) > 0)
    got = [layer_seconds(data, state, layer) for layer in range(LAYERS)]
    assert got == pytest.approx(by_the_cost(problem, state.held_LED, part).tolist(), rel=1e-9, abs=1e-10)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_equal_tokens_of_a_step_are_one_row(seed):
    rng = np.random.default_rng(seed)
    one = tiny_batch(rng, devices=3, layers=LAYERS, tokens=(4, 3))
    times = np.repeat(np.arange(7), 5)
    many = token_batch(one.experts_TLK[times], [20, 15], EXPERTS, home_T=one.home_of_tokens(3)[times])
    cluster = tiny_cluster(rng)
    for traffic, split in SEARCHED:
        problem = PlacementProblem(many, cluster, tiny_model(many), np.full(3, EXPERTS), traffic, split)
        data = make_data(problem, 10**9)
        assert len(data.rows.weight_M) <= 7 * LAYERS and data.rows.weight_M.sum() == 35 * LAYERS
        check(problem, data, make_state(data, problem, random_count(rng, LAYERS, EXPERTS, 3) > 0))
