"""What if: every cell of the grid against the map and the price by themselves."""

from dataclasses import replace

import numpy as np
import pytest

import poise
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import flow_of, settle
from poise.planning.engine_rules import parse_engine
from poise.planning.problem import PlacementProblem, deal_slots
from poise.planning.solve.solve import solve
from poise.replay.compare import IN_SAMPLE
from poise.replay.static import replay
from poise.replay.trial import TrialSetting
from poise.replay.what_if import judged_batches, machines_beside, what_if
from poise.routing.synthetic import zipf_trace
from poise.util.errors import OptionError

SPEC, MODEL, SIZE = "1x4:h100", "mixtral-8x7b", 256


@pytest.fixture(scope="module")
def asked():
    """eplb with 4 redundant slots beside blocks that stay; the comparison, its setting, batches, and the grid."""
    trace = zipf_trace(num_tokens=4096, num_layers=2, num_experts=8, top_k=2, exponent=1.2)
    base = poise.plan(trace, SPEC, method="contiguous", model=MODEL, engine="vllm", work=1.0).placement
    found = poise.compare(trace, SPEC, placements=(base, "eplb", "lpt"), redundant=4, model=MODEL, engine="vllm",
                          tokens_per_step=SIZE, work=1.0)  # fmt: skip
    setting = TrialSetting(Cluster.parse(SPEC), ModelSpec.parse(MODEL), parse_engine("vllm"), split=found.split)
    batch_of = judged_batches(found, [trace], fit=False, named=True)
    grid = what_if(found, setting, batch_of, sizes=(64, 1024), presets=("h100", "h200"), work=1.0)
    return found, setting, batch_of, grid


def test_axes(asked):
    grid = asked[3]
    assert grid.redundant == (0, 4, 8) and grid.tokens == (64, SIZE, 1024)
    assert grid.machines == ("h100", "h200") and grid.maps == ("contiguous", "eplb")
    assert grid.here == (1, 1, 0) and grid.seconds_RNMA.shape == (3, 3, 2, 2)
    assert np.isfinite(grid.seconds_RNMA).all() and (grid.bound_RNM[..., None] <= grid.seconds_RNMA * (1 + 1e-9)).all()


def test_a_machine_that_is_called_like_a_preset_stays_the_user_s():
    mine = replace(Cluster.uniform(1, 4), name="b200")
    assert {name: made is mine for name, made in machines_beside(mine, ("h200", "b200")).items()} == {
        "b200": True, "h200": False,
    }  # fmt: skip


def test_its_own_setting_is_what_the_comparison_says(asked):
    found, _, _, grid = asked
    for a, name in enumerate(grid.maps):
        row = found.replays[name, found.judged_on]
        assert grid.seconds_RNMA[(*grid.here, a)] == pytest.approx(row.step_seconds_B.mean(), rel=1e-12)
        assert grid.imbalance_RNMA[(*grid.here, a)] == pytest.approx(row.imbalance, rel=1e-12)
    assert grid.bound_RNM[grid.here] == pytest.approx(found.bounds_B[found.judged_on].mean(), rel=1e-12)


@pytest.mark.parametrize(("r", "n", "m"), [(0, 0, 0), (2, 2, 1), (1, 0, 1), (2, 1, 0)])
def test_a_cell_is_the_map_planned_here_and_priced_there(asked, r, n, m):
    found, _, batch_of, grid = asked
    slots = deal_slots(8, grid.redundant[r], 4)
    problem = PlacementProblem(found.batches[IN_SAMPLE], found.cluster, found.model, slots, found.traffic, found.split,
                               engine=parse_engine("vllm"))  # fmt: skip
    made = solve(problem, method="eplb", work=1.0).placement
    batch = found.batches[found.judged_on] if grid.tokens[n] == SIZE else batch_of(grid.tokens[n])
    machine = settle(Cluster.parse(f"1x4:{grid.machines[m]}"), found.model, batch.mean_tokens(), engine="vllm")
    for a, placed in enumerate((found.entries[0].placement, made)):
        got = replay(batch, placed, machine, found.model, traffic=flow_of(machine), split=found.split)
        assert grid.seconds_RNMA[r, n, m, a] == pytest.approx(got.step_seconds_B.mean(), rel=1e-12)


def test_what_was_given_stays_and_a_step_is_never_shorter_with_more_tokens(asked):
    *_, grid = asked
    assert (grid.seconds_RNMA[:, :, :, 0] == grid.seconds_RNMA[:1, :, :, 0]).all()
    assert (np.diff(grid.seconds_RNMA, axis=1) > 0).all()


def test_without_a_map_to_show_it_is_refused(asked):
    _, setting, batch_of, _ = asked
    trace = zipf_trace(num_tokens=512, num_layers=2, num_experts=8, top_k=2)
    other = poise.compare(trace, SPEC, placements=("lpt", "contiguous"), model=MODEL, tokens_per_step=64, work=1.0)
    with pytest.raises(OptionError, match="neither is compared"):
        what_if(other, setting, batch_of, work=1.0)


def test_slots_that_engine_or_memory_do_not_hold_are_left_out(asked):
    found, _, batch_of, _ = asked
    small = ModelSpec.parse(MODEL)
    machine = Cluster.parse(SPEC)
    object.__setattr__(machine, "memory_bytes", 3.5 * small.num_moe_layers * small.expert_bytes)
    setting = TrialSetting(machine, small, parse_engine("vllm"), split=found.split)
    assert what_if(found, setting, batch_of, sizes=(), presets=(), work=1.0).redundant == (0, 4)


def test_judged_batches_are_of_the_half_that_was_judged():
    trace = zipf_trace(num_tokens=2048, num_layers=2, num_experts=8, top_k=2)
    found = poise.compare(trace, SPEC, placements=("contiguous", "eplb"), tokens_per_step=64, work=1.0)
    first = judged_batches(found, [trace], fit=False, named=False)(64)
    whole = judged_batches(found, [trace], fit=True, named=False)(64)
    held_out = set(trace.split_requests()[1].requests().tolist())
    assert len(np.unique(first.request_T)) <= len(held_out) < len(np.unique(whole.request_T)) or len(held_out) == 32
    assert first.num_steps == whole.num_steps == 4 and first.home_T is not None
