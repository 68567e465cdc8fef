"""Measured curves of an expert: what they are at any number of tokens, what is refused, and their YAML."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.cost.compute import expert_seconds, expert_times
from poise.machine.cluster import Cluster, from_preset
from poise.machine.curve import MeasuredCurve
from poise.machine.model import ModelSpec
from poise.util.errors import ClusterError

MODEL = ModelSpec("tiny", 1, (0,), 4, 2, 8, 4)
FLAT_THEN_STEEP = MeasuredCurve([4, 16, 64, 256], [8.0, 8.0, 24.0, 88.0], parameters=96, weight_bytes=2)


def random_curve(rng, parameters=96.0):
    """Rising, per token falling: each knot anywhere between the two limits that the last one sets."""
    x = np.unique(np.concatenate([[rng.integers(1, 4)], rng.integers(1, 200, rng.integers(2, 7))])).astype(float)
    x = np.concatenate([x, [x[-1] + rng.integers(1, 50)]])
    y = [float(rng.uniform(0.1, 10))]
    for before, after in pairwise(x):
        y.append(y[-1] * (1 + (after / before - 1) * rng.choice([0.0, rng.random(), 1.0])))
    y[-1] = max(y[-1], y[-2] * (1 + 1e-3 * (x[-1] / x[-2] - 1)))
    return MeasuredCurve(x, y, parameters)


def test_through_the_knots_and_beyond():
    got = FLAT_THEN_STEEP.seconds(np.array([[0.0, 0.25, 1.0], [4, 40, 300]]))
    np.testing.assert_allclose(got, [[0, 2.0, 8.0], [8, 16, 88 + 44 / 3]])
    assert FLAT_THEN_STEEP.per_token == pytest.approx(1 / 3) and FLAT_THEN_STEEP.per_expert == 8
    rising = MeasuredCurve([3, 5], [7.0, 9.0], 1)
    np.testing.assert_allclose(rising.seconds(np.array([0.5, 1, 2, 105])), [2.5, 5, 6, 109])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_splitting_an_expert_never_saves_work_and_the_roofline_lies_below(seed):
    rng = np.random.default_rng(seed)
    curve = random_curve(rng)
    a, b = rng.choice([0.0, rng.uniform(0, 3), rng.uniform(0, 400)], 2), rng.uniform(0, 5, 2)
    one, two, both = curve.seconds(a), curve.seconds(b), curve.seconds(a + b)
    assert (both <= (one + two) * (1 + 1e-9)).all()
    assert (np.maximum(one, two) <= both * (1 + 1e-9)).all()
    cluster = from_preset([2], "h100", expert_curve=curve)
    per_token, per_expert = expert_times(cluster, MODEL)[1::-1]
    n = np.concatenate([[0.1, 1], rng.uniform(0, 500, 20), curve.tokens_X])
    measured = expert_seconds(n, cluster, MODEL)
    assert (np.maximum(n * per_token, np.minimum(n, 1) * per_expert) <= measured * (1 + 1e-9)).all()
    assert per_expert == pytest.approx(expert_seconds(np.array([1.0]), cluster, MODEL)[0])
    far = np.array([1e9])
    assert far * per_token == pytest.approx(expert_seconds(far, cluster, MODEL), rel=1e-3)


def test_other_models_are_scaled_by_parameters():
    cluster = from_preset([2], "h100", expert_curve=FLAT_THEN_STEEP)
    twice = dataclasses.replace(MODEL, expert_intermediate_size=8)
    n = np.array([0.5, 1.0, 30, 1000])
    np.testing.assert_allclose(expert_seconds(n, cluster, MODEL), FLAT_THEN_STEEP.seconds(n))
    np.testing.assert_allclose(expert_seconds(n, cluster, twice), 2 * FLAT_THEN_STEEP.seconds(n))


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        ([1], [1.0], "2 to"),
        ([1, 2], [1.0], "2 to"),
        ([0.5, 2], [1.0, 1.5], "1 or more"),
        ([2, 2], [1.0, 1.5], "1 or more"),
        ([1, np.inf], [1.0, 1.5], "1 or more"),
        ([1, 2], [0.0, 1.5], "above 0"),
        ([1, 2], [1.0, np.nan], "above 0"),
        ([1, 2, 4], [1.0, 0.9, 1.5], "1 s at 1 tokens, 0.9 s at 2"),
        ([1, 2, 4], [1.0, 1.5, 1.5], "1.5 s at 2 tokens, 1.5 s at 4"),
        ([1, 2, 4], [1.0, 1.5, 3.5], "per token"),
    ],
)
def test_other_curves_are_refused(x, y, says):
    with pytest.raises(ClusterError, match=says):
        MeasuredCurve(x, y, 96)
    with pytest.raises(ClusterError, match="parameters"):
        MeasuredCurve([1, 2], [1.0, 1.5], 0)


def test_each_peer_adds_to_the_latency():
    options = {"intra_latency_s": 1.0, "inter_latency_s": 10.0, "peer_latency_s": 0.25}
    assert from_preset([1], "h100", **options).plain_wire.start_s == 0
    assert from_preset([4], "h100", **options).plain_wire.start_s == 1.75
    assert from_preset([4, 1], "h100", **options).plain_wire.start_s == 12.0
    with pytest.raises(ClusterError, match="peer_latency_s"):
        from_preset([2], "h100", peer_latency_s=-1e-6)
    with pytest.raises(ClusterError, match="MeasuredCurve"):
        from_preset([2], "h100", expert_curve=[1, 2])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_yaml_reads_back_as_it_was(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    curve = random_curve(rng, parameters=float(rng.integers(1, 10**9)))
    cluster = from_preset([2, 3], "a100", peer_latency_s=float(rng.random()), expert_curve=curve)
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text("# a comment\n" + cluster.to_yaml())
    back = Cluster.parse(path)
    assert back.peer_latency_s == cluster.peer_latency_s and back.expert_curve is not None
    assert back.expert_curve.to_dict() == curve.to_dict()
    assert "expert_curve" not in from_preset([2], "h100").to_yaml()


CURVE = "tokens: [1, 2], seconds: [1e-6, 1.5e-6], parameters: 96"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "mapping"),
        ("{tokens: [1, 2], seconds: [1, 1.5]}", "lacks 'parameters'"),
        (f"{{{CURVE}, gpu: h100}}", "'gpu'"),
        ("{tokens: 3, seconds: [1, 1.5], parameters: 96}", "list"),
        ("{tokens: [1, x], seconds: [1, 1.5], parameters: 96}", "finite number"),
        ("{tokens: [1, 2], seconds: [1, 2.5], parameters: 96}", "per token"),
        (f"{{{CURVE}, weight_bytes: 0}}", "weight_bytes"),
    ],
)
def test_bad_curves_in_a_file_are_cluster_errors(tmp_path, text, says):
    path = tmp_path / "c.yaml"
    path.write_text(f"devices_per_node: 2\nexpert_curve: {{{CURVE}}}\n")
    assert Cluster.parse(path).expert_curve.weight_bytes == 2
    path.write_text(f"devices_per_node: 2\nexpert_curve: {text}\n")
    with pytest.raises(ClusterError, match=says):
        Cluster.parse(path)
