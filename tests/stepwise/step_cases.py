"""Random layers of a step for the step-wise methods, and running a method on them."""

from dataclasses import replace

import numpy as np
from benchmarks.grids import grid_of
from tests.helpers import tiny_batch, tiny_cluster, tiny_model

from poise.cost.weights import StepPrice
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.replay.serving import FastLoop, replay_steps
from poise.stepwise.protocol import LayerView, StepPlan


def view_of(
    static_ED, load_SE, slots, *, nodes=None, step=0, recent_HE=None, predicted_E=None, before_ED=None
) -> LayerView:
    """A layer; without ``nodes`` one node, without ``predicted_E`` predicted as it comes."""
    static = np.asarray(static_ED, dtype=bool)
    experts, devices = static.shape
    load_E = np.asarray(load_SE).sum(axis=0).astype(float)
    cluster = tiny_cluster(np.random.default_rng(0), nodes or (devices,), equal=True)
    price = StepPrice(cluster, ModelSpec.generic(experts, 1, np.arange(1)), 1e-4, 1e-5)
    recent = np.zeros((0, experts)) if recent_HE is None else np.asarray(recent_HE, dtype=float)
    return LayerView(
        static, static if before_ED is None else before_ED, load_E if predicted_E is None else predicted_E, recent,
        np.zeros_like(static), slots, step, 0, price,
    )  # fmt: skip


def random_case(rng, *, replicas=True, slots=None, experts=None, nodes=None, most=400):
    """(view, load_SE): uneven nodes and placements, skewed loads, sources that differ, sometimes no tokens at all."""
    nodes = nodes or [int(n) for n in rng.integers(1, 4, rng.integers(1, 4))]
    devices, experts = sum(nodes), experts or int(rng.integers(1, 13))
    static = np.zeros((experts, devices), bool)
    static[np.arange(experts), rng.integers(0, devices, experts)] = True
    if replicas:
        static |= rng.random((experts, devices)) < rng.choice([0.0, 0.1, 0.3])
    weight = rng.dirichlet(np.full(experts, rng.choice([0.2, 1.0, 5.0])))
    load_SE = np.array([rng.multinomial(rng.integers(0, most), weight) for _ in range(devices)]).astype(np.int64)
    slots = int(rng.integers(0, 4)) if slots is None else slots
    return view_of(static, load_SE, slots, nodes=nodes), load_SE


def run(policy, view, load_SE) -> StepPlan:
    """The checked plan of one step; the same again from the same inputs; nothing late that has no tokens."""
    early = policy.before_gate(view).copy()
    plan = policy.after_gate(view, policy.before_gate(view), load_SE)
    plan.check(view, load_SE)
    again = policy.after_gate(view, policy.before_gate(view), load_SE)
    np.testing.assert_array_equal(plan.quota_ED, again.quota_ED)
    np.testing.assert_array_equal(plan.holders_ED, again.holders_ED)
    late = plan.holders_ED & ~early
    assert (plan.quota_ED[late] > 0).all()
    assert (plan.holders_ED >= view.static_ED).all()
    if plan.passive:
        assert not late.any()
        whole, rest = np.divmod(load_SE.sum(axis=0), view.static_ED.sum(axis=1))
        assert (np.where(view.static_ED, plan.quota_ED - whole[:, None], 0) <= (rest > 0)[:, None]).all()
        assert (np.where(view.static_ED, plan.quota_ED - whole[:, None], 0) >= 0).all()
    return plan


def passes_replay(policy, seed: int) -> None:
    """Several steps and layers of real tokens through the replay, for every published setting."""
    rng = np.random.default_rng(seed)
    nodes = [(2, 1), (2, 2), (3,)][int(rng.integers(3))]
    cluster: Cluster = tiny_cluster(rng, nodes, measured=False)
    devices, experts = sum(nodes), 6
    batch = tiny_batch(rng, devices=devices, experts=experts, tokens=(9, 7, 0, 12, 5, 8, 11))
    count = np.zeros((batch.num_layers, experts, devices), np.int64)
    count[:, np.arange(experts), np.arange(experts) % devices] = 1
    if rng.integers(2):
        count[:, 1, 0] = 1
    placement = Placement.from_counts(count)
    for setting in grid_of(policy):
        loop = FastLoop(replace(policy, **setting), int(rng.integers(0, 3)))
        replay = replay_steps(batch, placement, loop, cluster, tiny_model(batch), traffic="home", warm_up=2)
        np.testing.assert_allclose(replay.cost.tokens_BLD.sum(axis=2), batch.load_BLE[2:].sum(axis=2))
