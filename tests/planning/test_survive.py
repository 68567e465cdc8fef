"""Plans of which a loss takes fewer experts, for a stated share of seconds; vLLM's rule; rows."""

import numpy as np
import pytest
from tests.planning.test_losses import levels, random_placement

from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.losses import Losses
from poise.planning.methods.vllm_reassign import reassigned
from poise.planning.placement import EMPTY, Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.repair import prepared
from poise.planning.solve.solve import solve
from poise.planning.solve.survive import alone_LE, hardened
from poise.replay.losses import imbalance, loss_rows
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.util.errors import InfeasibleError

CLUSTER = Cluster.uniform(2, 3)
UNITS = {"device": np.arange(6), "node": np.arange(6) // 3}


def problem(slots, traffic="home", layers=3, experts=16):
    trace = zipf_trace(num_tokens=300, num_layers=layers, num_experts=experts, top_k=2, tokens_per_request=10, seed=1)
    batch = make_batch(trace, tokens_per_step=60)
    model = ModelSpec.generic(experts, 2, batch.layer_ids_L)
    return PlacementProblem(batch, CLUSTER, model, np.full(6, slots), traffic)


def orphans(placement, lost):
    held = placement.count_LED() > 0
    return int((~np.delete(held, lost, axis=2).any(axis=2)).sum())


def step_seconds(some, placement):
    return float(some.batch.weight_B @ some.pricing.cost(some.batch, placement.count_LED()).seconds_BL.sum(axis=1))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("traffic", ["home", "stay"])
def test_fewer_experts_are_lost_within_the_stated_cost(unit, traffic):
    some = problem(4, traffic)
    plan = solve(some, method="eplb", work=0.1).placement
    seconds = step_seconds(some, plan)
    unit_D = UNITS[unit]
    lost = [np.flatnonzero(unit_D == number) for number in np.unique(unit_D)]
    before, last = sum(orphans(plan, each) for each in lost), None
    for cost in (0.0, 0.03, 10.0):
        made = hardened(some, plan, unit_D, most_cost=cost)
        after = sum(orphans(made.placement, each) for each in lost)
        assert (made.alone_before, made.alone) == (before, after) == (
            alone_LE(plan, unit_D).sum(), alone_LE(made.placement, unit_D).sum()
        )  # fmt: skip
        assert made.fewest <= after <= before and made.cost <= cost + 1e-12
        assert step_seconds(some, made.placement) == pytest.approx(seconds * (1 + made.cost))
        some.check(made.placement)
        some.engine.check(made.placement, some.slots_D)
        assert last is None or after <= last
        last = after
    assert last < before
    if unit == "device":
        assert last == made.fewest == 3 * (2 * 16 - 24), "each redundant slot saves an expert of its own"


def test_nothing_is_lost_where_slots_suffice():
    some = problem(6)
    plan = solve(some, method="lpt", work=0.1).placement
    for unit_D in UNITS.values():
        made = hardened(some, plan, unit_D, most_cost=100.0)
        assert made.alone == made.fewest == 0, "36 slots for 16 experts"


def test_the_rule_of_vllm_on_its_own_examples():
    """Compacted maps of the tests of #38862: the expert that is missing takes a slot of the one with most."""

    def after(rows, experts, ranks):
        old = np.array([rows + [e for e in range(experts) if e not in rows]])
        extra = old.shape[1] - len(rows)
        device = np.concatenate([np.arange(len(rows)) // 2, np.full(extra, ranks)])
        return reassigned(Placement(old, device, experts, ranks + 1), [ranks]).after_on_rest.slot_expert_LS[0].tolist()

    assert after([0, 1, 0, 1, 0, 3], 4, 3) == [0, 1, 0, 1, 2, 3]
    assert after([0, 1, 2, 3, 0, 2], 4, 3) == [0, 1, 2, 3, 0, 2]
    assert after([0, 0, 1, 1], 4, 2) == [0, 3, 1, 2], "no expert gives its last slot"
    final = after([0, 1, 0, 1, 0, 1], 4, 3)
    assert set(final) == {0, 1, 2, 3} and len(final) == 6
    with pytest.raises(InfeasibleError, match="no slot is left to take for expert 2"):
        after([0, 1], 4, 1)


def test_rows_say_what_each_loss_costs():
    rng = np.random.default_rng(5)
    before = random_placement(rng, 3, 12, 6, 4)
    load_LE, speed_D = rng.gamma(0.5, size=(3, 12)), np.ones(6)
    losses = prepared(before, "node", CLUSTER.node_D, load_LE, speed_D)
    rows = loss_rows(losses, load_LE, speed_D)
    assert [row.name for row in rows] == ["0-2", "3-5"]
    for row, loss in zip(rows, losses.losses, strict=True):
        assert row.orphans == row.least_reads == orphans(before, list(loss.lost)) == len(loss.reads_R3(before))
        mean_L = load_LE.sum(axis=1) / 3
        for value, placement in ((row.first, loss.first_on_rest), (row.after, loss.after_on_rest)):
            assert value == pytest.approx((levels(placement, load_LE, np.ones(3)) / mean_L).mean())
        assert row.bound <= row.after <= min(row.first, row.rival) * (1 + 1e-9) and row.copies == loss.copies
        assert row.before == imbalance(before, load_LE, speed_D)
        rule = reassigned(before, loss.lost)
        assert len(rule.reads_R3(before)) == row.orphans and (rule.first.slot_expert_LS[:, :12] == EMPTY).all() == (
            row.name == "0-2"
        )
        Losses(before, "node", (rule,))  # a rule that keeps to what a loss may do
