"""The drift test: exact against enumeration, the stated rate on stationary traffic, power on shifted traffic."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2_contingency
from tests.helpers import few_or

from poise.control.drift import DriftTest, correlated_lags, gram_LNN
from poise.routing.batch import RoutingBatch
from poise.util.errors import OptionError, TraceError

EXPERTS, LAYERS = 8, 3


def loads(rng, steps, *, tokens=64, request=1.0, tilt=0.0, layers=LAYERS, drifting=range(LAYERS)):
    """Steps of consecutive requests; a request of mean length ``request`` > 1 has experts of its own liking."""
    total = steps * tokens
    length = np.ones(total, int) if request == 1 else 1 + rng.poisson(request - 1, int(2 * total / request) + 9)
    of_token = np.repeat(np.arange(length.size), length)[:total]
    out = np.zeros((steps, layers, EXPERTS))
    for layer in range(layers):
        base = np.arange(1, EXPERTS + 1) / np.arange(1, EXPERTS + 1).sum()
        if layer in drifting:
            base = (1 - tilt) * base + tilt * base[::-1]
        liking = np.tile(base, (length.size, 1)) if request == 1 else rng.dirichlet(40 * base, length.size)
        expert = (rng.random(total)[:, None] > liking.cumsum(axis=1)[of_token, :-1]).sum(axis=1)
        np.add.at(out[:, layer], (np.arange(total) // tokens, expert), 1)
    return out


@given(st.integers(0, 10_000))
@example(1622)  # the statistic is the threshold but for its last bit
@settings(max_examples=30, deadline=None)
def test_statistic_and_p_value_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    layers, window, steps = int(rng.integers(1, 4)), 3, 7
    load = rng.integers(0, 9, (steps + window, layers, EXPERTS)).astype(float)
    load[:, :, rng.integers(EXPERTS)] = 0  # an expert nobody uses
    load[rng.integers(len(load)), 0] = 0  # a layer without tokens in one step
    if seed % 3 == 0:
        load[steps:, 0] *= np.linspace(0.2, 3, EXPERTS)
    pooled = load.sum(axis=0) / load.sum(axis=(0, 2))[:, None]
    total = load.sum(axis=2, keepdims=True)
    share = np.where(total > 0, load / np.maximum(total, 1), pooled)
    used = pooled > 0

    def distance(inside):
        inside = np.isin(np.arange(len(load)), inside)
        square = (share[inside].mean(axis=0) - share[~inside].mean(axis=0)) ** 2
        return np.array([(square[layer][used[layer]] / pooled[layer][used[layer]]).sum() for layer in range(layers)])

    test = DriftTest.fit(load[:steps], window, 0.2, gap=0, seed=seed)
    verdict = test.check(load[steps:])
    seen = distance(range(steps, steps + window))
    every = np.array([distance(c).mean() for c in combinations(range(steps + window), window)])
    assert verdict.statistic == pytest.approx(seen.mean())
    share_as_far = (every >= seen.mean() * (1 - 1e-9)).mean()
    assert abs(verdict.p_value - share_as_far) < 5 * np.sqrt(0.25 / test.permutations)
    above = verdict.statistic > verdict.threshold * (1 + 1e-9)  # arrangements as far apart tie up to rounding
    assert verdict.drifted == (verdict.p_value <= 0.2) == above
    chance = np.mean([distance(c) for c in combinations(range(steps + window), window)], axis=0)
    assert verdict.worst_layer == np.argmax(seen / chance)


def alarms(looks, rate, *, request, tokens=64, steps=64, window=16, **options):
    rng = np.random.default_rng(int(request * 1000 + tokens + 1e6 * rate))
    hits = 0
    for look in range(looks):
        load = loads(rng, steps + window, request=request, tokens=tokens)
        test = DriftTest.fit(load[:steps], window, rate, seed=look, **options)
        hits += test.check(load[steps:]).drifted
    return hits


@pytest.mark.parametrize(("request_tokens", "tokens"), [(1, 64), (40, 64), (100, 64), (40, 24)])
def test_false_alarms_are_as_rare_as_stated_and_not_much_rarer(request_tokens, tokens):
    """Independent references and windows; outside these bounds with odds 1 : 1000 if the rate is the stated one."""
    times = few_or(400, 120)
    hits = alarms(times, 0.05, request=request_tokens, tokens=tokens)
    assert binom.ppf(0.0005, times, 0.05) <= hits <= binom.ppf(0.9995, times, 0.05)


def test_the_rate_of_many_looks_together():
    """With ``looks`` = 8, at most 10 % of the references ever alarm in eight looks."""
    rng = np.random.default_rng(4)
    ever, times = 0, few_or(120, 40)
    for seed in range(times):
        load = loads(rng, 64 + 8 * 8, request=40, layers=2, drifting=range(2))
        test = DriftTest.fit(load[:64], 16, 0.1, looks=8, seed=seed)
        ever += any(test.check(load[at : at + 16]).drifted for at in range(64, 64 + 7 * 8, 8))
    assert ever <= binom.ppf(0.9995, times, 0.1)


def test_a_chi_square_test_would_alarm_on_the_same_traffic():
    """The traffic above does what the test is for: counts of tokens alarm on nothing most of the time."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        load = loads(rng, 80, request=100)
        hits += chi2_contingency(np.stack([load[:64, 0].sum(axis=0), load[64:, 0].sum(axis=0)])).pvalue <= 0.05
    assert hits > 30


@pytest.mark.parametrize(("request_tokens", "tilt"), [(1, 0.15), (40, 0.35), (100, 0.5)])
def test_shifted_traffic_is_detected(request_tokens, tilt):
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(60):
        test = DriftTest.fit(loads(rng, 64, request=request_tokens), 16, 0.01, seed=seed)
        hits += test.check(loads(rng, 16, request=request_tokens, tilt=tilt)).drifted
    assert hits >= 57


def test_the_worst_layer_is_the_one_that_changed():
    rng = np.random.default_rng(2)
    test = DriftTest.fit(loads(rng, 64), 16, 0.01)
    for layer in range(LAYERS):
        verdict = test.check(loads(rng, 16, tilt=0.5, drifting=[layer]))
        assert verdict.drifted and verdict.worst_layer == layer


def test_lags_of_requests_that_span_steps_are_found():
    rng = np.random.default_rng(3)
    long = [correlated_lags(loads(rng, 200, request=150), most=16) for _ in range(20)]  # a request spans 3 steps or 4
    assert np.mean(np.array(long) >= 2) > 0.9
    none = [correlated_lags(loads(rng, 200), most=16) for _ in range(40)]
    assert np.mean(np.array(none) <= 2) > 0.6


def test_same_seed_same_verdict_and_batches_are_loads():
    rng = np.random.default_rng(5)
    load = loads(rng, 60)
    batch = [RoutingBatch(part.copy(), np.full(len(part), 1 / len(part)), 1, np.arange(LAYERS, dtype=np.int32))
             for part in (load[:48], load[48:])]  # fmt: skip
    a = DriftTest.fit(load[:48], 12, 0.05, seed=7).check(load[48:])
    assert a == DriftTest.fit(batch[0], 12, 0.05, seed=7).check(batch[1])
    gram = gram_LNN(load)
    np.testing.assert_allclose(gram, gram.transpose(0, 2, 1))
    assert np.linalg.eigvalsh(gram).min() > -1e-9


def test_what_it_cannot_promise_it_refuses():
    load = loads(np.random.default_rng(6), 40)
    for wrong in ({"window": 0}, {"false_alarm_rate": 0.0}, {"false_alarm_rate": 1.0}, {"looks": 0}, {"gap": -1}):
        with pytest.raises(OptionError):
            DriftTest.fit(load, **{"window": 8, **wrong})
    with pytest.raises(OptionError, match=r"arrangements, a\s+rate"):
        DriftTest.fit(load[:8], 1, 0.01)
    with pytest.raises(OptionError, match="200000 permutations"):
        DriftTest.fit(load, 16, 1e-6)
    with pytest.raises(TraceError):
        DriftTest.fit(load[0], 8)
    with pytest.raises(TraceError, match="fitted for"):
        DriftTest.fit(load, 8).check(load[:7])
    with pytest.raises(TraceError, match="finite"):
        DriftTest.fit(np.where(load > 0, np.nan, load), 8)
    short = DriftTest.fit(load[:12], 4, 0.05, gap=4)
    assert not short.exact and short.gap < 4
    assert DriftTest.fit(load, 16, 0.05, gap=1).exact
