"""A step's cost: compute by hand, chunks that change nothing, and names of experts and devices that do not matter."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import FLOW_SPLITS, load_batch, random_count, random_slots, tiny_batch, tiny_cluster, tiny_model

from poise.cost import step as step_module
from poise.cost.bound import bound_terms
from poise.cost.compute import expert_seconds
from poise.cost.entries import LayerEntries
from poise.cost.near import layer_share
from poise.cost.split import exact_quota
from poise.cost.step import TokenShares, batch_cost
from poise.cost.traffic import DATA_FLOWS
from poise.routing.batch import RoutingBatch

SEEDS = st.integers(0, 2**32 - 1)
FIELDS = (
    "compute_BL", "dispatch_BL", "combine_BL", "kv_BL", "tokens_BLD", "pairs_BL", "cross_device_BL", "cross_node_BL",
)  # fmt: skip


def make(seed, nodes, loads, *, equal=False, top_k=2, measured=None):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes, equal=equal, measured=measured)
    if loads:
        batch = load_batch(rng, top_k=top_k, steps=4)
    else:
        batch = tiny_batch(rng, devices=cluster.num_devices, tokens=(3, 0, 5, 2, 4), top_k=top_k)
    return rng, cluster, batch, random_count(rng, 2, 4, cluster.num_devices)


@given(SEEDS, st.booleans(), st.sampled_from(["even", "exact"]))
@settings(max_examples=60, deadline=None)
def test_compute_is_the_slowest_device(seed, loads, split):
    """One second a token, and ``32 / bandwidth`` seconds to read an expert's weights, both at speed 1."""
    _, cluster, batch, count = make(seed, (2, 1), loads, measured=False)
    got = batch_cost(batch, count, cluster, tiny_model(batch), traffic="home", split=split)
    for b, layer in product(range(batch.num_steps), range(2)):
        seconds, tokens = [0.0] * 3, [0.0] * 3
        quota = exact_quota(batch.load_BLE[b, layer], count[layer], cluster.speed_D)
        for e in range(4):
            holders = np.flatnonzero(count[layer, e])
            load = float(batch.load_BLE[b, layer, e])
            for d in holders:
                n = load / len(holders)
                if split == "exact" and len(holders) > 1 and quota[e].sum() > 0:
                    n = load * quota[e, d] / quota[e].sum()
                tokens[d] += n
                seconds[d] += max(n, min(n, 1.0) * 32.0 / cluster.memory_bytes_per_s) / cluster.speed_D[d]
        assert got.compute_BL[b, layer] == pytest.approx(max(seconds), abs=1e-12)
        assert got.tokens_BLD[b, layer].tolist() == pytest.approx(tokens, abs=1e-12)
        mean = sum(tokens) / 3
        if mean > 0:
            assert got.imbalance_BL()[b, layer] == pytest.approx(max(tokens) / mean)
        else:
            assert np.isnan(got.imbalance_BL()[b, layer])
            assert got.seconds_BL[b, layer] == 0.0


@given(st.floats(0, 50), st.floats(0, 50), SEEDS)
@settings(max_examples=100, deadline=None)
def test_splitting_an_expert_never_saves_work_in_all(some, more, seed):
    cluster = tiny_cluster(np.random.default_rng(seed))
    model = tiny_model(load_batch(np.random.default_rng(0)))
    one, two, both = expert_seconds(np.array([some, more, some + more]), cluster, model)
    assert both <= (one + two) * (1 + 1e-12) + 1e-300
    assert max(one, two) <= both * (1 + 1e-12) + 1e-300


@given(SEEDS, st.sampled_from(FLOW_SPLITS), st.booleans(), st.sampled_from([1, 13, 40]))
@settings(max_examples=60, deadline=None)
def test_chunks_change_nothing(seed, priced, loads, size):
    traffic, split = priced
    _, cluster, batch, count = make(seed, (2, 1), loads)
    traffic = "home" if loads else traffic
    options = {"traffic": traffic, "split": split}
    whole = batch_cost(batch, count, cluster, tiny_model(batch), **options)
    with pytest.MonkeyPatch.context() as patch:
        assert len(step_module.step_chunks(batch, 3)) == 1
        patch.setattr(step_module, "_CHUNK_ELEMENTS", size)
        chunks = step_module.step_chunks(batch, 3)
        parts = batch_cost(batch, count, cluster, tiny_model(batch), **options)
    assert len(chunks) > 1
    assert [b for chunk in chunks for b in range(batch.num_steps)[chunk]] == list(range(batch.num_steps))
    for name in FIELDS:
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12, err_msg=name)


@given(SEEDS, st.sampled_from(DATA_FLOWS), st.booleans())
@settings(max_examples=60, deadline=None)
def test_names_of_experts_do_not_matter(seed, traffic, loads):
    rng, cluster, batch, count = make(seed, (2, 1), loads)
    traffic = "home" if loads else traffic
    name_LE = np.stack([rng.permutation(4) for _ in range(2)])  # new name of each expert
    load, renamed_count = np.empty_like(batch.load_BLE), np.empty_like(count)
    for layer in range(2):
        load[:, layer, name_LE[layer]] = batch.load_BLE[:, layer]
        renamed_count[layer, name_LE[layer]] = count[layer]
    tokens = batch.experts_TLK
    if tokens is not None:
        tokens = np.stack([name_LE[layer][tokens[:, layer]] for layer in range(2)], axis=1).astype(np.int16)
    renamed = RoutingBatch(load, batch.weight_B, batch.top_k, batch.layer_ids_L, tokens, batch.start_B,
                           batch.request_T, batch.home_T)  # fmt: skip
    options = {"traffic": traffic, "split": "even"}
    one = batch_cost(batch, count, cluster, tiny_model(batch), **options)
    two = batch_cost(renamed, renamed_count, cluster, tiny_model(batch), **options)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-9, atol=1e-12, err_msg=name)
    slots = random_slots(rng, 4, 3, 2)
    bounds = [bound_terms(b, cluster, tiny_model(b), traffic=traffic, slots_D=slots) for b in (batch, renamed)]
    np.testing.assert_allclose(bounds[0].seconds_BL, bounds[1].seconds_BL, rtol=1e-9)


@given(SEEDS, st.sampled_from(DATA_FLOWS), st.booleans(), st.sampled_from([(3,), (2, 2), (1, 1, 1)]))
@settings(max_examples=60, deadline=None)
def test_names_of_devices_do_not_matter(seed, traffic, loads, nodes):
    """Nodes of equal size: nodes change places, and devices inside them, all nodes alike (so that the sender's number
    in its node still says where its network copies land)."""
    rng, cluster, batch, count = make(seed, nodes, loads)
    traffic = "home" if loads else traffic
    devices, size = cluster.num_devices, nodes[0]
    node, inside = rng.permutation(len(nodes)), rng.permutation(size)
    name_D = np.array([node[d // size] * size + inside[d % size] for d in range(devices)])
    speed, renamed_count = np.empty(devices), np.empty_like(count)
    speed[name_D] = cluster.speed_D
    renamed_count[:, :, name_D] = count
    fields = {field: getattr(cluster, field) for field in cluster.__dataclass_fields__} | {"speed_D": speed}
    home = None if loads else name_D[batch.home_of_tokens(devices)].astype(np.int32)
    renamed = RoutingBatch(batch.load_BLE, batch.weight_B, batch.top_k, batch.layer_ids_L, batch.experts_TLK,
                           batch.start_B, None, home)  # fmt: skip
    options = {"traffic": traffic, "split": "even"}
    one = batch_cost(batch, count, cluster, tiny_model(batch), **options)
    two = batch_cost(renamed, renamed_count, type(cluster)(**fields), tiny_model(batch), **options)
    for name in FIELDS:
        got, want = getattr(two, name), getattr(one, name)
        got = got[..., name_D] if name == "tokens_BLD" else got
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_layer_that_is_entered_again_has_its_new_shares():
    """Fails if shares that were laid out for one placement are those of the next."""
    _, cluster, batch, _ = make(3, (2, 1), loads=False, equal=True)
    shares, experts_TK = TokenShares(batch, "stay"), batch.experts_TLK[:, 0]
    step_T = np.repeat(np.arange(batch.num_steps), np.diff(batch.start_B))
    for device in range(3):
        held_ED = np.zeros((4, 3), np.int32)
        held_ED[:, device] = 1
        shares.enter(0, layer_share(batch, 0, LayerEntries.of_counts(held_ED), cluster, "even"))
        share_TKD = shares.of_tokens(0, experts_TK, step_T)
        assert (share_TKD[..., device] == 1).all() and share_TKD.sum() == experts_TK.size
