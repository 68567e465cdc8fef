"""Large inputs: blocks and samples change nothing but memory, and memory stays below 3 times the file."""

import io
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import few_or, load_batch, tiny_batch, tiny_cluster, tiny_model

from poise.cost import bound as bound_module
from poise.cost import step as step_module
from poise.engines.dump import ReadOptions
from poise.engines.readers import read_dump
from poise.routing import batching, json_tables
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.routing.fingerprint import fingerprint
from poise.routing.profile import load_LE, mutual_information
from poise.routing.trace import NO_EXPERT, LoadProfile, RoutingTrace, kept, twice
from poise.util import room
from poise.util.errors import NoTrafficError, TraceError

SEEDS = st.integers(0, 2**32 - 1)


def picks(rng, tokens=17, layers=3, experts=6, top_k=3, idle=0.3):
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :top_k]
    return np.where(rng.random(ids.shape) < idle, NO_EXPERT, ids).astype(np.int16)


def tiny_blocks(patch, size):
    patch.setattr(room, "BLOCK_BYTES", size)


# blocks ---------------------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([1, 50, 200]), st.sampled_from([1, 3, 20]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_blocks_change_nothing_of_a_trace(seed, size, top_k, idle):
    rng = np.random.default_rng(seed)
    ids = picks(rng, experts=24, top_k=top_k, idle=0.3 if idle else 0.0)
    weights = rng.random(ids.shape)
    with pytest.MonkeyPatch.context() as patch:
        tiny_blocks(patch, size)
        try:
            trace = RoutingTrace(ids, 24, weights=weights)
        except NoTrafficError:
            assert (ids == NO_EXPERT).all()
            return
        units = fingerprint(trace)
        load = load_LE(ids, 24)
    behind = np.argsort(ids == NO_EXPERT, axis=2, kind="stable")
    np.testing.assert_array_equal(trace.experts, np.take_along_axis(ids, behind, axis=2))
    np.testing.assert_array_equal(trace.weights, np.take_along_axis(weights.astype(np.float32), behind, axis=2))
    for layer in range(3):
        np.testing.assert_array_equal(load[layer], [(ids[:, layer] == e).sum() for e in range(24)])
    whole = fingerprint(trace)
    np.testing.assert_array_equal(units.units, whole.units)
    np.testing.assert_array_equal(units.loads, whole.loads)


@given(SEEDS, st.sampled_from([1, 64, 4096]), st.sampled_from([2, 5, 18]), st.sampled_from([NO_EXPERT, None]))
@settings(max_examples=60, deadline=None)
def test_an_expert_that_is_listed_twice_is_found_in_any_block(seed, size, top_k, free):
    rng = np.random.default_rng(seed)
    ids = picks(rng, experts=20, top_k=top_k, idle=0.05)
    if rng.random() < 0.7:
        token, layer, (one, two) = rng.integers(17), rng.integers(3), rng.choice(top_k, 2, replace=False)
        ids[token, layer, one] = ids[token, layer, two] = 7
    wrong = [
        (t, i)
        for t, i in np.ndindex(17, 3)
        if len(set(rest := [e for e in ids[t, i].tolist() if e != free])) < len(rest)
    ]
    with pytest.MonkeyPatch.context() as patch:
        tiny_blocks(patch, size)
        assert twice(ids, free) == (wrong[0] if wrong else None)


@given(SEEDS, st.sampled_from([1, 13, 40]), st.booleans(), st.sampled_from(["home", "home_node_dedup", "stay"]))
@settings(max_examples=40, deadline=None)
def test_bounds_in_parts_are_the_bounds(seed, size, loads, traffic):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, (2, 1))
    batch = load_batch(rng, steps=4) if loads else tiny_batch(rng, devices=3, tokens=(3, 0, 5, 2, 4))
    options = {"traffic": "home" if loads else traffic, "slots_D": np.array([2, 2, 1])}
    whole = bound_module.bound_terms(batch, cluster, tiny_model(batch), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "_CHUNK_ELEMENTS", size)
        assert len(step_module.step_chunks(batch, 3)) > 1
        parts = bound_module.bound_terms(batch, cluster, tiny_model(batch), **options)
    for name in ("compute_BL", "dispatch_BL", "combine_BL", "kv_BL"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=0)


def test_loads_stay_in_their_type_and_are_the_same_in_any():
    rng = np.random.default_rng(0)
    count = rng.poisson(20, (6, 2, 4))
    batches, prints = [], []
    for dtype in ("u1", "u2", ">i4", "i8", "f2", "f4", "f8"):
        profile = LoadProfile(count.astype(dtype))
        assert profile.load_BLE.dtype.itemsize <= max(4, np.dtype(dtype).itemsize)
        batches.append(make_batch(profile))
        prints.append(fingerprint(profile).loads)
    for batch, print_ in zip(batches, prints, strict=True):
        np.testing.assert_array_equal(batch.load_BLE, batches[0].load_BLE)
        np.testing.assert_array_equal(print_, prints[0])


def test_what_others_may_write_to_is_copied():
    count, ids = np.ones((1, 2, 4), np.uint16), picks(np.random.default_rng(0), idle=0.0)
    profile, trace = LoadProfile(count), RoutingTrace(ids, 6)
    count[:], ids[:] = 9, 0
    assert (profile.load_BLE == 1).all() and (trace.experts != 0).any()
    assert kept(profile.load_BLE) is profile.load_BLE


# samples --------------------------------------------------------------------------------------------------------------


def steps_of_loads(rng, steps=60):
    return LoadProfile(rng.poisson(rng.gamma(4, 5, (steps, 2, 4))))


@given(SEEDS, st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_drawn_loads_are_those_of_the_whole(seed, most):
    profile = steps_of_loads(np.random.default_rng(seed))
    whole = make_batch(profile, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "MOST_LOADS", most * 8)
        some, again, first = (make_batch(profile, seed=seed, sample=apart) for apart in (True, True, False))
    np.testing.assert_array_equal(some.load_BLE, again.load_BLE)
    if most >= 60:
        assert some.drawn_from is None and some.sampled == "" and some.order == whole.order
        np.testing.assert_array_equal(some.load_BLE, whole.load_BLE)
        return
    assert (some.num_steps, some.drawn_from) == (most, 60) and some.sampled == f"{most} of 60 steps"
    at = [next(b for b in range(60) if np.array_equal(whole.load_BLE[b], step)) for step in some.load_BLE]
    assert all(i * 60 // most <= b < (i + 1) * 60 // most for i, b in enumerate(at))  # one of each part, in order
    np.testing.assert_array_equal(first.load_BLE, whole.load_BLE[:most])
    assert str(most) in some.order and "60 recorded loads" in some.order


@given(SEEDS, st.integers(1, 6), st.sampled_from(["interleaved", "file", "recorded"]))
@settings(max_examples=30, deadline=None)
def test_drawn_steps_of_tokens_are_steps_of_the_whole(seed, most, order):
    rng = np.random.default_rng(seed)
    ids = picks(rng, tokens=60, idle=0.1)
    step = {"step": np.sort(rng.integers(9, size=60))} if order == "recorded" else {}
    trace = RoutingTrace(
        ids, 6, request=np.arange(60) // 5, is_decode=np.arange(60) % 5 > 1, home=rng.integers(3, size=60), **step
    )
    options = {"seed": 3} if order == "recorded" else {"tokens_per_step": 7, "order": order, "seed": 3}
    whole = make_batch(trace, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "MOST_HELD", most * trace.experts[:9].size)
        some = make_batch(trace, **options)
    assert some.drawn_from == (None if some.num_steps == whole.num_steps else whole.num_steps)
    b = 0
    for mine in range(some.num_steps):
        one = some.part(slice(mine, mine + 1))
        while True:
            other = whole.part(slice(b, b + 1))
            b += 1
            if np.array_equal(one.experts_TLK, other.experts_TLK) and np.array_equal(one.home_T, other.home_T):
                break
        np.testing.assert_array_equal(one.load_BLE, other.load_BLE)


def test_a_drawn_mean_is_that_of_all_within_its_error():
    rng = np.random.default_rng(5)
    profile = LoadProfile(rng.poisson(np.linspace(20, 60, 4000)[:, None, None] * np.array([1.0, 2, 3, 4])[None, None]))
    whole = make_batch(profile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "MOST_LOADS", 400 * 4)
        some = make_batch(profile)
    error = some.load_BLE.std(axis=0) / np.sqrt(400)
    assert (np.abs(some.load_LE() - whole.load_LE()) < 5 * error).all()


# JSON -----------------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(0, 2**40), st.floats(0, 1e15), st.integers(-5, 300))
TABLES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)).flatmap(
    lambda shape: st.lists(
        st.lists(st.lists(NUMBERS, min_size=shape[2], max_size=shape[2]), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0], max_size=shape[0],
    )
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=6)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
)  # fmt: skip


@given(TABLES, VALUES, st.sampled_from([1, 5, 64, 1 << 20]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
       st.sampled_from([None, 1]), st.booleans(), st.integers(0, 10**6))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_pieces_of_json_are_the_whole(count, other, size, coding, indent, bare, cut):
    value = count if bare else {"before": other, "t": count, "after": other}
    text = json.dumps(value, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_tables, "READ_BYTES", size)
        patch.setattr(json_tables, "BLOCK_NUMBERS", size)
        got = json_tables.read_tables(io.BytesIO(text.encode(coding)), ("t",), json.JSONDecoder())
        with pytest.raises(ValueError):
            short = text[: cut % (len(text) - 1)]
            json_tables.read_tables(io.BytesIO(short.encode(coding)), ("t",), json.JSONDecoder())
    found = got if bare else got.pop("t")
    np.testing.assert_array_equal(found, np.array(count))
    assert not found.flags.writeable and (bare or got == {"before": other, "after": other})


@pytest.mark.parametrize("text", ["[[1, 2], [3]]", '[["1"]]', "[[true]]", "[[1], 2]", "[[1, null]]", f"[[{10**400}]]"])
def test_no_full_table(text):
    with pytest.raises(json_tables.Ragged):
        json_tables.read_tables(io.BytesIO(text.encode()), (), json.JSONDecoder())


# memory ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A trace and loads of some 8 MB, each in several formats."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    ids = ((rng.integers(64, size=(16_000, 61, 1)) + 8 * np.arange(8)) % 64).astype(np.uint8)
    loads = rng.poisson(100, (280, 61, 256)).astype(np.uint16)
    request, decode = np.arange(16_000) // 40, np.arange(16_000) % 40 > 20
    np.savez(folder / "trace.npz", experts=ids, num_experts=64, request=request.astype(np.int32), is_decode=decode)
    np.savez_compressed(
        folder / "packed.npz", experts=ids, num_experts=64, request=request.astype(np.int32), is_decode=decode
    )
    np.save(folder / "trace.npy", ids)
    np.savez(folder / "loads.npz", counts=loads)
    np.save(folder / "loads.npy", loads)
    many = rng.poisson(1000, (40, 61, 256))  # Python keeps no objects of such numbers
    (folder / "loads.json").write_text(json.dumps({"logical_count": many.tolist()}))
    size = {
        name: (folder / name).stat().st_size
        for name in ("trace.npz", "trace.npy", "loads.npz", "loads.npy", "loads.json")
    }
    return folder, {**size, "packed.npz": size["trace.npz"]}


def halves(found):
    if isinstance(found, LoadProfile):
        return found.steps(slice(0, found.num_steps // 2)), found.steps(slice(found.num_steps // 2, None))
    return found.split_requests()


def looked_at(path):
    found = read(path)
    if isinstance(found, RoutingTrace):
        load_LE(found.experts, found.num_experts)
        mutual_information(found.experts, found.num_experts, shuffles=1)


def batched(path):
    parts = halves(read(path))
    return [(make_batch(part, tokens_per_step=256), fingerprint(part)) for part in parts]


def converted(path):
    options = ReadOptions(
        num_experts=64 if "trace" in path.name else 256, format="exflow" if "trace" in path.name else None
    )
    return read_dump(path, options=options)


WORKS = [
    (name, work) for work in (looked_at, batched) for name in ("trace.npz", "packed.npz", "loads.npz", "loads.json")
]
FEW_WORKS = [("packed.npz", looked_at), ("trace.npz", batched), ("loads.json", batched)]


@pytest.mark.parametrize(
    ("name", "work"), few_or(WORKS, FEW_WORKS), ids=lambda value: getattr(value, "__name__", value)
)
def test_memory_stays_below_three_times_the_file(files, monkeypatch, name, work):
    _within(files, monkeypatch, name, work)


@pytest.mark.parametrize("name", ["trace.npy", "loads.npy", "loads.json"])
def test_converting_stays_below_three_times_the_file(files, monkeypatch, name):
    monkeypatch.setattr("poise.engines.dumps.parts.LONG_JSON", 1 << 20)
    _within(files, monkeypatch, name, converted)


def _within(files, monkeypatch, name, work):
    """The rule with a megabyte in place of the gigabyte that blocks and samples may take."""
    folder, size = files
    tiny_blocks(monkeypatch, 1 << 18)
    monkeypatch.setattr(batching, "MOST_LOADS", 1 << 16)
    monkeypatch.setattr(batching, "MOST_HELD", 1 << 17)
    monkeypatch.setattr(json_tables, "BLOCK_NUMBERS", 1 << 16)
    work(folder / name)  # what is imported and compiled does not count
    tracemalloc.start()
    try:
        held = work(folder / name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    del held
    assert peak < 3 * size[name] + (4 << 20), f"{peak / size[name]:.2f} times the file"


@pytest.mark.parametrize("name", ["trace.npz", "packed.npz", "loads.npz", "loads.json", "loads.npy"])
def test_what_does_not_fit_is_refused_with_both_numbers(files, monkeypatch, name):
    monkeypatch.setattr(room, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(room, "available_bytes", lambda: 1_000_000)
    monkeypatch.setattr(json_tables, "BLOCK_NUMBERS", 1 << 16)
    with pytest.raises(TraceError, match=r"takes \d{7,} bytes of memory, 1000000 are available"):
        (converted if name == "loads.npy" else read)(files[0] / name)


def test_what_is_available_is_below_the_limit_of_the_process():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = room.available_bytes()
    assert before is None or before > 0
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * resource.getpagesize()
    most = used + (1 << 30)
    if hard not in (resource.RLIM_INFINITY,) and most > hard:
        pytest.skip("limited already")
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        assert room.available_bytes() <= 1 << 30
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
