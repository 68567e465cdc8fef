"""The compiled exact split: optimal against a linear programme and a max-flow solver, whole tokens, kept at home."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow
from tests.helpers import few_or

from poise.cost.quota import QuotaProblem, balance, make_holders, make_scratch

NONE = np.zeros(0, np.int64)


def run(load, holds, speed=None, local=None, base=None, slack=0.0):
    holders, scratch = make_holders(holds), make_scratch(*holds.shape)
    quota = np.zeros(holders.device_H.size, np.int64)
    speed = np.ones(holds.shape[1]) if speed is None else speed
    local_H = NONE if local is None else np.ascontiguousarray(local[holders.device_H, holders.expert_H])
    problem = QuotaProblem(load, speed, local_H, NONE if base is None else base, slack)
    most = balance(problem, holders, quota, scratch)
    out = np.zeros(holds.shape, np.int64)
    out[holders.expert_H, holders.device_H] = quota
    return out, most


def case(rng):
    experts, devices = int(rng.integers(1, 9)), int(rng.integers(1, 7))
    holds = rng.random((experts, devices)) < rng.choice([0.1, 0.3, 0.6])
    holds[np.arange(experts), rng.integers(0, devices, experts)] = True
    return rng.integers(0, rng.choice([3, 30, 3000]), experts), holds


def feasible(load, holds, cap):
    """All tokens fit under a cap on every device: a maximum flow, source -> experts -> devices -> sink."""
    experts, devices = holds.shape
    size = experts + devices + 2
    graph = np.zeros((size, size), np.int32)
    graph[0, 1 : 1 + experts] = load
    graph[1 : 1 + experts, 1 + experts : -1] = np.where(holds, load[:, None], 0)
    graph[1 + experts : -1, -1] = cap
    return maximum_flow(csr_matrix(graph), 0, size - 1).flow_value == load.sum()


def test_many_cases_against_a_max_flow_solver():
    rng = np.random.default_rng(0)
    for _ in range(few_or(10_000, 2_000)):
        load, holds = case(rng)
        quota, most = run(load, holds)
        assert (quota.sum(axis=1) == load).all() and (quota[~holds] == 0).all() and quota.min() >= 0
        top = int(quota.sum(axis=0).max())
        assert top == most and feasible(load, holds, top)
        assert top == 0 or not feasible(load, holds, top - 1)


def test_the_maximum_is_the_linear_programme_rounded_up():
    rng = np.random.default_rng(1)
    for _ in range(500):
        load, holds = case(rng)
        expert, device = np.nonzero(holds)
        give, below = np.zeros((len(load), len(expert) + 1)), np.zeros((holds.shape[1], len(expert) + 1))
        give[expert, np.arange(len(expert))] = 1
        below[device, np.arange(len(expert))], below[:, -1] = 1, -1
        best = linprog(np.eye(len(expert) + 1)[-1], below, np.zeros(holds.shape[1]), give, load).fun
        assert run(load, holds)[1] == pytest.approx(np.ceil(best - 1e-7))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_unequal_speeds_cannot_be_beaten_by_moving_one_path(seed):
    rng = np.random.default_rng(seed)
    load, holds = case(rng)
    speed = rng.choice([0.5, 1.0, 2.0], holds.shape[1])
    quota, most = run(load, holds, speed)
    caps = np.array(
        [max((c for c in range(int(load.sum()) + 1) if c / s < most * (1 - 1e-12)), default=0) for s in speed]
    )
    assert (quota.sum(axis=0) / speed).max() == pytest.approx(most)
    assert load.sum() == 0 or not feasible(load, holds, caps)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=200, deadline=None)
def test_starting_at_home_changes_no_optimum_and_slack_bounds_the_loss(seed, slack):
    rng = np.random.default_rng(seed)
    load, holds = case(rng)
    sources = np.stack([rng.multinomial(n, np.full(holds.shape[1], 1 / holds.shape[1])) for n in load]).T
    _, most = run(load, holds)
    home, home_most = run(load, holds, local=sources)
    loose, loose_most = run(load, holds, local=sources, slack=slack)
    assert home_most == most
    assert loose_most <= max(np.ceil(max(load.sum() / holds.shape[1], most) * (1 + slack)), most) + 1
    kept = [np.minimum(sources.T, quota).sum() for quota in (home, loose)]
    assert kept[1] >= kept[0] or slack == 0


def test_tokens_that_are_there_already_count():
    quota, most = run(np.array([10]), np.ones((1, 2), bool), base=np.array([6, 0]))
    assert most == 8 and quota.tolist() == [[2, 8]]
