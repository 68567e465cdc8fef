"""Owners by price: no decision raises the modelled time, and the same is decided wherever it is made."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import tiny_cluster

from poise.cost.weights import training_price
from poise.machine.cluster import from_preset
from poise.machine.model import ModelSpec
from poise.replay.serving import FastLoop
from poise.replay.training import Foresight, SourceLoads, replay_training
from poise.routing.predict import SlidingMean
from poise.stepwise.methods.expert_parallelism import ExpertParallelism
from poise.stepwise.methods.flex_moe import FlexMoE
from poise.stepwise.methods.hecate import Hecate
from poise.stepwise.owners import KNOWN_SAMPLES, SAMPLES, LoadSamples, OwnerSeconds, decided
from poise.stepwise.poise.policy import Poise
from poise.stepwise.poise.recorded import KnownRouting
from poise.stepwise.sharding import (
    Balanced,
    Even,
    Heterogeneous,
    check_sharding,
    even_sharding,
    heterogeneous_sharding,
    place_within,
)

SEEDS = st.integers(0, 2**32 - 1)
POLICIES = (Poise(), KnownRouting(), ExpertParallelism(), Hecate(overlap=2), FlexMoE(trigger=1.1))
SHARDINGS = (Balanced(gain=0.0), Balanced(interval=3), Balanced(gain=0.1), Heterogeneous(by_price=True, overlap=2))
LAYERS, EXPERTS = 2, 6


def some_loads(rng, steps, devices, tokens=20_000):
    """int32 [B, L, D, E], other hot experts in every layer; sources differ."""
    weight = rng.dirichlet(np.full(EXPERTS, 0.3), size=(LAYERS, devices))
    load = [[[rng.multinomial(tokens, w) for w in layer] for layer in weight] for _ in range(steps)]
    return np.array(load, np.int32)


def price_of(cluster, **options):
    return training_price(40_000, EXPERTS, cluster, ModelSpec.generic(EXPERTS, 2, np.arange(LAYERS)), **options)


def case_of(seed, policy):
    """A machine, owners from other loads, and what they are priced on: a record, or steps that are over."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, [(2, 2), (3,), (1, 2)][seed % 3])
    devices, steps = cluster.num_devices, int(rng.integers(1, SAMPLES + 2))
    price = price_of(cluster, rematerialise=bool(rng.integers(2)), gather_ratio=float(rng.choice([0.5, 1.0])))
    load_BLSE = some_loads(rng, steps, devices)
    if rng.integers(2):
        samples = LoadSamples.of_record(load_BLSE, bool(rng.integers(2)))
    else:
        samples = LoadSamples.of_history(list(load_BLSE.sum(axis=2).astype(float).swapaxes(0, 1)), devices)
    current = heterogeneous_sharding(rng.exponential(size=(LAYERS, EXPERTS)) ** 3, 0, cluster)
    load_LE = load_BLSE.sum(axis=2).mean(axis=0)
    return load_LE, current, OwnerSeconds(policy, int(rng.integers(0, 3)), price, samples)


@pytest.mark.parametrize("sharding", SHARDINGS, ids=str)
@given(SEEDS, st.sampled_from(POLICIES))
@settings(max_examples=15, deadline=None)
def test_no_decision_raises_the_modelled_time(sharding, seed, policy):
    load_LE, current, seconds = case_of(seed, policy)
    new = decided(sharding, load_LE, current, seconds)
    check_sharding(new, seconds.price.cluster.num_devices)
    fresh = replace(seconds, _found={})
    np.testing.assert_array_equal(new, decided(sharding, load_LE.copy(), current.copy(), fresh))
    now_s = seconds.step(current)
    if (new == current).all():
        return
    after_s = seconds.step(new) + seconds.move(current, new) / sharding.interval
    assert after_s < now_s * (1.0 if seconds.samples.known is not None else 1.0 - sharding.gain)


@given(SEEDS, st.sampled_from(POLICIES[:4]), st.integers(1, SAMPLES))
@settings(max_examples=25, deadline=None)
def test_steps_that_are_known_are_never_slower_than_with_even_owners(seed, policy, steps):
    """The replay, which knows nothing of the decision, adds the same steps up, and the owners' move."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, (2, 2))
    traffic, price = SourceLoads(some_loads(rng, steps, 4), 2), price_of(cluster)
    of = lambda own: replay_training(traffic, FastLoop(policy, 1), price, sharding=own, first_reshard=0, warm_up=0,  # noqa: E731
                                     foresight=Foresight(traffic)).step_seconds_B.sum()  # fmt: skip
    even, ours = of(Even()), of(Balanced(interval=steps))
    assert ours <= even * (1 + 1e-12)


@given(SEEDS, st.sampled_from((Poise(), ExpertParallelism())))
@settings(max_examples=10, deadline=None)
def test_traffic_that_stays_is_never_slower_than_with_even_owners(seed, policy):
    """Decided from steps that are over; sources alike, as their counts are not kept."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, (2, 2))
    weight = rng.dirichlet(np.full(EXPERTS, 0.3), size=(LAYERS, 1)).repeat(4, axis=1)
    load = np.rint(weight * 10_000).astype(np.int32)[None].repeat(6, axis=0)
    traffic, price = SourceLoads(load, 2), price_of(cluster)
    of = lambda own: replay_training(traffic, FastLoop(policy, 1, SlidingMean(2)), price, sharding=own, first_reshard=2,  # noqa: E731
                                     warm_up=2).step_seconds_B.mean()  # fmt: skip
    assert of(Balanced(interval=4)) <= of(Even()) * (1 + 1e-12)


def test_owners_move_where_it_pays_and_stay_where_their_move_costs_more():
    cluster = from_preset([2, 2], "v100", nic_shared=True)
    load = np.zeros((1, 2, 4, 8), np.int32)
    load[..., :2] = 50_000  # two hot experts, which the even owners put on one device
    price = training_price(400_000, 8, cluster, ModelSpec.generic(8, 2, np.arange(2)))
    seconds = OwnerSeconds(ExpertParallelism(), 0, price, LoadSamples.of_record(load, True))
    even, load_LE = even_sharding(2, 8, 4), load[0].sum(axis=1).astype(float)
    new = decided(Balanced(), load_LE, even, seconds)
    assert (new[:, 0] != new[:, 1]).all() and seconds.step(new) < 0.6 * seconds.step(even)
    np.testing.assert_array_equal(decided(Balanced(), load_LE, new, seconds), new)  # nothing moves for nothing
    few = replace(seconds, samples=LoadSamples.of_record(load // 1000, True), _found={})
    assert (decided(Balanced(interval=10**6), load_LE, even, few) != even).any()
    gained, once = few.step(even) - few.step(new), few.move(even, new)
    hasty = Balanced(interval=max(1, int(0.1 * once / gained)))
    assert once / hasty.interval > gained > 0
    np.testing.assert_array_equal(decided(hasty, load_LE, even, few), even)
    past = replace(
        seconds, samples=LoadSamples.of_history(list(load.sum(axis=2).astype(float).swapaxes(0, 1)), 4), _found={}
    )
    assert (decided(Balanced(), load_LE, even, past) != even).any()
    np.testing.assert_array_equal(decided(Balanced(gain=0.7), load_LE, even, past), even)


def test_a_policy_that_is_not_by_price_is_followed_and_no_loads_move_nothing():
    cluster = from_preset([2, 2], "h100")
    load, even = np.array([[9.0, 1, 1, 1, 1, 1]] * LAYERS), even_sharding(LAYERS, EXPERTS, 4)
    none = LoadSamples([np.zeros((0, 4, EXPERTS), np.int64)] * LAYERS)
    seconds = OwnerSeconds(Poise(), 1, price_of(cluster), none)
    published = decided(Heterogeneous(overlap=1), load, even, seconds)
    np.testing.assert_array_equal(published, heterogeneous_sharding(load, 1, cluster))
    assert (published != even).any()
    for sharding in (Balanced(), Heterogeneous(overlap=1, by_price=True), Even()):
        np.testing.assert_array_equal(decided(sharding, load, even, seconds), even)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_owners_placed_within_a_layer_keep_every_device_s_number(seed):
    rng = np.random.default_rng(seed)
    cluster, owner = tiny_cluster(rng, (2, 2)), rng.integers(0, 4, 9)
    new = place_within(rng.exponential(size=9), owner, cluster)
    np.testing.assert_array_equal(np.bincount(new, minlength=4), np.bincount(owner, minlength=4))


def test_samples_are_the_newest_steps_and_all_or_spaced_micro_batches():
    load_BLSE = some_loads(np.random.default_rng(0), 15, 2)
    history = LoadSamples.of_history([load_BLSE[:, 0].sum(axis=1), np.zeros((0, EXPERTS))], 2)
    assert [len(one) for one in history.load_LBSE] == [SAMPLES, 0] and history.known is None
    np.testing.assert_array_equal(history.load_LBSE[0].sum(axis=1), load_BLSE[-SAMPLES:, 0].sum(axis=1))
    np.testing.assert_array_equal(history.mean_LE()[1], 0)
    record = LoadSamples.of_record(load_BLSE, False)
    np.testing.assert_array_equal(record.load_LBSE[1], load_BLSE[::2, 1])
    every = LoadSamples.of_record(load_BLSE[:KNOWN_SAMPLES], False)
    np.testing.assert_array_equal(every.load_LBSE[0], load_BLSE[:KNOWN_SAMPLES, 0])
    assert record.known is False


PRINTS = """
import numpy as np
from tests.stepwise.test_owners import POLICIES, SHARDINGS, case_of, decided
for seed in range(6):
    load_LE, current, seconds = case_of(seed, POLICIES[seed % 3])
    new = decided(SHARDINGS[seed % 4], load_LE, current, seconds)
    print(new.tolist(), seconds.step(current).hex(), seconds.step(new).hex())
"""


def test_another_process_decides_alike_bit_for_bit():
    """As ranks do, whose hashes of text and whose threads differ."""
    said = [subprocess.run([sys.executable, "-c", PRINTS], check=True, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": str(one), "NUMBA_NUM_THREADS": str(one)}).stdout
            for one in (1, 2)]  # fmt: skip
    assert said[0] == said[1] and said[0].count("0x") == 12
