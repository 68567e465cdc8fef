"""Serving simulated rank by rank: the split engines make, times that add up, and what the cost model says of even loads."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import no_experts

from poise.cost.exchange import ExchangeModel
from poise.cost.route import deal_evenly
from poise.cost.step import batch_cost
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.replay.serving import FastLoop
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.simulate.serving import ServingMark, serve_step, served_work
from poise.stepwise.registry import parse_policy
from poise.util.errors import OptionError


def scene(seed: int, redundant: int = 4, top_k: int = 2, idle: float = 0.0):
    trace = zipf_trace(num_tokens=1200, num_layers=2, num_experts=12, top_k=top_k, seed=seed)
    if idle:
        trace = replace(trace, experts=no_experts(np.random.default_rng(seed), trace.experts, idle))
    batch = make_batch(trace, tokens_per_step=240)
    make = np.random.default_rng(seed)
    slots = np.stack(
        [np.concatenate([make.permutation(12), make.choice(12, redundant, replace=False)]) for _ in range(2)]
    )
    place = Placement(slots.astype(np.int32), np.sort(np.arange(slots.shape[1]) % 4).astype(np.int32), 12, 4)
    return batch, place, Cluster.uniform(2, 2), ModelSpec.generic(12, top_k, batch.layer_ids_L)


@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 7), st.integers(0, 2**32 - 1))
def test_pairs_are_dealt_over_the_slots_in_turn(tokens, top_k, source, seed):
    make = np.random.default_rng(seed)
    count_ED = make.integers(0, 3, (6, 4))
    count_ED[count_ED.sum(axis=1) == 0, 0] = 1
    experts = make.integers(0, 6, (tokens, top_k))
    device = deal_evenly(experts, count_ED, source)
    assert (count_ED[experts, device] > 0).all()
    for expert in range(6):
        got = np.bincount(device[experts == expert], minlength=4)
        share = got.sum() * count_ED[expert] / count_ED[expert].sum()
        assert (np.abs(got - share) < count_ED[expert].clip(1)).all()


@pytest.mark.parametrize("idle", [0.0, 0.4])
@pytest.mark.parametrize("traffic", ["home", "home_device_dedup", "stay"])
def test_work_is_the_cost_models_on_known_copies(traffic, idle):
    """Without replicas the cost model's expectations are certain, so bytes and compute agree exactly."""
    batch, place, cluster, model = scene(3, redundant=0, idle=idle)
    cost = batch_cost(batch, place.count_LED(), cluster, model, traffic=traffic, split="even")
    work = served_work(batch, place, cluster, model, traffic=traffic)
    for step in range(batch.num_steps):
        for layer in range(2):
            one = work[step][layer]
            assert (one.tokens_D == cost.tokens_BLD[step, layer]).all()
            assert np.isclose(one.compute_D.max(), cost.compute_BL[step, layer], rtol=1e-12)
            for bytes_DD, seconds in ((one.out_DD, cost.dispatch_BL), (one.back_DD, cost.combine_BL)):
                assert np.isclose(fullest(bytes_DD, cluster) + latency(cluster), seconds[step, layer], rtol=1e-9)


@pytest.mark.parametrize("traffic", ["home", "home_device_dedup"])
def test_near_work_is_the_cost_models_where_every_node_has_one_replica(traffic):
    """Then nothing is shared out, and the cost model's expectations are certain."""
    batch, _, cluster, model = scene(5)
    make = np.random.default_rng(0)
    count = np.zeros((2, 12, 4), int)
    for layer, expert, node in product(range(2), range(12), range(2)):
        count[layer, expert, 2 * node + make.integers(2)] = 1
    place = Placement.from_counts(count)
    cost = batch_cost(batch, count, cluster, model, traffic=traffic, split="near")
    even = batch_cost(batch, count, cluster, model, traffic=traffic, split="even")
    assert cost.cross_node_BL.max() == 0 < even.cross_node_BL.min()
    work = served_work(batch, place, cluster, model, traffic=traffic, split="near")
    for step, layer in product(range(batch.num_steps), range(2)):
        one = work[step][layer]
        assert (one.tokens_D == cost.tokens_BLD[step, layer]).all()
        assert np.isclose(one.compute_D.max(), cost.compute_BL[step, layer], rtol=1e-12)
        assert np.isclose(fullest(one.out_DD, cluster) + latency(cluster), cost.dispatch_BL[step, layer], rtol=1e-9)
    for split in ("near", "exact"):
        with pytest.raises(OptionError, match=split):
            served_work(batch, place, cluster, model, traffic="stay", split=split)


def fullest(bytes_DD, cluster):
    same = cluster.node_D[:, None] == cluster.node_D[None, :]
    near, far = bytes_DD * same * ~np.eye(4, dtype=bool), bytes_DD * ~same
    return max(max(x.sum(axis=0).max(), x.sum(axis=1).max()) / rate
               for x, rate in ((near, cluster.intra_bytes_per_s), (far, cluster.inter_bytes_per_s)))  # fmt: skip


def latency(cluster):
    return cluster.intra_latency_s + cluster.inter_latency_s


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["home", "home_device_dedup", "stay"]))
def test_ranks_never_take_longer_than_terms_one_after_the_other(seed, traffic):
    batch, place, cluster, model = scene(seed)
    work = served_work(batch, place, cluster, model, traffic=traffic)
    exchange = ExchangeModel.of(cluster)
    for layers in work:
        marks = serve_step(layers, cluster.node_D, exchange, window_s=1e-4)
        assert (np.diff(marks, axis=2) >= -1e-15).all() and (
            marks[1:, :, ServingMark.START] >= marks[:-1, :, ServingMark.COMBINED] - 1e-15
        ).all()
        whole = sum(1e-4 + one.compute_D.max() + fullest(one.out_DD, cluster) + fullest(one.back_DD, cluster)
                    + fullest(one.keys_DD, cluster) + 3 * latency(cluster) + 12 * cluster.peer_latency_s for one in layers)  # fmt: skip
        longest = max(one.compute_D.max() for one in layers)
        assert longest <= marks[-1, :, ServingMark.COMBINED].max() <= whole * (1 + 1e-9)


def test_a_fast_loop_is_simulated_by_its_own_plans():
    batch, place, cluster, model = scene(5)
    loop = FastLoop(parse_policy("split"), 0, window_s=1e-3, control_s=1e-9)
    work = served_work(batch, place, cluster, model, traffic="home", loop=loop)
    even = served_work(batch, place, cluster, model, traffic="home")
    assert all(one.planned for step in work for one in step)
    assert sum(one.tokens_D.max() for step in work for one in step) < sum(
        one.tokens_D.max() for step in even for one in step
    )
    counted = serve_step(work[0], cluster.node_D, ExchangeModel.of(cluster), window_s=0.0, counts_s=1.0)
    assert counted[-1, :, 5].max() >= 4.0  # two layers, counts for the plan and sizes for the dispatch


def test_two_hops_are_refused():
    batch, place, cluster, model = scene(1)
    with pytest.raises(OptionError, match="one hop"):
        served_work(batch, place, cluster, model, traffic="home_node_dedup")
