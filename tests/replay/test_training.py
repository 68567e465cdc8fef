"""The training price and its replay: by hand, against independent prices, and every policy in it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, tiny_batch, tiny_cluster, tiny_model
from tests.stepwise.step_cases import random_case

from poise.cost.route import locality_rows
from poise.cost.transfers import plan_transfers
from poise.cost.weights import STATE_RATIO, StepPrice, compiled_price, fetch_seconds, training_price
from poise.machine.cluster import Cluster, from_preset
from poise.machine.model import ModelSpec
from poise.replay.serving import FastLoop
from poise.replay.training import SourceLoads, replay_training
from poise.stepwise.methods.expert_parallelism import ExpertParallelism
from poise.stepwise.methods.flex_moe import FlexMoE
from poise.stepwise.methods.full_replication import FullReplication
from poise.stepwise.methods.smart_moe import SmartMoE
from poise.stepwise.poise.gathers import OwnedLayer, calibrate, plan_layer, tried_counts
from poise.stepwise.poise.node_split import best_quotas, quota_seconds, source_tokens
from poise.stepwise.poise.policy import Poise
from poise.stepwise.poise.work_split import split_seconds
from poise.stepwise.poise.workspace import Desk, make_workspace
from poise.stepwise.registry import POLICIES
from poise.stepwise.sharding import Balanced, Heterogeneous, even_sharding, owned_ED
from poise.stepwise.step_seconds import compute_seconds, exchange_seconds, reshard_seconds, sparse_gather_seconds
from poise.util.errors import OptionError

SEEDS = st.integers(0, 2**32 - 1)


def skewed(rng, steps=7, layers=2, devices=4, experts=8, tokens=600) -> SourceLoads:
    weight = rng.dirichlet(np.full(experts, 0.4), size=(layers, devices))
    return SourceLoads(rng.multinomial(tokens, weight, size=(steps, layers, devices)).astype(np.int32), 2)


def price_of(cluster: Cluster, experts=8, layers=2, **options) -> StepPrice:
    options = {"window_s": 1e-6, "control_s": 0.0, **options}
    return training_price(4096, experts, cluster, ModelSpec.generic(experts, 2, np.arange(layers)), **options)


@given(*[st.floats(0, 10)] * 4, st.booleans())
def test_what_weights_expose(early, late, window, ratio, again):
    cluster, model = Cluster.uniform(2, 2), ModelSpec.generic(4, 1, np.arange(1))
    serving = StepPrice(cluster, model, window, 0.0)
    assert serving.exposed_seconds(early, late) == max(0.0, early - window) + late
    price = training_price(64, 4, cluster, model, window_s=window, rematerialise=again, gradient_ratio=ratio)
    back = (early + late) * (ratio + again)
    assert price.exposed_seconds(early, late) == pytest.approx(
        max(0.0, early - window) + late + max(0.0, back - 2 * window)
    )


def test_the_training_price_counts_passes_and_scores():
    cluster, model = Cluster.uniform(1, 2), ModelSpec.parse("gpt-moe-s")
    price = training_price(2048, 64, cluster, model)
    longer = training_price(2048, 64, cluster, model, sequence_length=1024)
    both_ways = training_price(2048, 64, cluster, model, sequence_length=1024, causal=False)
    scores = (
        2 * 1024 * 768 * 1024 / cluster.flops_per_s
    )  # a key and a value product, half of them, 1024 tokens a device
    assert longer.window_s - price.window_s == pytest.approx(scores)
    assert both_ways.window_s - price.window_s == pytest.approx(2 * scores)
    assert price.training and (price.compute_passes, price.exchange_passes) == (3, 2)
    rates, serving = compiled_price(price).machine, compiled_price(StepPrice(cluster, model, 0.0, 0.0)).machine
    assert rates.compute_s == 3 * serving.compute_s and rates.out_intra_s == 2 * serving.out_intra_s


@given(SEEDS, st.sampled_from([(2, 2), (3, 1), (2, 2, 2)]))
@settings(max_examples=60, deadline=None)
def test_fan_out_crosses_the_network_once_a_node(seed, nodes):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes, shared=True)
    held = owned_ED(rng.integers(0, cluster.num_devices, 5), cluster.num_devices)
    fetched = (rng.random(held.shape) < 0.5) & ~held
    wide, plain = (price_of(cluster, 5, 1, fan_out=on) for on in (True, False))
    seconds = fetch_seconds(held, fetched, wide)
    if not fetched.any():
        assert seconds == 0
        return
    node_D = cluster.node_D
    net_in, net_out = np.zeros(cluster.num_nodes), np.zeros(cluster.num_nodes)
    for e in range(5):
        home = node_D[held[e].argmax()]
        for n in range(cluster.num_nodes):
            if n != home and fetched[e, node_D == n].any():
                net_in[n] += 1
                net_out[home] += 1
    wire = max(net_in.max(), net_out.max()) * wide.model.expert_bytes / cluster.inter_bytes_per_s
    assert wire <= seconds - cluster.plain_wire.start_s + 1e-9
    intra_bound = fetched.sum(axis=0).max() * wide.model.expert_bytes / cluster.intra_bytes_per_s
    assert seconds - cluster.plain_wire.start_s <= max(wire, 5 * intra_bound) + 1e-9
    if fetched.any() and all((fetched[:, node_D == n].sum(axis=1) <= 1).all() for n in range(cluster.num_nodes)):
        assert seconds == pytest.approx(fetch_seconds(held, fetched, plain))
    alone = owned_ED(rng.integers(0, cluster.num_devices, 5), cluster.num_devices)
    assert fetch_seconds(alone, np.zeros_like(alone), wide) == 0


def test_plain_expert_parallelism_by_hand():
    """Two devices, two experts; every token of both sources goes to expert 0."""
    cluster = from_preset([2], "h100", intra_latency_s=0.0)
    load = np.array([[[[100, 0], [60, 0]]]], np.int32)
    price = price_of(cluster, 2, 1, window_s=0.25)
    got = replay_training(SourceLoads(load, 1), FastLoop(ExpertParallelism(), 0), price, warm_up=0, rest_s=2.0)
    model = price.model
    compute = 3 * max(
        160 * model.flops_per_token / cluster.flops_per_s, model.expert_bytes / cluster.memory_bytes_per_s
    )
    both = model.dispatch_bytes_per_token + model.combine_bytes_per_token
    exchange = 2 * 60 * both / cluster.intra_bytes_per_s
    assert got.compute_BL[0, 0] == pytest.approx(compute)
    assert got.exchange_BL[0, 0] == pytest.approx(exchange)
    assert got.step_seconds_B[0] == pytest.approx(compute + exchange + 3 * 0.25 + 2.0)
    assert got.imbalance == 2 and got.moved_BL.sum() == 0


@pytest.mark.parametrize("name", POLICIES)
@given(SEEDS, st.integers(0, 3), st.sampled_from([(2, 2), (4,), (3, 1)]), st.booleans())
@settings(max_examples=8, deadline=None)
def test_every_policy_trains(name, seed, slots, nodes, again):
    rng = np.random.default_rng(seed)
    cluster, traffic = tiny_cluster(rng, nodes), skewed(rng)
    price = price_of(cluster, rematerialise=again, window_s=float(rng.choice([0.0, 1e5])))
    sharding = Heterogeneous(interval=3, overlap=2) if seed % 2 else Balanced(interval=3)
    got = replay_training(
        traffic, FastLoop(POLICIES[name], slots), price, sharding=sharding, warm_up=2, first_reshard=1
    )
    load = traffic.load_BLSE[2:].sum(axis=(2, 3))
    np.testing.assert_array_equal(got.tokens_BLD.sum(axis=2), load)
    assert np.isfinite(got.step_seconds_B).all() and (got.exposed_BL <= got.moved_BL * (1 + 1e-9) + 1e-6).all()
    if name != "full-replication":
        assert got.replicas_BLD.max() <= slots + (getattr(POLICIES[name], "keeps", False) and name == "smart-moe")


def test_kept_replicas_pay_in_every_step_and_states_when_they_are_new():
    rng = np.random.default_rng(3)
    cluster = from_preset([2, 2], "v100", nic_shared=True)
    traffic, price = skewed(rng, steps=12, tokens=200_000), price_of(cluster, window_s=0.0)
    got = replay_training(traffic, FastLoop(FlexMoE(trigger=1.01, horizon=1e6), 2), price, warm_up=0)
    size, passes = price.model.expert_bytes, 2.0
    count = got.replicas_BLD.sum(axis=2)
    assert (count[-1] > 0).all()
    new = np.diff(count, axis=0, prepend=0)
    grew = new > 0
    assert (got.moved_BL[grew] >= count[grew] * size * passes + new[grew] * size * STATE_RATIO - 1).all()
    calm = got.moved_BL == count * size * passes
    assert calm.any() and (got.weights_BL[calm & (count > 0)] > 0).all()
    swaps = replay_training(traffic, FastLoop(SmartMoE(interval=2), 0), price, warm_up=0)
    assert (swaps.replicas_BLD == 0).all() and swaps.moved_BL.sum() > 0
    assert (swaps.moved_BL % (STATE_RATIO * size) == 0).all()  # owners move with their states; nothing to reduce


def test_rematerialisation_costs_replicas_that_are_kept_for_good_nothing():
    traffic = skewed(np.random.default_rng(3), steps=8, tokens=200_000)
    loop = FastLoop(FlexMoE(trigger=1.01, horizon=1e6), 2)
    kept, again = (
        replay_training(traffic, loop, price_of(Cluster.uniform(2, 2), window_s=0.0, rematerialise=flag), warm_up=0)
        for flag in (False, True)
    )
    np.testing.assert_array_equal(kept.weights_BL, again.weights_BL)
    np.testing.assert_array_equal(kept.moved_BL, again.moved_BL)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.sampled_from([(2, 2), (4,), (1, 3), (2, 2, 2)]), st.booleans())
def test_a_gather_takes_as_long_as_the_rounds_that_run(seed, nodes, fan_out):
    """At least what the fullest port needs, at most what sending everything from the owners takes."""
    rng = np.random.default_rng(seed)
    cluster = from_preset(list(nodes), "v100", nic_shared=True)
    price = price_of(cluster, fan_out=fan_out)
    devices, size = cluster.num_devices, price.model.expert_bytes
    held = owned_ED(rng.integers(0, devices, 8), devices)
    new = (rng.random((8, devices)) < 0.4) & ~held
    seconds = sparse_gather_seconds(held, new, price)
    if not new.any():
        assert seconds == 0.0
        return
    direct = plan_transfers(held.argmax(axis=1), new, cluster, form="direct").seconds(cluster, size)
    inside = new.sum(axis=0).max() * size / max(cluster.intra_bytes_per_s, cluster.inter_bytes_per_s)
    assert inside <= seconds <= direct * (1 + 1e-12)
    if not fan_out:
        assert seconds == direct
    ports = np.zeros((2, len(nodes)))
    for e, d in np.argwhere(new):  # an expert crosses into a node at least once if nobody there holds it
        source, target = cluster.node_D[held[e].argmax()], cluster.node_D[d]
        if source != target and not new[e, :d][cluster.node_D[:d] == target].any():
            ports[0, source] += len(nodes) == 2  # with relays others may send on
            ports[1, target] += 1
    assert seconds >= ports.max() * size / cluster.inter_bytes_per_s


def test_full_replication_gathers_and_reduces_everything_in_every_step():
    traffic = skewed(np.random.default_rng(1))
    price = price_of(Cluster.uniform(2, 2), rematerialise=True)
    got = replay_training(traffic, FastLoop(FullReplication(), 0), price, warm_up=0)
    # 8 experts to 3 others: 2 gathers and 1 reduce; the last layer's backward comes before anything is freed
    assert (got.moved_BL == 8 * 3 * np.array([3, 2]) * price.model.expert_bytes).all()
    assert (got.exchange_BL == 4 * price.cluster.plain_wire.start_s).all()


def test_resharding_is_spread_over_its_interval():
    traffic = skewed(np.random.default_rng(5), steps=9)
    price = price_of(Cluster.uniform(2, 2))
    got = replay_training(traffic, FastLoop(ExpertParallelism(), 0), price, sharding=Heterogeneous(interval=100),
                          first_reshard=2, warm_up=0)  # fmt: skip
    old = even_sharding(2, 8, 4)
    seconds = reshard_seconds(old, got.owner_LE, price)
    assert got.moved_owners == (old != got.owner_LE).sum() > 0
    np.testing.assert_allclose(got.reshard_B, [0, 0] + [seconds / 100] * 7)
    changed = owned_ED(got.owner_LE.ravel(), 4) & ~owned_ED(old.ravel(), 4)
    assert seconds == STATE_RATIO * fetch_seconds(owned_ED(old.ravel(), 4), changed, price)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_poise_exchanges_no_counts_where_that_costs_too_much(seed):
    rng = np.random.default_rng(seed)
    traffic, cluster = skewed(rng), tiny_cluster(rng, (2, 2))
    price = price_of(cluster, control_s=1e12)
    near, ours, plain = (
        replay_training(traffic, FastLoop(policy, slots), price)
        for policy, slots in ((Poise(), 2), (Poise(), 0), (ExpertParallelism(), 0))
    )
    assert near.control_BL.sum() == ours.control_BL.sum() == ours.moved_BL.sum() == 0
    np.testing.assert_allclose(ours.step_seconds_B, plain.step_seconds_B)  # nothing to fetch into: owners alone


@pytest.mark.parametrize("preset", ["v100", "a100"])
def test_poise_beats_its_rivals_where_skew_is_large(preset):
    cluster = from_preset([4, 4], preset, nic_shared=True)
    traffic = skewed(np.random.default_rng(8), devices=8, experts=16, tokens=16384, steps=10)
    price = training_price(8 * 8192, 16, cluster, ModelSpec.generic(16, 2, np.arange(2)))

    def of(policy, sharding=None):
        return replay_training(traffic, FastLoop(policy, 2), price, sharding=sharding).layers_B.sum()

    ours = of(Poise(), Balanced())
    mine = ("poise", "poise-near", "full-replication")  # the second is the first in training
    rivals = {name: of(policy) for name, policy in POLICIES.items() if name not in mine}
    rivals["hecate"] = min(of(POLICIES["hecate"], Heterogeneous()), rivals["hecate"])
    assert ours < min(rivals.values())


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_forced_router_balances_and_keeps_the_tokens(seed):
    traffic = skewed(np.random.default_rng(seed), tokens=int(seed % 700))
    flat = traffic.force_balanced().load_BLSE
    np.testing.assert_array_equal(flat.sum(axis=3), traffic.load_BLSE.sum(axis=3))
    assert (flat.max(axis=3) - flat.min(axis=3) <= 1).all()
    assert (flat.sum(axis=2).max(axis=2) - flat.sum(axis=2).min(axis=2) <= 4).all()


def test_counts_of_a_batch():
    rng = np.random.default_rng(2)
    batch = tiny_batch(rng, devices=3, experts=5, tokens=(6, 0, 9))
    got = SourceLoads.of_batch(batch, 3)
    np.testing.assert_array_equal(got.load_BLSE.sum(axis=2), batch.load_BLE)
    home_T = batch.home_of_tokens(3)
    assert got.load_BLSE[0, 0, 1].sum() == batch.top_k * (home_T[:6] == 1).sum()
    some = tiny_batch(rng, devices=3, experts=5, tokens=(6, 0, 9), idle=0.4)
    np.testing.assert_array_equal(SourceLoads.of_batch(some, 3).load_BLSE.sum(axis=2), some.load_BLE)
    loads = load_batch(rng, steps=2)
    spread = SourceLoads.of_batch(loads, 3).load_BLSE
    np.testing.assert_array_equal(spread.sum(axis=2), np.rint(loads.load_BLE))
    assert (spread.max(axis=2) - spread.min(axis=2) <= 1).all()
    assert tiny_model(batch).num_experts == got.load_BLSE.shape[3]


def test_what_does_not_fit_is_refused():
    traffic, cluster = skewed(np.random.default_rng(0)), Cluster.uniform(2, 2)
    loop, price = FastLoop(ExpertParallelism(), 0), price_of(cluster)
    with pytest.raises(OptionError, match="training price"):
        replay_training(traffic, loop, StepPrice(cluster, price.model, 0.0, 0.0))
    with pytest.raises(OptionError, match="4 sources"):
        replay_training(traffic, loop, price_of(Cluster.uniform(1, 2)))
    with pytest.raises(OptionError, match="7 warm-up steps"):
        replay_training(traffic, loop, price, warm_up=7)
    with pytest.raises(OptionError, match="whole numbers"):
        SourceLoads(np.zeros((1, 1, 1)), 1)


# ---- what poise plans with -----------------------------------------------------------------------------------------


def joint_case(seed):
    """(load_SE, owned_ED, wider holders, price)"""
    rng = np.random.default_rng(seed)
    view, load_SE = random_case(
        rng, replicas=False, experts=int(rng.integers(2, 9)), nodes=(2, int(rng.integers(1, 3)))
    )
    devices = view.static_ED.shape[1]
    cluster = from_preset([2, devices - 2], "v100", nic_shared=bool(rng.integers(2)))
    price = price_of(cluster, len(view.static_ED), 1, window_s=float(rng.choice([0.0, 1e-4])))
    wide = view.static_ED | (rng.random(view.static_ED.shape) < 0.3)
    return load_SE, view.static_ED, wide, price


@given(SEEDS)
@settings(max_examples=80, deadline=None)
def test_two_level_splits_are_whole_and_priced_as_the_other_kernel_does(seed):
    load_SE, _, wide, price = joint_case(seed)
    rates = compiled_price(price).machine
    seconds, quota = best_quotas(source_tokens(load_SE, rates), wide, rates)
    np.testing.assert_array_equal(quota.sum(axis=1), load_SE.sum(axis=0))
    assert quota.min() >= 0 and (quota[~wide] == 0).all()
    layer = Desk(rates, make_workspace(*wide.shape, int(wide.sum()))).put(wide)
    tokens_H = quota[layer.holders.expert_H, layer.holders.device_H].astype(float)
    assert seconds == pytest.approx(split_seconds(tokens_H, load_SE, layer))


def exposed(before_ED, early_ED, holders_ED, price):
    """Exposed seconds of a layer that holds ``before``, fetches up to ``early`` before the gate, the rest after it."""
    early_s = fetch_seconds(before_ED, early_ED & ~before_ED, price)
    return price.exposed_seconds(early_s, fetch_seconds(early_ED, holders_ED & ~early_ED, price))


@given(SEEDS, st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_plans_keep_slots_and_late_replicas_pay(seed, slots, extra):
    load_SE, owned, _, price = joint_case(seed)
    compiled = compiled_price(price)
    rates, sources = compiled.machine, source_tokens(load_SE, compiled.machine)
    layer = OwnedLayer(sources, owned, np.full(owned.shape[1], slots), compiled)
    (least, best, _), alone = plan_layer(layer, tried_counts(slots, 2, len(owned)))
    assert least <= alone and (best >= owned).all() and ((best & ~owned).sum(axis=0) <= slots).all()
    _, held, quota = calibrate(layer, best, extra)
    assert (held >= best).all() and (held & ~best).sum() <= extra and ((held & ~owned).sum(axis=0) <= slots).all()
    np.testing.assert_array_equal(quota.sum(axis=1), load_SE.sum(axis=0))
    without = best_quotas(sources, best, rates)[0] + exposed(owned, best, best, price)
    paid = quota_seconds(quota, sources, rates) + exposed(owned, best, held, price)
    assert paid <= without * (1 + 1e-9) + 1e-15


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_inside_one_node_the_plan_is_priced_as_the_replay_prices_it(seed):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, 10))
    view, load_SE = random_case(rng, replicas=False, experts=experts, nodes=(int(rng.integers(1, 5)),))
    price = price_of(tiny_cluster(rng, (view.static_ED.shape[1],)), len(view.static_ED), 1)
    wide = view.static_ED | (rng.random(view.static_ED.shape) < 0.3)
    rates = compiled_price(price).machine
    seconds, quota = best_quotas(source_tokens(load_SE, rates), wide, rates)
    pairs = locality_rows(load_SE, quota, price.cluster.node_D).sum(axis=1)
    exact = compute_seconds(quota, price) + exchange_seconds(pairs, price)
    exact -= 2 * (price.cluster.dispatch_wire.start_s + price.cluster.combine_wire.start_s)
    assert seconds == pytest.approx(exact)
