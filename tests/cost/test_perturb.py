"""The least and most that a gain can be within the errors of constants, against pricing every machine by itself."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, random_count, tiny_batch, tiny_cluster, tiny_model

from poise.cost.perturb import constant_errors, gain_range
from poise.cost.pricing import Pricing
from poise.cost.step import batch_cost
from poise.machine.cluster import Cluster
from poise.machine.kernel import AllToAllLinks, ExchangeWay, ExpertKernel

NODES = st.sampled_from([(2, 1), (3,), (1, 1)])


def machines(cluster, kernel, inside, between):
    """Every machine within these errors, the one that is given first."""
    for read, compute, moved in product((1, 1 - kernel, 1 + kernel), repeat=3):
        k = cluster.kernel
        one = replace(k, read_factor=k.read_factor * read, compute_factor=k.compute_factor * compute,
                      activation_factor=k.activation_factor * moved)  # fmt: skip
        for near, far in product((1, 1 - inside, 1 + inside), (1, 1 - between, 1 + between)):
            ways = [replace(way, intra_bytes_per_s=way.intra_bytes_per_s / near, inter_bytes_per_s=way.inter_bytes_per_s / far)
                    for way in (cluster.links.dispatch, cluster.links.combine)]  # fmt: skip
            ports = cluster.intra_bytes_per_s / near, cluster.inter_bytes_per_s / far
            yield replace(cluster, kernel=one, links=AllToAllLinks("l", *ways), intra_bytes_per_s=ports[0],
                          inter_bytes_per_s=ports[1])  # fmt: skip


FLOWS = st.sampled_from(["loads", "home_node_dedup", "stay"])


@given(st.integers(0, 2**32 - 1), NODES, FLOWS, st.sampled_from(["even", "exact"]))
@settings(max_examples=18, deadline=None)
def test_every_machine_is_priced_as_by_itself(seed, nodes, flow, split):
    rng = np.random.default_rng(seed)
    factors = rng.uniform(0.5, 3, 3)
    ways = [ExchangeWay(0.1, *rng.choice([2.0, 8.0], 2), error=0.2) for _ in range(2)]
    cluster = replace(
        tiny_cluster(rng, nodes, measured=False),
        kernel=ExpertKernel("k", "bf16", 2.0, 0.3, *factors, 32.0, 16.0, 0.25),
        links=AllToAllLinks("l", *ways),
    )
    loads = flow == "loads"
    batch = load_batch(rng) if loads else tiny_batch(rng, devices=cluster.num_devices)
    model = tiny_model(batch)
    before, after = (random_count(rng, 2, 4, cluster.num_devices) for _ in range(2))
    traffic = "home" if loads else flow
    got = gain_range(batch, before, after, Pricing(cluster, model, traffic, split))

    def seconds(count, machine):
        cost = batch_cost(batch, count, machine, model, traffic=traffic, split=split)
        return float(batch.weight_B @ cost.seconds_BL.mean(axis=1))

    pairs = [(seconds(before, one), seconds(after, one)) for one in machines(cluster, 0.25, 0.2, 0.2)]
    saved = [a - b for a, b in pairs]
    assert len(pairs) == 243
    assert got[:3] == pytest.approx((saved[0], min(saved), max(saved)), rel=1e-9, abs=1e-12)
    share = [1 - b / a for a, b in pairs]
    assert got[3:] == pytest.approx((share[0], min(share), max(share)), rel=1e-9, abs=1e-12)


def test_the_same_placement_gains_nothing_on_any_machine():
    rng = np.random.default_rng(1)
    batch, cluster = load_batch(rng), tiny_cluster(rng)
    count = random_count(rng, 2, 4, 3)
    assert set(gain_range(batch, count, count, Pricing(cluster, tiny_model(batch), "home", "even"))) == {0.0}


def test_errors_are_the_constants_own_or_unknown():
    one = Cluster.parse("1x8:h200+vllm.fp8_block+deepep-ll")
    known = max(one.links.dispatch.error, one.links.combine.error)
    assert constant_errors(one) == (one.kernel.error, known, 0.3)
    assert constant_errors(Cluster.parse("1x8:h200+datasheet")) == (0.3, 0.3, 0.3)
    both = replace(one.links, dispatch=replace(one.links.dispatch, inter_bytes_per_s=1e9))
    assert constant_errors(replace(one, links=both)).between == known
    doubtful = Cluster.parse("2x8:h200+deepep-ll")
    assert doubtful.links.dispatch.inter_bytes_per_s and constant_errors(doubtful).between == 0.3
