"""Replay and comparison: by hand, by property, as JSON."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import poise
from poise.api import planning_verdict
from poise.cost.pricing import Pricing
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.replay.compare import Entry, compare
from poise.replay.static import replay
from poise.report.page import render
from poise.report.view import Made
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.profile import load_LE
from poise.routing.synthetic import zipf_trace
from poise.routing.trace import LoadProfile
from poise.util.errors import OptionError


def hand():
    """Two steps, two layers, two experts on two devices; no token in layer 1 of step 1."""
    load = np.array([[[6.0, 2], [4, 4]], [[1, 3], [0, 0]]])
    return RoutingBatch(load, np.full(2, 0.5), 1, np.array([0, 1], np.int32))


def test_a_step_and_layer_without_tokens_is_left_out():
    batch, cluster = hand(), Cluster.parse("1x2:h100+datasheet")
    got = replay(batch, Placement.from_devices(np.array([[0, 1], [0, 1]]), 2), cluster,
                 ModelSpec.generic(2, 1, batch.layer_ids_L), traffic="home", split="even")  # fmt: skip
    assert got.imbalance == pytest.approx(np.mean([6 / 4, 1, 3 / 2]))
    assert got.cross_device_share == pytest.approx(0.5) and got.cross_node_share == 0
    np.testing.assert_allclose(got.relative_load_LD(), [[7 / 6, 5 / 6], [1, 1]])
    assert np.isfinite(got.step_seconds_B).all()


@given(st.integers(0, 10_000), st.sampled_from(["home", "home_node_dedup", "stay"]), st.sampled_from(["even", "exact"]))
@settings(max_examples=25, deadline=None)
def test_efficiency_is_a_share(seed, traffic, split):
    rng = np.random.default_rng(seed)
    batch = make_batch(zipf_trace(num_tokens=40, num_layers=2, num_experts=6, top_k=2, seed=seed), tokens_per_step=20)
    count = rng.random((2, 6, 4)) < 0.3
    count[:, np.arange(6), rng.integers(4, size=6)] = True
    got = replay(batch, Placement.from_counts(count.astype(int)), Cluster.parse("2x2:h100+datasheet"),
                 ModelSpec.generic(6, 2, batch.layer_ids_L), traffic=traffic, split=split)  # fmt: skip
    assert 0 < got.efficiency <= 1 and (got.bound_B <= got.step_seconds_B * (1 + 1e-9)).all()
    assert 1 <= got.imbalance <= 4


def comparison(names=("contiguous", "lpt")):
    trace = zipf_trace(num_tokens=400, num_layers=2, num_experts=8, exponent=1.0)
    return poise.compare(trace, "1x4", placements=names, work=9)


def test_rows_are_json_and_the_bound_is_no_slower_than_any_row():
    data = json.loads(json.dumps(comparison().to_json(), allow_nan=False))
    for part in ("in-sample", "held-out"):
        rows = {row["name"]: row for row in data["rows"] if row["judged_on"] == part}
        for row in rows.values():
            assert rows["bound"]["step_seconds"]["mean"] <= row["step_seconds"]["mean"] * (1 + 1e-9)
        assert rows["contiguous"]["speedup"] == 1


def test_the_verdict_says_not_worth_it():
    same = Placement.from_devices(np.zeros((2, 8), int) + np.arange(8) % 4, 4)
    trace = zipf_trace(num_tokens=400, num_layers=2, num_experts=8)
    got = poise.compare(trace, "1x4", placements=[same, same], model=ModelSpec.generic(8, 1, trace.layer_ids))
    assert got.verdict().startswith("Not worth it")
    assert got.gain("custom-2", "custom") == (0.0, 0.0, 0.0)


def test_a_gain_comes_with_an_interval():
    got = comparison()
    share, low, high = got.gain("lpt", "contiguous")
    assert low <= share <= high
    new, old = (got.replays[name, "held-out"].step_seconds_B.mean() for name in ("lpt", "contiguous"))
    assert share == pytest.approx(1 - new / old)


def test_names_must_differ():
    batch = hand()
    entry = Entry("a", Placement.from_devices(np.array([[0, 1], [0, 1]]), 2))
    with pytest.raises(OptionError, match="different names"):
        pricing = Pricing(Cluster.parse("1x2"), ModelSpec.generic(2, 1, batch.layer_ids_L), "home", "even")
        compare({"in-sample": batch}, [entry, entry], pricing=pricing, slots_D=np.array([1, 1]))


def test_load_profiles_are_split_by_step_and_a_single_one_is_said_to_flatter():
    many = poise.compare(poise.LoadProfile(np.random.default_rng(0).random((4, 2, 8))), "1x4", placements=["lpt"])
    assert many.batches["in-sample"].num_steps == many.batches["held-out"].num_steps == 2
    one = poise.compare(poise.LoadProfile(np.ones((1, 2, 8))), "1x4", placements=["lpt"])
    assert list(one.batches) == ["in-sample"] and "flatters" in one.notes[0]


def skewed(seed=0, layers=2, experts=8, requests=24):
    return zipf_trace(num_tokens=24 * requests, num_layers=layers, num_experts=experts, top_k=2, exponent=1.2,
                      tokens_per_request=24, seed=seed)  # fmt: skip


def test_no_gain_in_time_is_claimed_for_sizes_nobody_named():
    trace = skewed()
    got = poise.compare(trace, "1x4", placements=["contiguous", "lpt"])
    assert got.verdict().startswith("No verdict on time") and "--model" in got.verdict() and "%" not in got.verdict()
    model = ModelSpec.generic(8, 2, trace.layer_ids)
    assert not poise.compare(trace, "1x4", placements=["contiguous", "lpt"], model=model).defaults
    loads = poise.LoadProfile(np.random.default_rng(0).integers(1, 99, (4, 2, 8)), top_k=2)
    told = [poise.compare(loads, "1x4", placements=["contiguous", "lpt"], model=model, tokens_per_step=n).verdict()
            for n in (None, 64)]  # fmt: skip
    assert "--tokens-per-step" in told[0] and "%" not in told[0] and "No verdict" not in told[1]


def test_frequencies_are_no_tokens():
    loads = poise.LoadProfile(np.full((1, 2, 8), 1 / 8))
    with pytest.raises(OptionError, match="no more than one token"):
        poise.compare(loads, "1x4", placements=["lpt"])
    poise.compare(loads, "1x4", placements=["lpt"], tokens_per_step=64)


def labels(got, name):
    return {row["part"]: row["judged_on"] for row in got.rows() if row["name"] == name}


def test_what_a_plan_was_fitted_on_is_never_called_held_out(tmp_path):
    trace, model = skewed(), ModelSpec.generic(8, 2, np.arange(2))
    first, second = trace.split_requests()
    for name, source in (("whole", trace), ("first", first), ("other", skewed(seed=9))):
        poise.plan(source, "1x4", method="lpt", model=model).placement.save(tmp_path / f"{name}.npz")
    files = [str(tmp_path / f"{name}.npz") for name in ("whole", "first", "other")]
    got = poise.compare(second, "1x4", fit=first, placements=["contiguous", "lpt", *files], model=model)
    assert labels(got, "whole") == {"in-sample": "in-sample", "held-out": "fitted on this traffic"}
    for name in ("lpt", "first", "other", "contiguous"):
        assert labels(got, name)["held-out"] == "held-out"
    # a part of it under other request numbers, in another order, is the same traffic
    some = second.rows(np.isin(second.request, second.requests()[::3]))
    shuffled = poise.RoutingTrace(some.experts[::-1][::-1], 8, request=some.request + 700)
    alone = poise.compare(shuffled, "1x4", fit=skewed(seed=3), placements=["contiguous", files[0]], model=model)
    assert labels(alone, "whole")["held-out"] == "fitted on this traffic"
    assert "fitted on this traffic" in alone.verdict() and "held-out" not in alone.verdict()
    # and methods fitted on what they are judged on are no better
    same = poise.compare(second, "1x4", fit=second, placements=["contiguous", "lpt"], model=model)
    assert labels(same, "lpt")["held-out"] == "fitted on this traffic" and "held-out" not in same.verdict()


def test_a_file_of_before_says_nothing_of_what_it_was_fitted_on(tmp_path):
    Placement.from_devices(np.tile(np.arange(8) % 4, (2, 1)), 4).save(tmp_path / "old.npz")
    got = poise.compare(skewed(), "1x4", placements=["contiguous", str(tmp_path / "old.npz")])
    assert {row["fitted_share"] for row in got.rows() if row["name"] == "old"} == {None}
    assert any("old" in note and "not known" in note for note in got.notes)
    model = ModelSpec.generic(8, 2, np.arange(2))
    rows = ["round-robin", str(tmp_path / "old.npz")]
    assert (
        "held-out traffic (as far as is known)"
        in poise.compare(skewed(), "1x4", placements=rows, model=model).verdict()
    )


def test_nothing_is_called_held_out_where_all_that_looks_at_traffic_was_fitted_on_it(tmp_path):
    trace, model = skewed(), ModelSpec.generic(8, 2, np.arange(2))
    for method in ("lpt", "round-robin"):
        poise.plan(trace, "1x4", method=method, model=model).placement.save(tmp_path / f"{method}.npz")
    rows = ["contiguous", str(tmp_path / "round-robin.npz"), str(tmp_path / "lpt.npz")]
    for options in ({"model": model}, {}):
        got = poise.compare(trace, "1x4", placements=rows, **options)
        assert {row["judged_on"] for row in got.rows()} == {"in-sample", "fitted on this traffic"}
        html = render(got, Made("", ""))
        page = html[: html.index("<script")] if "<script" in html else html
        assert "held-out traffic" not in page + got.verdict() and "held-out" not in " ".join(got.notes)


def test_what_cannot_be_told_is_said():
    trace = skewed()
    first, second = (load_LE(part.experts, 8)[None] for part in trace.split_requests())
    plan = poise.plan(trace, "1x4", method="lpt", traffic="home").placement
    judged = poise.LoadProfile(np.concatenate([first, second]))
    got = poise.compare(judged, "1x4", placements=["contiguous", plan])
    assert any("lpt" in note and "cannot be told" in note for note in got.notes)


def test_without_a_model_the_even_baseline_is_no_winner_over_itself():
    loads = poise.LoadProfile(np.full((2, 2, 8), 50.0), top_k=2)
    assert (
        "nothing is more even than contiguous"
        in poise.compare(loads, "1x4", placements=["contiguous", "lpt"]).verdict()
    )


def test_a_baseline_that_was_fitted_on_what_is_judged_is_said_to_be():
    trace, model = skewed(), ModelSpec.generic(8, 2, np.arange(2))
    now = poise.plan(trace, "1x4", method="lpt", model=model).placement
    said = planning_verdict(trace, "1x4", method="round-robin", current=now, model=model)
    assert "current was fitted on this traffic, which flatters it" in said
    first, _ = trace.split_requests()
    before = poise.plan(first, "1x4", method="lpt", model=model).placement
    assert "flatters" not in planning_verdict(trace, "1x4", method="round-robin", current=before, model=model)


def test_a_trace_of_fewer_picks_than_the_models_is_no_ground_for_a_verdict_on_time():
    trace = skewed()
    got = poise.compare(trace, "1x4", placements=["contiguous", "lpt"], model=ModelSpec.generic(8, 4, trace.layer_ids))
    assert "the trace has 2 experts a token, generic 4" in got.verdict() and "No verdict on time" in got.verdict()


PLANNERS = ("round-robin", "lpt", "eplb", "flash-lb", "swift-balance", "surplus-fill", "poise")


@pytest.mark.parametrize("method", PLANNERS)
@pytest.mark.parametrize("step", [0, 1])
def test_a_plan_is_judged_where_a_layer_is_idle_in_a_half(method, step):
    """Two recorded steps, one with a layer that had no tokens: its loads are replayed by the plan of the other. Fails if
    the halves have other layers.
    """
    load = np.random.default_rng(step).integers(0, 50, (2, 2, 8))
    load[step, 0] = 0
    got = poise.compare(LoadProfile(load), "1x4", placements=("contiguous", method), work=0.2)
    for name, half in (("in-sample", load[:1]), ("held-out", load[1:])):
        np.testing.assert_allclose(got.batches[name].load_BLE, half)
    for entry in got.entries:
        assert entry.placement.num_layers == 2
    said = planning_verdict(LoadProfile(load), "1x4", method=method, work=0.2)
    assert said and "nan" not in said


def test_half_a_recording_without_tokens_is_no_half():
    load = np.random.default_rng(0).integers(1, 50, (4, 2, 8))
    load[:2] = 0
    judged = poise.compare(LoadProfile(load), "1x4", placements=("contiguous", "lpt"), work=0.2).batches
    np.testing.assert_allclose(judged["in-sample"].load_BLE, load[2:3])
    np.testing.assert_allclose(judged["held-out"].load_BLE, load[3:])
    load[2] = 0
    assert planning_verdict(LoadProfile(load), "1x4", method="lpt", work=0.2) is None
