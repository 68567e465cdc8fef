"""Why there are no replicas: what the policy weighed, and only where it made none."""

import re
from dataclasses import replace

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


SAID = re.compile(r"(\d+) replicas? would cost (\S+) s and save (\S+) s(?:, (\S+) s of it sure by the last steps)?"
                  r"(?:, where at least (\S+) s must be gained)?, by the rates of slow")  # fmt: skip


def test_the_numbers_are_those_that_decide():
    """Of all machines and histories: where poise makes none, what would be made costs, with the least that must be
    gained, as much as the last steps are sure that it saves; each number is what its words say."""
    rng, seen = np.random.default_rng(0), dict.fromkeys(("made", "costs", "margin", "not sure", "no plan"), 0)
    for turn in range(600):
        rate, wire = 10 ** rng.uniform(9, 16), 10 ** rng.uniform(8, 12)
        cluster = machine(rate, wire)
        view = view_of(rng.integers(1, 10 ** rng.uniform(1, 3), 8), cluster, window_s=10 ** rng.uniform(-8, -5))
        if turn % 2:  # steps that differ
            recent_HE = np.array([rng.multinomial(2000, rng.dirichlet(np.full(8, 8.0))) for _ in range(5)], float)
            view = replace(view, recent_HE=recent_HE, predicted_E=recent_HE.mean(axis=0))
        if (Poise().before_gate(view) & ~view.before_ED).any():
            seen["made"] += 1
            continue
        said = why_none(Poise(), view)
        if said == "predicted loads are even":
            continue
        numbers = SAID.fullmatch(said)
        if numbers is None:
            assert said == "no plan that was tried saves what it costs, by the rates of slow"
            seen["no plan"] += 1
            continue
        costs, saves, sure, least = (None if one is None else float(one) for one in numbers.groups()[1:])
        best = Poise().training.weighed(view)
        held_ED = best.holders_ED
        if (held_ED == view.before_ED).all():
            best = one_replica(Poise().training, view)
        else:  # on predicted loads, whatever the last steps say
            alone_s, with_s = (Poise().training.dispatch_seconds(view, held)[1] for held in (view.before_ED, held_ED))
            assert saves == pytest.approx(alone_s - with_s, rel=0.06)
            assert least is None or least == pytest.approx(Poise().margin * alone_s, rel=0.06)
        assert costs == pytest.approx(best.costs_s, rel=0.06) and (least is None) == (best.saves_s <= best.costs_s)
        if least is not None:
            assert (costs + least) * 1.06 >= (saves if sure is None else sure), said
        seen["costs" if least is None else "margin" if sure is None else "not sure"] += 1
        assert sure is None or (best.sure_s < best.saves_s and best.costs_s + best.margin_s < best.saves_s)
    assert min(seen[name] for name in ("made", "costs", "margin", "not sure")) > 5 and seen["no plan"] < 40, seen


@pytest.mark.parametrize(("rate", "made"), [(1e15, False), (1e6, True)])
def test_replicas_are_for_computers_that_are_slow_beside_their_wires(rate, made):
    view = view_of([12, 2, 2, 2, 2, 2, 2, 2], machine(rate, 1e10))
    assert bool((Poise().before_gate(view) & ~view.before_ED).any()) == made
    assert one_replica(Poise().training, view).pays == made
