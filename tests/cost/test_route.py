"""Rows of sources: every quota used exactly, as local as can be; whole-token traffic equals the expectation's."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import tiny_cluster

from poise.cost import route
from poise.cost.route import assign_tokens, count_sources, locality_pairs, locality_rows, token_copies
from poise.cost.weights import StepPrice, fetch_seconds, step_price, window_seconds
from poise.machine.model import ModelSpec

SEEDS = st.integers(0, 2**32 - 1)


def case(rng):
    nodes = [int(n) for n in rng.integers(1, 4, rng.integers(1, 4))]
    devices, experts = sum(nodes), int(rng.integers(1, 6))
    quota = rng.integers(0, 9, (experts, devices)) * (rng.random((experts, devices)) < 0.5)
    load = np.stack([rng.multinomial(q.sum(), rng.dirichlet(np.ones(devices))) for q in quota]).T
    return np.repeat(np.arange(len(nodes)), nodes), load.astype(np.int64), quota.astype(np.int64)


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_rows_use_every_quota_and_keep_what_can_be_kept(seed):
    node_D, load, quota = case(np.random.default_rng(seed))
    rows = locality_rows(load, quota, node_D)
    assert rows.min() >= 0
    assert (rows.sum(axis=0) == quota).all() and (rows.sum(axis=2) == load).all()
    assert (np.einsum("ded->de", rows) == np.minimum(load, quota.T)).all()  # own device first
    for node in np.unique(node_D):
        here = node_D == node
        inside = rows[here][:, :, here].sum(axis=(0, 2))
        assert (inside == np.minimum(load[here].sum(axis=0), quota[:, here].sum(axis=1))).all()  # then own node
    for source in range(len(node_D)):
        assert (locality_rows(load, quota, node_D, source)[0] == rows[source]).all()
    assert (locality_pairs(load, quota, node_D) == rows.sum(axis=1)).all()


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_tokens_follow_their_rows(seed):
    rng = np.random.default_rng(seed)
    node_D, load, quota = case(rng)
    source = np.repeat(np.arange(len(node_D)), load.sum(axis=1))
    expert = np.concatenate([np.repeat(np.arange(load.shape[1]), row) for row in load])
    device = np.zeros((len(source), 1), np.int64)
    rows = locality_rows(load, quota, node_D)
    assign_tokens(expert[:, None], source, rows.copy(), device)
    back = np.zeros_like(rows)
    np.add.at(back, (source, expert, device[:, 0]), 1)
    assert (back == rows).all()
    counted = np.zeros_like(load)
    count_sources(expert[:, None], source, counted)
    assert (counted == load).all()


def test_arrays_in_any_form_are_compiled_for_once():
    """Views, what may not be written, and narrow integers: each would be a function of its own."""
    picks = np.arange(12).reshape(3, 4) % 5
    wide = np.zeros((3, 8), np.int16)
    wide[:, ::2] = picks
    fixed, homes = picks.copy(), np.array([1, 0, 1], np.int32)
    fixed.flags.writeable = homes.flags.writeable = False
    before, found = set(route._count_sources.signatures), []
    for experts_TK, source_T in ((picks, np.array([1, 0, 1])), (wide[:, ::2], homes), (fixed, homes)):
        found.append(np.zeros((2, 5), np.int64))
        count_sources(experts_TK, source_T, found[-1])
    assert len(set(route._count_sources.signatures) - before) <= 1
    assert all((one == found[0]).all() for one in found) and found[0].sum() == 12


def test_copies_by_hand():
    cluster = tiny_cluster(np.random.default_rng(0), (2, 2), equal=True)
    device, source = np.array([[1, 1], [2, 3]]), np.array([0, 0])
    home, _ = token_copies(device, source, cluster, "home")
    assert home.device_BDD[0, 0].tolist() == [0, 2, 1, 1]
    once, _ = token_copies(device, source, cluster, "home_device_dedup")
    assert once.device_BDD[0, 0].tolist() == [0, 1, 1, 1]
    by_node, _ = token_copies(device, source, cluster, "home_node_dedup")
    assert by_node.node_BDN[0, 0].tolist() == [1, 1]
    _, back = token_copies(device, source, cluster, "stay")
    assert back.device_BDD[0].nonzero() is not None and back.device_BDD[0, 3, 2] == 1 and back.device_BDD[0].sum() == 2


def test_fetch_takes_the_near_holder_and_shares_senders():
    cluster = tiny_cluster(np.random.default_rng(0), (2, 2), shared=False, equal=True)
    model = ModelSpec.generic(2, 1, np.arange(1))
    price = StepPrice(cluster, model, 0.0, 0.0)
    held = np.array([[True, False, True, False], [True, False, False, False]])
    latency = cluster.intra_latency_s + cluster.inter_latency_s
    near = np.zeros_like(held)
    near[0, 1] = near[0, 3] = True  # each from its own node
    assert np.isclose(fetch_seconds(held, near, price), model.expert_bytes / cluster.intra_bytes_per_s + latency)
    far = np.zeros_like(held)
    far[1, 2] = far[1, 3] = True  # both from device 0
    assert np.isclose(fetch_seconds(held, far, price), 2 * model.expert_bytes / cluster.inter_bytes_per_s + latency)
    assert fetch_seconds(held, np.zeros_like(held), price) == 0
    assert step_price(64, 2, cluster, model).window_s == window_seconds(64, cluster, model) > 0
    assert step_price(64, 2, cluster, model, window_s=3.0, control_s=2.0).control_s == 2.0
