"""A bound of a training layer: below every plan, and a plan that has it where one can."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import tiny_cluster

from poise.cost.weights import training_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.stepwise.driver import LayerDriver
from poise.stepwise.least_seconds import least_layer_seconds
from poise.stepwise.methods.expert_parallelism import ExpertParallelism
from poise.stepwise.methods.hecate import Hecate
from poise.stepwise.poise.policy import Poise
from poise.stepwise.poise.recorded import KnownRouting
from poise.stepwise.protocol import Foreseen
from poise.stepwise.sharding import owned_ED
from poise.stepwise.step_seconds import compute_seconds, exchange_seconds, layer_seconds
from poise.util.errors import OptionError

EXPERTS = 8
POLICIES = (Poise(), KnownRouting(), ExpertParallelism(), Hecate(overlap=2))


def price_of(cluster, tokens=40_000, **options):
    return training_price(tokens, EXPERTS, cluster, ModelSpec.generic(EXPERTS, 2, np.arange(2)), **options)


def planned_seconds(policy, load_SE, owner_E, price, slots):
    """Of a plan, without control."""
    driver = LayerDriver(policy, owned_ED(owner_E, len(load_SE)), step_slots=slots, layer=0)
    told_E = load_SE.sum(axis=0).astype(float)
    view = driver.view(0, told_E, np.zeros((0, EXPERTS)), price, Foreseen(load_SE, True))
    cost = layer_seconds(driver.finish(view, driver.choose(view), load_SE), load_SE, price, again=False, keeps=False)
    return cost.compute_s + cost.exchange_s + cost.shown_s


@given(st.integers(0, 2**32 - 1), st.sampled_from(POLICIES), st.sampled_from([(2, 2), (3,), (1, 2), (2, 2, 2)]))
@settings(max_examples=150, deadline=None)
def test_no_plan_is_below_the_bound(seed, policy, nodes):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    tokens = int(10 ** rng.uniform(2, 6))
    window = {"window_s": float(rng.choice([0.0, 1e-4, 1.0])), "hidden_share": float(rng.choice([0.0, 0.3]))}
    price = price_of(cluster, tokens, gather_ratio=float(rng.choice([0.5, 1.0])), **window)
    weight = rng.dirichlet(np.full(EXPERTS, 0.3), size=cluster.num_devices)
    load_SE = np.array([rng.multinomial(tokens, one) for one in weight])
    owner_E, slots = rng.integers(0, cluster.num_devices, EXPERTS), int(rng.integers(0, 4))
    least_s = least_layer_seconds(load_SE, owner_E, price, slots)
    assert 0 < least_s <= planned_seconds(policy, load_SE, owner_E, price, slots) * (1 + 1e-9)
    assert least_layer_seconds(load_SE, owner_E, price, slots + 1) <= least_s * (1 + 1e-12)


@pytest.mark.parametrize("nodes", [(1, 4), (2, 2)])
def test_even_routing_has_it(nodes):
    price = price_of(Cluster.uniform(*nodes))
    load_SE, owner_E = np.full((4, EXPERTS), 1_000_000), np.repeat(np.arange(4), 2)
    got = planned_seconds(ExpertParallelism(), load_SE, owner_E, price, 0)
    assert least_layer_seconds(load_SE, owner_E, price, 0) == pytest.approx(got, rel=1e-3)
    assert least_layer_seconds(np.zeros_like(load_SE), owner_E, price, 0) == 0.0


@pytest.mark.parametrize("pairs", [1_000, 30_000, 1_000_000])
@pytest.mark.parametrize("window_s", [0.0, 1e-4, 10.0])
@pytest.mark.parametrize("slots", [0, 1, 2])
def test_each_number_of_experts_that_come_in_by_hand(pairs, window_s, slots):
    """Two nodes of two; every node's tokens are for the other node's four experts, a quarter each."""
    cluster = Cluster.uniform(2, 2)
    price, owner_E = price_of(cluster, window_s=window_s), np.repeat(np.arange(4), 2)
    load_SE = np.where((owner_E[None] // 2) != (np.arange(4)[:, None] // 2), pairs, 0)
    got = least_layer_seconds(load_SE, owner_E, price, slots)
    compute_s = 4 * pairs * compute_seconds(np.full((EXPERTS, 4), 10**9), price) / (EXPERTS * 10**9)
    port_s = price.gathered_bytes / cluster.plain_wire.inter_bytes_per_s
    found = []
    for come in range(2 * slots + 1):
        through = (come + 1) // 2  # of the fuller of two ports
        shown = max(0.0, through * port_s - window_s) + max(0.0, through * port_s - 2 * window_s)
        crossing = np.zeros((4, 4))
        crossing[:2, 2:] = (4 - come) * 2 * pairs / 4
        off = 4 * pairs * (1 - slots / 4)  # of a device, whose tokens are for four experts alike
        both_s = exchange_seconds(np.zeros((4, 4)), price) + off * in_node(price)
        crossing_s = max(exchange_seconds(crossing, price), both_s)
        found.append(crossing_s + shown)
    assert got == pytest.approx(compute_s + min(found), rel=1e-5)


def in_node(price):
    """Seconds a pair of a device that leaves through both ports, the one inside the node and the one out of it."""
    speed, large = 0.0, np.zeros((4, 4))
    for target in (1, 2):
        pairs_DD = large.copy()
        pairs_DD[0, target] = 1e12
        speed += 1e12 / exchange_seconds(pairs_DD, price)
    return 1.0 / speed


def test_loads_of_other_devices_are_an_error():
    with pytest.raises(OptionError, match="4 devices and 8 owners"):
        least_layer_seconds(
            np.ones((3, EXPERTS), np.int64), np.zeros(EXPERTS, np.int64), price_of(Cluster.uniform(1, 4)), 1
        )
