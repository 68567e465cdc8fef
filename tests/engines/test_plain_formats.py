"""Tables that say nothing about themselves, and lines of tracers: decided where only one reading is possible."""

import gzip
import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.engines import dumps

from poise.engines.dumps import parts
from poise.engines.readers import ReadOptions, read_dump
from poise.machine.model import ModelSpec, from_hf_config
from poise.util.errors import TraceError

MODEL = from_hf_config(dumps.CONFIG, name="test")


def counts(seed=6, high=5000, shape=(6, 32)):
    return np.random.default_rng(seed).integers(0, high, shape)


def save(path, array):
    """An array as .npy, .pt, .json or .csv holds it."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(array), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(array.tolist()))
    else:
        np.savetxt(path, array, fmt="%d" if array.dtype.kind == "i" else "%.17g", delimiter=",")
    return path


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".json", ".csv"])
def test_a_table_of_counts_is_no_trace(tmp_path, suffix):
    path = save(tmp_path / f"c{suffix}", counts())
    dump = read_dump(path)
    assert dump.trace is None and dump.layers_by_place and dump.profile.layer_ids.tolist() == list(range(6))
    np.testing.assert_array_equal(dump.profile.load_BLE[0], counts())
    small = save(tmp_path / f"s{suffix}", counts(high=30))  # may be ids as well
    with pytest.raises(
        TraceError, match=r"loads \[layers, experts\].*ids \[tokens.*\nhint: .*load-table or --format exflow"
    ):
        read_dump(small)
    np.testing.assert_array_equal(
        read_dump(small, options=ReadOptions(format="load-table")).profile.load_BLE[0], counts(high=30)
    )
    trace = read_dump(small, options=ReadOptions(format="exflow")).trace
    assert trace.num_layers == 32 and trace.num_tokens == 6
    if suffix != ".csv":
        steps = save(tmp_path / f"t{suffix}", counts(high=30, shape=(3, 6, 32)))  # no token has an expert twice
        assert read_dump(steps).profile.num_steps == 3
    np.testing.assert_array_equal(
        read_dump(save(tmp_path / f"f{suffix}", counts() / 7)).profile.load_BLE[0], counts() / 7
    )


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".json", ".csv"])
def test_numbers_of_layers_and_experts_are_no_loads(tmp_path, suffix):
    """A table with its index, or its head, among the numbers; and one that lists experts first."""
    rng = np.random.default_rng(0)
    table = np.stack([rng.multinomial(40_000, rng.dirichlet(np.ones(32))) for _ in range(6)])
    assert read_dump(save(tmp_path / f"c{suffix}", table)).profile.load_BLE.sum() == 240_000
    for wrong, said in (
        (np.c_[np.arange(6), table], "the first column counts"), (np.c_[1:7, table], "from 1 to 6 the first column"),
        (np.r_[[np.arange(32)], table], "the first row counts"), (table.T.copy(), "rows are experts"),
        (table.T / 40_000, "rows are experts"),
    ):  # fmt: skip
        path = save(tmp_path / f"w{suffix}", wrong)
        with pytest.raises(TraceError, match=rf"{said}.*\nhint: .*--format load-table"):
            read_dump(path)
        dump = read_dump(path, options=ReadOptions(format="load-table"))
        head = suffix == ".csv" and said == "the first row counts"
        np.testing.assert_array_equal(dump.profile.load_BLE[0], wrong[int(head) :])
        assert any("the first row, 0 to 31, was taken for a head" in note for note in dump.notes) == head
    if suffix != ".csv":
        steps = np.stack([2 * table, 3 * table, table])
        assert read_dump(save(tmp_path / f"s{suffix}", steps)).profile.num_steps == 3
        with pytest.raises(TraceError, match="layers come first, then steps"):
            read_dump(save(tmp_path / f"s{suffix}", np.swapaxes(steps, 0, 1).copy()))


def test_a_first_row_that_counts_up_is_a_layer_where_it_has_as_many_tokens(tmp_path):
    layers = np.array([np.arange(8), np.arange(8)[::-1], [28, 0, 0, 0, 0, 0, 0, 0]])
    for some in (layers, layers[:1]):
        dump = read_dump(save(tmp_path / "c.csv", some), options=ReadOptions(format="load-table"))
        np.testing.assert_array_equal(dump.profile.load_BLE[0], some)


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".json", ".csv"])
def test_what_a_router_gives_tokens_is_no_table_of_layers(tmp_path, suffix):
    """Probabilities, weights of the K chosen and masks look like shares of layers where no model says how many."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(64), size=16)
    chosen = np.argsort(probabilities)[:, -8:]
    mask = np.zeros((16, 64), np.int64)
    np.put_along_axis(mask, chosen, 1, axis=1)
    weights = mask * probabilities
    tables = [(probabilities, "adds up to 1"), (weights, "has 8 numbers above 0"), (mask, "has 8 numbers above 0")]
    for table, said in tables:
        path = save(tmp_path / f"r{suffix}", table)
        options = [ReadOptions(format="load-table"), ReadOptions(ModelSpec.parse("olmoe-1b-7b"))]
        with pytest.raises(TraceError, match="may be loads" if table is mask else rf"every row {said}[^|]*--format"):
            read_dump(path)
        for option in options:  # who says so, or how many layers there are, is believed
            np.testing.assert_array_equal(read_dump(path, options=option).profile.load_BLE[0], table)
    scores = rng.uniform(0.01, 0.99, (16, 64))  # a router that scores each expert alone
    for table, said in ((scores, "no number is above 1"), (100 * probabilities, "every row adds up to 100")):
        path = save(tmp_path / f"d{suffix}", table)
        with pytest.raises(TraceError, match=said):
            read_dump(path)
        for option in (ReadOptions(format="load-table"), ReadOptions(ModelSpec.parse("olmoe-1b-7b"))):
            np.testing.assert_array_equal(read_dump(path, options=option).profile.load_BLE[0], table)
    if suffix != ".csv":
        with pytest.raises(TraceError, match="every row adds up to 1"):
            read_dump(save(tmp_path / f"s{suffix}", np.stack([probabilities] * 3)))
    counted = save(tmp_path / f"c{suffix}", counts() * (np.arange(32) < 9) + (np.arange(32) < 9) * 5000)
    assert read_dump(counted).profile.num_layers == 6  # as many experts with tokens in every layer are nothing odd


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".json", ".csv"])
def test_loads_that_have_something_of_a_router_s_answers_are_loads(tmp_path, suffix):
    """Means over steps where as many experts of each layer have tokens, and steps of one token."""
    rng = np.random.default_rng(1)
    chosen = np.argsort(rng.random((10, 6, 64)))[..., :16]
    used = np.zeros((10, 6, 64), np.int64)
    np.put_along_axis(used, chosen, 1, axis=2)
    means = used[0] * rng.integers(3, 14_926, (6, 64)) / 3
    assert (np.count_nonzero(means, axis=1) == 16).all()
    np.testing.assert_array_equal(read_dump(save(tmp_path / f"m{suffix}", means)).profile.load_BLE[0], means)
    if suffix == ".csv":
        return
    for kind in (np.int64, np.float32):
        np.testing.assert_array_equal(
            read_dump(save(tmp_path / f"o{suffix}", used.astype(kind))).profile.load_BLE, used
        )
    if suffix != ".json":  # where whole numbers are ids as well
        with pytest.raises(TraceError, match=r"loads of one token \[layers, experts\], or choices \[tokens, experts\]"):
            read_dump(save(tmp_path / f"o{suffix}", used[:, 0].astype(np.float32)))


def test_ids_counted_from_1_are_refused(tmp_path):
    path = tmp_path / "n.json"

    def written(layer, expert, experts=8, layers=16):
        rows = {str(i + layer): {str(e + expert): 10 + e + i for e in range(experts)} for i in range(layers)}
        path.write_text(json.dumps(rows))
        return path

    assert read_dump(written(0, 0)).profile.num_experts == 8
    with pytest.raises(TraceError, match=r"expert 0 never.*\nhint: .*--num-experts 9"):
        read_dump(written(0, 1))
    assert read_dump(path, options=ReadOptions(num_experts=9)).profile.num_experts == 9
    with pytest.raises(TraceError, match=r"names expert 8, the model has 8\nhint: .*--zero-experts 1"):
        read_dump(path, options=ReadOptions(num_experts=8))
    assert read_dump(path, options=ReadOptions(num_experts=8, zero_experts=1)).profile.num_experts == 8
    olmoe = ModelSpec.parse("olmoe-1b-7b")
    assert read_dump(written(0, 0, 64), options=ReadOptions(olmoe)).profile.num_layers == 16
    with pytest.raises(TraceError, match="layers 1 to 16, olmoe-1b-7b has MoE layers 0 to 15"):  # 16: no prediction
        read_dump(written(1, 0, 64), options=ReadOptions(olmoe))


def test_what_is_known_of_the_model_decides(tmp_path):
    ids = np.random.default_rng(0).integers(0, 8, (30, 3))
    path = save(tmp_path / "t.npy", ids)
    with pytest.raises(TraceError, match="may be loads"):
        read_dump(path)
    assert read_dump(path, options=ReadOptions(MODEL)).trace.num_tokens == 30  # 30 layers are not the model's
    assert read_dump(path, options=ReadOptions(num_experts=8)).trace.num_tokens == 30  # nor has it 3 experts
    table = save(tmp_path / "l.npy", 4 * ids[:8].T)  # no ids of its 8 experts
    assert read_dump(table, options=ReadOptions(MODEL)).profile.layer_ids.tolist() == dumps.MOE
    long = save(tmp_path / "long.npy", np.random.default_rng(0).integers(0, 8, (3000, 3)))
    assert read_dump(long).trace.num_tokens == 3000  # no model has as many layers
    with pytest.raises(TraceError, match="no table of loads, no ids and no map of the model's 8 experts"):
        read_dump(save(tmp_path / "n.npy", counts(shape=(7, 31))), options=ReadOptions(MODEL))


def test_tables_with_and_without_identity_experts(tmp_path):
    """A model that has some is recorded either way; what is said of a width that fits nothing can be followed."""
    model = replace(ModelSpec.parse("olmoe-1b-7b"), num_zero_experts=4)
    full = counts(shape=(16, 68))
    for suffix in (".npy", ".pt", ".json", ".csv"):
        for width in (64, 68):
            dump = read_dump(save(tmp_path / f"z{suffix}", full[:, :width].copy()), options=ReadOptions(model))
            np.testing.assert_array_equal(dump.profile.load_BLE[0], full[:, :64])
        for low in (0, 700):  # values that could be ids as well, and such that could not
            table = save(tmp_path / f"h{suffix}", counts(high=900, shape=(16, 12)) + low)
            with pytest.raises(TraceError, match=r"give --zero-experts 4$"):
                read_dump(table, options=ReadOptions(num_experts=8))
        with pytest.raises(TraceError, match=r"experts and 16 layers\nhint: check --model$"):
            read_dump(save(tmp_path / f"s{suffix}", full[:15]), options=ReadOptions(model))


def test_layers_that_nothing_was_recorded_of_are_named(tmp_path):
    table = counts(shape=(16, 64))
    table[9] = 0
    for suffix in (".npy", ".pt", ".json", ".csv"):
        dump = read_dump(save(tmp_path / f"l{suffix}", table), options=ReadOptions(ModelSpec.parse("olmoe-1b-7b")))
        assert "nothing was recorded of MoE layers 9" in dump.notes
    torch.save({"logical_count": torch.from_numpy(table)}, tmp_path / "l.pt")
    dump = read_dump(tmp_path / "l.pt", options=ReadOptions(ModelSpec.parse("olmoe-1b-7b")))
    assert dump.profile.num_layers == 15 and "nothing was recorded of MoE layers 9" in dump.notes


def test_maps_and_devices_of_experts_are_neither(tmp_path):
    rows = np.stack([np.random.default_rng(i).permutation(np.r_[:8, :2]) for i in range(3)])
    for suffix in (".json", ".npy", ".pt"):
        path = save(tmp_path / f"m{suffix}", rows)
        np.testing.assert_array_equal(read_dump(path).slots.map_LS, rows)
    where = save(
        tmp_path / "p.pt",
        np.stack([np.random.default_rng(i).permutation(np.repeat(np.arange(4), 4)) for i in range(3)]),
    )
    with pytest.raises(TraceError, match="the device of each expert"):
        read_dump(where)
    with pytest.raises(TraceError, match=r"may be loads.* or a map"):
        read_dump(save(tmp_path / "two.json", np.array([[0, 1], [1, 0]])))
    hole = save(tmp_path / "hole.json", np.r_[[[0, 1, 2, 3, 4, 4]], [[0, 1, 2, 3, 4, 5]]])
    with pytest.raises(TraceError, match="may be loads"):  # a map would lack expert 5 of the first layer
        read_dump(hole)
    (tmp_path / "d.json").write_text(json.dumps({str(i): {str(e): e % 4 for e in range(8)} for i in range(3)}))
    with pytest.raises(TraceError, match="tokens of each expert, or the device"):
        read_dump(tmp_path / "d.json")
    assert read_dump(tmp_path / "d.json", options=ReadOptions(format="load-table")).profile.num_experts == 8
    assert read_dump(save(tmp_path / "one.json", np.arange(8)), options=ReadOptions(MODEL)).slots.map_LS.shape == (3, 8)
    with pytest.raises(TraceError, match="no map that holds every expert"):
        read_dump(save(tmp_path / "row.json", np.array([3, 9, 200])), options=ReadOptions(MODEL))


def test_lists_under_layers(tmp_path):
    path = tmp_path / "l.json"
    path.write_text(
        json.dumps({f"layer_{i}": row.tolist() for i, row in zip(dumps.MOE, counts(shape=(3, 8)), strict=True)})
    )
    dump = read_dump(path)
    assert dump.profile.layer_ids.tolist() == dumps.MOE and not dump.layers_by_place
    np.testing.assert_array_equal(dump.profile.load_BLE[0], counts(shape=(3, 8)))
    torch.save({2: torch.tensor([1, 7, 5]), 3: torch.tensor([1, 2, 0])}, tmp_path / "l.pt")
    with pytest.raises(TraceError, match="tokens of each expert, or ids of experts"):
        read_dump(tmp_path / "l.pt")
    dump = read_dump(tmp_path / "l.pt", options=ReadOptions(format="load-table"))
    assert dump.profile.load_BLE.tolist() == [[[1, 7, 5], [1, 2, 0]]] and dump.profile.layer_ids.tolist() == [2, 3]
    torch.save({2: {0: 5, 3: 6}}, tmp_path / "l.pt")
    assert read_dump(tmp_path / "l.pt").profile.load_BLE.tolist() == [[[5, 0, 0, 6]]]
    for bad in ({"0": [1, 2], "1": [1]}, {"0": {"0": "x"}}, {"0": {"0": 1, "00": 2}}, {"0": {"0": 1}, "1": {"a": 2}}):
        path.write_text(json.dumps(bad))
        with pytest.raises(TraceError):
            read_dump(path)


def test_one_ambiguous_file_of_a_folder_is_not_left_out(tmp_path):
    save(tmp_path / "a.npy", counts())
    save(tmp_path / "b.npy", counts(high=30))
    with pytest.raises(TraceError, match=r"b\.npy.*may be"):
        read_dump(tmp_path)


def test_an_archive_with_one_array_says_as_little(tmp_path):
    ids = dumps.choices(np.random.default_rng(1), 30, layers=1)[:, 0]
    np.savez(tmp_path / "008_002.npz", data=ids)  # the name tells the layer
    np.savez(tmp_path / "x.npz", data=ids)
    np.savez(tmp_path / "c.npz", counts())
    assert read_dump(tmp_path / "008_002.npz").trace.layer_ids.tolist() == [2]
    with pytest.raises(TraceError, match=r"load-table or --format step-routing"):
        read_dump(tmp_path / "x.npz")
    np.testing.assert_array_equal(read_dump(tmp_path / "c.npz").profile.load_BLE[0], counts())


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int32, torch.float16])
def test_tensors_of_any_plain_type_and_numbers_in_tensors(tmp_path, kind):
    """As engines keep counts in few bytes, and what a rank is in a tensor."""
    load = counts(high=200) + 1
    torch.save({"logical_count": torch.from_numpy(load).to(kind), "rank": torch.tensor(0)}, tmp_path / "s.pt")
    dump = read_dump(tmp_path / "s.pt")
    np.testing.assert_array_equal(dump.profile.load_BLE[0], load)
    assert "rank 0 alone was read" not in "".join(dump.notes)
    torch.save({"logical_count": torch.from_numpy(load), "rank": torch.tensor([0, 1])}, tmp_path / "s.pt")
    with pytest.raises(TraceError, match="rank must be a whole number"):
        read_dump(tmp_path / "s.pt")


def lines(tmp_path, rows):
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "r.jsonl"


def test_ranks_of_a_step_are_one_pass(tmp_path):
    rng = np.random.default_rng(3)
    place = tmp_path / "r"
    place.mkdir()
    known = dumps.router_lines(place, rng)
    trace = read_dump(place, options=ReadOptions(num_experts=8)).trace
    np.testing.assert_array_equal(trace.experts, known.experts_TLK)
    assert trace.step.tolist() == [0] * 7 + [1] * 2 + [2] * 6
    assert trace.home.tolist() == [0] * 3 + [1] * 4 + [0] * 2 + [0] + [1] * 5
    row = {"step": 0, "layer": 0, "rank": 0, "indices": [[0, 1], [2, 3]]}
    dump = read_dump(lines(tmp_path, [row, {**row, "rank": 1}]))
    assert dump.trace.num_tokens == 2 and "1 ranks hold the tokens of another" in dump.notes[0]
    dump = read_dump(lines(tmp_path, [row, {**row, "rank": 1, "indices": [[1, 1]]}]))
    assert dump.trace is None and dump.profile.load_BLE.tolist() == [[[1, 3, 1, 1]]] and dump.profile.top_k == 2
    for bad, said in (
        ([row, {**row, "rank": 2, "indices": [[0, 2]]}], "rank 1 has none"),
        ([row, row], "there twice"),
        ([row, {**row, "layer": 1, "indices": [[0, 1]]}], "depending on the layer"),
        ([{**row, "num_tokens": 3}], "num_tokens is 3, indices have 2"),
        ([{**row, "topk": 4}], "topk is 4, indices have 2"),
    ):
        with pytest.raises(TraceError, match=said):
            read_dump(lines(tmp_path, bad))


def test_a_map_and_its_loads_have_to_agree(tmp_path):
    dumps.eplb_stats(tmp_path, np.random.default_rng(0))
    path = tmp_path / "stats.json"
    data = json.loads(path.read_text())
    dump = read_dump(path)
    assert dump.slots.count_BLS.sum() == dump.profile.load_BLE.sum()
    data["per_layer_stats"][1]["logical_load"][2] += 1
    path.write_text(json.dumps(data))
    with pytest.raises(TraceError, match=r"slots of expert 2 have .* in layer 1, logical_load says"):
        read_dump(path)


def answer(sizes, prompt, rng, **more):
    """vLLM's answer with a choice of each size, and its rows."""
    head, tails = dumps.choices(rng, prompt), [dumps.choices(rng, size - 1) for size in sizes]
    made = [{"index": i, "routed_experts": dumps.npy_base64(np.concatenate([head, tail]).astype(np.uint8))}
            for i, tail in enumerate(tails)]  # fmt: skip
    usage = {"prompt_tokens": prompt, "completion_tokens": sum(sizes)}
    return {"choices": made, "usage": usage, **more}, head, tails


def put(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps(value))
    return tmp_path / "a.json"


def test_choices_of_one_prompt_count_it_once(tmp_path):
    made, head, tails = answer((4, 2), 5, np.random.default_rng(0))

    def check(value):
        trace = read_dump(put(tmp_path, value)).trace
        np.testing.assert_array_equal(trace.experts, np.concatenate([head, *tails]))
        assert trace.is_decode.tolist() == [False] * 5 + [True] * 4

    check(made)
    ids = {**made, "usage": None, "prompt_token_ids": [1, 2, 3, 4, 5]}
    check(ids)
    two = {**made, "choices": [{**c, "prompt_token_ids": [i] * 5} for i, c in enumerate(made["choices"])]}
    assert read_dump(put(tmp_path, two)).trace.num_tokens == 5 + 5 + 4  # two prompts in one request
    each = {**made, "usage": {"prompt_tokens": 10, "completion_tokens": 6}}
    dump = read_dump(put(tmp_path, each))
    assert (
        dump.trace.num_tokens == 14 and not dump.trace.is_decode.any() and "how long their prompts are" in dump.notes[0]
    )
    for value in ({**made, "usage": None}, {**made, "usage": {"prompt_tokens": 7, "completion_tokens": 6}}):
        with pytest.raises(TraceError, match="2 choices of 14 rows: whether they share a prompt"):
            read_dump(put(tmp_path, value))


def test_prompts_that_start_late(tmp_path):
    made, head, tails = answer((4,), 5, np.random.default_rng(1))
    rows = np.concatenate([head[3:], *tails])
    made["choices"][0]["routed_experts"] = dumps.npy_base64(rows.astype(np.uint8))
    trace = read_dump(put(tmp_path, made)).trace
    np.testing.assert_array_equal(trace.experts, rows)
    assert trace.is_decode.tolist() == [False] * 2 + [True] * 3
    made["choices"][0]["routed_experts"] = dumps.npy_base64(
        dumps.choices(np.random.default_rng(0), 10).astype(np.uint8)
    )
    with pytest.raises(TraceError, match="10 rows for 5 tokens"):
        read_dump(put(tmp_path, made))


def test_gzip_does_not_grow_without_end(tmp_path, monkeypatch):
    for content, said in ((b"[" + b"0," * (200 << 20), "would grow to more than"), (b"x" * 99, "neither JSON nor CSV")):
        out = io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as stream:
            stream.write(content)
        (tmp_path / "b.json.gz").write_bytes(out.getvalue())
        with pytest.raises(TraceError, match=said):
            read_dump(tmp_path / "b.json.gz")
    monkeypatch.setattr(parts, "FREE_BYTES", 100)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{"logical_count": [[' + b"1," * 5000 + b"1]]}"))
    with pytest.raises(TraceError, match="packed bytes would grow to more than"):
        read_dump(tmp_path / "b.json.gz")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(os.urandom(200))[:-9])
    with pytest.raises(TraceError, match="not readable as gzip packs"):
        read_dump(tmp_path / "b.json.gz")
