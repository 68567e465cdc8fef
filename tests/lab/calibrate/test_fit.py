"""Fits recover the constants that made the rows, with noise and with late repeats."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.lab.calibrate.fit import ComputeRow, LinkRow, fit_curve, fit_links
from poise.lab.calibrate.patterns import balanced, bulk_patterns, peer_counts, port_bytes, ring
from poise.lab.calibrate.result import assemble
from poise.machine.cluster import Cluster
from poise.util.errors import NoResultError, OptionError

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.sampled_from([(2, 2), (4, 4), (3, 1), (2, 2, 2), (4,), (1, 1, 1)])


def rows_of(rng, shape, truth, *, shared=False, noise=0.0, late=0.0):
    """Rows that a machine of these constants would give."""
    node_D = np.repeat(np.arange(len(shape)), shape).astype(np.int32)
    devices = len(node_D)
    patterns = [(f"{p} peers", ring(devices, p) * 64 * p) for p in peer_counts(devices)]
    bulk = bulk_patterns(node_D, single=True)
    if "all" in bulk:
        bulk["balanced"] = balanced(node_D, truth["intra_bytes_per_s"], truth["inter_bytes_per_s"])
    patterns += [(name, matrix * size) for name, matrix in bulk.items() for size in (1e5, 4e5, 16e5, 64e5)]
    out = []
    for name, matrix in patterns:
        ports = port_bytes(matrix, node_D)
        wire = max(
            ports.intra / truth["intra_bytes_per_s"],
            (ports.node if shared else ports.inter) / truth["inter_bytes_per_s"],
        )
        latency = truth["intra_latency_s"] + truth["inter_latency_s"] * (ports.inter > 0)
        seconds = (latency + truth["peer_latency_s"] * ports.peers + wire) * (1 + noise * rng.standard_normal())
        spread = noise * seconds
        if rng.random() < late:
            seconds, spread = seconds * rng.uniform(1.5, 4), seconds
        out.append(LinkRow(name, ports.intra, ports.inter, ports.node, ports.peers, seconds, seconds, seconds + spread))
    return out


def constants(rng):
    return {
        "intra_bytes_per_s": 10 ** rng.uniform(7, 8.5),
        "inter_bytes_per_s": 10 ** rng.uniform(6, 7.5),
        "intra_latency_s": 10 ** rng.uniform(-4, -2.5),
        "inter_latency_s": 10 ** rng.uniform(-4, -2.5),
        "peer_latency_s": 10 ** rng.uniform(-5, -3.5),
    }


@given(SEEDS, SHAPES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_exact_rows_give_the_constants_back(seed, shape, shared):
    rng = np.random.default_rng(seed)
    truth = constants(rng)
    got = fit_links(rows_of(rng, shape, truth, shared=shared), nic_shared=shared)
    assert got.worst < 1e-6 and got.typical <= got.worst and got.worst_long <= got.worst
    for kind, there in (("intra", max(shape) > 1), ("inter", len(shape) > 1)):
        assert (f"{kind}_bytes_per_s" in got.constants) == there
        if there:
            assert got.constants[f"{kind}_bytes_per_s"] == pytest.approx(truth[f"{kind}_bytes_per_s"], rel=1e-4)
    # all rows of one peer more than others: the sum is what a cluster of this shape pays
    peers = sum(shape) - 1
    start = truth["intra_latency_s"] + truth["inter_latency_s"] * (len(shape) > 1) + truth["peer_latency_s"] * peers
    found = sum(got.constants.get(f"{kind}_latency_s", 0.0) for kind in ("intra", "inter"))
    assert found + got.constants.get("peer_latency_s", 0.0) * peers == pytest.approx(start, rel=1e-3)


@given(SEEDS, st.sampled_from([(2, 2), (4, 4), (2, 2, 2)]))
@settings(max_examples=40, deadline=None)
def test_noise_and_late_repeats_move_rates_little(seed, shape):
    rng = np.random.default_rng(seed)
    truth = constants(rng)
    got = fit_links(rows_of(rng, shape, truth, noise=0.03, late=0.15)).constants
    for name in ("intra_bytes_per_s", "inter_bytes_per_s"):
        # a rate is seen only where bytes outlast the start-up
        if truth[name] * (truth["intra_latency_s"] + truth["inter_latency_s"]) < 1e6:
            assert got[name] == pytest.approx(truth[name], rel=0.15)
    assert all(value >= 0 for value in got.values())


@given(SEEDS, st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_shared_port_is_told_from_one_a_device(seed, shared):
    rng = np.random.default_rng(seed)
    truth = {**constants(rng), "intra_bytes_per_s": 3e8, "inter_bytes_per_s": 1e7}
    got = fit_links(rows_of(rng, (4, 4), truth, shared=shared, noise=0.02), nic_shared=None)
    assert got.nic_shared == shared
    assert got.constants["inter_bytes_per_s"] == pytest.approx(1e7, rel=0.15)


@pytest.mark.parametrize("name", ["intra", "inter"])
def test_a_rate_that_only_start_up_tells_is_named(name):
    truth = {"intra_bytes_per_s": 60e6, "inter_bytes_per_s": 15e6, "intra_latency_s": 5e-3, "inter_latency_s": 1e-3,
             "peer_latency_s": 1e-4}  # fmt: skip
    rows = rows_of(np.random.default_rng(0), (2, 2), truth)
    assert fit_links(rows).unsure == ()
    # balanced rows end on both ports at once; a start-up is 6 ms
    short = [
        row for row in rows
        if (row.pattern != "balanced" and max(row.intra_bytes / 60e6, row.inter_bytes / 15e6) < 0.02)
        or row.pattern in {"intra": {"inter"}, "inter": {"intra"}}[name]
    ]  # fmt: skip
    got = fit_links(short)
    assert got.unsure == (f"{name}_bytes_per_s",)
    _, notes = assemble(Cluster.uniform(2, 2), got, fit_curve(table(lambda n: 1e-3 + n, (1, 4)), parameters=1.0), None)
    assert [note for note in notes if "is a guess" in note and note.startswith(name)]


def test_rows_that_say_nothing_are_no_result():
    with pytest.raises(NoResultError, match="carried bytes"):
        fit_links([LinkRow("1 peers", 0, 0, 0, 1, 1e-3)])
    with pytest.raises(NoResultError, match="not above 0"):
        fit_links([LinkRow("intra", 10, 0, 0, 1, 0.0)])


def table(function, knots, noise=None, active=(1, 2, 4)):
    rows = []
    for n in knots:
        for a in active:
            factor = 1.0 if noise is None else 1 + 0.03 * noise.standard_normal()
            rows.append(ComputeRow(n * a, a, a * function(n) * factor))
    return rows


KNOTS = (1, 4, 16, 64, 256, 1024)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_roofline_is_found_again(seed):
    rng = np.random.default_rng(seed)
    slope, level = 10 ** rng.uniform(-8, -6), 10 ** rng.uniform(-6, -4)

    def truth(n):
        return max(level, slope * n) if seed % 2 else level + slope * n

    exact = fit_curve(table(truth, KNOTS), parameters=100.0)
    np.testing.assert_allclose(
        exact.curve.seconds_X, [truth(n) for n in KNOTS], rtol=0.031
    )  # level: its end is made to rise
    noisy = fit_curve(table(truth, KNOTS, rng), parameters=100.0)
    np.testing.assert_allclose(noisy.curve.seconds_X, [truth(n) for n in KNOTS], rtol=0.15)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_whatever_was_measured_the_curve_is_one_the_cost_model_takes(seed):
    rng = np.random.default_rng(seed)
    knots = np.unique(rng.integers(1, 2000, rng.integers(2, 12)))
    if len(knots) < 2:
        return
    rows = [ComputeRow(int(n), 1, 10 ** rng.uniform(-6, -2)) for n in knots for _ in range(rng.integers(1, 3))]
    got = fit_curve(rows, parameters=1.0)  # the curve's own checks: rising, per token falling
    assert len(got.residual_R) == len(rows) and got.curve.per_token > 0


def test_what_had_to_be_bent_is_said():
    rows = [ComputeRow(1, 1, 1e-6), ComputeRow(2, 1, 1e-6), ComputeRow(4, 1, 9e-6)]
    assert "seconds per token rise" in fit_curve(rows, parameters=1.0).notes[0]
    flat = fit_curve([ComputeRow(n, 1, 1e-6) for n in (1, 2, 4)], parameters=1.0)
    assert "bound by memory" in flat.notes[-1]
    assert fit_curve(table(lambda n: 1e-6 + 1e-7 * n, KNOTS), parameters=1.0).notes == ()
    with pytest.raises(OptionError, match="two numbers of tokens"):
        fit_curve([ComputeRow(4, 2, 1e-6), ComputeRow(2, 1, 1e-6)], parameters=1.0)
