"""What is exported is read back as the same placement; what a target cannot hold or say is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engines.checkpoint_cases import random_placement, write_checkpoint
from typer.testing import CliRunner

from poise.cli.main import app
from poise.engines.checkpoints.checkpoint import load_relabelling, relabel_checkpoint
from poise.engines.dump import placement_of
from poise.engines.exports import TARGETS, ExportOptions
from poise.engines.readers import ReadOptions, read_dump
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.util.errors import InputError, OptionError, PlacementError, TraceError

FILES = tuple(name for name, target in TARGETS.items() if not target.folder)
ONCE = ("vllm-34811", "megatron", "deepspeed")  # they hold no replicas
SAYS_DEVICES = ("vllm-ascend", "vllm-34811", "megatron", "deepspeed", "npz")
BY_PLACE = ("vllm-34811", "vllm-ascend", "vllm-49572", "vllm-hygon")  # they do not say which layers


def run(*words):
    got = CliRunner().invoke(app, [str(word) for word in words])
    assert got.exception is None or isinstance(got.exception, SystemExit), got.exception
    return got


def config_of(path, experts, decoder_layers, moe):
    sizes = {"num_hidden_layers": decoder_layers, "num_experts": experts, "num_experts_per_tok": 1, "hidden_size": 8,
             "moe_intermediate_size": 4, "moe_layer_freq": [int(i in moe) for i in range(decoder_layers)]}  # fmt: skip
    path.write_text(json.dumps(sizes))
    return path


@st.composite
def plans(draw):
    """Full slots, equally many on every device, no expert twice on one; which decoder layers, and how many there are."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    devices = draw(st.integers(1, 4))
    per_device = draw(st.integers(1, 3))
    redundant = draw(st.sampled_from([0, 0, 1]))
    experts, layers = devices * per_device, draw(st.integers(1, 3))
    rows = []
    for _ in range(layers):
        table = rng.permutation(experts).reshape(devices, per_device)
        if redundant and per_device < experts:
            more = [rng.choice(np.setdiff1d(np.arange(experts), held)) for held in table]
            table = np.concatenate([table, np.array(more)[:, None]], axis=1)
        rows.append(table.ravel())
    if draw(st.booleans()):
        rows = rows[:1] * layers  # all layers alike
    dense = draw(st.integers(0, 2))
    ids = np.sort(rng.choice(layers + dense, layers, replace=False))
    slots = np.repeat(np.arange(devices), len(rows[0]) // devices)
    return Placement(np.stack(rows), slots, experts, devices, ids), layers + dense


@given(plans())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_target_leads_back_to_the_placement(tmp_path_factory, drawn):
    plan, decoder_layers = drawn
    file = tmp_path_factory.mktemp("trip") / "map"
    model = replace(
        ModelSpec.generic(plan.num_experts, 1, np.arange(decoder_layers)),
        moe_layer_ids=tuple(plan.layer_ids_L.tolist()),
    )
    alike = (plan.count_LED() == plan.count_LED()[:1]).all()
    for name in FILES:
        if name in ONCE and (plan.num_slots > plan.num_experts or (name == "vllm-34811" and not alike)):
            continue
        assert TARGETS[name].write(plan, file, ExportOptions(model)).unplanned == 0
        devices = None if name in SAYS_DEVICES else plan.num_devices
        said = (
            {"format": name} if name in ("vllm-49572", "vllm-53022") else {}
        )  # few experts: a bare table that may be loads
        free = [] if name in BY_PLACE else [ReadOptions(**said)]
        for options in [ReadOptions(model, **said), *free]:
            back = placement_of(read_dump(file, options=options), devices, options.experts)
            rows = np.isin(back.layer_ids_L, plan.layer_ids_L)  # without a model, SGLang's dense layers are there too
            assert back.layer_ids_L[rows].tolist() == plan.layer_ids_L.tolist(), name
            assert rows.all() or (name in ("sglang", "vllm-53022") and options.model is None)
            np.testing.assert_array_equal(back.count_LED()[rows], plan.count_LED(), name)
    file.unlink()


def test_the_commands_lead_back_too(tmp_path):
    STAGE.save(tmp_path / "p.npz")
    model = config_of(tmp_path / "config.json", 4, 8, STAGE.layer_ids_L.tolist())
    for name in FILES:
        got = run("export", tmp_path / "p.npz", "--to", name, "--model", model, "-o", tmp_path / "map")
        assert got.exit_code == 0, got.output
        devices = () if name in SAYS_DEVICES else ("--devices", 2)
        said = ("--format", name) if name == "vllm-53022" else ()
        got = run("convert", tmp_path / "map", "--model", model, *devices, *said, "-o", tmp_path / "q.npz", "--json")
        assert got.exit_code == 0 and json.loads(got.stdout)["wrote"] == "placement", (name, got.output)
        back = Placement.load(tmp_path / "q.npz")
        assert back.layer_ids_L.tolist() == [3, 5] and back.num_devices == 2
        np.testing.assert_array_equal(back.count_LED(), STAGE.count_LED(), name)


def only(plan, row):
    return Placement(
        plan.slot_expert_LS[row:], plan.slot_device_S, plan.num_experts, plan.num_devices, plan.layer_ids_L[row:]
    )


def test_a_relabelled_checkpoint_says_which_placement_it_holds(tmp_path):
    source = write_checkpoint(tmp_path / "model", "minimax")
    first, second = random_placement("minimax", 0, devices=4), random_placement("minimax", 1, devices=2)
    relabel_checkpoint(first, source, tmp_path / "once")
    file = tmp_path / "once" / "poise-relabelling.json"
    assert run("convert", file, "-o", tmp_path / "p.npz").exit_code == 0
    np.testing.assert_array_equal(Placement.load(tmp_path / "p.npz").count_LED(), first.count_LED())
    # twice: what the second puts on a device, in the ids of the original
    relabel_checkpoint(second, tmp_path / "once", tmp_path / "twice")
    assert run("convert", tmp_path / "twice", "-o", tmp_path / "p.npz").exit_code == 0
    got, total = Placement.load(tmp_path / "p.npz"), load_relabelling(tmp_path / "twice")
    assert got.num_devices == total.num_devices == 2
    for layer, row in enumerate(load_relabelling(tmp_path / "once").order_LE):
        np.testing.assert_array_equal(got.count_LED()[layer][row], second.count_LED()[layer])
    # files of 0.1 have no number of devices
    data = json.loads(file.read_text())
    assert data.pop("num_devices") == 4
    file.write_text(json.dumps(data))
    got = run("convert", file, "-o", tmp_path / "q.npz")
    assert got.exit_code == 2 and "--devices" in got.stderr and not (tmp_path / "q.npz").exists()
    assert run("convert", file, "--devices", 4, "-o", tmp_path / "q.npz").exit_code == 0
    # the checkpoint itself says how many layers it has
    made = TARGETS["checkpoint"].write(only(first, 2), tmp_path / "part", ExportOptions(checkpoint=source))
    assert made.unplanned == 2 and not any("without --model" in note for note in made.notes)
    np.testing.assert_array_equal(Placement.load(tmp_path / "q.npz").count_LED(), first.count_LED())


def test_a_placement_keeps_its_empty_slots_and_unequal_devices(tmp_path):
    plan = Placement(np.array([[0, 1, -1, 2, 0]]), np.array([0, 0, 0, 1, 1]), 3, 2, np.array([3]))
    plan.save(tmp_path / "p.npz")
    assert run("convert", tmp_path / "p.npz", "-o", tmp_path / "q.npz").exit_code == 0
    back = Placement.load(tmp_path / "q.npz")
    assert back.slot_expert_LS.tolist() == plan.slot_expert_LS.tolist() and back.layer_ids_L.tolist() == [3]
    got = run("convert", tmp_path / "p.npz", "--devices", 3, "-o", tmp_path / "r.npz")
    assert got.exit_code == 2 and "--devices is 3, the file is for 2" in got.stderr
    with pytest.raises(TraceError, match="the placement has 3 experts, the model 8"):
        read_dump(tmp_path / "p.npz", options=ReadOptions(num_experts=8))


ORDER = {"format": "poise-expert-order", "version": 1, "framework": "megatron", "num_experts": 4, "ep_size": 2,
         "experts_per_rank": 2, "layers": {"1": [3, 0, 1, 2], "2": [0, 1, 2, 3]}}  # fmt: skip


@pytest.mark.parametrize("change, match", [
    ({"version": 2}, "version 2"), ({"framework": "x"}, "for x"), ({"ep_size": 3}, "no equal blocks"),
    ({"ep_size": None}, "ep_size must be a whole number"), ({"layers": {"1": [3, 0, 1]}}, "layer 1 must list 4"),
    ({"layers": {"7": [3, 0, 1, 1]}}, "layer 7: the old ids are no permutation"), ({"layers": {"-1": [0, 1, 2, 3]}}, "no layer"),
    ({"layers": {"0": [0, 1, 2, 3]}}, "layer 0, a dense layer"), ({"num_experts": 2}, "layer 1 must list 2"),
    ({"layers": {"9": [0, 1, 2, 3]}}, "none of the model's"), ({"layers": {}}, "missing"),
])  # fmt: skip
def test_orders_that_are_none_are_refused(tmp_path, change, match):
    model = replace(ModelSpec.generic(4, 1, np.arange(3)), moe_layer_ids=(1, 2))
    (tmp_path / "o").write_text(json.dumps({**ORDER, **change}))
    with pytest.raises(InputError, match=match):
        read_dump(tmp_path / "o", options=ReadOptions(model))


def test_maps_name_the_layer_that_is_wrong(tmp_path):
    rows = {1: [0, 1, 2, 0], 4: [0, 1, 2, 3]}
    (tmp_path / "t").write_text("num_slots: 4\n" + yaml.safe_dump({"initial_global_assignments": rows}))
    got = run("convert", tmp_path / "t", "--devices", 2, "-o", tmp_path / "p.npz")
    assert got.exit_code == 2 and "layer 1 (row 0): expert 3 has no slot" in got.stderr
    rows[4].pop()
    (tmp_path / "t").write_text("num_slots: 4\n" + yaml.safe_dump({"initial_global_assignments": rows}))
    assert "layer 4 lists 3" in run("convert", tmp_path / "t", "--devices", 2, "-o", tmp_path / "p.npz").stderr
    with pytest.raises(PlacementError, match=r"layer 7 \(row 1\): expert 1 has no slot"):
        Placement(np.array([[0, 1], [0, 0]]), np.array([0, 0]), 2, 1, np.array([2, 7]))
    with pytest.raises(PlacementError, match=r"^layer 1: expert 1 has no slot"):
        Placement(np.array([[0, 1], [0, 0]]), np.array([0, 0]), 2, 1)
    with pytest.raises(PlacementError, match=r"layer 5 \(row 0\): device 0 holds 2 experts in 1 slots"):
        Placement.from_counts(np.ones((1, 2, 1), int), slots_D=np.array([1]), layer_ids_L=np.array([5]))
    bad = {
        "moe_layer_count": 1,
        "layer_list": [{"layer_id": 0, "device_list": [{"device_id": 1, "device_expert": [0]}]}],
    }
    (tmp_path / "a").write_text(json.dumps(bad))
    with pytest.raises(TraceError, match="layer_id 0: 1 devices, their ids are not 0 to 0"):
        read_dump(tmp_path / "a")
    (tmp_path / "v").write_text(json.dumps({"expert_to_ep_rank": [0, 0, 1]}))
    with pytest.raises(TraceError, match="ranks hold 1 to 2 experts"):
        read_dump(tmp_path / "v", options=ReadOptions(ModelSpec.generic(3, 1, np.arange(2))))


STAGE = Placement(np.array([[0, 2, 1, 3]] * 2), np.array([0, 0, 1, 1]), 4, 2, np.array([3, 5]))
MODEL = replace(ModelSpec.generic(4, 1, np.arange(8)), moe_layer_ids=(1, 3, 5, 7))


@pytest.mark.parametrize("name", FILES)
def test_layers_without_a_plan_are_counted_for_every_target(tmp_path, name):
    made = TARGETS[name].write(STAGE, tmp_path / "x", ExportOptions(MODEL))
    assert made.unplanned == 2 and not any("without --model it is not known" in note for note in made.notes)
    made = TARGETS[name].write(STAGE, tmp_path / "x", ExportOptions(num_hidden_layers=8))
    assert made.unplanned is None and any("without --model it is not known" in note for note in made.notes)
    if name in ("vllm-ascend", "vllm-49572"):
        assert any("of layer 3, runs in the engine's first MoE layer" in note for note in made.notes)
    dense = replace(STAGE, layer_ids_L=np.array([3, 4]))
    with pytest.raises(PlacementError, match="row for layer 4, the model's MoE layers are 1 to 7"):
        TARGETS[name].write(dense, tmp_path / "y", ExportOptions(MODEL))
    assert not (tmp_path / "y").exists()
    with pytest.raises(OptionError, match="num_hidden_layers is 9, generic has 8"):
        ExportOptions(MODEL, num_hidden_layers=9)


def test_the_command_counts_them_and_says_what_becomes_of_them(tmp_path):
    STAGE.save(tmp_path / "p.npz")
    model = config_of(tmp_path / "config.json", 4, 8, MODEL.moe_layer_ids)
    for name, says in [("sglang", "as the engine would start them"), ("megatron", "keep their ids"),
                       ("vllm-34811", "the one list")]:  # fmt: skip
        got = run("export", tmp_path / "p.npz", "--to", name, "--model", model, "-o", tmp_path / "x", "--json")
        said = " ".join(got.stderr.split())
        assert json.loads(got.stdout)["unplanned_layers"] == 2 and "2 layers were not planned" in said and says in said


def test_rows_by_place_are_those_of_moe_layers_alone(tmp_path):
    """AFMoE: 32 layers, of them 2 dense; the engine counts 30."""
    model = replace(ModelSpec.generic(4, 1, np.arange(32)), moe_layer_ids=tuple(range(2, 32)))
    rows = np.array([np.roll(np.arange(4), layer) for layer in range(30)])
    plan = Placement(rows, np.array([0, 0, 1, 1]), 4, 2, np.arange(2, 32))
    TARGETS["vllm-ascend"].write(plan, tmp_path / "a", ExportOptions(model))
    layers = json.loads((tmp_path / "a").read_text())["layer_list"]
    assert [[e for d in layer["device_list"] for e in d["device_expert"]] for layer in layers] == rows.tolist()
    TARGETS["vllm-49572"].write(plan, tmp_path / "v", ExportOptions(model))
    assert json.loads((tmp_path / "v").read_text()) == rows.tolist()


def test_layers_of_multi_token_prediction_have_a_row_or_are_refused(tmp_path):
    trivial, planned = [0, 1, 2, 3], [0, 2, 1, 3]
    for name, target in TARGETS.items():
        if name not in ("tensorrt-llm", "vllm-ascend", "vllm-53022"):
            with pytest.raises(OptionError, match="1 layers of multi-token prediction"):
                target.write(STAGE, tmp_path / "no", ExportOptions(MODEL, num_mtp_layers=1, checkpoint=tmp_path))
    with pytest.raises(OptionError, match=r"0\.\.8"):
        TARGETS["vllm-ascend"].write(STAGE, tmp_path / "no", ExportOptions(MODEL, num_mtp_layers=65))
    with pytest.raises(OptionError, match="follow the decoder layers"):
        TARGETS["vllm-ascend"].write(STAGE, tmp_path / "no", ExportOptions(num_mtp_layers=1))
    ahead = Placement(np.array([planned] * 5), STAGE.slot_device_S, 4, 2, np.array([1, 3, 5, 7, 8]))
    with pytest.raises(PlacementError, match="layer 8"):
        TARGETS["tensorrt-llm"].write(ahead, tmp_path / "no", ExportOptions(MODEL))
    assert not (tmp_path / "no").exists()
    made = TARGETS["tensorrt-llm"].write(ahead, tmp_path / "t", ExportOptions(MODEL, num_mtp_layers=2))
    rows = yaml.safe_load((tmp_path / "t").read_text())["initial_global_assignments"]
    assert made.unplanned == 1 and list(rows) == [1, 3, 5, 7, 8, 9] and (rows[8], rows[9]) == (planned, trivial)
    made = TARGETS["vllm-ascend"].write(STAGE, tmp_path / "a", ExportOptions(MODEL, num_mtp_layers=2))
    layers = json.loads((tmp_path / "a").read_text())["layer_list"]
    rows = [[e for d in layer["device_list"] for e in d["device_expert"]] for layer in layers]
    assert made.unplanned == 4 and rows == [trivial, planned, planned, trivial, trivial, trivial]
    back = read_dump(tmp_path / "a", options=ReadOptions(MODEL))
    assert back.slots.layer_ids_L.tolist() == [1, 3, 5, 7] and "multi-token prediction" in back.notes[0]


def counts(rng, layers=4, experts=4, top_k=2):
    """Loads of routed experts whose sum is a multiple of top-k in every layer, [L, E]."""
    picks = np.argsort(rng.random((50, layers, experts)), axis=2)[:, :, :top_k]
    return np.stack([np.bincount(picks[:, layer].ravel(), minlength=experts) for layer in range(layers)])


def test_fused_shared_experts_are_cut_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    load_LE, known = counts(rng), ReadOptions(num_experts=4, top_k=2)
    fused = np.concatenate([load_LE, np.full((4, 1), 50), np.full((4, 1), 50)], axis=1)
    for key, data in [
        ("stat", {"logical_count": fused}),
        ("history", {"load_history": [{"logical_expert_load": fused}]}),
    ]:
        (tmp_path / key).write_text(json.dumps(data, default=np.ndarray.tolist))
        dump = read_dump(tmp_path / key, options=known)
        np.testing.assert_array_equal(dump.profile.load_BLE[0], load_LE)
        assert any("2 fused shared experts" in note for note in dump.notes)
        dump = read_dump(tmp_path / key)  # of a model that is not named: what it looks like is said
        assert dump.profile.num_experts == 6
    (tmp_path / "one").write_text(json.dumps({"logical_count": fused[:, :5].tolist()}))
    assert any("expert 4 has 1/2 of what all others have" in note for note in read_dump(tmp_path / "one").notes)
    fused[2, 4] += 1  # not what every token takes
    (tmp_path / "stat").write_text(json.dumps({"logical_count": fused.tolist()}))
    with pytest.raises(TraceError, match="names expert 5, the model has 4") as failure:
        read_dump(tmp_path / "stat", options=replace(known, zero_experts=0))
    assert "fuse shared experts" in failure.value.hint


def test_fused_picks_are_cut_or_refused(tmp_path):
    picks = np.argsort(np.random.default_rng(1).random((6, 3, 4)), axis=2)[:, :, :2]
    fused = np.concatenate([picks, np.full((6, 3, 1), 4)], axis=2)
    (tmp_path / "r").write_text(json.dumps({"prompt_routed_experts": fused.tolist()}))
    notes = read_dump(tmp_path / "r").notes
    assert any("the last pick is expert 4 throughout" in note for note in notes)
    for last, right in [(4, True), (3, False)]:
        fused[0, 0, 2] = last
        (tmp_path / "r").write_text(
            json.dumps({"routed_experts": fused.tolist(), "prompt_routed_experts": fused.tolist()})
        )
        options = ReadOptions(num_experts=4, zero_experts=0, top_k=2)
        if right:
            np.testing.assert_array_equal(read_dump(tmp_path / "r", options=options).trace.experts[:6], picks)
        else:
            with pytest.raises(TraceError):
                read_dump(tmp_path / "r", options=options)
