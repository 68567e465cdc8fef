"""A step rank by rank: the terms added up where all ranks are alike, never more where they are not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replay.test_training import price_of, skewed

from poise.cost.exchange import ExchangeModel
from poise.machine.cluster import Cluster
from poise.replay.serving import FastLoop
from poise.replay.training import replay_training
from poise.replay.work import LayerWork
from poise.simulate.clockwork import meanwhile
from poise.simulate.training import Backward, Forward, rank_step
from poise.stepwise.methods.expert_parallelism import ExpertParallelism
from poise.stepwise.methods.full_replication import FullReplication

SEEDS = st.integers(0, 2**32 - 1)
CLUSTER = Cluster.uniform(2, 2)


def steps_of(traffic, policy, **options):
    price = price_of(CLUSTER, **options)
    got = replay_training(traffic, FastLoop(policy, 8), price, warm_up=0, by_rank=True)
    model = ExchangeModel.of(CLUSTER)
    return got, [rank_step(work, CLUSTER.node_D, model, window_s=price.window_s) for work in got.work_BL]


def test_equal_ranks_take_what_the_terms_add_up_to():
    traffic = skewed(np.random.default_rng(0), tokens=640).force_balanced()
    got, steps = steps_of(traffic, ExpertParallelism())
    for one, added in zip(steps, got.step_seconds_B, strict=True):
        assert one.end_D.max() == pytest.approx(added, rel=1e-6)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_a_step_is_never_longer_than_its_terms_added_and_time_goes_on(seed):
    got, steps = steps_of(skewed(np.random.default_rng(seed), steps=2), ExpertParallelism())
    for one, added in zip(steps, got.step_seconds_B, strict=True):
        assert one.end_D.max() <= added * (1 + 1e-9)
        assert (np.diff(one.marks_LXDM[:, 0, :, : len(Forward)], axis=-1) >= 0).all()
        assert (np.diff(one.marks_LXDM[:, 1, :, : len(Backward)], axis=-1) >= 0).all()
        assert (one.marks_LXDM[1, 0, :, Forward.START] >= one.marks_LXDM[0, 0, :, Forward.COMBINED]).all()


def test_weights_that_no_window_hides_delay_the_counts_and_the_end():
    traffic = skewed(np.random.default_rng(1), steps=1)
    hidden, shown = (steps_of(traffic, FullReplication(), window_s=window)[1][0] for window in (1.0, 1e-6))
    assert hidden.end_D.max() == pytest.approx(3 * 2 * 1.0, rel=0.02)
    wait = shown.marks_LXDM[:, 0, :, Forward.COUNTED] - shown.marks_LXDM[:, 0, :, Forward.ATTENTION]
    assert (wait > 1e-4).all() and shown.end_D.max() > shown.marks_LXDM[0, 1, :, Backward.ATTENTION].max()


def test_weights_pass_beside_tokens_of_their_own_ports_only():
    node_D = np.array([0, 0, 1, 1], np.int32)
    tokens, weights = np.zeros((4, 4)), np.zeros((4, 4))
    tokens[0, 1] = tokens[0, 0] = 5.0
    weights[0, 1], weights[0, 2], weights[3, 1] = 2.0, 9.0, 9.0
    assert meanwhile(weights, tokens, node_D).tolist() == [[0, 2.0, 0, 0], *[[0] * 4] * 3]


def test_a_late_fetch_goes_the_other_way_through_a_hot_port():
    devices, size = 4, 1e6
    node_D, model = np.zeros(devices, np.int32), ExchangeModel(0.0, 0.0, 1e6, 1e6)
    tokens, weights = np.zeros((devices, devices)), np.zeros((devices, devices))
    tokens[1:, 0] = size  # everything to rank 0, which owns the hot expert
    weights[0, 1:] = 0.9 * size
    alone, both = (
        rank_step([LayerWork(tokens, np.zeros(devices), late=late)], node_D, model, window_s=0.0)
        for late in ((), (weights,))
    )
    ready, ready_alone = (one.marks_LXDM[0, 0, :, Forward.READY].max() for one in (both, alone))
    assert ready == pytest.approx(ready_alone)
