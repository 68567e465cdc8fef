"""Who asks is read off vLLM's frames: serving never waits for a planner, whatever thread it is on, and models do not mix."""

import logging
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tests.engines.turn_cases import EXPERTS, LAYERS, RANKS, SLOTS, TRIVIAL, Planner, shuffled

from poise.engines.plugins import policy, vllm_call
from poise.engines.plugins.settings import PolicySettings
from poise.engines.plugins.turns import GIVEN_UP, MOST_TRIED, WORDS
from poise.engines.plugins.vllm_call import Call, Planning
from poise.engines.plugins.vllm_caller import BALANCER, WORKER, caller

FRAMES = """
def rearrange(record, ask, self=None):
    eplb_model_state = record
    return ask()

def run_rebalance_experts(model_state, ask, eplb_state=None):
    return ask()
"""


def theirs(name):
    module = ModuleType(name)
    exec(FRAMES, module.__dict__)
    return module


SERVING, BESIDE = theirs(BALANCER + "eplb_state").rearrange, theirs(WORKER).run_rebalance_experts


@pytest.fixture
def planning(monkeypatch):
    """The first of two ranks; the other one has the same map, and no word."""

    def twice(tensor, group):
        tensor[:2] *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", twice)
    monkeypatch.setattr(vllm_call, "cpu_group", lambda: SimpleNamespace(rank=lambda: 0, size=lambda: 2))
    return Planning(PolicySettings(time_limit_s=0.002), Planner())


def call(old=TRIVIAL, seed=0):
    loads = np.random.default_rng(seed).integers(1, 100, (LAYERS, EXPERTS)).astype(np.float64)
    return Call(loads, SLOTS, 1, 1, RANKS, old, False)


def on_a_thread(work):
    out = []
    thread = threading.Thread(target=lambda: out.append(work()), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for the planner"
    return out[0]


def test_serving_on_another_thread_does_not_wait(planning):
    record, new = object(), shuffled(TRIVIAL)
    table = on_a_thread(lambda: SERVING(record, lambda: planning.table(call())))
    assert (table == TRIVIAL).all() and len(planning._aside.asked) == 1 and not planning._aside.coming[0].done()
    planning._aside.answers(new)
    assert (on_a_thread(lambda: SERVING(record, lambda: planning.table(call(seed=1)))) == new).all()


def test_the_worker_beside_waits_on_any_thread(planning):
    new, ask = shuffled(TRIVIAL), planning._aside.ask

    def soon(one):
        coming = ask(one)
        planning._aside.answers(new)
        return coming

    planning._aside.ask = soon
    assert (BESIDE(object(), lambda: planning.table(call())) == new).all()


def test_models_of_one_shape_do_not_take_each_others_maps(planning):
    first, second, new = object(), object(), shuffled(TRIVIAL)
    SERVING(first, lambda: planning.table(call()))
    of_first = planning._aside.coming[-1]
    SERVING(second, lambda: planning.table(call(seed=1)))
    assert len(planning._aside.coming) == 2
    of_first.set_result(SimpleNamespace(table_LS=new, said=""))
    assert (SERVING(second, lambda: planning.table(call(seed=2))) == TRIVIAL).all()
    assert (SERVING(first, lambda: planning.table(call(seed=3))) == new).all()


@pytest.mark.parametrize("window, interval, settles", [(1000, 3000, 1), (64, 64, 1), (64, 8, 8), (65, 8, 9), (0, 8, 1)])
def test_the_steps_that_loads_are_of_are_read_off_the_state(window, interval, settles):
    state = SimpleNamespace(expert_load_window_size=window, expert_rearrangement_step_interval=interval)
    assert SERVING(object(), caller, self=state).settles == settles
    assert BESIDE(object(), caller, eplb_state=state).settles == settles + (settles > 1)
    assert SERVING(object(), caller).settles == 1


def test_who_cannot_be_told_is_served(planning):
    assert (planning.table(call()) == TRIVIAL).all() and not planning._aside.coming[0].done()


def test_a_planner_that_is_given_up_is_said_once(planning, monkeypatch, caplog):
    monkeypatch.setattr(policy, "_said", set())
    planning._aside.fruitless = MOST_TRIED
    with caplog.at_level(logging.INFO, "vllm.poise"):
        for _ in range(3):
            assert (planning.table(call()) == TRIVIAL).all()
    assert caplog.text.count(WORDS[GIVEN_UP]) == 1 and not planning._aside.asked
