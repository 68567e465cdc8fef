"""What runs and what a restart would bring are two numbers, and the restart has a price."""

import numpy as np
import pytest

from poise.control.controller import Controller, ControlSettings
from poise.control.restart import Restart
from poise.machine.cluster import from_preset
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.routing.batch import RoutingBatch
from poise.util.errors import OptionError

CLUSTER = from_preset([4], "h100", flops_per_s=1e9, intra_latency_s=0.0)
IDS = np.arange(2, dtype=np.int32)
LOAD = np.array([[90.0, 80, 10, 10, 5, 5, 5, 5], [5, 5, 5, 5, 10, 10, 80, 90]])


def steps(count, load=LOAD):
    return RoutingBatch(np.tile(load, (count, 1, 1)), np.full(count, 1 / count), 2, IDS)


def controller(**more):
    first = Placement(np.tile(np.arange(8), (2, 1)), np.repeat(np.arange(4), 2), 8, 4, IDS)
    batch = steps(1)
    problem = PlacementProblem(
        batch, CLUSTER, ModelSpec.generic(8, 2, IDS), np.full(4, 2), "home", "even", current=first
    )
    options = {"window": 4, "every": 4, "method": "lpt", "background": False, "horizon_steps": 1e6, **more}
    return Controller(problem, ControlSettings(**options)), first


def imbalance(placement, load=LOAD):
    count = placement.count_LED()
    device = np.einsum("le,led->ld", load, count / count.sum(axis=2, keepdims=True))
    return (device.max(axis=1) / device.mean(axis=1)).mean()


def test_an_accepted_plan_does_not_run_before_a_restart():
    control, first = controller(at_start=True, restart_seconds=30.0)
    looks = control.observe(steps(16))
    assert {look.restart for look in looks[:3]} == {None} and looks[0].imbalance_after_restart == looks[0].imbalance
    decision = control.collect()
    assert decision.accepted and decision.restart.pays
    control.moved()
    new = control.current
    assert control.running is first and new is decision.moves.result
    look = control.observe(steps(4))[0]
    assert look.imbalance == pytest.approx(imbalance(first)) == look.restart.imbalance_running
    assert look.imbalance_after_restart == pytest.approx(imbalance(new)) and imbalance(new) < 0.9 * imbalance(first)
    assert look.restart.gain_seconds == pytest.approx(decision.gain_seconds)
    assert look.restart.steps_to_win_back == pytest.approx(30.0 / look.restart.gain_seconds)
    other = Placement(first.slot_expert_LS[:, ::-1], first.slot_device_S, 8, 4, IDS)
    control.runs(other)  # started anew with something else: what was written stays the newest
    assert control.running is other and control.current is new
    control.runs(Placement(new.slot_expert_LS.copy(), new.slot_device_S, 8, 4, IDS))
    assert control.running is control.current is new
    look = control.observe(steps(4))[0]
    assert look.restart is None and look.imbalance == pytest.approx(imbalance(new)) == look.imbalance_after_restart


def test_a_later_plan_goes_on_from_the_newest_and_the_restart_from_what_runs():
    control, first = controller(at_start=True)
    control.observe(steps(16))
    control.collect()
    control.moved()
    newest = control.current
    control.observe(steps(24, LOAD[:, np.random.default_rng(1).permutation(8)]))
    while (decision := control.collect()) is not None and not decision.accepted:
        pass
    assert decision is not None and decision.restart.seconds_running != pytest.approx(decision.seconds_before)
    control.moved()
    assert control.running is first and control.current is not newest


def test_before_a_plan_what_the_engine_says_is_what_plans_go_on_from():
    control, first = controller(at_start=True)
    other = Placement(first.slot_expert_LS[:, ::-1], first.slot_device_S, 8, 4, IDS)
    control.runs(other)
    assert control.running is control.current is other
    at_once, _ = controller()
    at_once.observe(steps(16))
    assert at_once.collect().restart is None
    at_once.moved()
    assert at_once.running is at_once.current


@pytest.mark.parametrize(
    ("after", "price", "pays", "said"),
    [(0.9, None, None, "price of a restart not known: give --restart-seconds"), (0.9, 60.0, True, "in 600 steps, the horizon is 1,000: worth"),
     (0.9, 200.0, False, "not worth a restart"), (1.0, None, False, "saves nothing"), (1.1, 0.0, False, "not worth a restart")],
)  # fmt: skip
def test_the_verdict_weighs_the_horizon_against_the_restart(after, price, pays, said):
    restart = Restart(1.81, 1.16, 1.0, after, 1000.0, price)
    assert restart.pays is pays and said in restart.sentence()
    assert restart.sentence().startswith("imbalance 1.810 running, 1.160 after a restart")


def test_a_price_below_nothing_is_refused():
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(OptionError, match="restart_seconds"):
            ControlSettings(restart_seconds=wrong)
