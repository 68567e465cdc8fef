"""Maps as engines hold them: every slot filled, no expert twice on a device, from E slots up to E on every device."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import load_batch, random_count, tiny_batch, tiny_cluster, tiny_model

import poise
from poise.api import deal_slots
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.engine_rules import ANY, ENGINES, NONE, fill_table, hold
from poise.planning.placement import EMPTY, Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.complete import complete
from poise.planning.solve.solve import METHODS, solve, without_redundant
from poise.replay.rows import fewer_words
from poise.routing.synthetic import zipf_trace
from poise.util.errors import NoResultError, OptionError, PlacementError

QUICK = ("contiguous", "round-robin", "lpt", "eplb", "eplb-global", "surplus-fill", "flash-lb", "coactivation", "grace-moe",
         "swift-balance")  # fmt: skip


def random_problem(seed, *, engine=ANY, poise_too=False):
    """Loads or tokens, equal or unequal slots, and any number of them between E and E on every device."""
    rng = np.random.default_rng(seed)
    experts, devices = int(rng.integers(2, 9)), int(rng.integers(1, 5))
    nodes = [devices] if devices < 3 or rng.random() < 0.5 else [2, devices - 2]
    make = tiny_batch if rng.random() < 0.5 else load_batch
    more = {"devices": devices} if make is tiny_batch else {}
    batch = make(rng, experts=experts, top_k=min(2, experts), **more)
    slots = deal_slots(experts, int(rng.integers(0, experts * (devices - 1) + 1)), devices)
    traffic = "home" if make is load_batch else str(rng.choice(["home", "home_node_dedup", "stay"]))
    split = str(rng.choice(["even", "exact"]))
    cluster = tiny_cluster(rng, nodes, equal=bool(rng.integers(2)))
    return PlacementProblem(batch, cluster, tiny_model(batch), rng.permutation(slots), traffic, split, engine=engine)


def check(problem, placement):
    count = placement.count_LED()
    assert count.max() == 1 and count.sum(axis=2).min() >= 1
    np.testing.assert_array_equal(count.sum(axis=1), np.tile(problem.slots_D, (placement.num_layers, 1)))
    assert (placement.slot_expert_LS != EMPTY).all()


@given(st.integers(0, 10**6), st.sampled_from(QUICK))
@settings(max_examples=150, deadline=None)
def test_every_method_fills_its_slots_and_doubles_nothing(seed, method):
    problem = random_problem(seed)
    try:
        found = solve(problem, method=method, work=6)
    except NoResultError:
        return
    check(problem, found.placement)
    assert found.lower_bound <= found.objective * (1 + 1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_poise_fills_its_slots_and_is_never_worse_than_a_rival_held_alike(seed):
    problem = random_problem(seed)
    found = solve(problem, work=3)
    check(problem, found.placement)
    for method in QUICK[:6]:
        assert found.objective <= solve(problem, method=method).objective * (1 + 1e-9), method


def test_full_replication_is_every_expert_once_everywhere(tmp_path):
    trace = zipf_trace(num_tokens=400, num_layers=2, num_experts=8, top_k=2, exponent=1.3, tokens_per_request=10)
    for method in ("poise", "lpt", "eplb", "moetuner-equal"):
        made = poise.plan(trace, "1x4", redundant=24, method=method, work=6).placement
        assert (made.count_LED() == 1).all(), method


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_filling_keeps_what_is_there(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(seed, engine=NONE)
    layers, experts, devices = problem.batch.num_layers, problem.batch.num_experts, problem.num_devices
    count = np.zeros((layers, experts, devices), np.int32)
    for layer in range(layers):
        for e, d in enumerate(rng.permutation(np.repeat(np.arange(devices), problem.slots_D))[:experts]):
            count[layer, e, d] = 1
    start = Placement.from_counts(count, slots_D=problem.slots_D)
    for filled in (complete(problem, start), hold(start, ANY)[0]):
        check(problem, filled)
        assert (filled.count_LED() >= count).all()
    assert hold(start, NONE)[0] is start


def test_a_device_that_holds_every_expert_gets_one_twice_only_then():
    crowded = Placement(np.array([[0, 1, -1, 0, -1, -1]]), np.array([0, 0, 0, 1, 1, 1]), 2, 2)
    table, empty = fill_table(crowded)
    assert table.tolist() == [[0, 1, 1, 0, 1, 0]] or (sorted(table[0, 3:].tolist()) == [0, 0, 1] and len(empty) == 3)


def test_rules_refuse_what_the_engine_cannot_hold():
    problem = random_problem(3)
    experts, devices = 6, 4
    loads = poise.LoadProfile(np.arange(1, 2 * experts + 1).reshape(1, 2, experts))
    with pytest.raises(OptionError, match="6 slots on 4 ranks were given as 1 to 2"):
        poise.plan(loads, f"1x{devices}", engine="sglang")
    with pytest.raises(OptionError, match="holds every expert once"):
        poise.plan(loads, "1x2", redundant=2, engine="megatron")
    with pytest.raises(OptionError, match="--split asks for exact"):
        poise.plan(loads, "1x2", redundant=2, engine="vllm", split="exact")
    with pytest.raises(OptionError, match="unknown engine"):
        poise.plan(loads, "1x2", engine="vlm")
    with pytest.raises(OptionError, match="sglang cannot hold"):
        replace(problem, pooled=True, engine=ENGINES["sglang"], slots_D=np.full(problem.num_devices, 8))
    assert replace(problem, pooled=True).engine is NONE
    with pytest.raises(PlacementError, match="different experts"):
        ANY.check(Placement(np.array([[0, 1, -1, 0]]), np.array([0, 0, 1, 1]), 2, 2), np.array([2, 2]))


def test_pooled_rows_are_left_out_of_tables_of_engines():
    loads = poise.LoadProfile(np.random.default_rng(0).integers(1, 99, (4, 2, 8)))
    got = poise.compare(loads, "1x4", placements=["contiguous", "moetuner"], work=6)
    assert [e.name for e in got.entries] == ["contiguous"] and any("moetuner left out" in n for n in got.notes)
    free = poise.compare(loads, "1x4", placements=["contiguous", "moetuner"], work=6, engine="none")
    assert [e.name for e in free.entries] == ["contiguous", "moetuner"]


def test_fewer_redundant_slots_are_named_where_they_are_better():
    """Decode: one token an expert, so that a replica costs a read of weights and saves nothing."""
    cluster, rng = Cluster.parse("1x4:h100"), np.random.default_rng(0)
    loads = poise.LoadProfile(rng.integers(1, 3, (4, 2, 16)), top_k=4)
    model = ModelSpec.generic(16, 4, np.arange(2))
    solution = poise.plan(loads, cluster, redundant=16, model=model, work=9)
    assert solution.details["fewer_redundant"]["redundant"] == 0
    assert solution.details["fewer_redundant"]["objective"] < solution.objective
    got = poise.compare(loads, cluster, redundant=16, model=model, placements=["contiguous", "poise"], work=9)
    assert "poise, 0 redundant" in {e.name for e in got.entries} and got.entries[-1].name == "poise"
    said = [note for note in got.notes if "--ep-num-redundant-experts 0" in note]
    assert said and "%" not in said[0] and "may be better" in said[0]  # nobody said how large a step is
    assert "%" in fewer_words(0, 0.05) and solution.details["defaults"]
    heavy = poise.LoadProfile(np.array([[[4000, *[100] * 7]] * 2]))
    assert "fewer_redundant" not in poise.plan(heavy, "1x4", redundant=8, work=9).details


def test_methods_table_knows_who_looks_at_traffic():
    assert {name for name, method in METHODS.items() if not method.fitted} == {"contiguous", "round-robin"}
    assert without_redundant(random_problem(1, engine=NONE)) is None


def test_counts_of_random_placements_stay(tmp_path):
    rng = np.random.default_rng(5)
    full = Placement.from_counts(random_count(rng, 2, 5, 3, share=1.1))
    assert hold(full, ANY) == (full, 0)
