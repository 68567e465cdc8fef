"""RoutingTrace and LoadProfile: what they accept, what they refuse, what they select."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.routing.files import join, read
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import OptionError, TraceError


def random_trace(seed: int, *, tokens: int = 60, layers: int = 3, num_experts: int = 7, top_k: int = 2) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((tokens, layers, num_experts)), axis=2)[:, :, :top_k]
    return RoutingTrace(
        experts.astype(np.int16), num_experts, request=rng.integers(0, 9, tokens) * 5 + 3,
        is_decode=rng.random(tokens) < 0.4, step=rng.integers(0, 4, tokens), home=rng.integers(0, 3, tokens),
        weights=-np.sort(-rng.random((tokens, layers, top_k)), axis=2), layer_ids=np.array([1, 4, 6])[:layers],
        domain=rng.integers(0, 2, tokens), domain_names=("a", "b"),
    )  # fmt: skip


PER_TOKEN = ("experts", "request", "is_decode", "step", "home", "weights", "domain")


def same(a: RoutingTrace, b: RoutingTrace) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in (*PER_TOKEN, "layer_ids"))
    return arrays and a.num_experts == b.num_experts and a.domain_names == b.domain_names


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 4), num_experts=st.sampled_from([4, 256, 257, 32_767]))
def test_a_saved_trace_reads_back_equal(tmp_path_factory, seed, top_k, num_experts):
    trace = random_trace(seed, tokens=8, num_experts=num_experts, top_k=top_k)
    path = tmp_path_factory.mktemp("t") / "trace.npz"
    trace.save(path)
    found = read(path)
    assert isinstance(found, RoutingTrace) and same(found, trace)


def test_two_dimensions_are_top_1_and_defaults_are_filled():
    trace = RoutingTrace(np.array([[0, 1], [1, 0], [1, 1]]), 2)
    assert trace.experts.shape == (3, 2, 1) and trace.experts.dtype == np.int16
    assert trace.request.tolist() == [0, 1, 2] and not trace.is_decode.any() and trace.layer_ids.tolist() == [0, 1]


def test_arrays_are_read_only_and_the_callers_stay_writeable():
    experts, request = np.zeros((4, 2, 1), np.int16), np.zeros(4, np.int32)
    trace = RoutingTrace(experts, 3, request=request)
    experts[:], request[:] = 2, 5
    assert trace.experts.max() == 0 and trace.request.max() == 0
    with pytest.raises(ValueError, match="read-only"):
        trace.experts[0] = 1


GOOD = np.array([[[0, 1]], [[2, 1]]])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(experts=GOOD + 1), "-1..2, got 1..3"),
        (dict(experts=GOOD - 2), "-2..0"),
        (dict(experts=GOOD * 0 - 1), "no pick of any token computes"),
        (dict(experts=GOOD.astype(float)), "float64"),
        (dict(experts=GOOD[..., [0, 0]]), "twice"),
        (dict(experts=GOOD[0, 0]), r"\(2,\)"),
        (dict(experts=GOOD[:0]), "empty"),
        (dict(num_experts=0), "32767, got 0"),
        (dict(num_experts=32_768), "got 32768"),
        (dict(num_experts=1, experts=GOOD * 0), "1"),
        (dict(request=np.zeros(3, int)), "2 tokens"),
        (dict(request=np.zeros(2)), "float64"),
        (dict(request=np.array([0, 2**40])), str(2**40)),
        (dict(is_decode=np.array([0, 2])), "0..1"),
        (dict(step=np.array([0, -1])), "-1..0"),
        (dict(home=np.array([-1, 0])), "-1..0"),
        (dict(weights=np.zeros((2, 1, 1))), r"\(2, 1, 1\)"),
        (dict(weights=np.full((2, 1, 2), np.nan)), "finite"),
        (dict(layer_ids=np.array([0, 1])), "1"),
        (dict(layer_ids=np.array([-1])), "-1"),
        (dict(domain=np.array([0, 2]), domain_names=("x", "y")), "0..1, got 0..2"),
        (dict(domain=np.array([0, 0])), "0..0"),
    ],
)
def test_bad_traces_are_refused_with_the_numbers(change, says):
    with pytest.raises(TraceError, match=says):
        RoutingTrace(**({"experts": GOOD, "num_experts": 3} | change))


def test_select_keeps_what_a_mask_keeps():
    trace = random_trace(1)
    decode_b = trace.select(domains=["b"], phase="decode")
    mask = (trace.domain == 1) & trace.is_decode
    assert all(np.array_equal(getattr(decode_b, n), getattr(trace, n)[mask]) for n in PER_TOKEN)
    with pytest.raises(TraceError, match="'c'"):
        trace.select(domains=["c"])
    with pytest.raises(OptionError, match="later"):
        trace.select(phase="later")
    with pytest.raises(TraceError, match="0 of 3"):
        RoutingTrace(np.zeros((3, 1), int), 1).select(phase="decode")


@settings(max_examples=40, deadline=None)
@given(requests=st.lists(st.integers(0, 6), min_size=2, max_size=40), share=st.floats(0.1, 0.9))
def test_split_is_by_first_appearance_and_whole_requests(requests, share):
    trace = RoutingTrace(np.arange(len(requests))[:, None] % 5, 5, request=np.array(requests))
    order = list(dict.fromkeys(requests))
    if len(order) < 2:
        with pytest.raises(TraceError, match="1 request"):
            trace.split_requests(share)
        return
    fit, judge = trace.split_requests(share)
    cut = min(len(order) - 1, max(1, round(share * len(order))))
    assert list(dict.fromkeys(fit.request.tolist())) == order[:cut]
    assert fit.request.tolist() == [r for r in requests if r in order[:cut]]
    assert judge.request.tolist() == [r for r in requests if r in order[cut:]]


def test_joined_traces_keep_requests_and_steps_apart():
    one, two = random_trace(1), random_trace(2)
    both = join([one, two])
    assert np.array_equal(both.experts, np.concatenate([one.experts, two.experts]))
    head, tail = both.request[:60], both.request[60:]
    assert not set(head.tolist()) & set(tail.tolist())
    for part, ids in ((one, head), (two, tail)):
        assert np.array_equal(np.equal.outer(ids, ids), np.equal.outer(part.request, part.request))
    assert not set(both.step[:60].tolist()) & set(both.step[60:].tolist())
    assert both.domain_names == ("a", "b")
    for what in (dict(num_experts=8), dict(layers=2), dict(top_k=3)):
        with pytest.raises(TraceError, match=r"\d"):
            join([one, random_trace(3, **what)])
    with pytest.raises(TraceError, match="joined"):
        join([random_trace(1, top_k=1), LoadProfile(np.ones((3, 7)), np.array([1, 4, 6]))])


def test_profiles_drop_dense_layers_and_join_as_steps():
    load = np.zeros((4, 3))
    load[1], load[3] = [1, 2, 3], [4, 0, 0]
    profile = LoadProfile(load)
    assert profile.load_BLE.shape == (1, 2, 3) and profile.layer_ids.tolist() == [1, 3]
    both = join([profile, LoadProfile(load * 2)])
    assert both.num_steps == 2 and np.array_equal(both.load_BLE[1], 2 * load[[1, 3]])


@pytest.mark.parametrize(
    "load", [np.zeros((2, 2)), -np.ones((2, 2)), np.full((2, 2), np.nan), np.full((2, 2), np.inf), np.ones(3),
             np.ones((0, 3)), np.ones((1, 1, 1, 1)), np.array([["1"]]), np.ones((2, 2)) * 1e300]
)  # fmt: skip
def test_bad_profiles_are_refused(load):
    with pytest.raises(TraceError):
        LoadProfile(load)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_some_steps_of_a_profile_have_the_layers_of_all(seed, steps, layers):
    """Fails if a layer that is idle in them is left out, which no other part of the recording has left out."""
    rng = np.random.default_rng(seed)
    load = rng.integers(1, 9, (steps, layers + 1, 3)) * (rng.random((steps, layers + 1, 1)) < 0.5)
    load[:, -1] = 0  # dense: left out of all
    load[0, 0] = 1
    whole = LoadProfile(load, idle_BL=rng.integers(0, 5, (steps, layers + 1)))
    assert whole.num_layers == load[:, :-1].any(axis=(0, 2)).sum()
    middle = whole.middle()
    busy = load.any(axis=(1, 2))
    assert (middle is None) == (busy.sum() < 2)
    for rows in [] if middle is None else [slice(0, middle), slice(middle, None)]:
        part = replace(whole.steps(rows), top_k=2)
        np.testing.assert_array_equal(part.layer_ids, whole.layer_ids)
        np.testing.assert_array_equal(part.load_BLE, whole.load_BLE[rows])
        np.testing.assert_array_equal(part.idle_BL, whole.idle_BL[rows])
    if middle is not None:
        assert busy[:middle].sum() - busy[middle:].sum() in (0, 1)
