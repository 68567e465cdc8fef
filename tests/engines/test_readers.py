"""Every format is told from its content and gives back the routing that went in."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engines import dumps

from poise.engines.checkpoints.permutation import Relabelling
from poise.engines.readers import FORMATS, ReadOptions, read_dump, read_slot_map
from poise.machine.model import ModelSpec, from_hf_config
from poise.planning.placement import Placement
from poise.routing.profile import load_LE
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import ModelError, OptionError, TraceError

MODEL = from_hf_config(dumps.CONFIG, name="test")
GOLDENS = Path(__file__).parent.parent / "goldens" / "dumps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dumps")


def made(folder, name, seed):
    """A folder with that dump alone in it, and what is in it."""
    place = folder / name
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    return place, dumps.MAKERS[name](place, np.random.default_rng(seed))


def same(dump, known):
    """The dump says what was known, and nothing else."""
    if known.experts_TLK is None:
        assert dump.trace is None
    else:
        trace = dump.trace
        np.testing.assert_array_equal(trace.experts, known.experts_TLK)
        assert trace.layer_ids.tolist() == known.ids and trace.num_experts == dumps.EXPERTS
        if known.request_T is not None:
            pairs = set(zip(trace.request.tolist(), known.request_T.tolist(), strict=True))
            assert len(pairs) == len(set(known.request_T.tolist())) == len(trace.requests())
        if known.decode_T is not None:
            np.testing.assert_array_equal(trace.is_decode, known.decode_T)
    if known.load_BLE is None:
        assert dump.profile is None
    else:
        np.testing.assert_array_equal(dump.profile.load_BLE, known.load_BLE)
        assert dump.profile.layer_ids.tolist() == known.ids
    if known.map_LS is not None:
        np.testing.assert_array_equal(dump.slots.map_LS, known.map_LS)
        assert dump.slots.layer_ids_L.tolist() == known.ids
    if known.balance_B is not None:
        np.testing.assert_array_equal(dump.balance_B, known.balance_B)


def test_every_format_has_a_maker():
    assert set(dumps.FORMAT) == set(dumps.MAKERS)
    own = {"poise", "placement", "expert-order", "relabelling"}  # test_map_round_trips.py
    own |= {"vllm-53022", "hygon-map"}  # test_vllm_maps.py
    assert set(dumps.FORMAT.values()) | own == set(FORMATS)


@pytest.mark.parametrize("name", dumps.MAKERS)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_round_trip(folder, name, seed):
    place, known = made(folder, name, seed)
    model = None if name in dumps.ONE_LAYER else MODEL
    options = ReadOptions(model) if model else ReadOptions(num_experts=dumps.EXPERTS)
    dump = read_dump(place, options=options)
    same(dump, known)
    if dump.slots is not None and dump.slots.count_BLS is not None:  # slots add up to experts
        loads = dump.profile.load_BLE if dump.profile else load_LE(dump.trace.experts, dumps.EXPERTS)[None]
        assert dump.slots.count_BLS.sum() == loads.sum()
    alone = [path for path in place.iterdir() if path.name != "meta_info.json"]
    for path in alone:  # any file of it, whatever it is called
        other = path.rename(path.with_name("file"))
        try:
            forced = read_dump(other, options=ReadOptions(model, num_experts=dumps.EXPERTS, format=dumps.FORMAT[name]))
            assert (forced.engine, forced.kind) == (dump.engine, dump.kind)
        finally:
            other.rename(path)


@pytest.mark.parametrize("name", ["sglang_stat", "sglang_per_pass", "sglang_per_token", "sglang_routed_openai", "tensorrt_raw",
                                  "tokenspeed", "selection_trace", "sglang_map"])  # fmt: skip
def test_without_a_model_layers_and_experts_are_seen(folder, name):
    place, known = made(folder, name, 3)
    dump = read_dump(place, options=ReadOptions(top_k=2 if "routed" in name else None))
    if name == "sglang_map":  # dense layers have rows too
        assert dump.slots.layer_ids_L.tolist() == list(range(dumps.LAYERS))
    elif name == "tokenspeed":
        np.testing.assert_array_equal(dump.profile.load_BLE, known.load_BLE)
    else:
        same(dump, known)


@pytest.mark.parametrize("name", dumps.MAKERS)
def test_goldens_read_as_ever(name):
    """Files that were once written, and what they were read as: a change of either is a change of the format."""
    expected = json.loads((GOLDENS / "expected.json").read_text())[name]
    model = None if name in dumps.ONE_LAYER else MODEL
    assert digest(read_dump(GOLDENS / name, options=ReadOptions(model))) == expected
    assert sum(path.stat().st_size for path in (GOLDENS / name).iterdir()) < 20_000


def digest(dump):
    """Everything in a dump, as a few words and a checksum of its arrays."""
    arrays = [dump.balance_B]
    if dump.trace:
        t = dump.trace
        arrays += [t.experts, t.request, t.is_decode, t.step, t.home, t.layer_ids]
    if dump.profile:
        arrays += [dump.profile.load_BLE, dump.profile.layer_ids]
    if dump.slots:
        arrays += [dump.slots.layer_ids_L, dump.slots.map_LS, dump.slots.count_BLS]
    data = b"".join(b"-" if a is None else str(a.shape).encode() + a.astype("<f8").tobytes() for a in arrays)
    return {"engine": dump.engine, "kind": dump.kind, "notes": list(dump.notes), "layers": dump.recorded_layers,
            "sum": hashlib.sha256(data).hexdigest()[:16]}  # fmt: skip


def write_goldens():
    """Run once, by hand: python -c 'from tests.engines.test_readers import *; write_goldens()'"""
    out = {}
    for name in dumps.MAKERS:
        place, _ = made(GOLDENS, name, 0)
        out[name] = digest(read_dump(place, options=ReadOptions(None if name in dumps.ONE_LAYER else MODEL)))
    (GOLDENS / "expected.json").write_text(json.dumps(out, indent=1) + "\n")


def test_own_files_pass_through(tmp_path):
    profile = LoadProfile(np.arange(1, 13).reshape(2, 2, 3))
    with (tmp_path / "l.npz").open("wb") as stream:
        np.savez(stream, counts=profile.load_BLE, layers=np.array([1, 4]))
    dump = read_dump(tmp_path / "l.npz")
    assert (dump.engine, dump.kind) == ("poise", "profile") and dump.profile.layer_ids.tolist() == [1, 4]
    place = tmp_path / "x"
    place.mkdir()
    trace = read_dump(made(tmp_path, "sglang_per_token", 0)[0]).trace
    trace.save(place / "t.npz")
    back = read_dump([place / "t.npz", place / "t.npz"]).trace
    assert back.num_tokens == 2 * trace.num_tokens and len(back.requests()) == 2 * len(trace.requests())


ZEROS = 3
NAMED = {"sglang_stat", "sglang_stat_json", "sglang_routed", "sglang_routed_openai", "vllm_routed", "vllm_routed_lists",
         "tensorrt_statistics", "tensorrt_raw", "exflow", "selection_trace", "load_history", "step_routing", "route_log",
         "vllm_routed_choices", "load_table", "load_table_pt", "load_nested", "load_csv", "moe_trace", "router_lines"}  # fmt: skip
"""Dumps in which routers' ids appear as they are; the others speak of slots, which no identity expert has."""


@pytest.mark.parametrize("name", [name for name in dumps.MAKERS if name not in ("vllm_log", "sglang_log")])
def test_identity_experts_compute_nothing(folder, name):
    """The last three of eight ids are identity experts; without the option they are not told from wrong numbers."""
    place, known = made(folder, name, 5)
    real = dumps.EXPERTS - ZEROS
    few = {"num_experts": real, "num_zero_experts": ZEROS}
    told = [ReadOptions(num_experts=real, zero_experts=ZEROS, top_k=dumps.TOP_K)]
    told += [] if name in dumps.ONE_LAYER else [ReadOptions(replace(MODEL, **few))]
    with pytest.raises(TraceError) as error:
        read_dump(place, options=ReadOptions(num_experts=real, top_k=dumps.TOP_K))
    for options in told:
        if name not in NAMED:
            with pytest.raises(TraceError):
                read_dump(place, options=options)
            continue
        assert "--zero-experts 3" in error.value.hint
        dump = read_dump(place, options=options)
        assert any("compute" in note for note in dump.notes)
        if known.experts_TLK is not None and options.model is not None:
            want = np.where(known.experts_TLK >= real, -1, known.experts_TLK)
            assert dump.trace.num_experts == real
            np.testing.assert_array_equal(np.sort(dump.trace.experts, axis=2), np.sort(want, axis=2))
        if known.load_BLE is not None and options.model is not None:
            np.testing.assert_array_equal(dump.profile.load_BLE, known.load_BLE[:, :, :real])
            np.testing.assert_array_equal(dump.profile.idle_BL, known.load_BLE[:, :, real:].sum(axis=2))
    one_short = ReadOptions(num_experts=real, zero_experts=ZEROS - 1, top_k=dumps.TOP_K)
    with pytest.raises(TraceError, match="the model" if name in NAMED else None):
        read_dump(place, options=one_short)


def test_a_few_ids_beyond_the_experts_given_by_hand_are_taken_for_identity_experts(tmp_path):
    """And said; not where a model, or --zero-experts 0, says that there are none, nor where they are half as many as E."""
    rng = np.random.default_rng(1)
    ids = [[rng.choice(12, 3, replace=False).tolist() for _ in range(2)] for _ in range(40)]
    ids[0][0] = [0, 1, 11]
    path = tmp_path / "answers.json"
    path.write_text(
        json.dumps({"choices": [{"routed_experts": ids}], "usage": {"prompt_tokens": 30, "completion_tokens": 11}})
    )
    dump = read_dump(path, options=ReadOptions(num_experts=8))
    assert dump.trace.num_experts == 8 and dump.trace.num_tokens == 40
    assert (dump.trace.experts == -1).sum() == (np.array(ids) >= 8).sum()
    assert any("--zero-experts 4 says so" in note for note in dump.notes)
    model = replace(MODEL, num_experts=8, num_hidden_layers=2, moe_layer_ids=(0, 1), top_k=3)
    for options in (ReadOptions(num_experts=8, zero_experts=0), ReadOptions(model), ReadOptions(num_experts=7)):
        with pytest.raises(TraceError, match="names expert 11, the model has"):
            read_dump(path, options=options)


def test_tokens_of_another_top_k_are_not_the_models(tmp_path):
    rng = np.random.default_rng(1)
    ids = [[rng.choice(64, 7, replace=False).tolist() for _ in range(16)] for _ in range(20)]
    (tmp_path / "a.json").write_text(json.dumps({"choices": [{"routed_experts": ids}]}))
    for options in (ReadOptions(ModelSpec.parse("olmoe-1b-7b")), ReadOptions(top_k=8)):
        with pytest.raises(TraceError, match="7 experts a token, the model has top-8"):
            read_dump(tmp_path / "a.json", options=options)
    dump = read_dump(tmp_path / "a.json", options=ReadOptions(top_k=7))
    assert dump.trace.top_k == 7 and not any("were recorded" in note for note in dump.notes)
    dump.trace.save(tmp_path / "t.npz")  # may keep a part of the picks, but not more than there are
    assert "7 of the 8 experts that a token has were recorded" in read_dump(
        tmp_path / "t.npz", options=ReadOptions(top_k=8)
    ).notes  # fmt: skip
    with pytest.raises(TraceError, match="7 experts a token, the model has top-6"):
        read_dump(tmp_path / "t.npz", options=ReadOptions(top_k=6))


def test_answers_without_a_token_and_tensors_of_other_kinds_say_what_they_are(tmp_path):
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    (tmp_path / "a.json").write_text(json.dumps({"choices": [{"routed_experts": ""}], "usage": usage}))
    with pytest.raises(TraceError, match="no answer has routed experts"):
        read_dump(tmp_path / "a.json")
    torch.save({"logical_count": torch.ones(2, 4).to_sparse()}, tmp_path / "s.pt")
    with pytest.raises(TraceError, match=r"only tensors, numbers and text are read\n.*nothing of it was run") as error:
        read_dump(tmp_path / "s.pt")
    assert "truncated" not in str(error.value)


def test_numbers_of_identity_experts_that_contradict_are_refused():
    model = replace(MODEL, num_experts=5, num_zero_experts=3)
    assert ReadOptions(model).zeros == ReadOptions(model, zero_experts=3).zeros == 3
    for options, says in (
        ({"model": model, "zero_experts": 2}, "zero_experts is 2, test has 3"),
        ({"zero_experts": 3}, "behind an unknown number"),
        ({"num_experts": 5, "zero_experts": -1}, "got -1"),
    ):
        with pytest.raises(OptionError, match=says):
            ReadOptions(**options)
    with pytest.raises(ModelError, match="num_zero_experts"):
        replace(model, num_zero_experts=-1)


def test_own_files_of_all_ids_are_read_with_the_option(tmp_path):
    """A trace that was recorded before identity experts were known of; its relabelling leaves their picks alone."""
    ids = np.array([[[0, 6], [7, 5]], [[6, 7], [1, 4]]])
    RoutingTrace(ids, 8).save(tmp_path / "t.npz")
    trace = read_dump(tmp_path / "t.npz", options=ReadOptions(num_experts=5, zero_experts=3)).trace
    assert trace.experts.tolist() == [[[0, -1], [-1, -1]], [[-1, -1], [1, 4]]]
    order = Relabelling(np.array([0, 1]), np.array([[4, 3, 2, 1, 0]] * 2))
    assert order.original(trace).experts.tolist() == [[[4, -1], [-1, -1]], [[-1, -1], [3, 0]]]


def test_a_relabelled_checkpoint_gives_old_ids(folder, tmp_path):
    rng = np.random.default_rng(1)
    order = np.stack([rng.permutation(dumps.EXPERTS) for _ in dumps.MOE])
    (tmp_path / "poise-relabelling.json").write_text(Relabelling(np.array(dumps.MOE), order, "m").to_json())
    for name in ("sglang_per_token", "sglang_per_pass", "sglang_routed", "sglang_map"):
        place, known = made(folder, name, 2)
        model = MODEL if name in ("sglang_routed", "sglang_map") else None
        dump = read_dump(place, options=ReadOptions(model, relabelling=tmp_path))
        layer = np.arange(len(dumps.MOE))[:, None]
        if known.experts_TLK is not None:
            np.testing.assert_array_equal(dump.trace.experts, order[layer, known.experts_TLK])
        if known.map_LS is not None:
            np.testing.assert_array_equal(dump.slots.map_LS, order[layer, known.map_LS])
        if known.load_BLE is not None:
            old = np.zeros_like(known.load_BLE)
            for i in range(len(dumps.MOE)):
                old[:, i, order[i]] = known.load_BLE[:, i]
            np.testing.assert_array_equal(dump.profile.load_BLE, old)


def test_tensorrt_slots_need_the_placement_that_ran(folder):
    place, _ = made(folder, "tensorrt_statistics", 4)
    rng = np.random.default_rng(0)
    map_LS = np.stack([rng.permutation(np.r_[np.arange(6), 0, 1]) for _ in dumps.MOE])  # 8 slots, 6 experts
    plan = Placement(map_LS, np.repeat(np.arange(4), 2), 6, 4, np.array(dumps.MOE))
    small = from_hf_config({**dumps.CONFIG, "num_experts": 6}, name="small")
    with pytest.raises(TraceError, match=r"8 are counted, the model has 6 experts.*\n.*--placement"):
        read_dump(place, options=ReadOptions(small))
    plain = read_dump(place)
    dump = read_dump(place, options=ReadOptions(small, plan))
    want = np.zeros((3, 3, 6))
    for layer in range(3):
        np.add.at(want[:, layer], (slice(None), map_LS[layer]), plain.profile.load_BLE[:, layer])
    np.testing.assert_array_equal(dump.profile.load_BLE, want)
    np.testing.assert_array_equal(dump.slots.count_BLS, plain.profile.load_BLE)


def test_tensorrt_ranks_that_share_their_tokens_count_once(folder):
    place, known = made(folder, "tensorrt_statistics", 5)
    (place / "rank2.safetensors").write_bytes((place / "rank1.safetensors").read_bytes())
    dump = read_dump(place)
    same(dump, known)
    assert any("1 files count the tokens of another rank" in note for note in dump.notes)


def test_layers_that_predict_ahead_are_left_out(folder, tmp_path):
    wide = np.ones((1, dumps.LAYERS + 1, dumps.EXPERTS), int)
    wide[:, [0, 3]] = 0
    (tmp_path / "l.json").write_text(json.dumps({"logical_count": wide.tolist()}))
    dump = read_dump(tmp_path / "l.json", options=ReadOptions(MODEL))
    assert dump.profile.layer_ids.tolist() == dumps.MOE and "multi-token prediction" in dump.notes[0]
    place, known = made(folder, "ascend_map", 1)
    data = json.loads((place / "map.json").read_text())
    data["layer_list"].append({**data["layer_list"][0], "layer_id": 3})
    data["moe_layer_count"] = 4
    (place / "map.json").write_text(json.dumps(data))
    same(read_dump(place, options=ReadOptions(MODEL)), known)


def test_lists_of_moe_layers_alone_are_not_taken_for_decoder_layers(folder):
    """One dense layer and one that predicts ahead: as many entries as the model has decoder layers."""
    one_dense = {**dumps.CONFIG, "moe_layer_freq": [0, 1, 1, 1, 1]}
    model = from_hf_config(one_dense, name="one dense")
    map_LS = dumps.slot_map(np.random.default_rng(6))
    place, _ = made(folder, "vllm_49572", 0)
    (place / "map.json").write_text(json.dumps(map_LS.tolist()))
    other, _ = made(folder, "ascend_map", 0)
    layers = [{"layer_id": i, "device_list": [{"device_id": 0, "device_expert": row.tolist()}]}
              for i, row in enumerate(map_LS)]  # fmt: skip
    (other / "map.json").write_text(json.dumps({"layer_list": layers}))
    with pytest.raises(TraceError, match="5 lists: one dense has as many decoder layers, and 4 MoE layers"):
        read_dump(place, options=ReadOptions(model))
    every = read_dump(place, options=ReadOptions(model, format="vllm-53022"))
    np.testing.assert_array_equal(every.slots.map_LS, map_LS[1:])
    for path, said in ((place, "vllm-49572"), (other, None)):
        dump = read_dump(path, options=ReadOptions(model, format=said))
        assert dump.slots.layer_ids_L.tolist() == [1, 2, 3, 4]
        np.testing.assert_array_equal(dump.slots.map_LS, map_LS[:4])
        assert "1 layers behind the model's own were left out" in dump.notes[0]


@pytest.mark.parametrize("name", ["ascend_map", "vllm_49572", "vllm_routed", "load_history", "exflow"])
def test_a_relabelling_is_not_applied_to_layers_that_are_guessed(folder, tmp_path, name):
    place, _ = made(folder, name, 0)
    order = np.stack([np.roll(np.arange(dumps.EXPERTS), 1) for _ in dumps.MOE])
    (tmp_path / "poise-relabelling.json").write_text(Relabelling(np.array(dumps.MOE), order, "m").to_json())
    form = "exflow" if name == "exflow" else None
    dump = read_dump(place, options=ReadOptions(format=form))
    assert dump.layers_by_place and any("--model gives decoder layers" in note for note in dump.notes)
    with pytest.raises(OptionError, match=r"layer numbers are not known.*\nhint: give --model"):
        read_dump(place, options=ReadOptions(relabelling=tmp_path, format=form))
    dump = read_dump(place, options=ReadOptions(MODEL, relabelling=tmp_path))
    assert not dump.layers_by_place and "expert ids are those before the relabelling" in dump.notes


def test_tokenspeed_ranks_with_different_maps_are_told(folder):
    place, known = made(folder, "tokenspeed", 1)
    assert read_dump(place, options=ReadOptions(MODEL)).slots.maps_agree
    first = sorted(place.iterdir())[0]
    data = torch.load(first)
    data["physical_to_logical_map"] = data["physical_to_logical_map"].flip(1)
    torch.save(data, first)
    dump = read_dump(place, options=ReadOptions(MODEL))
    assert not dump.slots.maps_agree and "files have different maps" in dump.notes[0]
    same(dump, known)


def test_answers_without_a_shape_name_the_option(folder):
    place, known = made(folder, "sglang_routed", 0)
    with pytest.raises(
        TraceError, match=r"10 experts a token, which are layers times top-k\nhint: give --model or --top-k"
    ):
        read_dump(place)
    same(read_dump(place, options=ReadOptions(top_k=2, num_experts=8)), known)
    with pytest.raises(TraceError, match="no multiple of top-3"):
        read_dump(place, options=ReadOptions(top_k=3))
    line = json.loads((place / "answers").read_text().splitlines()[0])
    del line["meta_info"]["prompt_tokens"]
    (place / "answers").write_text(json.dumps(line))
    with pytest.raises(TraceError, match="prompt_tokens"):
        read_dump(place, options=ReadOptions(MODEL))


def test_answers_that_start_late_and_tokens_without_routes(folder):
    place, known = made(folder, "sglang_routed", 0)
    line = json.loads((place / "answers").read_text().splitlines()[0])  # 5 tokens of prompt, 4 of answer
    first = known.experts_TLK[:8]
    line["meta_info"]["routed_experts"] = dumps.raw_base64(first[2:])  # routed_experts_start_len = 2
    (place / "answers").write_text(json.dumps(line))
    trace = read_dump(place, options=ReadOptions(MODEL)).trace
    np.testing.assert_array_equal(trace.experts, first[2:])
    assert trace.is_decode.tolist() == [False] * 3 + [True] * 3
    hole = first.copy()
    hole[1] = 0
    line["meta_info"]["routed_experts"] = dumps.raw_base64(hole)
    (place / "answers").write_text(json.dumps(line))
    dump = read_dump(place, options=ReadOptions(MODEL))
    np.testing.assert_array_equal(dump.trace.experts, np.delete(first, 1, axis=0))
    assert "1 tokens without captured experts were left out" in dump.notes


def test_what_does_not_fit_together_is_refused(folder, tmp_path):
    stat, _ = made(folder, "sglang_stat", 0)
    log, _ = made(folder, "vllm_log", 0)
    with pytest.raises(TraceError, match=r"sglang-stat.*balance-log"):
        read_dump([stat, log])
    with pytest.raises(OptionError, match="unknown format"):
        read_dump(stat, options=ReadOptions(format="sglang"))
    with pytest.raises(TraceError, match="not of format exflow"):
        read_dump(stat, options=ReadOptions(format="exflow"))
    with pytest.raises(TraceError, match="logical_count has 8 experts, the model 16"):
        read_dump(stat, options=ReadOptions(num_experts=16))
    with pytest.raises(OptionError, match="top_k is 4, test has 2"):
        ReadOptions(MODEL, top_k=4)
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(TraceError, match="no known format"):
        read_dump(tmp_path)
    with pytest.raises(TraceError, match="no such file"):
        read_dump(tmp_path / "nowhere.pt")
    with pytest.raises(TraceError, match="says nothing about what slots hold"):
        read_slot_map(stat)
    (stat / "notes.txt").write_text("my notes")
    assert "left out: notes.txt" in read_dump(stat).notes[0]
    plan = tmp_path / "p.npz"
    Placement(np.array([[0, 1]]), np.array([0, 1]), 2, 2).save(plan)
    assert read_slot_map(plan).map_LS.tolist() == [[0, 1]]
    with pytest.raises(TraceError, match="a map of slots, no traffic"):
        _ = read_dump(plan).traffic
