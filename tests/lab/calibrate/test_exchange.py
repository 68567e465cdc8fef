"""The finer model of an exchange: its fit gives constants back; its ends lie where the coarse model has them, or before."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.cost.exchange import ExchangeModel, evenness, exchange_ends
from poise.lab.calibrate.exchange import fit_exchange
from poise.lab.calibrate.fit import LinkRow
from poise.lab.calibrate.patterns import balanced, bulk_patterns, peer_counts, port_bytes, ring
from poise.machine.cluster import Cluster
from poise.util.errors import ClusterError, NoResultError

SEEDS = st.integers(0, 2**32 - 1)


def rows_of(shape, model, counts_s):
    """Rows that a machine of these constants would give."""
    node_D = np.repeat(np.arange(len(shape)), shape).astype(np.int32)
    devices = len(node_D)
    patterns = [(f"{p} peers", ring(devices, p) * 64 * p) for p in peer_counts(devices)]
    bulk = bulk_patterns(node_D)
    if len(shape) > 1:
        bulk["balanced"] = balanced(node_D, model.intra_bytes_per_s, model.inter_bytes_per_s)
    patterns += [(name, matrix * size) for name, matrix in bulk.items() for size in (2e5, 8e5, 32e5, 128e5)]
    out = []
    for name, matrix in patterns:
        alone_s = exchange_ends(matrix, np.zeros(devices), node_D, model).max()
        seconds = alone_s + counts_s / 2
        p = port_bytes(matrix, node_D)
        out.append(LinkRow(name, p.intra, p.inter, p.node, p.peers, seconds, seconds, seconds, 1, 1, alone_s, p.intra_even,
                           p.inter_even))  # fmt: skip
    return out


@given(SEEDS, st.sampled_from([(2, 2), (4, 4), (2, 2, 2)]))
@settings(max_examples=5, deadline=None)
def test_exact_rows_give_the_constants_back(seed, shape):
    rng = np.random.default_rng(seed)
    truth = ExchangeModel(rng.uniform(1e-3, 4e-3), rng.uniform(1e-4, 5e-4), rng.uniform(6e7, 1e8), rng.uniform(1e7, 3e7),
                          rng.uniform(5e4, 2e5))  # fmt: skip
    found = fit_exchange(rows_of(shape, truth, 2e-3))
    assert found.counts_s == pytest.approx(2e-3) and np.median(np.abs(found.residual_R)) < 0.01
    assert found.model.intra_bytes_per_s == pytest.approx(truth.intra_bytes_per_s, rel=0.02)
    assert found.model.inter_bytes_per_s == pytest.approx(truth.inter_bytes_per_s, rel=0.02)
    assert found.model.crowding_bytes == pytest.approx(truth.crowding_bytes, rel=0.3)  # the grid is that coarse


@pytest.mark.parametrize("shape", [(8,), (4, 4)])
def test_what_an_idle_port_passes_at_once_is_told_from_a_rate(shape):
    truth = ExchangeModel(2e-3, 1e-4, 6e7, 2e7, 1e5, 1e-3, 3e-3)
    found = fit_exchange(rows_of(shape, truth, 2e-3)).model
    assert found.intra_bytes_per_s == pytest.approx(truth.intra_bytes_per_s, rel=0.02)
    assert found.inter_bytes_per_s == pytest.approx(truth.inter_bytes_per_s if len(shape) > 1 else 6e7, rel=0.02)
    assert found.intra_credit_s == pytest.approx(truth.intra_credit_s, abs=5e-4)
    assert found.inter_credit_s == pytest.approx(truth.inter_credit_s if len(shape) > 1 else 0.0, abs=5e-4)
    assert found.start_s == pytest.approx(truth.start_s, abs=1e-3)


def test_bytes_that_cost_nothing_are_as_fast_as_can_be():
    rows = [replace(row, seconds=1e-3, alone_s=1e-3) for row in rows_of((4,), ExchangeModel(1e-3, 0, 1e9, 1e9), 0.0)]
    assert fit_exchange(rows).model.intra_bytes_per_s > 1e12


def test_rows_without_bytes_or_times_are_no_result():
    with pytest.raises(NoResultError, match="without counts"):
        fit_exchange([LinkRow("intra", 1e6, 0, 0, 1, 1e-3)])
    with pytest.raises(NoResultError, match="carried bytes"):
        fit_exchange([LinkRow("1 peers", 0, 0, 0, 1, 1e-3, alone_s=1e-3)])


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_ends_are_those_of_the_fullest_port_if_all_begin_together(seed):
    rng = np.random.default_rng(seed)
    cluster = Cluster.uniform(2, 3)
    bytes_DD = rng.integers(0, 1000, (6, 6)) * (rng.random((6, 6)) < 0.7) * 1e6
    end_D = exchange_ends(bytes_DD, np.zeros(6), cluster.node_D, ExchangeModel.of(cluster))
    ports = port_bytes(bytes_DD, cluster.node_D)
    fullest = max(ports.intra / cluster.intra_bytes_per_s, ports.inter / cluster.inter_bytes_per_s)
    start = cluster.intra_latency_s + cluster.inter_latency_s
    assert end_D.max() >= fullest * (1 - 1e-9) and end_D.max() <= 2 * fullest + start


def test_a_late_rank_delays_only_those_that_hear_from_it():
    node_D, model = np.zeros(4, np.int32), ExchangeModel(0.0, 0.0, 10.0, 10.0)
    bytes_DD = np.zeros((4, 4))
    bytes_DD[0, 1] = bytes_DD[2, 3] = 20.0
    end_D = exchange_ends(bytes_DD, np.array([0.0, 0.0, 5.0, 0.0]), node_D, model)
    assert end_D.tolist() == [2.0, 2.0, 7.0, 7.0]
    assert exchange_ends(np.diag([9.0] * 4), np.arange(4.0), node_D, model).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_an_idle_port_passes_its_credit_at_once():
    node_D, plain = np.zeros(3, np.int32), ExchangeModel(0.0, 0.1, 10.0, 10.0)
    credit = replace(plain, intra_credit_s=3.0)
    bytes_DD = np.array([[0.0, 20.0, 5.0], [60.0, 0.0, 10.0], [60.0, 10.0, 0.0]])
    begin_D = np.array([0.0, 1.0, 2.0])
    without, ends = (exchange_ends(bytes_DD, begin_D, node_D, model) for model in (plain, credit))
    assert (without - ends).max() == pytest.approx(3.0)
    # not before it is sent, nor before this rank has posted
    ends = exchange_ends(bytes_DD, begin_D, node_D, replace(plain, intra_credit_s=1e9))
    assert ends.tolist() == pytest.approx([2.0, 2.0, 2.2])


def test_crowding_is_paid_where_ports_are_even():
    node_D, crowded = np.zeros(4, np.int32), ExchangeModel(0.0, 0.0, 10.0, 10.0, 20.0)
    even = np.ones((4, 4)) * 100.0
    hot = np.zeros((4, 4))
    hot[:3, 3] = 100.0
    assert exchange_ends(even, np.zeros(4), node_D, crowded).max() == pytest.approx(32.0)
    assert evenness(hot) == 0.25 and exchange_ends(hot, np.zeros(4), node_D, crowded).max() == pytest.approx(30.5)
    # who begins late finds the ports that the others have left
    pair = np.zeros((4, 4))
    pair[0, 1] = pair[1, 0] = pair[2, 3] = pair[3, 2] = 100.0
    late = exchange_ends(pair, np.array([0.0, 0.0, 0.0, 8.0]), node_D, crowded)
    assert late.tolist() == pytest.approx([12.0, 12.0, 18.0, 18.0])
    with pytest.raises(ClusterError, match="crowding_bytes"):
        ExchangeModel(0.0, 0.0, 1.0, 1.0, -1.0)
