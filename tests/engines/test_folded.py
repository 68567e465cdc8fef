"""Picks of one layer that were read as layers, by too small a K, by none, or with axes exchanged."""

import base64
import json

import numpy as np
import pytest
from tests.engines.test_plain_formats import save

from poise.engines.readers import ReadOptions, read_dump
from poise.util.errors import TraceError

TOKENS, LAYERS, EXPERTS, TOP_K = 300, 6, 64, 4


def picks(seed=0, tokens=TOKENS, layers=LAYERS, experts=EXPERTS, top_k=TOP_K):
    return np.argsort(np.random.default_rng(seed).random((tokens, layers, experts)), axis=2)[:, :, :top_k]


def answer(experts_TLK):
    """SGLang's: numbers without a shape."""
    return {
        "meta_info": {
            "routed_experts": base64.b64encode(experts_TLK.astype("<i4").tobytes()).decode(),
            "prompt_tokens": len(experts_TLK) - 9,
            "completion_tokens": 10,
        }
    }


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("top_k", [1, 2])
def test_too_small_a_k_is_refused(tmp_path, top_k, dense):
    experts = picks()
    experts[:, :dense] = 0
    (tmp_path / "a.json").write_text(json.dumps(answer(experts)))
    dump = read_dump(tmp_path / "a.json", options=ReadOptions(top_k=TOP_K))
    np.testing.assert_array_equal(dump.trace.experts, experts[:, dense:])
    read, true = (LAYERS - dense) * TOP_K // top_k, LAYERS - dense
    with pytest.raises(
        TraceError, match=rf"read as {read} layers of {top_k} experts .* {true} layers of 4.*\n.*--top-k"
    ):
        read_dump(tmp_path / "a.json", options=ReadOptions(top_k=top_k))


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".json"])
def test_bare_picks_of_a_layer_are_not_layers_of_one(tmp_path, suffix):
    dense = picks(tokens=3000)
    dense[:, 0] = 0
    for experts in (picks(tokens=3000, layers=1, top_k=8)[:, 0], picks(tokens=3000).reshape(3000, -1),
                    dense.reshape(3000, -1)):  # fmt: skip
        path = save(tmp_path / f"t{suffix}", experts)
        with pytest.raises(TraceError, match=r"read as (8|24) layers of 1 .* (1 layers of 8|6 layers of 4)"):
            read_dump(path)
        assert read_dump(path, options=ReadOptions(format="exflow")).trace.top_k == 1  # who says so means it


@pytest.mark.parametrize("top_k", [TOP_K, 2])
def test_picks_that_compute_nothing_prove_nothing(tmp_path, top_k):
    """Identity experts leave holes (-1), also several in a layer; too small a K is told as without them."""
    experts = picks()
    experts[7, 2, 1:3] = experts[9, 0, 0] = -1
    (tmp_path / "a.json").write_text(json.dumps(answer(experts)))
    options = ReadOptions(top_k=top_k, num_experts=EXPERTS, zero_experts=8)
    if top_k == TOP_K:
        np.testing.assert_array_equal(
            np.sort(read_dump(tmp_path / "a.json", options=options).trace.experts), np.sort(experts)
        )
    else:
        with pytest.raises(TraceError, match="read as 12 layers of 2 experts"):
            read_dump(tmp_path / "a.json", options=options)


def cyclic(tokens=3000, layers=LAYERS, experts=32):
    """A top-1 router whose layers are sure of each other: expert e, then e + 1, ..."""
    first = np.random.default_rng(0).integers(0, experts, (tokens, 1))
    return (first + np.arange(layers)) % experts


def test_layers_that_never_agree_are_read_where_the_shape_is_said(tmp_path):
    path = save(tmp_path / "t.npy", cyclic()[:, :, None])
    np.testing.assert_array_equal(read_dump(path).trace.experts[:, :, 0], cyclic())
    nested = tmp_path / "v.json"
    nested.write_text(json.dumps({"routed_experts": cyclic(40)[:, :, None].tolist()}))
    assert read_dump(nested).trace.num_layers == LAYERS
    path = save(tmp_path / "t.npy", cyclic())
    with pytest.raises(TraceError, match=r"read as 6 layers of 1 .*\n.* if they are layers, say so: --format exflow"):
        read_dump(path)
    np.testing.assert_array_equal(
        read_dump(path, options=ReadOptions(format="exflow")).trace.experts[:, :, 0], cyclic()
    )


@pytest.mark.parametrize("array", [
    np.zeros((0, 4, 5), int), np.zeros((0, 5), int), np.zeros((5, 0), int), np.zeros((4, 0, 5), int),
    np.where(np.arange(64 * 4 * 6).reshape(64, 4, 6) == 77, -1, picks(tokens=64).transpose(0, 2, 1)),
    np.where(np.arange(6)[:, None] == 3, -1, cyclic(64)[:, :, None]),
])  # fmt: skip
def test_empty_arrays_and_ids_below_zero_are_typed_errors(tmp_path, array):
    np.save(tmp_path / "t.npy", array)
    for options in (ReadOptions(), ReadOptions(num_experts=32, top_k=1), ReadOptions(format="load-table")):
        with pytest.raises(TraceError) as error:
            read_dump(tmp_path / "t.npy", options=options)
        assert "--format load-table" not in str(error.value)  # which would not help


@pytest.mark.parametrize("seed", range(4))
def test_layers_stay_layers(tmp_path, seed):
    """Of top-1 models: even, skewed, and layers that use other experts each, where nothing is proven."""
    rng = np.random.default_rng(seed)
    even = rng.integers(0, 32, (3000, 12))
    skewed = np.stack([rng.choice(32, 3000, p=rng.dirichlet(np.full(32, 0.2))) for _ in range(12)], axis=1)
    apart = rng.integers(0, 4, (3000, 8)) + 4 * (np.arange(8) % 2)
    for experts in (even, skewed, apart):
        assert read_dump(save(tmp_path / "t.npy", experts)).trace.num_layers == experts.shape[1]


def test_ids_with_the_axes_exchanged_are_no_loads(tmp_path):
    path = save(tmp_path / "t.npy", picks().transpose(0, 2, 1).copy())
    with pytest.raises(TraceError, match=r"no column has a number twice in its 4 rows, .*\n.*--format load-table"):
        read_dump(path)
    for least, most in ((0, 64), (0, 4000)):  # loads, small and large
        load = np.random.default_rng(1).integers(least, most, (40, 4, 8))
        assert read_dump(save(tmp_path / "l.npy", load), options=ReadOptions(num_experts=8)).profile.num_steps == 40
