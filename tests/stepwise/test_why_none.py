"""Why there are no replicas: what the policy weighed, and only where it made none."""

import re

import numpy as np
import pytest

from poise.cost.weights import training_price
from poise.machine.cluster import Cluster, from_preset
from poise.machine.model import ModelSpec
from poise.stepwise.methods.hecate import Hecate
from poise.stepwise.poise.policy import Poise
from poise.stepwise.protocol import LayerView
from poise.stepwise.registry import POLICIES
from poise.stepwise.why_none import one_replica, why_none

MODEL = ModelSpec("small", 2, (0, 1), 8, 2, 64, 32, 3, 4.0, 4.0, 4.0, 128.0)


def machine(rate, wire):
    """Four devices of one node: operations and weight bytes a second, and bytes a second through a port."""
    return Cluster(np.zeros(4, np.int32), np.ones(4), rate, rate, 1e9, wire, wire, name="slow")


SLOW = machine(1e9, 1e9)


def view_of(load_E, cluster=SLOW, slots=2, known=3, window_s=1e-6):
    """Experts dealt out in turn."""
    load = np.asarray(load_E, float)
    owned = np.zeros((len(load), cluster.num_devices), bool)
    owned[np.arange(len(load)), np.arange(len(load)) % cluster.num_devices] = True
    price = training_price(load.sum() / 2, len(load), cluster, MODEL, window_s=window_s)
    return LayerView(owned, owned, load, np.tile(load, (known, 1)), np.zeros_like(owned), slots, known, 0, price)


HOT = [4000, 100, 100, 100, 100, 100, 100, 100]


@pytest.mark.parametrize(
    ("policy", "view", "said"),
    [
        (Poise(), view_of(HOT, slots=0), "no slots"),
        (Poise(), view_of(HOT, known=0), "first step: no loads known"),
        (Poise(), view_of([500] * 8), "predicted loads are even"),
        (
            Poise(),
            view_of(HOT, from_preset([4], "a100")),
            ".* replicas? would cost .* s and save .* s, by the rates of a100",
        ),
        (Hecate(), view_of(HOT), r"no gather hides: one takes 2.5e-05 s, the window has 1e-06 s, by the rates of slow"),
        (POLICIES["expert-parallelism"], view_of(HOT), "expert-parallelism makes none"),
    ],
)
def test_says(policy, view, said):
    assert re.fullmatch(said, why_none(policy, view))
    assert (policy.before_gate(view) == view.before_ED).all() or not view.step_slots or not len(view.recent_HE)


def test_the_two_numbers_are_those_that_decide():
    """Of all machines: where poise makes none, what would be made costs as much as it saves, or more."""
    rng, seen = np.random.default_rng(0), dict.fromkeys(("made", "would", "no plan"), 0)
    for _ in range(200):
        rate, wire = 10 ** rng.uniform(9, 16), 10 ** rng.uniform(8, 12)
        cluster = machine(rate, wire)
        view = view_of(rng.integers(1, 10 ** rng.uniform(1, 3), 8), cluster, window_s=10 ** rng.uniform(-8, -5))
        if (Poise().before_gate(view) & ~view.before_ED).any():
            seen["made"] += 1
            continue
        said = why_none(Poise(), view)
        if numbers := re.search(r"would cost (\S+) s and save (\S+) s", said):
            assert float(numbers[1]) >= float(numbers[2]), said
        seen["would" if numbers else "no plan"] += said != "predicted loads are even"
    assert min(seen["made"], seen["would"]) > 20 and seen["no plan"] < 20, seen


@pytest.mark.parametrize(("rate", "made"), [(1e15, False), (1e6, True)])
def test_replicas_are_for_computers_that_are_slow_beside_their_wires(rate, made):
    view = view_of([12, 2, 2, 2, 2, 2, 2, 2], machine(rate, 1e10))
    assert bool((Poise().before_gate(view) & ~view.before_ED).any()) == made
    costs, saves = one_replica(Poise().training, view)
    assert (costs < saves) == made
