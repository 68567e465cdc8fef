"""Engines that run the plan, the trivial map, another map or none at all: who is called live, and how often."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engines import runs
from tests.helpers import few_or

from poise.engines.dump import BalanceLog
from poise.engines.explain import copies_of, measures_of
from poise.engines.verify import verify
from poise.planning.methods.eplb import rebalance_experts
from poise.planning.placement import Placement
from poise.routing.trace import RoutingTrace
from poise.util.errors import PlacementError

EXPERTS, DEVICES, SLOTS, LAYERS, TOP_K = 16, 4, 20, 4, 2
TRIVIAL = np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1)).astype(np.int32)
SIZES = {8: 120, 64: 24, 512: 12, 4096: 4}


def placement(table):
    return Placement(table, np.repeat(np.arange(DEVICES), SLOTS // DEVICES), EXPERTS, DEVICES)


class World:
    """Traffic of one popularity, a plan for it, and other maps."""

    def __init__(self, seed, exponent):
        self.rng = np.random.default_rng(seed)
        self.share = runs.popularity(self.rng, LAYERS, EXPERTS, exponent)
        fit = runs.loads(runs.tokens(self.rng, self.share, TOP_K, 3000), EXPERTS).load_BLE[0]
        shuffled = self.rng.permutation(fit, axis=1)
        self.tables = {"plan": rebalance_experts(fit, SLOTS, 1, 1, DEVICES)[0].astype(np.int32), "trivial": TRIVIAL,
                       "another": rebalance_experts(shuffled, SLOTS, 1, 1, DEVICES)[0].astype(np.int32)}  # fmt: skip
        self.plan = placement(self.tables["plan"])

    def ran(self, runs_map, size, measure="ranks", kind="trace"):
        sizes = self.rng.integers(max(1, size // 2), 2 * size, SIZES.get(size, 4))
        table = self.tables.get(runs_map, TRIVIAL)
        mean, most, chosen = runs.passes(self.rng, self.share, TOP_K, sizes, table, DEVICES, measure)
        if runs_map == "noise":
            most = np.round(mean / self.rng.uniform(0.3, 1.0, len(mean)))
        traffic = RoutingTrace(chosen, EXPERTS)
        return runs.vllm_dump(mean, most, traffic if kind == "trace" else runs.loads(chosen, EXPERTS, known_k=False))


@given(
    st.integers(0, 2**20), st.floats(0.0, 1.6), st.sampled_from(sorted(SIZES)), st.sampled_from(["ranks", "layers"]),
    st.sampled_from(["trace", "loads"]), st.sampled_from(["trivial", "another", "noise"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_does_not_run_is_not_called_live(seed, exponent, size, measure, kind, running):
    """The examples are always the same: of some hundred worlds another map gives the plan's balance by chance in one."""
    size = min(size, 512) if running == "noise" else size  # two values may be near the plan's by chance, six not
    world = World(seed, exponent)
    assert verify(world.plan, world.ran(running, size, measure, kind), error_rate=0.001).verdict != "live"


@pytest.mark.parametrize("size", sorted(SIZES))
@pytest.mark.parametrize("measure", ["ranks", "layers"])
def test_a_plan_that_runs_is_called_live_where_maps_differ_a_lot(size, measure):
    worlds = [World(seed, 1.4) for seed in range(5)]
    found = [verify(world.plan, world.ran("plan", size, measure)) for world in worlds]
    assert sum(one.live is True for one in found) >= (1 if size == 8 else 4)
    assert all(one.verdict != "not-live" for one in found)


@pytest.mark.parametrize(("running", "right", "wrong"), [("plan", "live", "not-live"), ("trivial", "not-live", "live")])
def test_forty_runs_with_and_without_the_plan(running, right, wrong):
    """No false word; the right one in three of four, as plan and trivial map differ by 5 % or more."""
    words = []
    for seed in range(few_or(40, 4)):
        world = World(1000 + seed, (0.6, 1.0, 1.4)[seed % 3])
        found = verify(world.plan, world.ran(running, (64, 512, 4096, 8192)[seed % 4]))
        assert abs(found.predicted / found.trivial - 1) >= 0.05
        words.append(found.verdict)
    assert wrong not in words and words.count(right) >= 0.75 * len(words)


def test_a_plan_that_runs_is_not_said_not_to():
    for seed in range(6):
        world = World(seed, 0.5)
        assert verify(world.plan, world.ran("plan", 64)).verdict != "not-live"


def test_a_plan_less_balanced_than_no_plan_is_not_proven_by_small_passes():
    """Two ranks, passes of a few tokens, nothing rearranged: what is measured lies nearer to what the plan gives in the
    long run than to what the trivial map gives there, and that is noise.
    """
    fooled = 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        share = runs.popularity(rng, LAYERS, EXPERTS, 0.5)
        mean, most, chosen = runs.passes(rng, share, TOP_K, [*[8] * 22, 150], TRIVIAL, 2)
        table = np.stack([rng.permutation(row) for row in TRIVIAL])
        plan = Placement(table, np.repeat([0, 1], SLOTS // 2), EXPERTS, 2)
        dump = runs.vllm_dump(mean, most, RoutingTrace(chosen, EXPERTS))
        count = np.stack([plan.count_LED(), replace(plan, slot_expert_LS=TRIVIAL).count_LED()])
        load = runs.loads(chosen, EXPERTS).load_BLE[0]
        long_run = np.einsum("le,pled->pld", load, count / count.sum(axis=3, keepdims=True))
        ours, trivial = (long_run.mean(axis=2).sum(axis=1) / long_run.max(axis=2).sum(axis=1)).tolist()
        measured = dump.balance_B[11:].mean()
        fooled += abs(measured - ours) < abs(measured - trivial)
        assert verify(plan, dump).verdict != "live"
    assert fooled >= 12  # a rule of the nearer one calls these live


def test_the_engines_own_balancer_and_older_plans_explain_a_balance_as_well():
    world = World(5, 1.2)
    dump = world.ran("plan", 512)
    assert verify(world.plan, dump).verdict == "live"
    own = replace(dump, log=replace(dump.log, own_balancer=True))
    assert verify(world.plan, own).verdict == "undecided" and verify(world.plan, own, balancer_off=True).live
    mirrored = placement(np.ascontiguousarray(world.tables["plan"][:, ::-1]))  # other devices, the same balance
    found = verify(world.plan, dump, against={"older.npz": mirrored})
    assert found.verdict == "undecided" and "so would the older.npz" in found.sentence()
    with pytest.raises(PlacementError, match=r"older has 16 experts on 2 devices, the plan 16 on 4"):
        verify(world.plan, dump, against={"older": Placement(TRIVIAL, np.repeat([0, 1], 10), EXPERTS, 2)})


def test_passes_before_the_first_rearrangement_do_not_count():
    world = World(3, 1.4)
    early, late = (world.ran(name, 512) for name in ("trivial", "plan"))
    parts = [(early.log, 3), (late.log, 1)]  # most of the log is older than the map
    log = BalanceLog(
        *(np.concatenate([np.tile(getattr(part, name), times) for part, times in parts]) for name in ("mean_B", "most_B")),
        np.repeat([0, 1], [3 * len(early.balance_B), len(late.balance_B)]), own_balancer=False,
    )  # fmt: skip
    dump = replace(late, log=log, balance_B=log.mean_B / log.most_B)
    assert verify(world.plan, dump).verdict == "live"
    unseen = replace(dump, log=replace(log, rearranged_B=np.zeros(len(log.mean_B), np.int64)))
    found = verify(world.plan, unseen)
    assert found.verdict != "live" and any("no rearrangement came" in note for note in found.notes)


def test_a_sample_of_other_tokens_is_no_more_sure_than_it_is_large():
    """Loads of few tokens are uneven by chance; a plan fitted to them must not gain from that."""
    start = np.tile(np.arange(EXPERTS, dtype=np.int32), (LAYERS, 1))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        share = runs.popularity(rng, LAYERS, EXPERTS, 0.0)
        few = runs.tokens(rng, share, TOP_K, 60)
        table = rebalance_experts(runs.loads(few, EXPERTS).load_BLE[0], EXPERTS, 1, 1, DEVICES)[0]
        fitted = Placement(table.astype(np.int32), np.repeat(np.arange(DEVICES), EXPERTS // DEVICES), EXPERTS, DEVICES)
        mean, most, _ = runs.passes(rng, share, TOP_K, [4096] * 4, start, DEVICES)
        dump = runs.vllm_dump(mean, most, RoutingTrace(few, EXPERTS))
        assert verify(fitted, dump, tolerance=0.01).verdict != "live"


def test_what_the_mean_of_a_log_is_of():
    tokens = np.array([7.0, 12.0, 31.0])
    layers, devices, top_k = 6, 4, 8
    assert set(measures_of(tokens * top_k, layers, devices, top_k)) == {"layers"}
    found = measures_of(tokens * top_k * layers / devices, layers, devices, top_k)
    np.testing.assert_allclose(found["ranks"], tokens * top_k)
    assert set(measures_of(np.array([0.37, 1.91]), layers, devices, top_k)) == {"ranks", "layers"}


@pytest.mark.parametrize("copies", [2, 4])
def test_tokens_that_every_rank_of_a_tensor_parallel_group_counts_are_not_more_tokens(copies):
    """vLLM counts on each rank; ranks that have the same tokens make passes look that much longer than they are."""
    for seed in range(3):
        dump = World(seed, 1.0).ran("plan", 8)
        counted = replace(dump, log=replace(dump.log, most_B=dump.log.most_B * copies, mean_B=dump.log.mean_B * copies))
        plan = World(seed, 1.0).plan
        assert verify(plan, counted).explanations == verify(plan, dump).explanations
    many = 4.0 * np.arange(5, 25)
    assert copies_of(many, 4) == 4 and copies_of(many, 2) == 2 and copies_of(many + (many == 40), 4) == 1
    few = np.array([8.0, 12.0, 16.0])
    assert copies_of(few, 4) == 1 and copies_of(np.tile(few, 20), 4) == 1, "batches that repeat tell nothing more"
