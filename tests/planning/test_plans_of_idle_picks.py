"""Every method on traffic of which a third of the picks, one layer of a step and one of all steps compute nothing."""

import numpy as np
import pytest
from tests.helpers import no_experts, tiny_cluster, tiny_model, token_batch

from poise.control.payback import _seconds, bounded
from poise.cost.step import batch_cost
from poise.cost.traffic import DATA_FLOWS
from poise.planning.problem import PlacementProblem
from poise.planning.solve.affinity import affinity_start
from poise.planning.solve.search import plain_start, search
from poise.planning.solve.solve import METHODS, solve
from poise.util.errors import NoResultError

EXPERTS, LAYERS = 6, 4


def scene(traffic, seed=0):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, (2, 2), equal=True)
    score = rng.gumbel(size=(50, LAYERS, EXPERTS)) + 2.0 * rng.random((1, LAYERS, EXPERTS))
    ids = no_experts(rng, np.argsort(-score, axis=2)[:, :, :2], 0.35)
    ids[:20, 2] = -1
    if seed == 0:
        ids[:, 1] = -1
    batch = token_batch(ids, [20, 16, 14], EXPERTS, home_T=rng.integers(0, 4, 50))
    return batch, PlacementProblem(batch, cluster, tiny_model(batch), np.full(4, 2), traffic)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("traffic", ["home_node_dedup", "stay"])
def test_every_method_places_the_real_experts(name, traffic):
    _, problem = scene(traffic)
    try:
        got = solve(problem, method=name, work=1.5)
    except NoResultError:
        pytest.skip("the method does not take this problem")
    assert got.placement.num_experts == EXPERTS
    assert 0 < got.lower_bound <= got.objective * (1 + 1e-9)


@pytest.mark.parametrize("traffic", DATA_FLOWS)
def test_the_search_prices_what_the_cost_prices(traffic):
    """Nothing else tells its plans apart, so that the one it returns is no worse than its start."""
    batch, problem = scene(traffic, 1)
    start = plain_start(problem)
    plan = search(problem, [start], time_limit_s=0.05, seed=0).placement
    options = {"traffic": traffic, "split": "even"}
    mean = [batch.weight_B @ batch_cost(batch, each.count_LED(), problem.cluster, problem.model, **options)
            .seconds_BL.mean(axis=1) for each in (start, plan)]  # fmt: skip
    assert mean[1] <= mean[0] * (1 + 1e-9)


def test_a_token_that_skips_a_layer_draws_its_next_expert_to_where_it_waits():
    """Layer 1 computes nothing; the token goes from layer 0 to layer 2, so their experts are put together."""
    turn = np.arange(40) % 4
    ids = np.stack([turn, np.full(40, -1), (turn + 2) % 4], axis=1)[:, :, None]
    batch = token_batch(ids, [20, 20], 4, home_T=turn)
    problem = PlacementProblem(batch, tiny_cluster(np.random.default_rng(0), (4,), equal=True), tiny_model(batch),
                               np.ones(4, int), "stay")  # fmt: skip
    plan = solve(problem, method="poise", work=3).placement
    device_LE = plan.count_LED().argmax(axis=2)
    assert (device_LE[2, (np.arange(4) + 2) % 4] == device_LE[0]).all()
    assert any((d[2, (np.arange(4) + 2) % 4] == d[0]).all()
               for d in (p.count_LED().argmax(axis=2) for p in affinity_start(problem)))  # fmt: skip


def test_moves_count_in_layers_that_tokens_reach_over_others():
    batch, problem = scene("stay", 2)
    before, after = plain_start(problem), solve(problem, method="exflow", work=1.5).placement
    whole = _seconds(problem, before.count_LED(), 0, LAYERS)
    cost = batch_cost(batch, before.count_LED(), problem.cluster, problem.model, traffic="stay", split="even")
    assert whole == pytest.approx(float(batch.weight_B @ cost.seconds_BL.sum(axis=1)))
    count = before.count_LED().copy()
    count[1] = after.count_LED()[1]
    changed = batch_cost(batch, count, problem.cluster, problem.model, traffic="stay", split="even")
    gain = batch.weight_B @ (cost.seconds_BL - changed.seconds_BL).sum(axis=1)
    assert _seconds(problem, before.count_LED(), 1, 2) - _seconds(problem, count, 1, 2) == pytest.approx(float(gain))
    some = bounded(before, after, problem, 4)
    assert before.diff(some).fetched <= 4 and _seconds(problem, some.count_LED(), 0, LAYERS) <= whole * (1 + 1e-9)
