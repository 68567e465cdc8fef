"""Traces and profiles: files, selections, joins, and damage by the thousand."""

import io
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise import api
from poise.routing.files import join, read
from poise.routing.profile import (
    affinity_LEE,
    coactivation_LEE,
    load_LE,
    mutual_information,
)
from poise.routing.synthetic import zipf_trace
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import InputError, OptionError, TraceError


def small(seed=0, tokens=60):
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((tokens, 3, 6)), axis=2)[:, :, :2]
    return RoutingTrace(
        experts.astype(np.int16), 6, request=np.repeat(np.arange(tokens // 5), 5).astype(np.int32),
        is_decode=np.tile([False, False, False, True, True], tokens // 5), layer_ids=np.array([1, 2, 5], np.int32),
        domain=np.repeat([0, 1], tokens // 2).astype(np.int16), domain_names=("a", "b"), name="small",
    )  # fmt: skip


def same(a, b):
    for name in ("experts", "request", "is_decode", "step", "home", "weights", "layer_ids", "domain"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            np.testing.assert_array_equal(x, y)
    return a.num_experts == b.num_experts and a.domain_names == b.domain_names


def test_a_saved_trace_reads_back(tmp_path):
    trace = small()
    trace.save(tmp_path / "t.npz")
    assert same(trace, read(tmp_path / "t.npz"))


def test_top_one_traces_may_leave_out_k(tmp_path):
    np.savez(tmp_path / "t.npz", experts=np.array([[0, 1], [2, 3]], np.uint8))
    trace = read(tmp_path / "t.npz")
    assert trace.experts.shape == (2, 2, 1) and trace.num_experts == 4 and trace.request.tolist() == [0, 1]


def test_selections(tmp_path):
    trace = small()
    path = str(tmp_path / "t.npz")
    trace.save(path)
    assert read(path + "#domain=a").num_tokens == 30
    assert read(path + "#phase=decode").num_tokens == 24
    first, second = read(path + "#half=first"), read(path + "#half=second")
    assert not set(first.request.tolist()) & set(second.request.tolist())
    assert first.num_tokens + second.num_tokens == 60
    assert set(np.unique(first.domain)) == set(np.unique(second.domain)) == {0, 1}
    for bad in ("#domain=c", "#phase=train", "#color=red", "#half=third"):
        with pytest.raises(InputError):
            read(path + bad)


def test_join_keeps_requests_apart_and_merges_domains(tmp_path):
    a, b = small(0), small(1)
    both = join([a, b])
    assert both.num_tokens == 120 and len(both.requests()) == 24 and both.domain_names == ("a", "b")
    np.testing.assert_array_equal(both.experts, np.concatenate([a.experts, b.experts]))
    with pytest.raises(TraceError, match=r"6 experts, .* has 8"):
        join([a, zipf_trace(num_tokens=5, num_layers=3, num_experts=8, top_k=2)])
    with pytest.raises(TraceError, match="no trace"):
        join([])


def test_profiles(tmp_path):
    load = np.zeros((4, 5))
    load[1:3] = np.arange(10).reshape(2, 5)
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": load.tolist()}))
    (tmp_path / "b.json").write_text(json.dumps({"logical_count": [load.tolist(), (2 * load).tolist()]}))
    np.savez(tmp_path / "c.npz", counts=load[1:3], layers=np.array([1, 2]))
    cross = np.arange(50.0).reshape(2, 5, 5)
    cross[1] = cross[0].T  # layer 7 has the same loads in both tables
    np.savez(tmp_path / "d.npz", cross=cross, layer_pairs=np.array([[0, 7], [7, 15]]))
    a, b, c, d = (read(tmp_path / name) for name in ("a.json", "b.json", "c.npz", "d.npz"))
    assert a.layer_ids.tolist() == b.layer_ids.tolist() == c.layer_ids.tolist() == [1, 2]
    np.testing.assert_array_equal(a.load_BLE[0], load[1:3])
    assert b.num_steps == 2 and api.load([tmp_path / "a.json", tmp_path / "b.json"]).num_steps == 3
    assert d.layer_ids.tolist() == [0, 7, 15]
    np.testing.assert_array_equal(d.load_BLE[0, 0], cross[0].sum(axis=1))
    with pytest.raises(OptionError, match="loads only"):
        read(str(tmp_path / "a.json") + "#phase=decode")


BAD_ARRAYS = {
    "ids out of range": {"experts": np.array([[9]]), "num_experts": np.array(4)},
    "negative ids": {"experts": np.array([[-1]]), "num_experts": np.array(4)},
    "float ids": {"experts": np.array([[0.5]])},
    "NaN ids": {"experts": np.array([[np.nan]])},
    "expert twice": {"experts": np.array([[[1, 1]]]), "num_experts": np.array(4)},
    "one axis": {"experts": np.array([1, 2])},
    "no tokens": {"experts": np.zeros((0, 3), np.uint8), "num_experts": np.array(4)},
    "requests of another length": {"experts": np.zeros((3, 2), np.uint8), "request": np.zeros(4, np.int32)},
    "weights of another shape": {"experts": np.zeros((3, 2), np.uint8), "weights": np.zeros((3, 2, 2), np.float32)},
    "NaN weights": {"experts": np.zeros((1, 1), np.uint8), "weights": np.full((1, 1, 1), np.nan, np.float32)},
    "layers not ascending": {"experts": np.zeros((3, 2), np.uint8), "layer_ids": np.array([2, 1])},
    "unnamed domain": {"experts": np.zeros((3, 2), np.uint8), "domain": np.zeros(3, np.int16)},
    "no experts": {"request": np.zeros(3)},
    "NaN loads": {"counts": np.array([[np.nan, 1.0]])},
    "negative loads": {"counts": np.array([[-1.0, 1.0]])},
    "no load": {"counts": np.zeros((2, 3))},
    "pickled": {"experts": np.array([{"a": 1}], dtype=object)},
    "huge num_experts": {"experts": np.zeros((1, 1), np.uint8), "num_experts": np.array(10**9)},
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_trace_errors(tmp_path, name):
    np.savez(tmp_path / "t.npz", **BAD_ARRAYS[name])
    with pytest.raises(TraceError):
        read(tmp_path / "t.npz")


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", "{}", '{"logical_count": 3}', '{"logical_count": [[1, 2], [1]]}',
                                  '{"logical_count": [[1, "x"]]}', '{"logical_count": [[1, NaN]]}',
                                  '{"logical_count": [[1e999]]}', '{"logical_count": [[-1]]}', '{"logical_count": null}',
                                  "[" * 100_000, '{"logical_count": [[' + "9" * 5000 + "]]}"])  # fmt: skip
def test_bad_json_is_a_trace_error(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(TraceError):
        read(tmp_path / "t.json")


def test_a_header_that_claims_too_much_allocates_nothing(tmp_path):
    import zipfile

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<i8", "fortran_order": False, "shape": (10**9, 10)})
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("experts.npy", head.getvalue() + b"\0" * 64)
    tracemalloc.start()
    with pytest.raises(TraceError, match="80000000000"):
        read(tmp_path / "t.npz")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_two_thousand_damaged_files_give_trace_errors(tmp_path):
    small().save(tmp_path / "good.npz")
    stored = io.BytesIO()
    np.savez(stored, experts=small().experts, num_experts=np.array(6), request=small().request)
    (tmp_path / "good.json").write_text(json.dumps({"logical_count": [[1, 2, 3], [4, 5, 6]]}))
    sources = [((tmp_path / "good.npz").read_bytes(), "t.npz"), (stored.getvalue(), "t.npz"),
               ((tmp_path / "good.json").read_bytes(), "t.json")]  # fmt: skip
    rng, refused = np.random.default_rng(0), 0
    for turn in range(2100):
        data, name = sources[turn % 3]
        broken = bytearray(data)
        for _ in range(int(rng.integers(1, 5))):
            broken[rng.integers(len(broken))] = rng.integers(256)
        if rng.random() < 0.25:
            broken = broken[: rng.integers(len(broken))]
        (tmp_path / name).write_bytes(bytes(broken))
        try:
            read(tmp_path / name)
        except TraceError:
            refused += 1
    assert refused > 500


@given(st.integers(0, 1000), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_statistics_equal_counting_by_hand(seed, top_k):
    ids = zipf_trace(num_tokens=40, num_layers=3, num_experts=5, top_k=top_k, seed=seed).experts
    load, affinity, together = np.zeros((3, 5)), np.zeros((2, 5, 5)), np.zeros((3, 5, 5))
    for t in range(40):
        for layer in range(3):
            for e in ids[t, layer]:
                load[layer, e] += 1
                for f in ids[t, layer]:
                    together[layer, e, f] += 1
                if layer < 2:
                    for f in ids[t, layer + 1]:
                        affinity[layer, e, f] += 1
    np.testing.assert_array_equal(load_LE(ids, 5), load)
    np.testing.assert_array_equal(affinity_LEE(ids, 5), affinity)
    np.testing.assert_array_equal(coactivation_LEE(ids, 5), together)


def test_information_of_copies_and_of_independent_layers():
    rng = np.random.default_rng(0)
    first = rng.integers(4, size=4000)
    ids = np.stack([first, (first + 1) % 4, rng.integers(4, size=4000)], axis=1)[:, :, None]
    real, null = mutual_information(ids, 4)
    assert real[0] == pytest.approx(np.log(4), abs=0.01) and real[1] < 0.01 and (null < 0.01).all()


def test_profile_rejects_what_is_no_load():
    with pytest.raises(TraceError, match="empty"):
        LoadProfile(np.zeros((0, 2)))
