"""Plans of sparse collectives: who gets what, what each link carries, and that relays have what they pass on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.cost.links import PortLoad, port_seconds
from poise.cost.transfers import nearest_transfers, plan_transfers
from poise.cost.weights import StepPrice, fetch_seconds
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.util.errors import OptionError, PlacementError

FORMS = ("direct", "node", "tree", "auto")


@st.composite
def cases(draw):
    nodes, each, experts = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    devices = nodes * each
    wanted = rng.random((experts, devices)) < draw(st.sampled_from((0.0, 0.2, 0.7, 1.0)))
    return (
        Cluster.uniform(nodes, each, draw(st.sampled_from(("a100", "v100")))),
        rng.integers(0, devices, experts),
        wanted,
    )


@settings(deadline=None, max_examples=300)
@given(case=cases(), form=st.sampled_from(FORMS))
def test_everyone_gets_what_is_wanted_once_and_relays_have_it(case, form):
    cluster, owner, wanted = case
    plan = plan_transfers(owner, wanted, cluster, expert_bytes=1e6, form=form)
    held = np.zeros_like(wanted)
    held[np.arange(len(owner)), owner] = True
    new = wanted & ~held
    for one in plan.rounds:
        before = held.copy()
        for move in one:
            assert before[move.expert, move.source], "a relay sends what has not arrived"
            assert not held[move.expert, move.target], "sent twice"
            held[move.expert, move.target] = True
    assert (held == (wanted | held)).all() and (held & ~wanted).sum() <= len(owner)
    links = plan.links_DD(cluster.num_devices)
    assert plan.count == links.sum() == new.sum()
    assert (links.sum(axis=0) == new.sum(axis=0)).all()
    assert links.sum(axis=0).max(initial=0) <= new.any(axis=1).sum(), "a rank receives more than lambda S"


@settings(deadline=None, max_examples=200)
@given(case=cases(), form=st.sampled_from(FORMS))
def test_a_reduction_is_the_gather_backwards_and_few_gradients_arrive_at_once(case, form):
    cluster, owner, wanted = case
    plan = plan_transfers(owner, wanted, cluster, expert_bytes=1e6, form=form)
    back = plan.backwards()
    there = sorted((m.expert, m.source, m.target) for one in plan.rounds for m in one)
    assert there == sorted((m.expert, m.target, m.source) for one in back for m in one)
    most = max(np.bincount([d for _, _, d in there], minlength=1))
    gone = set()
    for one in back:
        assert max(np.bincount([move.target for move in one])) <= most
        assert not any((move.expert, move.target) in gone for move in one), "arrives where the sum has left already"
        gone |= {(move.expert, move.source) for move in one}


@settings(deadline=None, max_examples=200)
@given(case=cases(), form=st.sampled_from(("node", "tree")))
def test_an_expert_enters_a_node_once(case, form):
    cluster, owner, wanted = case
    plan = plan_transfers(owner, wanted, cluster, form=form)
    into: dict[tuple[int, int], int] = {}
    for one in plan.rounds:
        for move in one:
            source, target = cluster.node_D[move.source], cluster.node_D[move.target]
            if source != target:
                into[move.expert, int(target)] = into.get((move.expert, int(target)), 0) + 1
    assert max(into.values(), default=0) <= 1


@settings(deadline=None, max_examples=100)
@given(case=cases())
def test_auto_is_the_cheapest(case):
    cluster, owner, wanted = case
    best = plan_transfers(owner, wanted, cluster, expert_bytes=5e6).seconds(cluster, 5e6)
    for form in ("direct", "node", "tree"):
        assert best <= plan_transfers(owner, wanted, cluster, form=form).seconds(cluster, 5e6) + 1e-15


def test_a_hot_owner_is_relieved():
    cluster = Cluster.uniform(4, 8, "v100")
    wanted = np.ones((1, 32), bool)
    owner = np.zeros(1, np.int64)
    sent = {
        form: plan_transfers(owner, wanted, cluster, form=form).links_DD(32).sum(axis=1).max() for form in FORMS[:3]
    }
    assert sent["direct"] == 31 and sent["node"] <= 10 and sent["tree"] <= 5
    plans = {form: plan_transfers(owner, wanted, cluster, expert_bytes=1e7, form=form) for form in FORMS}
    seconds = {form: plan.seconds(cluster, 1e7) for form, plan in plans.items()}
    assert seconds["auto"] == min(seconds.values()) < seconds["direct"] / 3


def test_errors():
    cluster = Cluster.uniform(1, 2, "a100")
    with pytest.raises(OptionError, match="ring"):
        plan_transfers(np.zeros(1, np.int64), np.ones((1, 2), bool), cluster, form="ring")
    with pytest.raises(PlacementError, match=r"\(1, 3\)"):
        plan_transfers(np.zeros(1, np.int64), np.ones((1, 3), bool), cluster)


@settings(deadline=None, max_examples=200)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_what_holders_pass_on_takes_what_is_priced(case, seed):
    """Any holder may send, the price is of the same sends, port by port."""
    cluster, owner, wanted = case
    held = np.random.default_rng(seed).random(wanted.shape) < 0.3
    held[np.arange(len(owner)), owner] = True
    coming = wanted & ~held
    plan = nearest_transfers(held, coming, cluster)
    assert sorted((m.expert, m.target) for one in plan.rounds for m in one) == [tuple(at) for at in np.argwhere(coming)]
    port = np.zeros((4, cluster.num_devices))
    for move in (move for one in plan.rounds for move in one):
        assert held[move.expert, move.source]
        far = 2 * int(cluster.node_D[move.source] != cluster.node_D[move.target])
        assert not far or not held[move.expert, cluster.node_D == cluster.node_D[move.target]].any()
        port[far, move.source] += 1
        port[far + 1, move.target] += 1
    price = StepPrice(cluster, ModelSpec.generic(len(owner), 1, np.arange(1)), 1.0, 0.0)
    wire = port_seconds(PortLoad(*port[:, None]), price.model.expert_bytes, cluster, cluster.plain_wire)[0]
    priced = fetch_seconds(held, coming, price)
    assert priced == pytest.approx(wire + cluster.plain_wire.start_s if coming.any() else 0.0)


def test_an_expert_that_nobody_holds_cannot_come():
    none = np.zeros((1, 2), bool)
    with pytest.raises(PlacementError, match="expert 0 is to come to device 0, and no device holds it"):
        nearest_transfers(none, ~none, Cluster.uniform(1, 2, "a100"))
