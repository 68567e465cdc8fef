"""The same traffic is known again however it comes; traffic that only shares a prompt is not."""

import numpy as np
import pytest

from poise.routing.files import join
from poise.routing.fingerprint import FITTED, fingerprint
from poise.routing.profile import load_LE
from poise.routing.trace import LoadProfile, RoutingTrace


def picks(rng, tokens, layers=3, experts=8, top_k=2):
    return np.argsort(-rng.gumbel(size=(tokens, layers, experts)), axis=2)[:, :, :top_k].astype(np.int16)


def served(seed, requests=40, prompt=20, answer=20, system=0, kinds=1):
    """Requests of a prompt, behind one of some system prompts, and an answer."""
    shared, rng = np.random.default_rng(99), np.random.default_rng(seed)
    heads = [picks(shared, system) for _ in range(kinds)]
    rows = [np.concatenate([heads[i % kinds], picks(rng, prompt + answer)]) for i in range(requests)]
    request = np.repeat(np.arange(requests), system + prompt + answer)
    decode = np.tile(np.arange(system + prompt + answer) >= system + prompt, requests)
    return RoutingTrace(np.concatenate(rows), 8, request=request, is_decode=decode)


def place(trace):
    """Number of each token in its request."""
    size = np.bincount(trace.request)
    return np.arange(trace.num_tokens) - np.repeat(np.cumsum(size) - size, size)


def by_step(trace):
    return trace.rows(np.lexsort((trace.request, place(trace))))


def bare(trace, **members):
    return RoutingTrace(trace.experts, trace.num_experts, **members)


DISGUISES = {
    "no phases": lambda t: bare(t, request=t.request),
    "no requests": bare,
    "all called decoded": lambda t: bare(t, request=t.request, is_decode=np.ones(t.num_tokens, bool)),
    "cut at 10 tokens": lambda t: t.rows(place(t) < 10),
    "steps from the middle": lambda t: by_step(t).rows(np.arange(400, 1000)),
    "in order of steps": by_step,
    "twice": lambda t: join([t, t]),
    "twice, no phases": lambda t: join([bare(t, request=t.request)] * 2),
    "twice, no phases, with other traffic": lambda t: join([served(7), *[bare(t, request=t.request)] * 2]),
    "other numbers, picks turned": lambda t: RoutingTrace(t.experts[:, :, ::-1], 8, request=700 - t.request),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_the_same_traffic_is_known_however_it_comes(name):
    trace, other = served(1), DISGUISES[name](served(1))
    for fitted, judged in ((trace, other), (other, trace)):
        assert (fingerprint(fitted).share_of(fingerprint(judged)) or 0.0) >= FITTED


@pytest.mark.parametrize(
    "options", [{}, {"system": 200, "prompt": 2, "answer": 8}, {"system": 60, "kinds": 6},
                {"system": 80, "prompt": 0, "answer": 8}]
)  # fmt: skip
def test_a_prompt_that_many_requests_share_is_no_traffic_in_common(options):
    share = fingerprint(served(1, **options)).share_of(fingerprint(served(2, **options)))
    assert share is not None and share < FITTED


def test_prompts_that_were_sampled_twice_are_in_common():
    first = served(1)
    again = picks(np.random.default_rng(5), first.num_tokens)
    again[~first.is_decode] = first.experts[~first.is_decode]
    second = RoutingTrace(again, 8, request=first.request, is_decode=first.is_decode)
    twice = join([second, DISGUISES["no phases"](served(8)), first])
    assert fingerprint(twice).share_of(fingerprint(second)) > FITTED
    assert fingerprint(second).share_of(fingerprint(first)) == pytest.approx(0.5, abs=0.1)


def test_of_little_traffic_it_is_not_known():
    rng = np.random.default_rng(0)
    parts = [RoutingTrace(picks(rng, 3), 8) for _ in range(2)]
    assert fingerprint(parts[0]).share_of(fingerprint(parts[1])) is None
    trace = served(1)
    half = load_LE(trace.experts[:800], 8)[None]
    assert fingerprint(trace).share_of(fingerprint(LoadProfile(half))) is None
