"""Owners planned on a thread: taken at a step that all ranks know, as they would be planned at once; or not at all."""

from types import SimpleNamespace

import numpy as np

from poise.cost.weights import training_price
from poise.machine.cluster import from_preset
from poise.machine.model import ModelSpec
from poise.stepwise.methods.expert_parallelism import ExpertParallelism
from poise.stepwise.owners import LoadSamples, OwnerSeconds, decided
from poise.stepwise.sharding import Balanced, even_sharding
from poise.train.history import LoadHistory
from poise.train.owner_plans import OwnerPlans

LAYERS, EXPERTS = 2, 8
FEW = 200
"""Tokens of a hot expert in a pass that gains less from a move than the move costs."""


def planner():
    """What plans read of a run: hot experts on one device."""
    cluster = from_preset([2, 2], "v100", nic_shared=True)
    price = training_price(400_000, EXPERTS, cluster, ModelSpec.generic(EXPERTS, 2, np.arange(LAYERS)))
    history = LoadHistory(LAYERS, EXPERTS)
    layers = [SimpleNamespace(owner_E=owner_E) for owner_E in even_sharding(LAYERS, EXPERTS, 4)]
    return SimpleNamespace(layers=layers, history=history, price=lambda pairs: price,
                           settings=SimpleNamespace(policy=ExpertParallelism(), step_slots=0),
                           deployment=SimpleNamespace(cluster=cluster))  # fmt: skip


def loaded(one, passes=1, tokens=200_000):
    for layer in list(range(LAYERS)) * passes:
        one.history.record(layer, np.array([tokens, tokens, 0, 0, 0, 0, 0, 0]))
    one.history.close()
    return one


def test_a_plan_is_taken_a_tenth_of_the_interval_later_and_once():
    one = loaded(planner())
    plans, own = OwnerPlans(one), Balanced(interval=100)
    plans.begin(own, 100)
    assert plans.take(100) is None and plans.take(109) is None
    got = plans.take(110)
    samples = LoadSamples.of_history([one.history.of(layer) for layer in range(LAYERS)], 4)
    seconds = OwnerSeconds(ExpertParallelism(), 0, one.price(0), samples)
    np.testing.assert_array_equal(got, decided(own, one.history.mean_LE(), plans.current, seconds))
    assert (got != plans.current).any() and plans.take(111) is None
    plans.begin(Balanced(interval=2), 4)
    assert plans.take(4) is not None, "a short interval has no time to wait"


def test_what_was_begun_is_dropped_with_what_it_was_begun_from_and_no_loads_plan_nothing():
    plans = OwnerPlans(loaded(planner()))
    plans.begin(Balanced(), 100)
    plans.forget()
    assert plans.take(1000) is None
    empty = OwnerPlans(planner())
    empty.begin(Balanced(), 100)
    assert empty.take(1000) is None


def test_micro_batches_to_come_count_each_for_its_own():
    """A move that one micro-batch does not pay for, several do."""
    one = planner()
    load = np.zeros((1, LAYERS, 4, EXPERTS), np.int32)
    load[..., :2] = FEW // 4
    plans, even = OwnerPlans(one), even_sharding(LAYERS, EXPERTS, 4)
    seconds = OwnerSeconds(ExpertParallelism(), 0, one.price(0), LoadSamples.of_record(load, True))
    rich = plans.known(Balanced(interval=10**6), load, True)
    gained, once = seconds.step(even) - seconds.step(rich), seconds.move(even, rich)
    assert gained > 0
    tight = max(1, int(0.3 * once / gained))
    assert once / tight > gained
    np.testing.assert_array_equal(plans.known(Balanced(interval=tight), load, True), even)
    many = load.repeat(1 + int(2 * once / tight / gained), axis=0)
    assert (plans.known(Balanced(interval=tight), many, True) != even).any()


def test_micro_batches_of_the_past_count_each_for_its_own():
    """The same, from the history of steps that accumulate gradients."""
    one, even = planner(), even_sharding(LAYERS, EXPERTS, 4)
    seconds = OwnerSeconds(ExpertParallelism(), 0, one.price(0), LoadSamples.of_history(
        [np.array([[FEW, FEW, 0, 0, 0, 0, 0, 0]], float)] * LAYERS, 4))  # fmt: skip

    def planned(passes: int, interval: int):
        one = planner()
        for _ in range(3):
            loaded(one, passes, FEW)
        plans = OwnerPlans(one)
        plans.begin(Balanced(interval=interval, gain=0.0), 0)
        return plans.take(interval)

    rich = planned(1, 10**6)
    gained, once = seconds.step(even) - seconds.step(rich), seconds.move(even, rich)
    tight = max(1, int(0.3 * once / gained))
    assert 0 < gained < once / tight
    np.testing.assert_array_equal(planned(1, tight), even)
    assert (planned(1 + int(2 * once / tight / gained), tight) != even).any()


def test_owners_by_a_record_are_never_slower_on_it_than_those_that_the_past_proposes():
    """By their price with the move; in some cases the past has proposed the better ones, by chance."""
    better = 0
    for seed in range(12):
        rng, one = np.random.default_rng(seed), planner()
        for layer in range(LAYERS):
            one.history.record(layer, rng.multinomial(400_000, rng.dirichlet(np.full(EXPERTS, 0.5))))
        one.history.close()
        record = rng.multinomial(100_000, rng.dirichlet(np.full(EXPERTS, 0.5), (3, LAYERS, 4))).astype(np.int32)
        own, plans, priced = Balanced(interval=100), OwnerPlans(one), LoadSamples.of_record(record, True)
        seconds = OwnerSeconds(ExpertParallelism(), 0, one.price(0), priced, len(record))

        def total_s(owner_LE, seconds=seconds, plans=plans, own=own):
            return seconds.step(owner_LE) + seconds.move(plans.current, owner_LE) / own.interval

        plans.begin(own, 0)
        past = plans.take(100)
        alone = decided(own, record.sum(axis=2).mean(axis=0), plans.current, seconds)
        assert total_s(plans.known(own, record, True)) <= min(total_s(past), total_s(alone)) * (1 + 1e-12)
        better += total_s(past) < total_s(alone) * (1 - 1e-9)
    assert better, "no case tells"
