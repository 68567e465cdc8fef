"""Loads under a name of their own: the same numbers whatever holds them, and what is no plain fact beside is refused."""

import gzip
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.engines.readers import ReadOptions, read_dump
from poise.machine.model import ModelSpec
from poise.util.errors import TraceError

NAMES = (
    "counts",
    "loads",
    "load",
    "expert_counts",
    "expert_load",
    "token_counts",
    "logical_counts",
    "tokens_per_expert",
)


def loads(seed, steps=1):
    rng = np.random.default_rng(seed)
    return rng.multinomial(4000, rng.dirichlet(np.full(16, 0.6)), size=(steps, 5))


def written(folder, form, name, load_BLE):
    """A file in which ``name`` stands before the loads."""
    path, facts = folder / f"x.{form}", {"model": "x", "num_layers": 5, "note": None}
    table = load_BLE[0] if len(load_BLE) == 1 else load_BLE
    if form == "npz":
        np.savez(path, **{name: table})
    elif form == "pt":
        torch.save({**facts, name: torch.from_numpy(table)}, path)
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps({"step": at, name: one.tolist()}) for at, one in enumerate(load_BLE)))
    elif form == "list":
        path.write_text(json.dumps([{"step": at, name: one.tolist()} for at, one in enumerate(load_BLE)]))
    elif form == "gz":
        path.write_bytes(gzip.compress(json.dumps({**facts, name: table.tolist()}).encode()))
    else:
        path.write_text(json.dumps({**facts, name: table.tolist()}))
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(["npz", "pt", "json", "gz", "jsonl", "list"]), name=st.sampled_from(NAMES),
       seed=st.integers(0, 2**20), steps=st.integers(1, 4))  # fmt: skip
def test_one_set_of_loads_under_any_name(tmp_path, form, name, seed, steps):
    load_BLE = loads(seed, steps)
    dump = read_dump(written(tmp_path, form, name, load_BLE))
    assert dump.trace is None
    np.testing.assert_array_equal(dump.profile.load_BLE, load_BLE)


def test_numbers_that_could_be_ids_are_loads_by_their_name(tmp_path):
    small = np.random.default_rng(0).integers(0, 9, (1, 5, 16))  # of bare numbers it is asked what they are
    for form in ("npz", "pt", "json"):
        np.testing.assert_array_equal(
            read_dump(written(tmp_path, form, "expert_counts", small)).profile.load_BLE, small
        )


@pytest.mark.parametrize("suffix", ["", ".mlp", ".mlp.experts", ".block_sparse_moe.gate"])
def test_layers_named_by_their_module(tmp_path, suffix):
    load_LE = loads(1)[0]
    rows = {f"model.layers.{layer + 3}{suffix}": row for layer, row in enumerate(load_LE)}
    torch.save({name: torch.tensor(row) for name, row in rows.items()}, tmp_path / "x.pt")
    nested = {"layers": {name: {f"expert_{e}": int(n) for e, n in enumerate(row)} for name, row in rows.items()}}
    (tmp_path / "x.json").write_text(json.dumps(nested))
    for name in ("x.pt", "x.json"):
        profile = read_dump(tmp_path / name).profile
        assert profile.layer_ids.tolist() == [3, 4, 5, 6, 7]
        np.testing.assert_array_equal(profile.load_BLE[0], load_LE)


@pytest.mark.parametrize("kind", [list, tuple])
def test_tensors_in_a_list_are_one_table(tmp_path, kind):
    load_BLE = loads(2, 4)
    torch.save(kind(torch.tensor(row) for row in load_BLE[0]), tmp_path / "rows.pt")
    torch.save(kind(torch.tensor(step) for step in load_BLE), tmp_path / "steps.pt")
    torch.save({"logical_count": kind(torch.tensor(step) for step in load_BLE)}, tmp_path / "recorder.pt")
    np.testing.assert_array_equal(read_dump(tmp_path / "rows.pt").profile.load_BLE, load_BLE[:1])
    for name in ("steps.pt", "recorder.pt"):
        np.testing.assert_array_equal(read_dump(tmp_path / name).profile.load_BLE, load_BLE)
    torch.save(kind(torch.zeros(3 + at) for at in range(3)), tmp_path / "ragged.pt")
    with pytest.raises(TraceError, match="no known format"):
        read_dump(tmp_path / "ragged.pt")


@pytest.mark.parametrize(
    "value",
    [
        {"expert_counts": [[5, 6]], "layer_ids": [3]},  # which layers is not read
        {"expert_counts": [[5, 6]], "rank": 1},  # a part of the loads
        {"expert_counts": [[5, 6]], "ep_size": 4},
        *(
            {"expert_counts": [[5, 6]], fact: 0}
            for fact in (
                "Rank",
                "rankId",
                "DP rank",
                "gpu",
                "device",
                "worker",
                "shard",
                "node",
                "stage",
                "id",
                "layer",
                "layer_id",
                "layerIdx",
                "first_layer",
                "start_layer",
            )
        ),
        {"expert_counts": [[5, 6]], "layers": "4-7"},
        {"expert_counts": [[5, 6]], "expert_loads": [[5, 6]]},
        {"expert_bias": [[5, 6], [7, 8]]},
        {"tokens": [[5, 6], [7, 8]]},  # ids of tokens, maybe
        {f"model.layers.{layer}.mlp.gate.e_score_correction_bias": [1.5, 2.5] for layer in range(3)},
        {f"model.layers.{layer}.input_layernorm.weight": [1.5, 2.5] for layer in range(3)},
    ],
)
def test_what_is_beside_them_is_not_passed_over(tmp_path, value):
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(TraceError, match="no known format"):
        read_dump(tmp_path / "x.json")


def test_steps_have_to_be_alike(tmp_path):
    path = tmp_path / "x.jsonl"
    for other, said in (
        ({"expert_counts": [[1, 2, 3]] * 5}, "object 1 has .5, 3. numbers, the first one .5, 16."),
        ({"loads": loads(0)[0].tolist()}, "object 1 has no table 'expert_counts'"),
    ):
        path.write_text("\n".join(json.dumps(one) for one in ({"expert_counts": loads(0)[0].tolist()}, other)))
        with pytest.raises(TraceError, match=said):
            read_dump(path)


def test_more_layers_than_tokens_are_asked_about(tmp_path):
    """[layers, tokens, K], as engines hold it, is no trace of as many layers as there are tokens."""
    rng = np.random.default_rng(3)
    ids_TLK = np.stack([np.stack([rng.choice(32, 4, replace=False) for _ in range(6)]) for _ in range(60)])
    for number, ids in enumerate((ids_TLK.transpose(1, 0, 2), ids_TLK[:, :, 0].T)):
        np.save(tmp_path / f"{number}.npy", np.ascontiguousarray(ids))
        with pytest.raises(TraceError, match="6 tokens of 60 layers, or 6 layers of 60 tokens"):
            read_dump(tmp_path / f"{number}.npy", options=ReadOptions(num_experts=32))
        said = ReadOptions(num_experts=32, format="exflow")
        assert read_dump(tmp_path / f"{number}.npy", options=said).trace.num_layers == 60
    np.save(tmp_path / "right.npy", ids_TLK)
    assert read_dump(tmp_path / "right.npy", options=ReadOptions(num_experts=32)).trace.num_layers == 6


def test_ids_below_a_head_of_numbers(tmp_path):
    """What pandas writes: the names 0, 1, 2, ... are no token."""
    ids_TL = np.random.default_rng(4).integers(0, 16, (200, 6))
    path = tmp_path / "x.csv"
    np.savetxt(path, ids_TL, fmt="%d", delimiter=",", header="0,1,2,3,4,5", comments="")
    dump = read_dump(path, options=ReadOptions(format="exflow"))
    np.testing.assert_array_equal(dump.trace.experts[:, :, 0], ids_TL)
    assert any("was taken for a head" in note for note in dump.notes)
    always = np.tile(np.arange(6), (200, 1))  # a token as any other
    np.savetxt(path, always, fmt="%d", delimiter=",")
    assert read_dump(path, options=ReadOptions(format="exflow")).trace.num_tokens == 200


@pytest.mark.parametrize("label", ["layer_{}", "L{}", "model.layers.{}.mlp", "Layer {}"])
def test_an_index_that_names_layers(tmp_path, label):
    load_LE, path = loads(5)[0], tmp_path / "x.csv"
    rows = [[label.format(layer), *map(str, row)] for layer, row in enumerate(load_LE)]
    path.write_text("\n".join(map(",".join, [["", *(f"expert_{e}" for e in range(16))], *rows])))
    np.testing.assert_array_equal(read_dump(path).profile.load_BLE[0], load_LE)


@pytest.mark.parametrize("form", ["json", "gz", "pt", "list"])
@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"axes": "experts, layers"}, "'axes' can say 'layers, experts', it says 'experts, layers'"),
        ({"counters": "running"}, "'counters' can say 'steps', it says 'running'"),
        ({"num_layers": 16, "num_experts": 5}, "'num_layers' says 16 layers, the table has 5"),
        ({"n_layers": 7}, "'n_layers' says 7 layers, the table has 5"),
        ({"numLayers": 7}, "'numLayers' says 7 layers, the table has 5"),
        ({"num_experts": 8}, "'num_experts' says 8 experts, the table has 16"),
    ],
)
def test_facts_that_contradict_the_table_are_told(tmp_path, form, facts, said):
    """Fails if a fact is passed over, whatever holds it."""
    value = {**facts, "counts": loads(6)[0].tolist()}
    path = tmp_path / f"x.{form}"
    if form == "pt":
        torch.save({**facts, "counts": torch.from_numpy(loads(6)[0])}, path)
    elif form == "gz":
        path.write_bytes(gzip.compress(json.dumps(value).encode()))
    else:
        path.write_text(json.dumps([value] if form == "list" else value))
    with pytest.raises(TraceError, match=said):
        read_dump(path)


def test_facts_that_agree_are_kept(tmp_path):
    load_BLE = loads(7, 3)
    facts = {"axes": "layers, experts", "counters": "steps", "num_layers": 5, "num_experts": 16, "num_steps": 3}
    (tmp_path / "x.json").write_text(json.dumps({**facts, "counts": load_BLE.cumsum(axis=0).tolist()}))
    profile = read_dump(tmp_path / "x.json").profile
    assert profile.said == {"axes", "counters"}, "else running totals are refused"
    np.testing.assert_array_equal(profile.load_BLE, load_BLE.cumsum(axis=0))
    (tmp_path / "x.json").write_text(json.dumps({**facts, "num_steps": 4, "counts": load_BLE.tolist()}))
    with pytest.raises(TraceError, match="'num_steps' says 4 steps, the table has 3"):
        read_dump(tmp_path / "x.json")


def test_layers_of_a_model_and_those_of_them_that_are_moe(tmp_path):
    model = ModelSpec.parse("deepseek-v3")
    load = np.random.default_rng(8).integers(1, 99, (58, 256)).tolist()
    (tmp_path / "x.json").write_text(json.dumps({"num_layers": 61, "counts": load}))
    with pytest.raises(TraceError, match="'num_layers' says 61 layers, the table has 58"):
        read_dump(tmp_path / "x.json")
    assert read_dump(tmp_path / "x.json", options=ReadOptions(model=model)).profile.layer_ids[0] == 3


def test_objects_of_one_step_are_no_steps(tmp_path):
    rows = [{"step": at // 2, "counts": one.tolist()} for at, one in enumerate(loads(9, 4))]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TraceError, match="objects 0 and 1 are both of step 0"):
        read_dump(tmp_path / "x.jsonl")


def test_the_fact_that_is_in_the_way_is_named(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"counts": [[5, 6]], "gpu": 1}))
    with pytest.raises(TraceError) as caught:
        read_dump(tmp_path / "x.json")
    assert "'gpu' may say which part of the loads this is" in caught.value.hint


@pytest.mark.parametrize("whole", [False, True])
def test_a_list_that_names_one_tensor_often_is_refused_before_it_is_stacked(tmp_path, monkeypatch, whole):
    """Fails if memory is taken first: 8 MB in the file are 20 GB as a table."""
    one = torch.ones(1000, 1000)
    torch.save([one] * 5000 if whole else {"counts": [one] * 5000}, tmp_path / "x.pt")
    monkeypatch.setattr(np, "stack", lambda *_: pytest.fail("stacked"))
    with pytest.raises(TraceError, match=r"5000 arrays .1000, 1000. of float32 have 5000000000 numbers"):
        read_dump(tmp_path / "x.pt")
    torch.save([{"counts": one} for _ in range(5000)], tmp_path / "steps.pt")
    with pytest.raises(TraceError, match="5000 arrays"):
        read_dump(tmp_path / "steps.pt")


@pytest.mark.parametrize("key", ["model.layers.{}.mlp.gate", "layers.{}.router"])
def test_fractions_of_a_router_may_be_its_scores(tmp_path, key):
    rows = {key.format(layer): [1.5, 2.5, 0.25, 7.0] for layer in range(3)}
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with pytest.raises(TraceError, match="may be loads, or scores or corrections of a router"):
        read_dump(tmp_path / "x.json")
    assert read_dump(tmp_path / "x.json", options=ReadOptions(format="load-table")).profile.num_layers == 3


@pytest.mark.parametrize("name", ["p.json", "p.json.gz", "p.txt"])
def test_a_profile_is_one_under_any_name(tmp_path, name):
    load, idle = loads(10, 3), np.random.default_rng(1).integers(0, 9, (3, 5))
    text = json.dumps({"logical_count": load.tolist(), "identity_count": idle.tolist()}).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    dump = read_dump(tmp_path / name)
    np.testing.assert_array_equal(dump.profile.load_BLE, load)
    np.testing.assert_array_equal(dump.profile.idle_BL, idle)
