"""The core behind the plugins: valid maps, never worse than the map in use or the engine's, few moves, alike on all ranks."""

import ast
import importlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from poise.cost.step import batch_cost
from poise.engines.plugins import planner, switch
from poise.engines.plugins.policy import PolicySettings, logical_maps, rebalance, usable_map
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.methods import eplb
from poise.planning.placement import Placement
from poise.routing.batch import RoutingBatch
from poise.util.errors import InputError, OptionError, PlacementError

QUICK = PolicySettings(time_limit_s=0.02)
SHAPES = {  # layers, experts, slots, groups, nodes, ranks
    "one node": (3, 32, 40, 1, 1, 8),
    "no redundancy": (2, 16, 16, 1, 1, 4),
    "two nodes": (2, 32, 48, 1, 2, 8),
    "groups on nodes": (3, 64, 80, 8, 4, 8),
    "a node is a rank": (2, 16, 20, 4, 4, 4),
    "fewer experts than slots of a rank": (2, 4, 12, 1, 1, 2),
}


def loads_of(layers, experts, seed=0, skew=1.0):
    rng = np.random.default_rng(seed)
    load = np.stack([rng.permutation(1e5 / np.arange(1, experts + 1) ** skew) for _ in range(layers)])
    return rng.poisson(load).astype(np.int64)


def tokens(load, table, ranks):
    """Tokens of each rank under an even split, float [L, D]."""
    layers = len(table)
    replicas = np.stack([np.bincount(row, minlength=load.shape[1]) for row in table])
    each = np.take_along_axis(load / replicas, table, axis=1)
    return each.reshape(layers, ranks, -1).sum(axis=2)


def twice(table, ranks):
    """An expert is twice on a rank."""
    rows = table.reshape(len(table), ranks, -1)
    return any(len(set(held.tolist())) < held.size for row in rows for held in row)


def fetched(old, new, ranks):
    """Experts that some rank must fetch."""
    pairs = zip(old.reshape(len(old), ranks, -1), new.reshape(len(new), ranks, -1), strict=True)
    return sum(len(set(b.tolist()) - set(a.tolist())) for x, y in pairs for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_maps_are_valid_and_never_worse_than_the_map_in_use(name):
    layers, experts, slots, groups, nodes, ranks = SHAPES[name]
    load = loads_of(layers, experts)
    old = np.tile(np.arange(slots) % experts, (layers, 1))
    for current in (None, old):
        table = rebalance(load, slots, groups, nodes, ranks, current, settings=QUICK)
        assert table.dtype == np.int64 and usable_map(table, layers, experts, slots) is not None
        assert twice(table, ranks) == (slots // ranks > experts)
        assert (tokens(load, table, ranks).max(axis=1) <= tokens(load, old, ranks).max(axis=1) * (1 + 1e-9)).all()
        again = rebalance(load.copy(), slots, groups, nodes, ranks, current, settings=QUICK)
        np.testing.assert_array_equal(table, again)
        if current is not None:  # what stays on its rank stays in its slot
            for was, now in zip(old.reshape(-1, slots // ranks), table.reshape(-1, slots // ranks), strict=True):
                assert (now[np.isin(was, now) & ~_doubles(was)] == was[np.isin(was, now) & ~_doubles(was)]).all()


def _doubles(held):
    return np.array([(held == expert).sum() > 1 for expert in held])


@pytest.mark.parametrize("name", ["one node", "two nodes", "groups on nodes"])
def test_as_balanced_as_the_engines_algorithm_at_least(name):
    layers, experts, slots, groups, nodes, ranks = SHAPES[name]
    load = loads_of(layers, experts, seed=3)
    flat = groups % nodes != 0
    theirs, _, _ = eplb.rebalance_experts(load, slots, 1 if flat else groups, 1 if flat else nodes, ranks)
    ours = rebalance(load, slots, groups, nodes, ranks, settings=QUICK)
    most = [tokens(load, table, ranks).max(axis=1) for table in (ours, theirs)]
    assert (most[0] <= most[1] * (1 + 1e-6)).all() or twice(theirs, ranks)


def test_groups_stay_whole_on_nodes():
    layers, experts, slots, groups, nodes, ranks = SHAPES["groups on nodes"]
    table = None
    for seed in range(3):
        table = rebalance(loads_of(layers, experts, seed), slots, groups, nodes, ranks, table, settings=QUICK)
        for row in table.reshape(layers, nodes, -1):
            held = [set((node // (experts // groups)).tolist()) for node in row]
            assert sorted(group for one in held for group in one) == list(range(groups))


def test_a_layer_without_load_and_a_balanced_one_keep_their_rows():
    load = loads_of(3, 16)
    load[0], load[1] = 0, 1000
    old = np.tile(np.random.default_rng(0).permutation(16), (3, 1))
    table = rebalance(load, 16, 1, 1, 4, old, settings=QUICK)
    np.testing.assert_array_equal(table[:2], old[:2])
    assert (table[2] != old[2]).any()
    assert rebalance(load * 0, 20, 1, 1, 4, settings=QUICK).tolist() == [[p % 16 for p in range(20)]] * 3
    assert rebalance(load, 16, 1, 1, 1, old, settings=QUICK).tolist() == old.tolist()


def test_moves_are_few_and_priced():
    layers, experts, slots, ranks = 4, 32, 40, 8
    load = loads_of(layers, experts, seed=1)
    first = rebalance(load, slots, 1, 1, ranks, settings=QUICK)
    drifted = (load * np.random.default_rng(2).uniform(0.7, 1.4, load.shape)).astype(np.int64)
    theirs, _, _ = eplb.rebalance_experts(drifted, slots, 1, 1, ranks)
    ours = rebalance(drifted, slots, 1, 1, ranks, first, settings=QUICK)
    assert tokens(drifted, ours, ranks).max(axis=1).mean() < 0.99 * tokens(drifted, first, ranks).max(axis=1).mean()
    assert 0 < fetched(first, ours, ranks) < 0.8 * fetched(first, theirs, ranks)
    assert fetched(first, rebalance(load, slots, 1, 1, ranks, first, settings=QUICK), ranks) < 0.1 * slots * layers
    short = PolicySettings(time_limit_s=0.02, horizon_steps=1e-3)
    np.testing.assert_array_equal(rebalance(drifted, slots, 1, 1, ranks, first, settings=short), first)


def test_speeds_of_the_cluster_count():
    cluster = Cluster(np.zeros(4, np.int32), np.array([1.0, 1.0, 1.0, 0.5]), 1e12, 1e12, 1e11, 1e11, 1e10)
    load = np.full((1, 32), 1000)
    table = rebalance(load, 48, 1, 1, 4, settings=PolicySettings(cluster=cluster, time_limit_s=0.05))
    on = tokens(load, table, 4)[0]
    assert on[3] < 0.75 * on[:3].min()


def test_a_named_model_and_step_price_memory_too():
    """Few tokens an expert: what counts is the experts a rank must read, which replicas only add to."""
    model = ModelSpec.parse("qwen3-30b-a3b")
    load = loads_of(2, 128, skew=0.1)
    base = np.tile(np.arange(128), (2, 1))
    decode = PolicySettings(model=model, tokens_per_step=64, time_limit_s=0.02, horizon_steps=10.0)
    np.testing.assert_array_equal(rebalance(load, 128, 1, 1, 8, base, settings=decode), base)
    tokens_only = PolicySettings(time_limit_s=0.02, horizon_steps=1e6)
    assert (rebalance(load, 128, 1, 1, 8, base, settings=tokens_only) != base).any()


def test_no_candidate_beats_what_is_taken_under_the_model(monkeypatch):
    seen = []
    real = planner._candidates
    monkeypatch.setattr(planner, "_candidates", lambda *args: seen.extend(real(*args)) or seen)
    load = loads_of(2, 32, seed=5)
    table = rebalance(load, 40, 1, 1, 8, settings=QUICK)
    assert len(seen) == 2
    model, scaled = (
        ModelSpec.generic(32, 1, np.arange(2)),
        load * (planner.EXPERT_TOKENS * planner.LINEAR * 32 / load.sum(axis=1))[:, None],
    )
    batch = RoutingBatch(scaled[None], np.ones(1), 1, np.arange(2, dtype=np.int32))

    def seconds(rows):
        count = Placement(rows, np.repeat(np.arange(8), 5), 32, 8).count_LED()
        return batch_cost(batch, count, Cluster.uniform(1, 8), model, traffic="home", split="even").seconds_BL[0]

    assert not twice(seen[1], 8)
    for other in (one for one in seen if not twice(one, 8)):
        assert (seconds(table) <= seconds(other) * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    "old",
    [np.zeros((2, 20)), np.full((2, 20), -1), np.zeros((3, 20)), np.tile(np.arange(20), (2, 1)), np.zeros((2, 24))],
)
def test_a_map_in_use_that_is_none_counts_as_none(old):
    load = loads_of(2, 16)
    np.testing.assert_array_equal(
        rebalance(load, 20, 1, 1, 4, old, settings=QUICK), rebalance(load, 20, 1, 1, 4, settings=QUICK)
    )


@pytest.mark.parametrize(
    "case",
    [
        dict(weight_LE=np.ones(4)), dict(weight_LE=np.full((1, 4), np.nan)), dict(weight_LE=-np.ones((1, 4))),
        dict(num_replicas=6), dict(num_replicas=0), dict(num_ranks=0), dict(num_replicas=2), dict(num_replicas=8.0),
        dict(weight_LE=np.array([[1, 2, np.inf, 4]])), dict(weight_LE=np.zeros((0, 4))), dict(weight_LE=np.zeros((2, 0))),
        dict(num_nodes=0), dict(num_nodes=None), dict(num_nodes=-1), dict(num_groups=-1), dict(num_groups="two"),
        dict(settings=PolicySettings(cluster=Cluster.parse("1x3"))),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit(case):
    given = dict(weight_LE=np.arange(4.0)[None], num_replicas=8, num_groups=1, num_nodes=1, num_ranks=4) | case
    with pytest.raises(OptionError):
        rebalance(**given)


def test_numbers_that_disagree_are_both_named():
    for case, said in (
        (dict(num_replicas=6), "6 slots .* 4 ranks"), (dict(num_replicas=4, num_ranks=3), "4 slots .* 3 ranks"),
        (dict(num_replicas=2, num_ranks=2), "2 slots for 4 experts"), (dict(num_nodes=0), "nodes .* 1, got 0"),
        (dict(weight_LE=np.array([[1, 1, 1, 1], [1, 1, 1, np.nan]])), "got nan for expert 3 of layer 1"),
    ):  # fmt: skip
        given = dict(weight_LE=np.arange(4.0)[None], num_replicas=8, num_groups=1, num_nodes=1, num_ranks=4) | case
        with pytest.raises(OptionError, match=said):
            rebalance(**given)


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 16])
def test_groups_and_nodes_that_do_not_divide(nodes):
    """No groups (None, 0) are one; groups that do not divide are ignored; nodes that do not, are one."""
    load = loads_of(2, 16)
    plain = rebalance(load, 24, 1, 1, 8, settings=QUICK)
    for groups in (None, 0, 1, 3, 5, 32):
        table = rebalance(load, 24, groups, nodes, 8, settings=QUICK)
        assert usable_map(table, 2, 16, 24) is not None
        if nodes in (1, 3, 16):
            np.testing.assert_array_equal(table, plain)
        if not groups:
            np.testing.assert_array_equal(table, rebalance(load, 24, 1, nodes, 8, settings=QUICK))


def test_no_clock_and_no_threads_decide(monkeypatch):
    """A rank may be slow, or have fewer threads: its map must be that of the others."""
    load = loads_of(1, 256, seed=1)
    first = rebalance(load[:, ::-1], 320, 1, 1, 64, settings=QUICK)
    want = rebalance(load, 320, 1, 1, 64, first, settings=QUICK)

    def clock(*_):
        raise AssertionError("a clock was looked at")

    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
        monkeypatch.setattr(time, name, clock)
    np.testing.assert_array_equal(rebalance(load, 320, 1, 1, 64, first, settings=QUICK), want)
    for module in (
        "planning.methods.swift_balance",
        "planning.solve.anneal",
        "engines.plugins.planner",
        "planning.methods.eplb",
    ):
        tree = ast.parse(Path(importlib.import_module(f"poise.{module}").__file__).read_text())
        products = [ast.unparse(node) for node in ast.walk(tree) if isinstance(getattr(node, "op", None), ast.MatMult)]
        assert products in ([], ["weight_B @ own[:, :-1] ** 2"]), module  # one step: nothing is added up


def test_logical_maps():
    table = np.array([[2, 0, 1, 0], [1, 1, 0, 2]])
    slots, replicas = logical_maps(table, 3, 2)
    assert slots.tolist() == [[[1, 3], [2, -1], [0, -1]], [[2, -1], [0, 1], [3, -1]]]
    assert replicas.tolist() == [[2, 1, 1], [1, 2, 1]]
    with pytest.raises(OptionError, match="2 slots, the map of experts room for 1"):
        logical_maps(table, 3, 1)
    for wrong in (3, -2):
        with pytest.raises(OptionError, match=f"names expert {wrong} of 3"):
            logical_maps(np.array([[0, 1, 2, wrong]]), 3, 2)


def test_logical_maps_with_empty_slots():
    slots, replicas = logical_maps(np.array([[0, 1, -1, 2, 3, -1], [3, -1, 2, 1, 0, -1]]), 4, 1)
    assert slots.tolist() == [[[0], [1], [3], [4]], [[4], [3], [2], [0]]]
    assert (replicas == 1).all()
    wide, _ = logical_maps(np.array([[0, 1, -1, 2, 3, -1]]), 4, 3)
    assert wide.tolist() == [[[0, -1, -1], [1, -1, -1], [3, -1, -1], [4, -1, -1]]]
    rng = np.random.default_rng(0)
    for _ in range(50):  # slot by slot
        experts, table = int(rng.integers(1, 6)), rng.integers(-1, 6, (3, int(rng.integers(1, 9))))
        table = np.minimum(table, experts - 1)
        slots, replicas = logical_maps(table, experts, table.shape[1])
        for layer, expert in np.ndindex(3, experts):
            mine = np.flatnonzero(table[layer] == expert)
            assert slots[layer, expert, : len(mine)].tolist() == mine.tolist()
            assert (slots[layer, expert, len(mine) :] == -1).all() and replicas[layer, expert] == len(mine)


def test_a_static_map_is_given_whatever_the_load(tmp_path):
    rows = np.array([[3, 0, 2, 1, 2, 0], [1, -1, 0, 2, 3, 0]])
    Placement(rows, np.array([0, 0, 0, 1, 1, 1]), 4, 2, np.array([1, 3])).save(tmp_path / "p.npz")
    settings = PolicySettings.from_environment({"POISE_STATIC_MAP": str(tmp_path / "p.npz")})
    for load in (np.zeros((2, 4)), loads_of(2, 4)):
        assert rebalance(load, 6, 1, 1, 2, settings=settings).tolist() == [rows[0].tolist(), [1, 2, 0, 2, 3, 0]]
    with pytest.raises(PlacementError, match=r"\(2, 4, 6, 2\), the engine \(2, 4, 8, 2\)"):
        rebalance(np.ones((2, 4)), 8, 1, 1, 2, settings=settings)
    (tmp_path / "m.json").write_text(json.dumps({"physical_to_logical_map": [[0, 1, 1, 0], [1, 0, 0, 1]]}))
    settings = PolicySettings.from_environment({"POISE_STATIC_MAP": str(tmp_path / "m.json")})
    assert rebalance(np.ones((2, 2)), 4, 1, 1, 2, settings=settings).tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]


def write_map(path, rows):
    path.write_text(json.dumps({"physical_to_logical_map": rows}))


@pytest.mark.parametrize("name", ["map.npz", "map.json"])
def test_a_static_map_is_read_once(tmp_path, name):
    """The first rearrangement comes thousands of steps after the start; what the file is by then differs by rank."""

    def write(row):
        if name.endswith("json"):
            return write_map(tmp_path / name, [row])
        return Placement(np.array([row]), np.array([0, 0, 1, 1]), 2, 2).save(tmp_path / name)

    write([0, 1, 1, 0])
    settings = PolicySettings.from_environment({"POISE_STATIC_MAP": str(tmp_path / name)})
    write([1, 0, 0, 1])
    first = rebalance(np.ones((1, 2)), 4, 1, 1, 2, settings=settings)
    assert first.tolist() == [[0, 1, 1, 0]]
    (tmp_path / name).unlink()
    first[:] = 0
    assert rebalance(np.ones((1, 2)), 4, 1, 1, 2, settings=settings).tolist() == [[0, 1, 1, 0]]


def test_a_static_map_of_sglang_for_a_model_with_dense_layers(tmp_path):
    sizes = {"num_hidden_layers": 4, "num_experts": 2, "num_experts_per_tok": 1, "hidden_size": 8,
             "moe_intermediate_size": 4, "first_k_dense_replace": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    environ = {"POISE_STATIC_MAP": str(tmp_path / "m.json"), "POISE_MODEL": str(tmp_path / "config.json")}
    moe, dense = [[0, 1, 1, 0], [1, 0, 0, 1]], [0, 1, 0, 1]
    for rows in (moe, [dense, dense, *moe]):  # by MoE layers, and as 'poise export --to sglang' writes it
        write_map(tmp_path / "m.json", rows)
        settings = PolicySettings.from_environment(environ)
        assert rebalance(np.ones((2, 2)), 4, 1, 1, 2, settings=settings).tolist() == moe
    unnamed = PolicySettings.from_environment({**environ, "POISE_MODEL": ""})
    with pytest.raises(PlacementError, match=r"\(4, 2, 4, 2\), the engine \(2, 2, 4, 2\)") as error:
        rebalance(np.ones((2, 2)), 4, 1, 1, 2, settings=unnamed)
    assert "POISE_MODEL" in error.value.hint
    write_map(tmp_path / "m.json", [dense, *moe])
    with pytest.raises(PlacementError, match=r"3 layers, \S+ 4, 2 of them MoE"):
        PolicySettings.from_environment(environ)


def test_settings_from_the_environment(tmp_path):
    assert PolicySettings.from_environment({"POISE_CLUSTER": " "}) == PolicySettings()
    got = PolicySettings.from_environment(
        {"POISE_CLUSTER": "2x4:h200", "POISE_MODEL": "qwen3-30b-a3b", "POISE_TOKENS_PER_STEP": "256",
         "POISE_TIME_LIMIT_S": "0.5", "POISE_HORIZON_STEPS": "1e4"}
    )  # fmt: skip
    assert got.cluster is not None and got.cluster.num_nodes == 2 and got.model is not None
    assert (got.tokens_per_step, got.time_limit_s, got.horizon_steps) == (256, 0.5, 1e4)
    assert [switch.planning({"POISE_EPLB": value}) for value in ("1", "on", "0", "", "false")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    (tmp_path / "bad.json").write_text("{}")
    for name, value in {
        "POISE_CLUSTER": "8", "POISE_MODEL": "none", "POISE_TIME_LIMIT_S": "fast", "POISE_HORIZON_STEPS": "0",
        "POISE_TOKENS_PER_STEP": "64", "POISE_STATIC_MAP": str(tmp_path / "bad.json"),
    }.items():  # fmt: skip
        with pytest.raises(InputError):
            PolicySettings.from_environment({name: value})
    for tokens in ("inf", "nan", "1.5"):
        with pytest.raises(OptionError, match="whole number"):
            PolicySettings.from_environment({"POISE_MODEL": "qwen3-30b-a3b", "POISE_TOKENS_PER_STEP": tokens})
    with pytest.raises(PlacementError, match="no such file"):
        PolicySettings.from_environment({"POISE_STATIC_MAP": str(tmp_path / "none.npz")})
