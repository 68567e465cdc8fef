"""Loads of iterations, and plans made by a thread."""

import threading

import numpy as np

from poise.cost.transfers import TransferPlan
from poise.stepwise.sharding import MEAN_STEPS
from poise.train.ahead import PlanAhead
from poise.train.history import LoadHistory


def test_an_iteration_is_the_mean_of_its_micro_batches():
    history = LoadHistory(2, 3)
    for load in ([3, 0, 0], [0, 0, 9]):
        history.record(0, np.array(load))
    assert history.passes(0) == 2 and history.seen(0) == 1 and history.seen(1) == 0
    np.testing.assert_array_equal(history.of(0), [[1.5, 0, 4.5]])  # the open iteration so far
    assert history.close() == [0] and history.close() == [] and history.passes(0) == 0
    np.testing.assert_array_equal(history.of(0), [[1.5, 0, 4.5]])
    assert history.seen_L.tolist() == [1, 0] and history.pairs_L.tolist() == [9, 1]
    np.testing.assert_array_equal(history.mean_LE(), [[1.5, 0, 4.5], [0, 0, 0]])  # the other layer never ran


def test_passes_of_an_iteration_are_those_of_the_layer_that_runs_most():
    history = LoadHistory(2, 3)
    assert history.micro_batches() == 1
    for passes in (4, 4, 2, 4):
        for layer in [0] * passes + [1]:
            history.record(layer, np.ones(3))
        history.close()
    assert history.micro_batches() == 4


def test_only_recent_iterations_are_kept():
    history = LoadHistory(1, 1)
    for step in range(MEAN_STEPS + 5):
        history.record(0, np.array([step]))
        assert history.close() == []
    assert history.of(0)[:, 0].tolist() == list(range(5, MEAN_STEPS + 5)) and history.seen_L[0] == MEAN_STEPS + 5


def test_a_plan_is_waited_for_and_used_only_for_what_it_was_made_from():
    ahead, go = PlanAhead(), threading.Event()
    plan = (np.zeros((1, 2), bool), TransferPlan((), "none"))
    ahead.start(3, 7, lambda: go.wait(30) and plan)
    assert ahead.get(3, 8) is None and ahead.get(2, 7) is None
    go.set()
    assert ahead.get(3, 7) is plan and ahead.get(3, 7) is plan
    ahead.start(3, 8, lambda: 1 / 0)
    try:
        ahead.get(3, 8)
    except ZeroDivisionError:
        return
    raise AssertionError("an error of the planner was lost")
