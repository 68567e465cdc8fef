"""Picks that compute nothing (identity experts): what traces, files and steps make of them."""

import json

import numpy as np
import pytest
from tests.helpers import no_experts

from poise.engines.readers import read_dump
from poise.routing.batching import make_batch
from poise.routing.files import join, read
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import TraceError


def test_they_stand_behind_a_tokens_other_picks_with_their_weights():
    weights = np.array([[[0.5, 0.3, 0.2]], [[0.4, 0.3, 0.3]]], np.float32)
    trace = RoutingTrace(np.array([[[-1, 2, 0]], [[-1, -1, -1]]]), 4, weights=weights)
    assert trace.experts.tolist() == [[[2, 0, -1]], [[-1, -1, -1]]]
    np.testing.assert_array_equal(trace.weights[0, 0], np.array([0.3, 0.2, 0.5], np.float32))
    with pytest.raises(TraceError, match="lists one expert twice"):
        RoutingTrace(np.array([[[-1, 2, 2]]]), 4)


@pytest.mark.parametrize("experts", [8, 128, 129, 300])
def test_they_survive_a_file(tmp_path, experts):
    rng = np.random.default_rng(experts)
    ids = np.argsort(rng.random((30, 2, experts)), axis=2)[:, :, :3]
    trace = RoutingTrace(no_experts(rng, ids, 0.4), experts)
    trace.save(tmp_path / "t.npz")
    np.testing.assert_array_equal(read(tmp_path / "t.npz").experts, trace.experts)


def test_loads_are_those_of_real_picks():
    trace = RoutingTrace(np.array([[[0, -1], [-1, -1]], [[1, 0], [-1, -1]], [[2, 1], [2, -1]]]), 3)
    batch = make_batch(trace, tokens_per_step=2, order="file")
    assert batch.load_BLE.tolist() == [[[2, 1, 0], [0, 0, 0]], [[0, 1, 1], [0, 0, 1]]]
    assert batch.tokens_BL().tolist() == [[2, 0], [1, 1]]
    assert batch.came_from_TL().tolist() == [[-1, 0], [-1, 1], [-1, 2]]


def test_a_profile_counts_them_for_the_size_of_a_step_alone(tmp_path):
    """30 picks a layer of which 10 compute nothing: 10 tokens of top-3, so that 20 tokens are 40 real pairs, not 60."""
    profile = LoadProfile(np.array([[12, 8], [0, 0], [5, 15]]), top_k=3, idle_BL=np.array([10, 0, 10]))
    assert profile.idle_BL.tolist() == [[10, 10]] and profile.layer_ids.tolist() == [0, 2]
    batch = make_batch(profile, tokens_per_step=20)
    np.testing.assert_allclose(batch.load_BLE, [[[24, 16], [10, 30]]])
    np.testing.assert_allclose(make_batch(profile).load_BLE.sum(axis=2), [[30, 30]], rtol=0.5)
    (tmp_path / "p.json").write_text(json.dumps({"logical_count": [[12, 8]], "identity_count": [10]}))
    np.savez(tmp_path / "p.npz", counts=np.array([[12, 8]]), layers=np.array([3]), identity_count=np.array([[10]]))
    both = [read(tmp_path / name) for name in ("p.json", "p.npz")]
    assert [one.idle_BL.tolist() for one in both] == [[[10]], [[10]]]
    later = LoadProfile(np.array([[9, 30]]), idle_BL=np.array([4]))
    assert join([both[0], later]).idle_BL.tolist() == [[10], [4]] and both[0].steps(slice(0, 1)).idle_BL == [[10]]
    for wrong in (np.array([1, 2, 3]), np.array([-1.0]), np.array([np.nan]), np.array(["a"])):
        with pytest.raises(TraceError, match="compute nothing"):
            LoadProfile(np.ones((1, 2)), idle_BL=wrong)


def test_a_profile_in_json_keeps_them_when_it_is_read_as_a_dump(tmp_path):
    load, idle = np.random.default_rng(1).integers(0, 90, (3, 2, 8)), np.random.default_rng(2).integers(0, 9, (3, 2))
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"logical_count": load.tolist(), "identity_count": idle.tolist()}))
    profile = read_dump(path).profile
    np.testing.assert_array_equal(profile.load_BLE, load)
    np.testing.assert_array_equal(profile.idle_BL, idle)


def test_profiles_with_an_idle_layer_are_joined():
    """A layer that nobody used in one file is empty in its steps; picks that compute nothing go along."""
    rng = np.random.default_rng(3)
    load, idle = rng.integers(1, 90, (4, 3, 8)), rng.integers(1, 9, (4, 3)).astype(float)
    load[2:, 1], idle[2:, 1] = 0, 0
    parts = [LoadProfile(load[:2], idle_BL=idle[:2], name="a"), LoadProfile(load[2:], idle_BL=idle[2:], name="b")]
    assert parts[1].layer_ids.tolist() == [0, 2]
    for order in ((0, 1), (1, 0)):
        together = join([parts[at] for at in order])
        np.testing.assert_array_equal(together.load_BLE, np.concatenate([load[2 * at : 2 * at + 2] for at in order]))
        np.testing.assert_array_equal(together.idle_BL, np.concatenate([idle[2 * at : 2 * at + 2] for at in order]))
        assert together.notes == ("b has no load in layers 1: they count as idle in its steps",)
    ends = LoadProfile(load[:1, 1:], np.array([1, 2]), name="late")  # ranks, or a file that began at another layer
    for order in ((parts[0], ends), (ends, parts[0])):
        with pytest.raises(TraceError, match="late has load in layers 1 to 2, a in layers 0 to 2: idle in one of them"):
            join(order)
    other = LoadProfile(load[:1, 1:], np.array([4, 5]), name="c")  # of another stage of a pipeline, or model
    with pytest.raises(TraceError, match="a has 3 layers with load, c 2, and 0 of 5 are in each"):
        join([parts[0], other])
