"""What a plugin's planner goes to: gains that are worth it, so many moves at a time, under the engine's split, by phase."""

import numpy as np
import pytest
from tests.engines.test_policy import QUICK, fetched, loads_of, tokens

from poise.cost.step import batch_cost
from poise.engines.plugins import planner, switch
from poise.engines.plugins.policy import PolicySettings, asked, orphans_placed, rebalance, usable_map
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.routing.batch import RoutingBatch
from poise.util.errors import OptionError

LAYERS, EXPERTS, SLOTS, RANKS = 4, 32, 40, 8


def a_map(load, **more):
    return rebalance(load, SLOTS, 1, 1, RANKS, settings=PolicySettings(time_limit_s=0.02, **more))


def drifted(load, by, seed=2):
    return np.maximum(1, load * np.random.default_rng(seed).uniform(1 - by, 1 + by, load.shape)).astype(np.int64)


def test_small_gains_leave_the_map_in_use_and_say_so():
    load = loads_of(LAYERS, EXPERTS, seed=1)
    old = a_map(load)
    call = drifted(load, 0.3)
    table, said = asked(call, SLOTS, 1, 1, RANKS, old, settings=QUICK).plan()
    gain = float(said.removeprefix("gains ").partition("%")[0]) / 100
    assert (table != old).any() and gain > 0.01
    most = PolicySettings(time_limit_s=0.02, min_gain=gain + 0.01)
    table, said = asked(call, SLOTS, 1, 1, RANKS, old, settings=most).plan()
    np.testing.assert_array_equal(table, old)
    assert f"the best map found gains {gain:.2%} of a step, POISE_MIN_GAIN asks for {gain + 0.01:.2%}" in said
    for bad in (-0.1, 1.0):
        with pytest.raises(OptionError, match="min_gain"):
            PolicySettings(min_gain=bad)


def test_the_gain_that_is_said_is_the_one_under_the_model():
    load = loads_of(LAYERS, EXPERTS, seed=4)
    old = np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1))
    settings = PolicySettings(time_limit_s=0.02, cluster=Cluster.parse("1x8:h100"), model=ModelSpec.parse("qwen3-30b-a3b"),
                              tokens_per_step=4096)  # fmt: skip
    with pytest.raises(OptionError):
        PolicySettings(tokens_per_step=4)
    load = np.concatenate([load] * 4, axis=1)  # 128 experts
    old = np.tile(np.arange(136) % 128, (LAYERS, 1))
    table, said = asked(load, 136, 1, 1, RANKS, old, settings=settings).plan()
    scaled = load / load.sum(axis=1, keepdims=True) * 4096 * 8
    batch = RoutingBatch(scaled[None], np.ones(1), 8, np.arange(LAYERS, dtype=np.int32))
    problem = planner._problem(scaled, settings.cluster, settings.model, 136, settings)
    seconds = [
        batch_cost(batch, Placement(rows, np.repeat(np.arange(8), 17), 128, 8).count_LED(), problem.cluster, settings.model,
                   traffic="home", split="even").seconds_BL.sum()
        for rows in (old, table)
    ]  # fmt: skip
    assert not problem.cluster.open and problem.cluster.kernel is not None  # measured, not a datasheet's
    assert said.startswith(f"gains {1 - seconds[1] / seconds[0]:.2%} of a step")


def test_so_many_moves_at_a_time_and_the_rest_later():
    load = loads_of(LAYERS, EXPERTS, seed=3)
    at = a_map(load)
    load = loads_of(LAYERS, EXPERTS, seed=9)
    whole, _ = asked(load, SLOTS, 1, 1, RANKS, at, settings=QUICK).plan()
    of_rank = lambda old, new: max(  # noqa: E731
        sum(len(set(new[layer, r].tolist()) - set(old[layer, r].tolist())) for layer in range(LAYERS))
        for r in range(RANKS)
    )
    shape = (LAYERS, RANKS, -1)
    assert of_rank(at.reshape(shape), whole.reshape(shape)) > 4
    some = PolicySettings(time_limit_s=0.02, max_moves=4)
    seen = [tokens(load, at, RANKS).max(axis=1).sum()]
    for turn in range(6):
        table, said = asked(load, SLOTS, 1, 1, RANKS, at, settings=some).plan()
        assert of_rank(at.reshape(shape), table.reshape(shape)) <= 4
        assert turn or ("layers wait" in said and (table != at).any(axis=1).sum() < LAYERS)
        seen.append(tokens(load, table, RANKS).max(axis=1).sum())
        assert seen[-1] <= seen[-2] * (1 + 1e-9)
        at = table
    assert seen[-1] < 1.1 * tokens(load, whole, RANKS).max(axis=1).sum() < seen[0]
    with pytest.raises(OptionError, match="max_moves"):
        PolicySettings(max_moves=0)


def test_a_limit_that_no_layer_fits_is_said():
    load = loads_of(1, EXPERTS, seed=3)
    old = np.arange(SLOTS)[None] % EXPERTS
    table, said = asked(load, SLOTS, 1, 1, RANKS, old, settings=PolicySettings(time_limit_s=0.02, max_moves=1)).plan()
    if (table == old).all():
        assert "POISE_MAX_MOVES, 1" in said
    else:
        assert fetched(old, table, RANKS) > 0


def test_under_near_nodes_have_copies_of_their_own():
    """Two nodes: the map for ``near`` is cheaper under it than the map for ``even``, and valid."""
    load = loads_of(2, EXPERTS, seed=6, skew=1.3)
    cluster = Cluster.uniform(2, 4)
    model = ModelSpec.parse("qwen3-30b-a3b")
    both = {}
    for split in ("even", "near"):
        settings = PolicySettings(cluster=cluster, time_limit_s=0.2, split=split)
        both[split] = rebalance(load, 48, 1, 2, 8, settings=settings)
        assert usable_map(both[split], 2, EXPERTS, 48) is not None
    scaled = load / load.sum(axis=1, keepdims=True) * planner.EXPERT_TOKENS * planner.LINEAR * EXPERTS
    batch = RoutingBatch(scaled[None], np.ones(1), 1, np.arange(2, dtype=np.int32))
    model = ModelSpec.generic(EXPERTS, 1, np.arange(2))
    seconds = {
        split: batch_cost(batch, Placement(rows, np.repeat(np.arange(8), 6), EXPERTS, 8).count_LED(), cluster, model,
                          traffic="home", split="near").seconds_BL.sum()
        for split, rows in both.items()
    }  # fmt: skip
    assert seconds["near"] < seconds["even"]


@pytest.mark.parametrize("strategy, whole", [("auto", True), ("hierarchical", True), ("global", False)])
def test_groups_by_strategy(strategy, whole):
    """#51988: prefill keeps groups on nodes, decode does not."""
    made = asked(loads_of(2, 64), 80, 8, 4, 8, settings=PolicySettings(strategy=strategy))
    assert (made.nodes == 4) == whole
    if strategy == "hierarchical":
        with pytest.raises(OptionError, match="8 groups of 64 experts do not divide over 1 nodes"):
            asked(loads_of(2, 64), 80, 8, 1, 8, settings=PolicySettings(strategy=strategy))


def test_instances_of_two_phases_from_one_environment():
    environ = {"POISE_EPLB": "1", "POISE_MODEL": "qwen3-30b-a3b", "POISE_TOKENS_PER_STEP_PREFILL": "8192",
               "POISE_TOKENS_PER_STEP_DECODE": "256", "POISE_STATIC_MAP_DECODE": " ", "POISE_SPLIT": "near"}  # fmt: skip
    prefill, decode, neither = (
        PolicySettings.from_environment({**environ, "POISE_PHASE": phase}) for phase in ("prefill", "decode", "")
    )
    assert (prefill.tokens_per_step, decode.tokens_per_step, neither.tokens_per_step) == (8192, 256, None)
    assert (prefill.strategy, decode.strategy) == ("auto", "global")
    assert prefill.split == decode.split == "near" and prefill.phase == "prefill"
    chosen = PolicySettings.from_environment({**environ, "POISE_PHASE": "decode", "POISE_STRATEGY": "hierarchical"})
    assert chosen.strategy == "hierarchical"
    of = switch.of_phase({"POISE_PHASE": "decode", "POISE_STATIC_MAP_DECODE": "a.npz", "POISE_EPLB_PREFILL": "1"})
    assert switch.static_map(of) and not switch.planning(of)
    for name, value in {
        "POISE_PHASE": "both",
        "POISE_STRATEGY": "local",
        "POISE_SPLIT": "exact",
        "POISE_MAX_MOVES": "1.5",
    }.items():
        with pytest.raises(OptionError, match=name):
            PolicySettings.from_environment({name: value})


# ---- ranks that are lost ----------------------------------------------------------------------------------------------


def test_orphans_take_empty_slots_and_then_copies_that_matter_least():
    load = np.array([[50.0, 9, 8, 7, 100, 3]])
    held = np.array([[0, 1, -1, 0, 2, 3]])  # 4 and 5 are lost, with one empty slot
    placed = orphans_placed(held, load, 2)
    assert placed.tolist() == [[0, 1, 4, 5, 2, 3]] or placed.tolist() == [[5, 1, 4, 0, 2, 3]]
    whole = np.array([[0, 1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(orphans_placed(whole, load, 2), whole)


@pytest.mark.parametrize("seed", range(6))
def test_every_expert_is_placed_whoever_is_lost(seed):
    rng = np.random.default_rng(seed)
    load = loads_of(2, 16, seed)
    old = np.stack([rng.permutation(np.concatenate([np.arange(16), rng.integers(0, 16, 16)])) for _ in range(2)])
    active = np.ones(8, bool)
    active[rng.choice(8, rng.integers(1, 5), replace=False)] = False
    table = rebalance(load, 32, 1, 2, 8, old, settings=QUICK, active_D=active)
    on = table.reshape(2, 8, 4)
    assert (on[:, ~active] == -1).all()
    left = on[:, active].reshape(2, -1)
    assert usable_map(left, 2, 16, left.shape[1]) is not None
    again = rebalance(load.copy(), 32, 1, 2, 8, old.copy(), settings=QUICK, active_D=active.astype(int))
    np.testing.assert_array_equal(table, again)
    kept = asked(load, 32, 1, 2, 8, old, settings=QUICK, active_D=active).kept().reshape(2, 8, 4)
    assert (kept[:, ~active] == -1).all()
    assert usable_map(kept[:, active].reshape(2, -1), 2, 16, left.shape[1]) is not None


def test_nodes_that_lost_as_many_ranks_each_stay_nodes():
    """Expert groups stay whole where what is left allows it."""
    load = loads_of(2, 64)
    active = np.array([1, 1, 0, 1, 1, 1, 1, 0])
    made = asked(load, 128, 4, 2, 8, settings=PolicySettings(cluster=Cluster.uniform(2, 4)), active_D=active)
    assert (made.nodes, made.ranks, made.slots) == (2, 6, 96)
    uneven = asked(load, 128, 4, 2, 8, settings=PolicySettings(cluster=Cluster.uniform(2, 4)),
                   active_D=np.array([1, 1, 0, 0, 1, 1, 1, 0]))  # fmt: skip
    assert (uneven.nodes, uneven.ranks) == (1, 5)


def test_warming_up_runs_the_few_moves_too(monkeypatch):
    """Else the first plan of an engine compiles them, and is late for seconds."""
    from poise.engines.plugins import planner, policy

    nudged, calls = planner.nudged, []
    monkeypatch.setattr(planner, "nudged", lambda *given: calls.append(given) or nudged(*given))
    policy.warm_up.__wrapped__()
    assert calls
