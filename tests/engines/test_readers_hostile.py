"""Untrusted dumps: whatever is in a file, a valid dump or a typed error comes out, no code runs, memory stays small."""

import base64
import io
import json
import pickle
import resource
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from tests.engines import dumps
from tests.helpers import few_or

from poise.engines import readers
from poise.engines.dumps import parts
from poise.engines.readers import ReadOptions, read_dump
from poise.machine.model import from_hf_config
from poise.routing import files
from poise.util import extras
from poise.util.errors import InputError, NoResultError, TraceError
from poise.util.jsonfile import unique

MODEL = from_hf_config(dumps.CONFIG, name="test")
MUTANTS = few_or(10_000, 2_000)
HEADROOM = 1 << 29
"""Bytes of address space that reading small files may take; they have a few kilobytes."""


def check(paths, options):
    """Read; the dump if it is valid, None if it was refused. Anything else is the failure."""
    try:
        dump = read_dump(paths, options=options)
    except (InputError, NoResultError) as error:
        assert error.message
        return None
    assert dump.engine and dump.kind and repr(dump)
    if dump.trace is not None:
        assert 0 <= dump.trace.experts.min() <= dump.trace.experts.max() < dump.trace.num_experts
    if dump.profile is not None:
        assert np.isfinite(dump.profile.load_BLE).all() and dump.profile.load_BLE.min() >= 0
    if dump.balance_B is not None:
        assert (dump.balance_B > 0).all() and (dump.balance_B <= 1).all()
    if dump.slots is not None and dump.slots.count_BLS is not None:
        assert np.isfinite(dump.slots.count_BLS).all()
    return dump


@pytest.fixture
def little_memory():
    """Allocations that small files cannot excuse fail with a MemoryError, which no reader may hide."""
    torch.zeros(1) + 1  # whatever starts late has started
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def rezipped(data, rng):
    """An archive with other bytes in a member and the checksum that fits: what lies behind the checksum is reached."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = sorted(members)[rng.integers(len(members))]
    if rng.random() < 0.5:
        name = next((n for n in members if n.endswith("data.pkl")), name)
    members[name] = mutated(members[name], rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


NUMBERS = [
    b"-1",
    b"0",
    b"1e400",
    b"NaN",
    b"1.5",
    b"99999999999999999999999",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"4000000000",
]


def mutated(data, rng):
    """Bytes flipped, cut, put in, doubled, or a number swapped for another."""
    data = bytearray(data)
    kind = rng.integers(6)
    at = int(rng.integers(len(data) + 1))
    if kind == 0:
        for _ in range(rng.integers(1, 5)):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = rng.bytes(int(rng.integers(1, 9)))
    elif kind == 3:
        end = min(len(data), at + int(rng.integers(1, 40)))
        data[at:at] = data[at:end]
    elif kind == 4:
        del data[at : at + int(rng.integers(1, 40))]
    else:
        digits = [i for i in range(max(0, at - 50), min(len(data), at + 50)) if chr(data[i]).isdigit()]
        if digits:
            start = end = digits[0]
            while end < len(data) and chr(data[end]).isdigit():
                end += 1
            data[start:end] = NUMBERS[rng.integers(len(NUMBERS))]
    return bytes(data)


def put(path, data):
    """A new file: some file systems flush one that was cut and written again."""
    path.unlink()
    path.write_bytes(data)


def test_many_mutants(tmp_path, little_memory):
    rng = np.random.default_rng(20261125)
    each = MUTANTS // len(dumps.MAKERS) + 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, maker in dumps.MAKERS.items():
            folder = tmp_path / name
            folder.mkdir()
            maker(folder, rng)
            files = sorted(folder.iterdir())
            seeds = {path: path.read_bytes() for path in files}
            options = ReadOptions() if name in dumps.ONE_LAYER else ReadOptions(MODEL)
            assert check(folder, options) is not None
            for _ in range(each):
                path = files[rng.integers(len(files))]
                data = seeds[path]
                bad = rezipped(data, rng) if data.startswith(b"PK") and rng.random() < 0.7 else mutated(data, rng)
                put(path, bad)
                refused += check(folder if len(files) < 3 else path, options) is None
                put(path, data)
                tried += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert tried >= MUTANTS and refused > tried // 2
    assert grown < 300 << 20, f"{grown >> 20} MiB more in memory"


class Alarm:
    """Loading this as a pickle would raise the alarm."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def zipped_pickle(path, data, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, content in members.items():
            archive.writestr(f"archive/data/{name}", content)


def test_no_code_is_run(tmp_path):
    path = tmp_path / "d.pt"
    torch.save({"records": [Alarm()]}, path)
    with pytest.raises(TraceError, match="where only tensors"):
        read_dump(path)
    path.write_bytes(pickle.dumps({"logical_count": Alarm()}))
    with pytest.raises(TraceError, match="a bare pickle"):
        read_dump(path)
    torch.save({"logical_count": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(TraceError, match="a bare pickle"):
        read_dump(path)
    for data in (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
                 b"\x80\x04\x8c\x05torch\x8c\x06Tensor\x93.", b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R."):  # fmt: skip
        zipped_pickle(path, data)
        with pytest.raises(TraceError, match="where only tensors"):
            read_dump(path)
    np.savez(tmp_path / "s.npz", data=np.array([Alarm()], object), allow_pickle=True)
    (tmp_path / "o.npy").write_bytes(b"")
    np.save(tmp_path / "o.npy", np.array([Alarm()], object), allow_pickle=True)
    for name in ("s.npz", "o.npy"):
        with pytest.raises(TraceError):
            read_dump(tmp_path / name)


def test_tensors_that_are_larger_than_their_file(tmp_path, little_memory):
    path = tmp_path / "d.pt"
    torch.save({"logical_count": torch.ones(1).expand(1 << 20, 1 << 12, 8)}, path)
    with pytest.raises(TraceError, match="more than the file has"):
        read_dump(path)
    many = {f"x{i}": torch.zeros(1, dtype=torch.int64).expand(1 << 20) for i in range(1000)}
    torch.save({"logical_count": torch.ones(2, 2), **many}, path)
    with pytest.raises(TraceError, match="more than the file has"):
        read_dump(path)
    torch.save({"logical_count": torch.ones(2, 2).to_sparse()}, path)
    with pytest.raises(TraceError):
        read_dump(path)
    record = dumps.token_record(0, 0, np.zeros((4000, 3, 2), int), range(4000), [4000], 1)
    torch.save(
        {"records": [dict(record) for _ in range(3000)], "last_physical_to_logical_map": torch.zeros(5, 12)}, path
    )
    with pytest.raises(TraceError, match="unfold to more than"):
        read_dump(path)
    torch.save({"records": [record] * 3000}, path)
    with pytest.raises(TraceError, match="in two places"):
        read_dump(path)


def test_archives_that_inflate(tmp_path, little_memory):
    path = tmp_path / "d.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        with archive.open("archive/data/0", "w", force_zip64=True) as stream:
            for _ in range(200):
                stream.write(bytes(1 << 20))
    with pytest.raises(TraceError, match="compressed"):
        read_dump(path)
    torch.save({"logical_count": torch.ones(64, 64)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"\x00\x00\x80\x3f" * 4)] ^= 1  # one bit of one number
    path.write_bytes(data)
    with pytest.raises(TraceError, match=r"damaged|not readable"):
        read_dump(path)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "{", "[" * 100_000, '{"logical_count": 1e400}', '{"logical_count": [[1e400, 1]]}', '{"logical_count": [[NaN, 1]]}',
        '{"logical_count": [[1, 2], [3]]}', '{"logical_count": [["1", 2]]}', '{"logical_count": [[-1, 2]]}',
        '{"logical_count": [[1, 2]], "logical_count": [[1, 2]]}', '{"logical_count": [[0, 0]]}', '{"logical_count": []}',
        '{"logical_count": [[' + "9" * 5000 + "]]}", '{"physical_to_logical_map": [[0, 99999999999999999999]]}',
        '{"physical_to_logical_map": [[0, 5]]}', '{"physical_to_logical_map": {}}', '{"load_history": [{}]}', '{"load_history": []}',
        '{"layer_list": [{"layer_id": 1, "device_list": []}]}', '{"layer_list": 1}', '{"expert_to_ep_rank": "abc"}',
        '{"meta_info": {"routed_experts": "????", "prompt_tokens": 1, "completion_tokens": 1}}',
        '{"meta_info": {"routed_experts": "AAAA", "prompt_tokens": -1, "completion_tokens": 1e9}}',
        '{"routed_experts": [[[0, 0]]]}', '{"routed_experts": [[[0, 1]], [[0]]]}', '{"prompt_routed_experts": "k05VTVBZ"}',
        '[{"1": [[0]]}, {"2": [[0]]}]', '[{"1": [[0]], "01": [[1]]}]', '[[0, 1], [2]]', "[0, -1]", '{"num_experts": 4, "num_experts_per_token": 2}',
        "num_slots: 4\ninitial_global_assignments: &a\n  0: [0, 1, 2, 3]\nx: *a\n", "num_slots: 3\ninitial_global_assignments:\n  0: [0, 1]\n",
        "num_slots: !!python/object/apply:os.system [true]\ninitial_global_assignments: {}\n", "num_slots: " + "[" * 5000,
        "initial_global_assignments:\n  a: [0]\n", "num_slots: !!int ''\n", "EPLB step: 1: avg_tokens=1, max_tokens=2, balancedness=7.5\n",
        "EPLB step: 1: avg_tokens=0.00, max_tokens=0, balancedness=0.0000\n", "INFO nothing here\n", "\x00\x01\x02",
        '{"type": "route", "layer": 0, "topk_ids": [0]}\n{"type": "route", "layer": 1, "topk_ids": [0, 1]}\n',
    ],
)  # fmt: skip
def test_broken_text_is_a_trace_error(tmp_path, text, little_memory):
    (tmp_path / "f").write_text(text)
    with pytest.raises(TraceError):
        read_dump(tmp_path / "f")


@pytest.mark.parametrize("error", [ImportError("No module named 'torch'"), OSError("libcudart.so.12: cannot open")])
def test_torch_files_where_torch_is_missing_or_broken(tmp_path, monkeypatch, error):
    torch.save({"logical_count": torch.ones(2, 2)}, tmp_path / "d.pt")

    def import_module(name):
        assert name == "poise.engines.dumps.torch_files"
        raise error

    monkeypatch.setattr(extras.importlib, "import_module", import_module)
    with pytest.raises(NoResultError, match=r"needs PyTorch: (No module|libcudart).*\nhint: pip install"):
        read_dump(tmp_path / "d.pt")


def test_lists_of_text_take_no_room(tmp_path, little_memory):
    """numpy would make every entry as wide as the widest."""
    rows = [["x"] * 2000, ["y" * 1_000_000]]
    (tmp_path / "f").write_text(json.dumps({"logical_count": rows}))
    with pytest.raises(TraceError, match="must hold numbers alone"):
        read_dump(tmp_path / "f")


def test_headers_that_lie(tmp_path, little_memory):
    path = tmp_path / "f"
    header = "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 8), }"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + bytes(64))
    with pytest.raises(TraceError, match="64000000000 bytes, but holds 64"):
        read_dump(path)
    text = json.dumps({"1_1": {"dtype": "I64", "shape": [10**9], "data_offsets": [0, 8 * 10**9]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(TraceError):
        read_dump(path)
    path.write_bytes(struct.pack("<Q", 20) + b"{" + b" " * 40)
    with pytest.raises(TraceError):
        read_dump(path)
    path.write_bytes(b"PK\x05\x06" + bytes(18))
    with pytest.raises(TraceError):
        read_dump(path)
    path.write_bytes(zlib.compress(bytes(100)))
    with pytest.raises(TraceError, match=r"not known|no known"):
        read_dump(path)


def test_json_that_unfolds(tmp_path, little_memory):
    """Empty lists, dicts and texts take twenty times their bytes."""
    path = tmp_path / "f"
    for start, item, count in ((b"[", b"[],", 21 << 20), (b"{", b'"":{},', 7 << 20), (b"{}\n[", b'"ab",', 21 << 20)):
        path.write_bytes(start + item * count)
        with pytest.raises(TraceError, match=r"may take \d+ bytes in memory, at most"):
            read_dump(path)
    path.write_bytes(b"{}\n" + b"1\n" * 100)
    with pytest.raises(TraceError, match="not an object or a list"):
        read_dump(path)
    with path.open("wb") as stream:
        stream.write(b"[0")
        stream.truncate(parts.MAX_JSON_BYTES + 1)
    with pytest.raises(TraceError, match=rf"{parts.MAX_JSON_BYTES + 1} bytes in JSON"):
        read_dump(path)
    with path.open("wb") as stream:  # by pieces: this process has little memory, too
        stream.write(struct.pack("<Q", 7 + (90 << 20)) + b'{"1_1":')
        for _ in range(30):
            stream.write(b"[]," * (1 << 20))
    with pytest.raises(TraceError, match="in memory, at most"):  # the header of a safetensors file
        read_dump(path)


def test_pickles_that_unfold(tmp_path, little_memory):
    path = tmp_path / "d.pt"
    made = b"h\x00h\x01R" * 600_000  # what it says again and again is a new object each time
    for data in (
        b"\x80\x02ccollections\nOrderedDict\nq\x00)q\x01](" + made + b"e.",
        b"\x80\x02](" + b"]" * (7 << 20) + b"e.",
    ):
        zipped_pickle(path, data)
        with pytest.raises(TraceError, match=r"a pickle of \d+ bytes would take more than"):
            read_dump(path)
    zipped_pickle(path, bytes((32 << 20) + 1))
    with pytest.raises(TraceError, match="above 33554432 bytes"):
        read_dump(path)


def test_many_files_share_one_limit(tmp_path, monkeypatch):
    """Each may repeat a number up to 64 MiB, however small it is."""
    monkeypatch.setattr(readers, "MAX_FILE_BYTES", 8 << 20)
    for i in range(3):
        torch.save({"logical_count": torch.ones(1).expand(1 << 10, 1 << 11)}, tmp_path / f"{i}.pt")  # 8 MiB
    assert read_dump(tmp_path / "0.pt").profile.num_layers == 1 << 10
    with pytest.raises(TraceError, match="more than 16777216 bytes together, or in memory"):
        read_dump(tmp_path)


def test_statistics_that_are_large_on_paper(tmp_path, little_memory):
    text = json.dumps({"1_1": {"dtype": "U8", "shape": [1 << 30, 4], "data_offsets": [0, 1 << 32]}}).encode()
    with (tmp_path / "rank0_raw.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + (1 << 32))
    with pytest.raises(TraceError, match=r"4294967296 numbers, at most \d+ are read"):
        read_dump(tmp_path)


def test_numbers_of_one_byte_stay_small(tmp_path, little_memory):
    """As int64 they would take eight times the file, 200 MiB, and two or three times that on the way."""
    tokens = np.zeros((1 << 14, 1600), np.uint8)
    tokens[0] = 3
    np.save(tmp_path / "t.npy", tokens)
    trace = read_dump(tmp_path / "t.npy").trace
    assert trace.experts.shape == (*tokens.shape, 1) and trace.experts.dtype == np.int16


def test_routed_experts_of_one_byte_stay_small(tmp_path, little_memory):
    shape = (1 << 14, 384, 4)
    rows = np.broadcast_to(np.arange(4, dtype=np.uint8), shape)
    answer = {"routed_experts": base64.b64encode(rows.tobytes()).decode(), "routed_experts_dtype": "uint8",
              "prompt_tokens": shape[0], "completion_tokens": 1}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"meta_info": answer}))
    trace = read_dump(tmp_path / "a.json", options=ReadOptions(top_k=4)).trace
    assert trace.experts.shape == shape and trace.experts.dtype == np.int16


class Key(str):
    """A text that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Key.compared += 1
        return str.__eq__(self, other)


def test_many_keys_with_one_twice_are_told_at_once(tmp_path, monkeypatch):
    """Looking for the one that is there twice took the square of their number."""
    monkeypatch.setattr(Key, "compared", 0)
    with pytest.raises((TraceError, ValueError), match="key '1999' appears twice"):
        unique([(Key(i), 0) for i in [*range(2000), 1999]])
    assert Key.compared < 100  # keys of one hash only
    (tmp_path / "f.json").write_text('{"1": 0, "2": 0, "1": 0}')
    for reads in (read_dump, files.read):
        with pytest.raises(TraceError, match="key '1' appears twice"):
            reads(tmp_path / "f.json")
