"""poise and the policies of Hecate, FasterMoE, SmartMoE and FlexMoE: what each promises."""

from dataclasses import replace

import numpy as np
import pytest
from benchmarks.grids import grid_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stepwise.step_cases import random_case, view_of

from poise.cost.compute import expert_times
from poise.cost.split import exact_quota
from poise.cost.weights import HIDDEN_SHARE, step_price, training_price
from poise.machine.cluster import Cluster
from poise.machine.curve import MeasuredCurve
from poise.machine.model import ModelSpec
from poise.stepwise.methods.faster_moe import FasterMoE
from poise.stepwise.methods.flex_moe import FlexMoE
from poise.stepwise.methods.hecate import Hecate, HecateCalibrated, materialise, nearest_quota, nearest_rows
from poise.stepwise.methods.lplb import Lplb
from poise.stepwise.methods.smart_moe import SmartMoE
from poise.stepwise.poise.policy import Poise
from poise.stepwise.poise.work_split import best_split, exact_quota_by_work, plan_seconds, split_seconds
from poise.stepwise.poise.workspace import desk_of
from poise.stepwise.protocol import LayerView
from poise.stepwise.registry import POLICIES
from poise.stepwise.sharding import owned_ED

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full-replication"])
@given(SEEDS, st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_plans_are_valid_with_every_published_setting(name, seed, slots):
    rng = np.random.default_rng(seed)
    view, load_SE = random_case(rng, slots=slots)
    policy = POLICIES[name]
    setting = grid_of(policy)[seed % len(grid_of(policy))]
    policy = type(policy)(**setting)
    held = policy.before_gate(view)
    assert (held.sum(axis=0) <= view.slots_D).all() and held.any(axis=1).all()
    plan = policy.after_gate(view, held, load_SE)
    plan.check(view, load_SE)
    assert policy.keeps or not (view.static_ED & ~plan.holders_ED).any()
    with pytest.raises(ValueError, match="read-only"):
        plan.quota_ED[0, 0] = 1


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_balancing_tokens_is_exact_on_its_holders(seed):
    view, load_SE = random_case(np.random.default_rng(seed))
    policy = Poise(objective="tokens")
    plan = policy.after_gate(view, policy.before_gate(view), load_SE)
    best = exact_quota(load_SE.sum(axis=0), plan.holders_ED, view.price.cluster.speed_D).sum(axis=0).max()
    assert plan.quota_ED.sum(axis=0).max() == best


def test_exactly_predicted_surplus_is_spread_evenly():
    """One hot expert of 8 on 4 devices; two step slots are plenty."""
    load = np.full((4, 8), 25)
    load[:, 0] = 400
    static = np.zeros((8, 4), bool)
    static[np.arange(8), np.arange(8) % 4] = True
    view = view_of(static, load, 2)
    policy = Poise(objective="tokens")
    plan = policy.after_gate(view, policy.before_gate(view), load)
    assert plan.quota_ED.sum(axis=0).max() <= 1.01 * load.sum() / 4
    kept = view_of(static, load, 2, before_ED=plan.holders_ED)
    assert (policy.before_gate(kept) == plan.holders_ED).all()  # what is predicted again is not fetched again


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_fast_split_is_whole_and_priced_as_it_is(seed):
    """The kernel's split sums to the loads, and it never chooses one that its own price calls slower than exact."""
    view, load_SE = random_case(np.random.default_rng(seed))
    layer = desk_of(view).put(view.static_ED)
    holders = layer.holders
    seconds = best_split(load_SE, 0.05, layer)
    tokens_H = layer.space.best_H[: holders.device_H.size].copy()
    total = np.bincount(holders.expert_H, weights=tokens_H, minlength=len(view.static_ED))
    np.testing.assert_allclose(total, load_SE.sum(axis=0))
    exact = exact_quota(load_SE.sum(axis=0), view.static_ED, layer.machine.speed_D)[holders.expert_H, holders.device_H]
    assert seconds == pytest.approx(split_seconds(tokens_H, load_SE, layer))
    assert seconds <= split_seconds(exact.astype(float), load_SE, layer) * 1.5 + 1e-12


def test_hot_experts_are_split_on_a_machine_with_a_curve():
    """A roofline, given as a curve whose last knot lies far beyond any load, is planned on as the roofline itself."""
    load_SE = np.array([[900, 40, 30, 30]] * 4)
    static = np.eye(4, dtype=bool)
    static[0] = True
    view = view_of(static, load_SE, 1)
    slow = replace(view.price.cluster, memory_bytes_per_s=view.price.cluster.memory_bytes_per_s / 32)
    view = replace(view, price=replace(view.price, cluster=slow))
    times = expert_times(view.price.cluster, view.price.model)
    tokens = np.array([1.0, times.read_s / times.compute_s, 1e7])
    curve = MeasuredCurve(
        tokens, np.maximum(times.read_s, tokens * times.compute_s), view.price.model.expert_parameters
    )
    measured = replace(view, price=replace(view.price, cluster=replace(view.price.cluster, expert_curve=curve)))
    quotas = [exact_quota_by_work(load_SE, 0.0, desk_of(each).put(static)) for each in (view, measured)]
    seconds = [plan_seconds(each.predicted_E.copy(), 0.0, desk_of(each).put(static)) for each in (view, measured)]
    assert quotas[0][0].max() < 3600
    np.testing.assert_array_equal(quotas[0], quotas[1])
    assert seconds[0] == pytest.approx(seconds[1])


def test_algorithm_1_by_hand():
    held = np.zeros((4, 4), bool)
    held[np.arange(4), np.arange(4)] = True
    load, free, node = np.array([60.0, 30.0, 10.0, 0.0]), np.full(4, 2), np.array([0, 0, 1, 1])
    everywhere = materialise(load, held, free, 2, 2, node)  # step 2: the top 2 to all devices
    assert everywhere[:2].all() and (everywhere.sum(axis=1) == [4, 4, 1, 1]).all()
    spread = materialise(load, held, free, 3, 1, node)  # step 3: 4 places for 60, 30 and 10 %
    assert spread.sum() - held.sum() == 4 or spread[0].all()
    assert spread[0, 2] or spread[0, 3]  # the node that lacked expert 0 comes first


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_hecate_sends_a_token_to_the_nearest_replica(seed):
    view, load_SE = random_case(np.random.default_rng(seed))
    node_D = view.price.cluster.node_D
    rows = nearest_rows(load_SE, view.static_ED, node_D)
    assert (rows.sum(axis=2) == load_SE).all()
    for source in range(len(node_D)):
        for expert in range(len(view.static_ED)):
            used = np.flatnonzero(rows[source, expert])
            if view.static_ED[expert, source]:
                assert set(used) <= {source}
            elif view.static_ED[expert, node_D == node_D[source]].any():
                assert (node_D[used] == node_D[source]).all()
            if used.size:
                holders = view.static_ED[expert].sum()
                assert rows[source, expert][used].ptp() <= 1 if hasattr(rows, "ptp") else holders >= used.size
    assert (nearest_quota(load_SE, view.static_ED, node_D) == rows.sum(axis=0)).all()


@pytest.mark.parametrize("policy", [Hecate(), Lplb(history_steps=0)])
@given(seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_without_room_for_rows_the_quotas_are_the_same(policy, seed):
    view, load_SE = random_case(np.random.default_rng(seed))
    held = policy.before_gate(view)
    whole = policy.after_gate(view, held, load_SE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{type(policy).__module__}.MAX_ROWS", 0)
        plan = policy.after_gate(view, held, load_SE)
    assert plan.rows_SED is None and plan.passive == whole.passive
    np.testing.assert_array_equal(plan.quota_ED, whole.quota_ED)
    plan.check(view, load_SE)


@pytest.mark.parametrize("seed", [0, 1, 14117, 15213, 36666])
def test_what_comes_in_the_background_fits_though_a_later_plan_wants_back_what_it_drops(seed):
    rng, devices, experts = np.random.default_rng(seed), 8, 16
    cluster = Cluster.parse("1x8:h100")
    price = step_price(8 * 4096, experts, cluster, replace(ModelSpec.parse("deepseek-v3"), num_experts=experts),
                       window_s=1.0)  # fmt: skip
    static = np.zeros((experts, devices), bool)
    static[np.arange(experts), rng.permutation(np.arange(experts) % devices)] = True
    held = static.copy()
    for d in range(devices):
        held[rng.permutation(np.flatnonzero(~held[:, d]))[: rng.integers(0, 2) + 1], d] = True
    load = np.exp(1.5 * rng.normal(size=experts))
    load *= 8 * 4096 * 8 / load.sum()
    view = LayerView(static, held, load, np.zeros((0, experts)), np.zeros_like(static), 2, 0, 0, price)
    fetch = Poise().in_background(view, held)
    if fetch is not None:
        after = (held & ~fetch.dropped_ED) | fetch.coming_ED
        assert (after.sum(axis=0) <= view.slots_D).all() and (after >= static).all()


def test_calibration_moves_only_what_pays():
    load = np.zeros((2, 2), np.int64)
    load[:, 0] = 40_000
    static = np.eye(2, dtype=bool)
    view = view_of(static, load, 1, predicted_E=np.array([1.0, 1.0]))
    policy = HecateCalibrated(overlap=1)
    held = view.static_ED
    assert policy.after_gate(view, held, load).holders_ED.sum() >= 2
    small = np.ones((2, 2), np.int64)
    assert (policy.after_gate(view, held, small).holders_ED == held).all()
    assert Hecate(overlap=3).limits(view) == (2, 1)


def test_shadows_stop_where_the_latency_does():
    load = np.array([[1000, 1], [1000, 1]])
    view = view_of(np.eye(2, dtype=bool), load, 1)
    plan = FasterMoE().after_gate(view, view.before_ED, load)
    assert plan.quota_ED.sum() == load.sum()
    tiny = FasterMoE().after_gate(view, view.before_ED, np.ones((2, 2), np.int64))
    assert (tiny.holders_ED == view.before_ED).all()


def test_smart_moe_swaps_on_its_interval_and_keeps_one_owner():
    static = np.zeros((4, 2), bool)
    static[[0, 1], 0] = static[[2, 3], 1] = True
    recent = np.array([[50.0, 50.0, 1.0, 1.0]])
    load = np.ones((2, 4), np.int64)
    waits = view_of(static, load, 0, step=7, recent_HE=recent)
    swaps = view_of(static, load, 0, step=10, recent_HE=recent)
    assert (SmartMoE().before_gate(waits) == static).all()
    after = SmartMoE().before_gate(swaps)
    assert (after.sum(axis=1) == 1).all() and recent[0] @ after[:, 0] == 51


def test_flex_moe_expands_when_called_and_rests_when_balanced():
    static = np.eye(4, dtype=bool)
    load = np.ones((4, 4), np.int64)
    hot = view_of(static, load, 1, recent_HE=np.array([[1e6, 1.0, 1.0, 1.0]]))
    calm = view_of(static, load, 1, recent_HE=np.ones((1, 4)))
    assert FlexMoE(horizon=1e6).before_gate(hot)[0].sum() > 1
    assert (FlexMoE().before_gate(calm) == static).all()


def training_view(load_E, recent_HE, share=HIDDEN_SHARE):
    """16 experts on 2 x 4 slow devices, two owned by each, two slots."""
    cluster = replace(
        Cluster.uniform(2, 4, "a100"),
        preset="",
        open=(),
        flops_per_s=4e11,
        intra_bytes_per_s=1e9,
        inter_bytes_per_s=2e8,
    )
    price = training_price(
        2048,
        16,
        cluster,
        ModelSpec.generic(16, 1, np.arange(1)),
        window_s=0.3,
        hidden_share=share,
        dense_s=0.1 * (share > 0),
    )
    static = owned_ED(np.repeat(np.arange(8), 2), 8)
    return LayerView(static, static.copy(), load_E, recent_HE, np.zeros_like(static), 2, 0, 0, price)


def gathered(policy, load_E, recent_HE=(), share=HIDDEN_SHARE):
    """Replicas before the gate."""
    view = training_view(load_E, np.reshape(recent_HE, (-1, 16)), share)
    return policy.training.before_gate(view) & ~view.before_ED


SKEWED = 4096.0 / np.arange(1, 17) / (1.0 / np.arange(1, 17)).sum()


@pytest.mark.parametrize("share", [0.0, HIDDEN_SHARE])
def test_replicas_in_training_are_gathered_only_where_they_pay(share):
    """On 2 x 4 slow devices: even loads ask for none once what hides has a price; skewed ones for some either way."""
    nearly = 256.0 * np.array([1.1, 1.1, *[1.0] * 12, 0.9, 0.9])
    assert gathered(Poise(), nearly, share=share).any() == (share == 0.0)
    assert gathered(Poise(), SKEWED, share=share).any()


def test_replicas_in_training_pay_on_the_last_steps_and_not_on_their_mean_alone():
    """One odd step of five makes the mean as skewed as five that agree do; what it saves is then no more than chance."""
    even = np.full(16, 256.0)
    steady = 0.8 * even + 0.2 * SKEWED
    odd = np.stack([even] * 4 + [SKEWED])
    sure = Poise(margin=0.0)
    assert gathered(sure, steady).any() and gathered(sure, steady, steady[None]).any()
    assert gathered(sure, steady, np.tile(steady, (5, 1))).any()
    assert gathered(sure, steady, np.tile(0.1 * steady, (5, 1))).any(), "of fewer tokens, they count by their shares"
    assert not gathered(sure, steady, odd).any()


def test_replicas_in_training_must_gain_the_margin():
    made = [
        [gathered(Poise(margin=margin), 256.0 + part * (SKEWED - 256.0)).any() for part in np.linspace(0.0, 1.0, 41)]
        for margin in (0.0, 0.03, 0.1)
    ]
    counts = [sum(one) for one in made]
    assert counts[0] > counts[1] > counts[2] > 0 and all(not one[0] and one[-1] for one in made)
    assert gathered(Poise(margin=10.0), SKEWED).sum() == 0
