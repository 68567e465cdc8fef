"""The fast loop's replay: equal to the static price where nothing is replicated, priced where something moves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, random_count, tiny_batch, tiny_cluster, tiny_model

from poise.cost.step import batch_cost
from poise.cost.traffic import DATA_FLOWS
from poise.planning.placement import Placement
from poise.replay.serving import FastLoop, replay_steps
from poise.replay.static import replay
from poise.stepwise.methods.full_replication import FullReplication
from poise.stepwise.methods.split import ExactSplit
from poise.stepwise.poise.policy import Poise
from poise.stepwise.protocol import StepPlan
from poise.stepwise.registry import POLICIES, parse_policy
from poise.util.errors import OptionError, PlacementError

SEEDS = st.integers(0, 2**32 - 1)
TOKENS = (9, 0, 7, 12, 8, 6, 10)


def make(seed, nodes=(2, 1), experts=5, replicas=0.2, tokens=TOKENS, **options):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes, **options)
    idle = (0.0, 0.4)[seed % 2]  # picks that compute nothing
    batch = tiny_batch(rng, devices=cluster.num_devices, experts=experts, tokens=tokens, idle=idle)
    count = random_count(rng, 2, experts, cluster.num_devices, replicas)
    return batch, Placement.from_counts(count), cluster, tiny_model(batch)


@given(SEEDS, st.sampled_from(DATA_FLOWS), st.sampled_from([(2, 1), (3,), (2, 2), (1,)]))
@settings(max_examples=60, deadline=None)
def test_without_replicas_the_split_policy_is_the_static_price_plus_control(seed, traffic, nodes):
    batch, placement, cluster, model = make(seed, nodes, replicas=0.0)
    placement = Placement.from_devices(placement.count_LED().argmax(axis=2), cluster.num_devices)
    static = batch_cost(batch, placement.count_LED(), cluster, model, traffic=traffic, split="even")
    got = replay_steps(
        batch, placement, FastLoop(ExactSplit(), 0, control_s=3.0), cluster, model, traffic=traffic, warm_up=0
    )
    busy = batch.load_BLE.sum(axis=2) > 0
    np.testing.assert_allclose(got.cost.compute_BL, static.compute_BL)
    np.testing.assert_allclose(got.cost.dispatch_BL, static.dispatch_BL, atol=1e-12)
    np.testing.assert_allclose(got.cost.combine_BL, static.combine_BL, atol=1e-12)
    np.testing.assert_allclose(got.cost.kv_BL, static.kv_BL)
    np.testing.assert_allclose(got.cost.tokens_BLD, static.tokens_BLD)
    np.testing.assert_allclose(got.cost.cross_node_BL, static.cross_node_BL, atol=1e-9)
    np.testing.assert_allclose(got.cost.control_BL, 3.0 * busy)
    assert (got.cost.weights_BL == 0).all() and (got.moved_bytes_B == 0).all()


@pytest.mark.parametrize("name", POLICIES)
@given(SEEDS, st.sampled_from(["home", "home_node_dedup", "stay"]), st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_every_policy_plans_validly_and_never_beats_the_bound(name, seed, traffic, slots):
    batch, placement, cluster, model = make(seed)
    got = replay_steps(batch, placement, FastLoop(POLICIES[name], slots), cluster, model, traffic=traffic, warm_up=2)
    assert got.cost.tokens_BLD.shape[0] == len(TOKENS) - 2
    np.testing.assert_allclose(got.cost.tokens_BLD.sum(axis=2), batch.load_BLE[2:].sum(axis=2))
    if name != "full-replication":  # takes memory that the bound was not given
        assert (got.bound_B <= got.step_seconds_B * (1 + 1e-9)).all()


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_loads_without_tokens_run_too(seed):
    rng = np.random.default_rng(seed)
    batch, cluster = load_batch(rng, steps=4), tiny_cluster(rng, (2, 1))
    placement = Placement.from_counts(random_count(rng, 2, 4, 3))
    got = replay_steps(batch, placement, FastLoop(Poise(), 1), cluster, tiny_model(batch), traffic="home", warm_up=1)
    whole = np.rint(batch.load_BLE[1:]).sum(axis=2)
    assert np.isfinite(got.step_seconds_B).all() and (got.cost.tokens_BLD.sum(axis=2) <= whole + 1e-9 + whole).all()


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_when_control_costs_too_much_poise_leaves_the_engine_alone(seed):
    batch, placement, cluster, model = make(seed)
    loop = FastLoop(Poise(), 2, control_s=1e9)
    got = replay_steps(batch, placement, loop, cluster, model, traffic="home", warm_up=0)
    base = replay(batch, placement, cluster, model, traffic="home", split="even")
    np.testing.assert_allclose(got.step_seconds_B, base.step_seconds_B)
    assert got.moved_bytes_per_step == 0


def test_full_replication_moves_every_missing_expert_and_no_token():
    batch, placement, cluster, model = make(3)
    got = replay_steps(batch, placement, FastLoop(FullReplication(), 0), cluster, model, traffic="home", warm_up=0)
    assert got.cross_device_share == 0
    missing = int((placement.count_LED() == 0).sum())
    busy = (batch.load_BLE.sum(axis=2) > 0).all(axis=1)
    np.testing.assert_allclose(got.moved_bytes_B[busy], missing * model.expert_bytes)


def test_a_plan_that_breaks_an_invariant_is_refused():
    class Bad(ExactSplit):
        def after_gate(self, view, holders_ED, load_SE):
            return StepPlan(holders_ED, np.zeros_like(view.static_ED, dtype=np.int64))

    batch, placement, cluster, model = make(4)
    with pytest.raises(PlacementError, match="tokens, 0 planned"):
        replay_steps(batch, placement, FastLoop(Bad(), 0), cluster, model, traffic="home", warm_up=0)


def test_policies_from_text():
    assert parse_policy("poise:horizon=4").horizon == 4.0
    assert parse_policy("poise", model_named=False).objective == "tokens"
    assert parse_policy("poise").objective == "seconds"
    for spec in ("nothing", "poise:color=red", "poise:horizon=soon"):
        with pytest.raises(OptionError):
            parse_policy(spec)
    with pytest.raises(OptionError, match="at least 0"):
        FastLoop(ExactSplit(), -1)
