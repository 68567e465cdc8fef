"""A plan that runs is told from one that was dropped, by whatever the engine said."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.engines.dump import EngineDump, SlotRecord
from poise.engines.verify import verify
from poise.planning.engine_rules import ANY, hold
from poise.planning.placement import Placement
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import OptionError, PlacementError, TraceError

EXPERTS, DEVICES, PER, LAYERS = 8, 4, 3, 3
IDS = np.array([1, 2, 5], np.int32)


def plan_of(seed, empty=False):
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.concatenate([np.arange(EXPERTS), rng.permutation(EXPERTS)[:4]])) for _ in IDS]
    slots = np.stack(rows).astype(np.int32)
    if empty:
        for row in slots:  # one copy of an expert that has two
            twice = np.flatnonzero(np.bincount(row, minlength=EXPERTS) == 2)[0]
            row[np.flatnonzero(row == twice)[0]] = -1
    return Placement(slots, np.repeat(np.arange(DEVICES), PER), EXPERTS, DEVICES, IDS)


def loads_of(seed, records=3):
    return np.random.default_rng(seed + 1).integers(0, 1000, (records, LAYERS, EXPERTS)) * np.array(
        [9, 1, 1, 1, 1, 1, 1, 4]
    )


def counted(load_BLE, map_LS):
    """Tokens of slots, replicas alike."""
    out = np.zeros((len(load_BLE), *map_LS.shape))
    for b, layer, s in np.ndindex(out.shape):
        row = map_LS[layer]
        out[b, layer, s] = load_BLE[b, layer, row[s]] / (row == row[s]).sum()
    return out


TRIVIAL = np.tile(np.arange(DEVICES * PER) % EXPERTS, (LAYERS, 1)).astype(np.int32)


def dump_of(load_BLE, running_LS, *, says_map=True, says_counts=True, says_loads=True):
    slots = SlotRecord(IDS, running_LS if says_map else None, counted(load_BLE, running_LS) if says_counts else None)
    return EngineDump("sglang", "per-pass", profile=LoadProfile(load_BLE, IDS) if says_loads else None, slots=slots)


@given(st.integers(0, 2**20), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_plan_that_runs_is_live_and_balances_as_predicted(seed, says_loads):
    plan, load = plan_of(seed), loads_of(seed)
    found = verify(plan, dump_of(load, plan.slot_expert_LS, says_loads=says_loads))
    assert found.live and found.evidence == "map" and found.as_predicted
    assert {layer.state for layer in found.layers} == {"live"}
    assert found.measured == pytest.approx(found.predicted)
    for index, layer in enumerate(found.layers):  # by hand: device loads of each record
        device = counted(load, plan.slot_expert_LS)[:, index].reshape(len(load), DEVICES, PER).sum(axis=2)
        imbalance = (device.max(axis=1) / device.mean(axis=1)).mean()
        assert layer.measured == pytest.approx(imbalance) and layer.predicted == pytest.approx(imbalance)


@given(st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_a_dropped_map_is_found_layer_by_layer(seed):
    plan, load = plan_of(seed), loads_of(seed)
    running = plan.slot_expert_LS.copy()
    running[1] = TRIVIAL[1]
    found = verify(plan, dump_of(load, running))
    assert not found.live
    assert [layer.state for layer in found.layers] == ["live", "trivial map", "live"]
    assert "1 of 3 layers, 1 of them the trivial map" in found.sentence()
    assert found.layers[1].wrong == int((running[1] != plan.slot_expert_LS[1]).sum())


def test_other_order_on_a_device_runs_too_and_empty_slots_may_hold_anything():
    plan = plan_of(3, empty=True)
    running = plan.slot_expert_LS.copy()
    running[running == -1] = 0
    load = loads_of(3)
    assert {layer.state for layer in verify(plan, dump_of(load, running)).layers} == {"live"}
    turned = running.reshape(LAYERS, DEVICES, PER)[:, :, ::-1].reshape(LAYERS, -1)
    found = verify(plan, dump_of(load, np.ascontiguousarray(turned)))
    assert found.live and {layer.state for layer in found.layers} <= {"live", "reordered"}
    assert "reordered" in {layer.state for layer in found.layers}
    moved = np.roll(running, PER, axis=1)
    assert "other map" in {layer.state for layer in verify(plan, dump_of(load, moved)).layers}


@given(st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_counts_of_slots_and_experts_prove_a_map_without_one(seed):
    plan, load = plan_of(seed), loads_of(seed)
    yes = verify(plan, dump_of(load, plan.slot_expert_LS, says_map=False))
    assert yes.live and yes.evidence == "counts" and {layer.state for layer in yes.layers} == {"counts agree"}
    no = verify(plan, dump_of(load, TRIVIAL, says_map=False))
    assert not no.live and {layer.state for layer in no.layers} == {"counts disagree"}
    assert (yes.verdict, no.verdict) == ("live", "not-live")
    with pytest.raises(TraceError, match="proves nothing"):
        verify(plan, dump_of(load, TRIVIAL, says_map=False, says_loads=False))


def test_counts_that_fit_another_map_too_prove_none_and_a_map_has_to_fit_its_counts():
    plan, load = plan_of(3), np.full((2, LAYERS, EXPERTS), 12.0)
    load[:, 1:] = loads_of(3)[:2, 1:]
    alike = np.full((2, LAYERS, DEVICES * PER), 6.0)
    alike[:, 1:] = counted(load, plan.slot_expert_LS)[:, 1:]
    load[:, 0] = 6.0 * (plan.slot_expert_LS[0][:, None] == np.arange(EXPERTS)).sum(axis=0)
    dump = EngineDump("tokenspeed", "expert-load", profile=LoadProfile(load, IDS), slots=SlotRecord(IDS, None, alike))
    swapped = plan.slot_expert_LS.copy()  # two experts with as many slots and the same tokens change places
    single = np.flatnonzero(np.bincount(swapped[0], minlength=EXPERTS)[swapped[0]] == 1)
    there = single[single // PER != single[0] // PER][0]
    swapped[0, [single[0], there]] = swapped[0, [there, single[0]]]
    assert verify(plan, dump).verdict == "live"
    other = replace(plan, slot_expert_LS=swapped)
    found = verify(plan, dump, against={"older": other})
    assert found.verdict == "undecided" and found.layers[0].state == "counts fit others"
    assert "1 of 3 layers the counts of slots fit another map" in found.sentence()
    with pytest.raises(TraceError, match=r"slots counted \d+ pairs, the traffic has \d+"):
        verify(plan, replace(dump, profile=LoadProfile(2 * load, IDS)))
    load = loads_of(4)
    lies = dump_of(load, TRIVIAL)  # its map is said to be the plan's, its slots got what the trivial map gives them
    lies = replace(lies, slots=replace(lies.slots, map_LS=plan.slot_expert_LS))
    assert verify(plan, lies).verdict == "not-live"
    assert {layer.state for layer in verify(plan, lies).layers} == {"counts disagree"}


def test_a_balance_alone_tells_the_plan_from_the_trivial_map():
    load = np.zeros((4, LAYERS, EXPERTS))
    load[:, :, [0, 1]] = 100.0  # both on device 0 of the trivial map
    load[:, :, 2:] = 10.0
    slots = np.tile([0, 2, 3, 1, 4, 5, 0, 6, 7, 1, 2, 3], (LAYERS, 1)).astype(np.int32)
    plan = Placement(slots, np.repeat(np.arange(DEVICES), PER), EXPERTS, DEVICES, IDS)
    profile = LoadProfile(load, IDS)

    def reported(balance, dense=0):
        return EngineDump(
            "sglang", "stat", profile=profile, balance_B=np.full(4, balance), recorded_layers=LAYERS + dense
        )

    on = verify(plan, reported(0.93), balancer_off=True)
    assert on.live and on.evidence == "balance" and on.predicted > on.trivial + 0.2
    off = verify(plan, reported(on.trivial))
    assert off.live is False and "does not run" in off.sentence() and not off.as_predicted
    # the engine counts dense layers as balanced
    assert verify(plan, reported(0.9, dense=3)).trivial == pytest.approx((on.trivial + 1) / 2)
    even = EngineDump("sglang", "stat", profile=LoadProfile(np.ones((1, LAYERS, EXPERTS)), IDS), balance_B=np.ones(1))
    flat = Placement(TRIVIAL, np.repeat(np.arange(DEVICES), PER), EXPERTS, DEVICES, IDS)
    found = verify(flat, even)
    as_predicted = replace(even, balance_B=np.array([found.predicted]))
    assert verify(flat, as_predicted).verdict == "undecided"  # it is the trivial map
    with pytest.raises(TraceError, match="neither what slots hold"):
        verify(plan, EngineDump("sglang", "stat", profile=profile))


def test_slots_that_a_plan_leaves_empty_are_predicted_as_the_export_fills_them():
    plan = plan_of(3, empty=True)
    held, filled = hold(plan, ANY)
    load = loads_of(3)
    given = EngineDump("sglang", "stat", profile=LoadProfile(load, IDS), balance_B=np.full(3, 0.9))
    counts = SlotRecord(IDS, held.slot_expert_LS, counted(load, held.slot_expert_LS))
    recorded = EngineDump("sglang", "per-pass", profile=LoadProfile(load, IDS), slots=counts)
    assert filled == LAYERS
    assert verify(plan, given).predicted == verify(held, given).predicted
    assert verify(held, given, against={"plan": plan}).explanations == verify(held, given).explanations
    assert verify(plan, recorded).live and verify(plan, recorded).predicted == verify(held, recorded).predicted


def test_vllm_logs_sums_over_layers_and_passes_before_the_map_do_not_count():
    load = np.zeros((2, 2, 4))
    load[:, 0] = [100, 0, 100, 0]
    load[:, 1] = [60, 60, 0, 0]
    plan = Placement(np.array([[0, 1, 2, 3], [0, 2, 1, 3]]), np.array([0, 0, 1, 1]), 4, 2)
    profile = LoadProfile(load)
    planned = (100 + 60) / (100 + 60)
    trivial = (100 + 60) / (100 + 120)

    def log(*balance):
        return EngineDump("vllm", "balance-log", profile=profile, balance_B=np.array(balance))

    on = verify(plan, log(trivial, planned))
    assert on.measured == pytest.approx(planned) and on.predicted == pytest.approx(planned)
    assert on.trivial == pytest.approx(trivial)
    assert verify(plan, log(planned, trivial)).measured == pytest.approx(trivial)
    many = log(*[0.5] * 8)  # passes of no known size: they may be of a token each, whatever map runs
    assert verify(plan, many).verdict == "undecided"


def test_a_trace_with_steps_is_judged_step_by_step():
    experts = np.array([[0], [0], [1], [1]])[:, :, None]
    trace = RoutingTrace(experts, 4, step=np.array([0, 0, 1, 1]))
    plan = Placement(np.arange(4)[None], np.array([0, 1, 2, 3]), 4, 4)
    found = verify(plan, EngineDump("sglang", "stat", trace=trace, balance_B=np.array([0.25, 0.25])))
    assert found.predicted == pytest.approx(0.25)  # all tokens together: 0.5


def test_a_file_says_what_should_run_and_ranks_that_differ_are_told():
    plan, load = plan_of(4), loads_of(4)
    made = EngineDump("sglang", "map", slots=SlotRecord(IDS, plan.slot_expert_LS.copy()))
    found = verify(plan, made)
    assert found.live is None and found.verdict == "file-matches" and {f.state for f in found.layers} == {"matches"}
    assert (
        "the file matches the plan in all 3 layers; whether the engine runs it, this file cannot say"
        == found.sentence()
    )
    assert verify(plan, made, recorded=True).live and verify(plan, made, recorded=True).verdict == "live"
    other = verify(plan_of(5), made)
    assert other.live is None and other.verdict == "file-differs" and "is not what the file holds" in other.sentence()
    whole = dump_of(load, plan.slot_expert_LS)
    apart = verify(plan, replace(whole, slots=replace(whole.slots, maps_agree=False)))
    assert apart.live is False and "different maps" in apart.sentence()


def test_layers_that_were_not_recorded_are_unseen_and_other_shapes_refused():
    plan, load = plan_of(1), loads_of(1)
    whole = dump_of(load, plan.slot_expert_LS)
    part = replace(whole, slots=SlotRecord(IDS[:2], whole.slots.map_LS[:2]))
    found = verify(plan, part)
    assert [layer.state for layer in found.layers] == ["live", "live", "unseen"] and found.live is None
    assert "2 of 3 layers; the others were not seen" in found.sentence()
    with pytest.raises(OptionError, match=r"part of 1, got 5"):
        verify(plan, whole, tolerance=5)
    wide = replace(whole, slots=SlotRecord(IDS, np.zeros((LAYERS, 16), np.int32)))
    with pytest.raises(PlacementError, match="16 slots a layer, the placement has 12"):
        verify(plan, wide)
    strange = replace(whole, slots=SlotRecord(IDS, np.full((LAYERS, 12), 99, np.int32)))
    with pytest.raises(PlacementError, match="expert 99, the placement has 8"):
        verify(plan, strange)
    with pytest.raises(PlacementError, match="counts 16 experts"):
        verify(plan, replace(whole, profile=LoadProfile(np.ones((1, 3, 16)), IDS)))


def test_tokens_in_one_record_are_compared_with_counts_in_many():
    plan, load = plan_of(7), loads_of(7)
    one = replace(dump_of(load, plan.slot_expert_LS), profile=LoadProfile(load.sum(axis=0), IDS))
    found = verify(plan, one)
    assert found.measured == pytest.approx(found.predicted)
