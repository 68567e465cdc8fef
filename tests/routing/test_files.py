"""Untrusted files: whatever is in them, a valid object or a TraceError comes out, and memory stays small."""

import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers import few_or
from tests.routing.test_trace import random_trace

from poise import api
from poise.routing import json_tables
from poise.routing import npz as npz_module
from poise.routing.files import read
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import InputError, TraceError

FUZZ = settings(max_examples=few_or(1000, 200), deadline=None, suppress_health_check=list(HealthCheck))


def npz(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def trace_bytes(compressed: bool = True) -> bytes:
    trace = random_trace(0, tokens=20)
    names = ("experts", "num_experts", "request", "is_decode", "step", "home", "weights", "layer_ids", "domain")
    out = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(out, **{n: getattr(trace, n) for n in names}, domain_names=np.array(trace.domain_names))
    return out.getvalue()


SEEDS = [
    trace_bytes(),
    trace_bytes(compressed=False),
    npz(counts=np.arange(12).reshape(3, 4), layers=np.array([0, 2, 5])),
    npz(cross=np.ones((2, 3, 3), int), layer_pairs=np.array([[0, 1], [1, 2]])),
]
JSON_SEED = json.dumps({"logical_count": [[0, 0, 0], [1, 2, 3.5], [4, 5, 6]]}).encode()


def check(path) -> bool:
    """Read; True if it is valid, False if it was refused. Anything else is the failure."""
    try:
        found = read(path)
    except TraceError as error:
        assert error.message
        return False
    if isinstance(found, RoutingTrace):
        assert 0 <= found.experts.min() <= found.experts.max() < found.num_experts
        assert found.request.shape == found.is_decode.shape == found.experts.shape[:1]
    else:
        assert np.isfinite(found.load_BLE).all() and found.load_BLE.min() >= 0
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def test_the_seeds_are_valid(folder):
    for data in SEEDS:
        (folder / "a.npz").write_bytes(data)
        assert check(folder / "a.npz")
    (folder / "a.json").write_bytes(JSON_SEED)
    assert check(folder / "a.json")


@FUZZ
@given(
    which=st.integers(0, len(SEEDS) - 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_flipped_bytes(folder, which, flips):
    data = bytearray(SEEDS[which])
    for at, value in flips:
        data[int(at * len(data))] = value
    (folder / "b.npz").write_bytes(data)
    check(folder / "b.npz")


@FUZZ
@given(which=st.integers(0, len(SEEDS) - 1), keep=st.floats(0, 1), drop=st.floats(0, 1))
def test_cut_and_shortened_files(folder, which, keep, drop):
    data = SEEDS[which]
    end = int(keep * len(data))
    gap = int(drop * end)
    for piece in (data[:end], data[end:], data[:gap] + data[end:]):
        (folder / "c.npz").write_bytes(piece)
        valid = check(folder / "c.npz")
        assert not valid or piece == data


MEMBERS = ["experts", "num_experts", "request", "is_decode", "step", "home", "weights", "layer_ids", "domain",
           "domain_names", "counts", "layers", "cross", "layer_pairs"]  # fmt: skip
DTYPES = ["u1", "i2", "i4", ">i8", "u8", "f2", "f4", "f8", "c8", "?", "U3", "S2", "M8[s]", "O"]


@FUZZ
@given(
    data=st.data(),
    names=st.lists(st.sampled_from(MEMBERS), min_size=1, max_size=6, unique=True),
)
def test_members_of_any_type_and_shape(folder, data, names):
    arrays = {}
    for name in names:
        shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4)))
        values = np.array(data.draw(st.lists(st.integers(-2, 300), min_size=1, max_size=4)))
        dtype = data.draw(st.sampled_from(DTYPES))
        arrays[name] = np.resize(values, shape).astype(dtype)
        if data.draw(st.booleans()):
            arrays[name] = np.asfortranarray(arrays[name])
    (folder / "d.npz").write_bytes(npz(**arrays))
    check(folder / "d.npz")


@FUZZ
@given(at=st.floats(0, 1, exclude_max=True), text=st.binary(max_size=4), cut=st.integers(0, 3))
def test_changed_json(folder, at, text, cut):
    place = int(at * len(JSON_SEED))
    (folder / "e.json").write_bytes(JSON_SEED[:place] + text + JSON_SEED[place + cut :])
    check(folder / "e.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)


@FUZZ
@given(value=VALUES)
def test_any_json_value(folder, value):
    (folder / "f.json").write_text(json.dumps({"logical_count": value}))
    check(folder / "f.json")


def member(header: str, body: bytes = b"") -> bytes:
    text = header.encode("latin-1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def archive_of(path, **members: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zf:
        for name, data in members.items():
            zf.writestr(f"{name}.npy", data)
    return path


NUMBER = member("{'descr': '<i8', 'fortran_order': False, 'shape': (), }\n", struct.pack("<q", 4))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 1000000), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (100000000, 8), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000, 7), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (0, 99999999999999999999999), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 8), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 1), }",
        "{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (1, 1), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (" + "1," * 200 + "), }",
        "(" * 2000,
        "",
    ],
)
def test_headers_that_lie_cost_no_memory(tmp_path, header):
    path = archive_of(tmp_path / "a.npz", experts=member(header, b"\0" * 64), num_experts=NUMBER)
    tracemalloc.start()
    try:
        with pytest.raises(TraceError, match="experts"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    rows = 200 << 20
    header = member(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({rows}, 1), }}")
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zf:
        with zf.open("experts.npy", "w") as out:
            out.write(header)
            for _ in range(rows >> 20):
                out.write(bytes(1 << 20))
        zf.writestr("num_experts.npy", NUMBER)
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(TraceError, match="times"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_members_share_one_budget(tmp_path, monkeypatch):
    """Each may be small enough alone; members may also lie on the same packed bytes."""
    monkeypatch.setattr(npz_module, "FREE_BYTES", 1 << 20)
    rows = 900_000
    arrays = {"experts": np.zeros((rows, 1), np.uint8), "num_experts": 4}
    path = tmp_path / "t.npz"
    np.savez_compressed(path, **arrays)
    assert read(path).num_tokens == rows
    np.savez_compressed(path, **arrays, is_decode=np.zeros(rows, bool))
    with pytest.raises(TraceError, match=r"its members would grow from \d+ to 18\d{5} bytes, more than 100 times"):
        read(path)
    np.savez(path, **arrays, is_decode=np.zeros(rows, bool))  # as they are
    assert read(path).num_tokens == rows
    monkeypatch.setattr(npz_module, "MAX_UNPACKED_BYTES", rows)
    with pytest.raises(TraceError, match="unpack to 18"):
        read(path)


def test_a_long_list_of_members_is_not_read(tmp_path):
    """zipfile makes an object of every entry before anybody can count them."""
    entry = b"PK\x01\x02" + bytes(42)
    path = tmp_path / "t.npz"
    for count, end in ((300_000, b""), (300_000, b"64")):
        listed = entry * count
        total = len(listed).to_bytes(4, "little") if not end else b"\xff" * 4
        head = b""
        if end:
            head = b"PK\x06\x06" + bytes(36) + len(listed).to_bytes(8, "little") + bytes(8)
            head += b"PK\x06\x07" + bytes(4) + len(listed).to_bytes(8, "little") + bytes(4)
        path.write_bytes(listed + head + b"PK\x05\x06" + bytes(8) + total + bytes(6))
        with pytest.raises(TraceError, match=f"list of members has {len(listed)} bytes"):
            read(path)


def test_json_that_unfolds(tmp_path, monkeypatch):
    """A list of nothing takes twenty times its three bytes."""
    (tmp_path / "t.json").write_text('{"logical_count": [' + "[]," * 1000 + "[1]]}")
    with pytest.raises(TraceError, match="not a full table"):
        read(tmp_path / "t.json")
    monkeypatch.setattr(json_tables, "MAX_ROOM", 1 << 16)
    monkeypatch.setattr(json_tables, "LONG", 1 << 10)
    for size, count in ((1 << 20, 2000), (1 << 10, 2000), (64, 20)):  # long values, as they come, and many
        monkeypatch.setattr(json_tables, "READ_BYTES", size)
        rest = ", ".join(f'"{key}": [{"[]," * count}[1]]' for key in range(2000 // count * 5))
        (tmp_path / "t.json").write_text(f'{{"logical_count": [[1]], {rest}}}')
        with pytest.raises(TraceError, match=r"bytes in memory, at most 65536|more than 65536 bytes in memory"):
            read(tmp_path / "t.json")


class Trap:
    """Unpickling this would raise the alarm."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_pickles_are_never_run(tmp_path):
    for name in ("experts", "request", "domain_names"):
        arrays = {"experts": np.zeros((1, 1), int), "num_experts": 1} | {name: np.array([Trap()], object)}
        (tmp_path / "p.npz").write_bytes(npz(**arrays))
        with pytest.raises(TraceError, match="ickle"):
            read(tmp_path / "p.npz")


def test_missing_files_and_arrays_are_named(tmp_path):
    with pytest.raises(TraceError, match="nowhere"):
        read(tmp_path / "nowhere.npz")
    (tmp_path / "x.npz").write_bytes(npz(tokens=np.zeros(3)))
    with pytest.raises(TraceError, match=r"experts.*tokens"):
        read(tmp_path / "x.npz")
    (tmp_path / "y.json").write_text('{"counts": 1}')
    with pytest.raises(TraceError, match="logical_count"):
        read(tmp_path / "y.json")
    with pytest.raises(TraceError, match="no trace"):
        api.load([])


def test_selectors(tmp_path):
    trace = random_trace(4)
    path = tmp_path / "t.npz"
    trace.save(path)
    found = read(f"{path}#domain=a,phase=decode")
    assert np.array_equal(found.experts, trace.experts[(trace.domain == 0) & trace.is_decode])
    halves = [read(f"{path}#half={half}") for half in ("first", "second")]
    assert sum(half.num_tokens for half in halves) == trace.num_tokens
    assert not set(halves[0].request.tolist()) & set(halves[1].request.tolist())
    for bad in ("domain=zz", "phase=never", "half=third", "color=red", "phase", "domain="):
        with pytest.raises(InputError, match=r"\w"):
            read(f"{path}#{bad}")
    LoadProfile(np.ones((1, 2)))
    (tmp_path / "l.json").write_bytes(JSON_SEED)
    with pytest.raises(InputError, match="loads only"):
        read(f"{tmp_path / 'l.json'}#half=first")


def test_profiles_of_every_form_agree(tmp_path):
    load = np.array([[[1, 2, 3], [3, 2, 1]], [[4, 0, 0], [0, 4, 0]]])
    (tmp_path / "s.json").write_text(json.dumps({"logical_count": load.tolist()}))
    steps = read(tmp_path / "s.json")
    singles = []
    for i, one in enumerate(load):
        singles.append(tmp_path / f"{i}.npz")
        singles[-1].write_bytes(npz(counts=one, layers=np.arange(2)))
    assert np.array_equal(api.load(singles).load_BLE, steps.load_BLE) and steps.num_steps == 2
    cross = np.arange(9).reshape(1, 3, 3)
    (tmp_path / "c.npz").write_bytes(npz(cross=cross, layer_pairs=np.array([[2, 7]])))
    pairs = read(tmp_path / "c.npz")
    assert pairs.layer_ids.tolist() == [2, 7]
    assert np.array_equal(pairs.load_BLE[0], [cross[0].sum(axis=1), cross[0].sum(axis=0)])
