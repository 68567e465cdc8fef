"""SGLang's records: written by the engine's own recorder, by several ranks, with holes; requests found again."""

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engines import dumps, engine_stubs

from poise.engines.readers import ReadOptions, read_dump, read_slot_map
from poise.machine.model import from_hf_config
from poise.planning.placement import Placement
from poise.util.errors import TraceError

MODEL = from_hf_config(dumps.CONFIG, name="test")


class Withable:
    """As in the engine's utils: a value inside a with-block."""

    def __init__(self):
        self.value = None

    def with_value(self, value):
        self.value = value
        return self

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        self.value = None


@pytest.fixture
def recorder(sglang_wheel, tmp_path, monkeypatch):
    """A rank's recorder in a mode: the engine's code, with the parts of the engine that it asks for."""
    moe = engine_stubs.Settings(moe_a2a_backend="none", expert_distribution_recorder_buffer_size=4,
                                eplb_min_rebalancing_utilization_threshold=1.0)  # fmt: skip
    where = SimpleNamespace(get=lambda: str(tmp_path))
    parts = {
        "sglang": {}, "sglang.srt": {}, "sglang.srt.model_executor": {}, "sglang.srt.observability": {},
        "sglang.srt.layers": {}, "sglang.srt.layers.moe": {"get_moe_a2a_backend": lambda: None},
        "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=where)},
        "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": object, "ForwardMode": object},
        "sglang.srt.observability.metrics_collector": {
            "STAT_LOGGER_ROLE_EXPERT_DISPATCH": "", "ExpertDispatchCollector": object, "resolve_collector_class": None},
        "sglang.srt.runtime_context": {
            "get_device": lambda: SimpleNamespace(device="cpu"), "get_exec": lambda: SimpleNamespace(moe=moe, overlap=engine_stubs.Settings()),
            "get_platform": lambda: SimpleNamespace(is_hip=False), "get_schedule": lambda: SimpleNamespace(chunked_prefill_size=8),
            "logs_expert_balancedness_to_server_log": lambda: False, "reports_expert_balancedness": lambda: False},
        "sglang.srt.utils": {"Withable": Withable, "get_device": lambda: "cpu", "get_int_env_var": lambda name, default: default},
    }  # fmt: skip
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    device = SimpleNamespace(empty_cache=lambda: None, is_current_stream_capturing=lambda: False)
    monkeypatch.setattr(torch, "get_device_module", lambda *args: device)
    with engine_stubs.borrowed("sglang"):
        engine_stubs.put(parts)
        spec = importlib.util.spec_from_file_location(
            "engine_recorder", sglang_wheel / "sglang/srt/eplb/expert_distribution.py"
        )
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "engine_recorder", module)
        spec.loader.exec_module(module)

        def make(mode, rank, map_LS):
            moe.expert_distribution_recorder_mode = mode
            metadata = SimpleNamespace(
                num_layers=dumps.LAYERS, num_logical_experts=dumps.EXPERTS, num_physical_experts=dumps.SLOTS,
                num_local_physical_experts=dumps.SLOTS // 2, ep_size=2, physical_to_logical_map=torch.from_numpy(map_LS),
            )  # fmt: skip
            made = module.ExpertDistributionRecorder.init_new(metadata, rank)
            made.start_record()
            return made

        yield make


def forward(recorder, pass_id, slot_TLK, positions, lengths, mode):
    """One pass through the MoE layers, as the model does it."""
    batch = SimpleNamespace(
        input_ids=torch.arange(len(slot_TLK)), positions=torch.tensor(positions), extend_seq_lens_cpu=lengths,
        forward_mode=SimpleNamespace(value=mode), extend_num_tokens=len(slot_TLK),
    )  # fmt: skip
    with recorder.with_forward_pass(pass_id, batch):
        for index, layer in enumerate(dumps.MOE):
            with recorder.with_current_layer(layer):
                recorder.on_select_experts(torch.from_numpy(slot_TLK[:, index].astype(np.int32)))


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
def test_what_the_engines_recorder_writes_is_what_went_through_it(recorder, tmp_path, mode):
    rng = np.random.default_rng(7)
    map_LS = dumps.slot_map(rng)
    ranks = [recorder(mode, rank, map_LS) for rank in range(1 if mode == "stat" else 2)]  # stat: rank 0 has the sum
    plan = [([4, 2], 1, [0, 1, 2, 3, 0, 1]), (None, 2, [4, 2]), (None, 2, [5, 3])]
    chosen, loads = [], []
    for pass_id, (lengths, kind, positions) in enumerate(plan):
        load = 0
        for rank in ranks:
            experts = dumps.choices(rng, len(positions))
            forward(rank, pass_id + 5, dumps.slots_of(rng, experts, map_LS[dumps.MOE]), positions, lengths, kind)
            chosen.append(experts)
            load = load + dumps.count(experts, dumps.EXPERTS)
        loads.append(load)
    for rank in ranks:
        rank.dump_record()
    assert len(list(tmp_path.glob("expert_distribution_recorder_*.pt"))) == len(ranks)
    dump = read_dump(tmp_path, options=ReadOptions(MODEL))
    assert dump.recorded_layers == dumps.LAYERS
    if mode != "per_token":
        np.testing.assert_array_equal(dump.profile.load_BLE, np.stack(loads))
        assert dump.profile.layer_ids.tolist() == dumps.MOE
    if mode == "stat":
        assert dump.slots is None and dump.balance_B is None
        assert "1 of 4 steps have no load" in dump.notes[0]
    else:
        np.testing.assert_array_equal(dump.slots.map_LS, map_LS[dumps.MOE])
        assert dump.slots.count_BLS.sum(axis=(1, 2)).tolist() == [2 * 36, 2 * 12, 2 * 12]
    if mode == "per_token":
        trace = dump.trace
        np.testing.assert_array_equal(trace.experts, np.concatenate(chosen))
        assert trace.step.tolist() == [5] * 12 + [6] * 4 + [7] * 4
        assert trace.home.tolist() == [0] * 6 + [1] * 6 + [0, 0, 1, 1] * 2
        assert trace.request.tolist() == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 2 + [0, 1, 2, 3] * 2
        assert trace.is_decode.tolist() == [False] * 12 + [True] * 8


def _files(folder, files, map_LS):
    """One file a rank."""
    for index, records in enumerate(files):
        torch.save(dumps.detail(records, map_LS), folder / f"{index}.pt")
    return [folder / f"{index}.pt" for index in range(len(files))]


def one(rng, tokens, map_LS, pass_id=0, rank=0, **changes):
    """A record of a prompt, and its experts."""
    chosen = dumps.choices(rng, tokens)
    slots = dumps.slots_of(rng, chosen, map_LS[dumps.MOE])
    record = dumps.token_record(pass_id, rank, slots, range(tokens), [tokens], 1)
    return {**record, **changes}, chosen


def test_tensor_parallel_ranks_hold_the_same_tokens(tmp_path):
    """Each rank picks its own replica of an expert, so slots differ where experts do not."""
    rng = np.random.default_rng(0)
    map_LS = dumps.slot_map(rng)
    first, chosen = one(rng, 6, map_LS)
    again = dumps.token_record(
        0, 1, dumps.slots_of(rng, chosen, map_LS[dumps.MOE]), range(6), [6], 1, inputs=first["input_ids"]
    )
    other, more = one(rng, 4, map_LS, rank=2)
    dump = read_dump(_files(tmp_path, [[first], [again], [other]], map_LS), options=ReadOptions(MODEL))
    np.testing.assert_array_equal(dump.trace.experts, np.concatenate([chosen, more]))
    assert dump.trace.home.tolist() == [0] * 6 + [2] * 4
    assert "1 records hold the tokens of another rank" in dump.notes[0]
    # same token ids that went elsewhere are other tokens
    third, elsewhere = one(rng, 6, map_LS, rank=1, input_ids=first["input_ids"])
    trace = read_dump(_files(tmp_path, [[first], [third]], map_LS)).trace
    np.testing.assert_array_equal(trace.experts, np.concatenate([chosen, elsewhere]))


def test_stages_of_a_pipeline_are_merged(tmp_path):
    rng = np.random.default_rng(1)
    map_LS = dumps.slot_map(rng)
    record, chosen = one(rng, 6, map_LS)
    stages = []
    for layers in ([0, 1, 2], [3, 4]):
        topk = record["topk_ids_of_layer"].clone()
        topk[[layer for layer in range(dumps.LAYERS) if layer not in layers]] = -1
        stages.append([{**record, "topk_ids_of_layer": topk}])
    trace = read_dump(_files(tmp_path, stages, map_LS), options=ReadOptions(MODEL)).trace
    np.testing.assert_array_equal(trace.experts, chosen)
    half = read_dump(_files(tmp_path, stages[:1], map_LS), options=ReadOptions(MODEL))
    assert half.trace.layer_ids.tolist() == [1, 2] and "nothing was recorded of MoE layers 4" in half.notes


def test_padding_holes_and_shared_experts(tmp_path):
    rng = np.random.default_rng(2)
    map_LS = dumps.slot_map(rng)
    record, chosen = one(rng, 6, map_LS)
    topk = record["topk_ids_of_layer"].clone()
    topk[:, 4:] = -1  # two rows of padding
    topk[2, 1] = -1  # one layer of one token is missing
    dump = read_dump(_files(tmp_path, [[{**record, "topk_ids_of_layer": topk}]], map_LS), options=ReadOptions(MODEL))
    np.testing.assert_array_equal(dump.trace.experts, chosen[[0, 2, 3]])
    assert "2 rows without any expert were left out: padding" in dump.notes
    assert "1 tokens lack experts in some layer and were left out" in dump.notes
    topk = record["topk_ids_of_layer"].clone()
    topk[dumps.MOE, :, 2] = dumps.SLOTS  # a shared expert that was fused behind the routed ones
    fused = _files(tmp_path, [[{**record, "topk_ids_of_layer": topk}]], map_LS)
    for options in (ReadOptions(), ReadOptions(MODEL)):
        dump = read_dump(fused, options=options)
        np.testing.assert_array_equal(dump.trace.experts, chosen)
        assert "1 columns of shared experts were cut" in dump.notes
    with pytest.raises(TraceError, match="records hold 2 experts a token, the model routes to 3"):
        read_dump(fused, options=ReadOptions(top_k=3))
    topk[dumps.MOE[0], 0, 0] = dumps.SLOTS
    with pytest.raises(TraceError, match="names slot 12, the map has 12"):
        read_dump(_files(tmp_path, [[{**record, "topk_ids_of_layer": topk}]], map_LS))


def test_identity_experts_follow_the_slots_of_a_map(tmp_path):
    """Without redundant slots their ids go on behind the slots; counts of slots have none of them."""
    rng = np.random.default_rng(3)
    map_LS = np.stack([rng.permutation(6) for _ in range(dumps.LAYERS)])
    chosen = dumps.choices(rng, 9)  # 8 ids: 6 experts and 2 identity experts
    slots = chosen.copy()
    for row, layer in enumerate(dumps.MOE):
        slots[:, row] = np.append(np.argsort(map_LS[layer]), [6, 7])[chosen[:, row]]
    record = dumps.token_record(0, 0, slots, range(9), [9], 1)
    record["global_physical_count"] = record["global_physical_count"][:, :6]
    paths = _files(tmp_path, [[record]], map_LS)
    model = replace(MODEL, num_experts=6, num_zero_experts=2)
    for options in (ReadOptions(model), ReadOptions(num_experts=6, zero_experts=2, top_k=2)):
        dump = read_dump(paths, options=options)
        want = np.where(chosen >= 6, -1, chosen)
        np.testing.assert_array_equal(np.sort(dump.trace.experts, axis=2), np.sort(want, axis=2))
        assert dump.trace.num_experts == 6 and dump.slots.count_BLS.sum() == (want >= 0).sum()
    with pytest.raises(TraceError, match="names slot 7, the map has 6"):
        read_dump(paths, options=ReadOptions(num_experts=6))


def test_a_dump_without_a_map_takes_the_placement_that_ran(tmp_path):
    rng = np.random.default_rng(3)
    map_LS = dumps.slot_map(rng)
    record, chosen = one(rng, 6, map_LS)
    torch.save({"records": [record]}, tmp_path / "d.pt")
    with pytest.raises(TraceError, match=r"counts slots and has no map\nhint: give --placement"):
        read_dump(tmp_path)
    plan = Placement(map_LS[dumps.MOE], np.repeat(np.arange(4), 3), dumps.EXPERTS, 4, np.array(dumps.MOE))
    np.testing.assert_array_equal(read_dump(tmp_path, options=ReadOptions(placement=plan)).trace.experts, chosen)


def test_ranks_that_count_the_same_passes_alike_count_once(tmp_path):
    rng = np.random.default_rng(4)
    map_LS = dumps.slot_map(rng)
    mine = [{"forward_pass_id": i, "rank": 0, "global_physical_count": torch.from_numpy(
        dumps.on_all_layers(dumps.count(dumps.choices(rng, 9), dumps.SLOTS)))} for i in range(3)]  # fmt: skip
    twin = [{**record, "rank": 1} for record in mine]
    for record in twin:  # replicas of an expert share otherwise
        count = record["global_physical_count"].clone()
        for layer in dumps.MOE:
            one, other = np.flatnonzero(map_LS[layer] == np.bincount(map_LS[layer]).argmax())[:2]
            count[layer, one], count[layer, other] = count[layer, other].item(), count[layer, one].item()
        record["global_physical_count"] = count
    other = [
        {**record, "rank": 2, "global_physical_count": record["global_physical_count"] * (1 + (i == 2))}
        for i, record in enumerate(mine)
    ]
    once = read_dump(_files(tmp_path, [mine], map_LS)).profile.load_BLE
    twice = read_dump(_files(tmp_path, [mine, twin], map_LS))
    np.testing.assert_array_equal(twice.profile.load_BLE, once)
    assert "1 of 2 files count the tokens of another one" in twice.notes[0]
    three = read_dump(_files(tmp_path, [mine, twin, other], map_LS)).profile.load_BLE
    np.testing.assert_array_equal(three[:2], 2 * once[:2])


def test_ranks_with_different_maps_are_told(tmp_path):
    rng = np.random.default_rng(8)
    planned = dumps.slot_map(rng)
    other = rng.permutation(dumps.EXPERTS)[planned]
    dense = planned.copy()
    dense[[i for i in range(dumps.LAYERS) if i not in dumps.MOE]] = 0  # layers without experts hold none
    records = [[one(rng, 6 + rank, planned, rank=rank)[0]] for rank in range(3)]
    for detail in ("topk_ids_of_layer", None):
        files = [[{k: v for k, v in r.items() if k != "topk_ids_of_layer" or detail} for r in file] for file in records]
        for maps, agree in (
            ([planned] * 3, True),
            ([other, planned, planned], False),
            ([dense, planned, planned], True),
        ):
            for rank, map_LS in enumerate(maps):
                torch.save(dumps.detail(files[rank], map_LS), tmp_path / f"{rank}.pt")
            dump = read_dump(tmp_path, options=ReadOptions(MODEL))
            assert dump.slots.maps_agree is agree and (dump.trace is None) is (detail is None)
            np.testing.assert_array_equal(dump.slots.map_LS, planned[dumps.MOE])
            assert any("files have different maps" in note for note in dump.notes) is (maps[0] is not planned)
            if not agree:
                with pytest.raises(TraceError, match="ranks report different maps"):
                    read_slot_map(tmp_path)


def test_copies_are_told_from_slots_where_a_map_was_lost(tmp_path):
    """Ranks with the same tokens; the map of one file is a later one, by which its experts would be others."""
    rng = np.random.default_rng(9)
    map_LS, later = dumps.slot_map(rng), dumps.slot_map(rng)
    record, chosen = one(rng, 6, map_LS)
    count = {key: record[key] for key in ("forward_pass_id", "rank", "global_physical_count")}
    for held in (record, count):
        torch.save(dumps.detail([held], map_LS), tmp_path / "0.pt")
        torch.save(dumps.detail([{**held, "rank": 1}], later), tmp_path / "1.pt")
        dump = read_dump(tmp_path, options=ReadOptions(MODEL))
        assert dump.slots.count_BLS.sum() == chosen.size and not dump.slots.maps_agree
    np.testing.assert_array_equal(dump.profile.load_BLE[0], dumps.count(chosen, dumps.EXPERTS))


def served(rng, requests, chunk):
    """A server's passes over (prompt, answer) lengths: (rows of (request, position), lengths or None, mode)."""
    waiting, running, passes = list(range(len(requests))), [], []
    done = dict.fromkeys(waiting, 0)
    while waiting or running:
        batch, lengths, left = [], [], chunk
        while waiting and left and len(running) + len(lengths) < 4:
            request = waiting[0]
            take = min(left, requests[request][0] - done[request])
            batch += [(request, done[request] + i) for i in range(take)]
            lengths.append(take)
            done[request] += take
            left -= take
            if done[request] < requests[request][0]:
                break
            waiting.pop(0)
            running.append(request)
        if batch:
            passes.append((batch, lengths, 1))
            if waiting and done[waiting[0]]:
                continue
        if running and (not waiting or rng.random() < 0.7):
            passes.append(([(request, done[request]) for request in running], None, 2))
            for request in list(running):
                done[request] += 1
                if done[request] == sum(requests[request]):
                    running.remove(request)
    return passes


@given(
    seed=st.integers(0, 2**20), chunk=st.integers(2, 9),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=7),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_requests_are_found_and_never_mixed(tmp_path_factory, seed, chunk, sizes):
    """Tokens that are put into one request are of one; with prompts of their own lengths all are found."""
    folder = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(seed)
    map_LS = dumps.slot_map(rng)
    records, chosen, truth, decode = [], [], [], []
    for pass_id, (rows, lengths, mode) in enumerate(served(rng, sizes, chunk)):
        experts = dumps.choices(rng, len(rows))
        slots = dumps.slots_of(rng, experts, map_LS[dumps.MOE])
        records.append(dumps.token_record(pass_id, 0, slots, [position for _, position in rows], lengths, mode))
        chosen.append(experts)
        truth += [request for request, _ in rows]
        decode += [mode == 2] * len(rows)
    dump = read_dump(_files(folder, [records], map_LS))
    trace = dump.trace
    np.testing.assert_array_equal(trace.experts, np.concatenate(chosen))
    assert trace.is_decode.tolist() == decode
    pairs = set(zip(trace.request.tolist(), truth, strict=True))
    assert len(pairs) == len(trace.requests()), "a request of the trace has tokens of two"
    if len(sizes) == 1:
        assert len(pairs) == 1 and not dump.notes[1:]
    assert (len(pairs) > len(sizes)) <= any("requests of their own" in note for note in dump.notes)


def test_mixed_passes_and_verified_drafts(tmp_path):
    rng = np.random.default_rng(5)
    map_LS = dumps.slot_map(rng)
    plan = [
        ([0, 1, 2], [3], 1), ([0, 1, 3], [2, 1], 3),  # a prompt, then another one beside the first one's next token
        ([4, 2], None, 2), ([5, 6, 3, 4], None, 5),
    ]  # fmt: skip
    records = [
        dumps.token_record(i, 0, dumps.slots_of(rng, dumps.choices(rng, len(p)), map_LS[dumps.MOE]), p, lengths, mode)
        for i, (p, lengths, mode) in enumerate(plan)
    ]
    dump = read_dump(_files(tmp_path, [records], map_LS))
    assert dump.trace.is_decode.tolist() == [False] * 5 + [True] * 7
    assert dump.trace.request.tolist()[:8] == [0, 0, 0, 1, 1, 0, 0, 1]
    assert len(set(dump.trace.request.tolist()[8:])) == 4 and "4 of 7 decoded tokens" in dump.notes[-1]
