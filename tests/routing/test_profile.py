"""Statistics against counting by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import no_experts
from tests.routing.test_trace import random_trace

from poise.routing.profile import (
    affinity_LEE,
    coactivation_LEE,
    dead_share_L,
    load_LE,
    mutual_information,
    skew_L,
)
from poise.routing.trace import RoutingTrace


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), top_k=st.integers(1, 3), num_experts=st.integers(3, 9))
def test_counts_equal_counting_by_hand(seed, top_k, num_experts):
    trace = random_trace(seed, tokens=20, num_experts=num_experts, top_k=top_k)
    if seed % 2:  # picks that compute nothing count nowhere
        trace = replace(trace, experts=no_experts(np.random.default_rng(seed), trace.experts, 0.4))
    shape = (trace.num_layers, num_experts, num_experts)
    load, pairs, both = np.zeros(shape[:2]), np.zeros((shape[0] - 1, *shape[1:])), np.zeros(shape)
    for row in trace.experts.tolist():
        token = [[e for e in chosen if e >= 0] for chosen in row]
        for layer, chosen in enumerate(token):
            for a in chosen:
                load[layer, a] += 1
                for b in chosen:
                    both[layer, a, b] += 1
                for b in token[layer + 1] if layer + 1 < shape[0] else []:
                    pairs[layer, a, b] += 1
    assert np.array_equal(load_LE(trace.experts, num_experts), load)
    assert np.array_equal(affinity_LEE(trace.experts, num_experts), pairs)
    assert np.array_equal(coactivation_LEE(trace.experts, num_experts), both)
    assert seed % 2 or pairs.sum() == top_k**2 * trace.num_tokens * (shape[0] - 1)


def test_mutual_information_of_known_chains():
    rng = np.random.default_rng(0)
    start = rng.integers(0, 4, 4000)
    chain = np.stack([start, (start + 1) % 4, rng.integers(0, 4, 4000)], axis=1)[:, :, None]
    real, null = mutual_information(chain, 4)
    share = np.bincount(start) / 4000
    assert real[0] == pytest.approx(-(share * np.log(share)).sum())  # a permutation keeps the whole entropy
    assert real[0] == pytest.approx(math.log(4), abs=0.01)
    assert real[1] < 0.01 and (null < 0.01).all() and (null > 0).all()
    assert np.array_equal(mutual_information(chain, 4, seed=3)[1], mutual_information(chain, 4, seed=3)[1])


def test_the_shuffled_null_is_that_of_skewed_loads():
    """Independent layers with skewed loads: the measured information is within the null's own range."""
    rng = np.random.default_rng(1)
    p = np.array([0.7, 0.2, 0.05, 0.05])
    trace = rng.choice(4, (3000, 2, 1), p=p)
    real, null = mutual_information(trace, 4, shuffles=20)
    assert null[0] == pytest.approx(9 / 2 / 3000, rel=0.5)  # (E - 1)^2 / 2 T, the bias of a finite sample
    assert real[0] < 4 * null[0]


def test_skew_and_dead_experts():
    load = np.array([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0]])
    assert skew_L(load).tolist() == [1, 4, 2] and dead_share_L(load).tolist() == [0, 0.75, 0.5]
    trace = RoutingTrace(np.array([[0], [0], [1]]), 3)
    assert skew_L(load_LE(trace.experts, 3))[0] == pytest.approx(2)
