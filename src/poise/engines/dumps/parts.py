"""Files as what they hold: the container is told from the first bytes, never from the name."""

from __future__ import annotations

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np

from poise.engines.dumps.csv_text import MAX_CSV_BYTES, csv_text, sniff
from poise.engines.dumps.untrusted import (
    MAX_JSON_BYTES,
    file_size,
    json_room,
    npy_file,
    parse_json,
    read_bytes,
    stacked,
)
from poise.engines.shards import MAX_HEADER_BYTES, Shard, read_shard
from poise.routing.json_tables import Ragged, read_tables
from poise.routing.npz import BROKEN, FREE_BYTES, MAX_RATIO, check_directory
from poise.util.errors import ModelError, TraceError
from poise.util.extras import with_torch
from poise.util.files import open_regular, read_at_most
from poise.util.jsonfile import strict_decoder
from poise.util.yamlfile import parse_yaml

Container = Literal["torch", "npz", "npy", "safetensors", "json", "json-lines", "csv", "yaml", "text"]
HEAD_BYTES = 4096
CSV_HEAD_BYTES = 1 << 18
"""A line of names may have one for each of thousands of experts."""
MAX_LINES_BYTES = 1 << 30
MAX_YAML_BYTES = 1 << 20
MAX_DIRECTORY_BYTES = 32 << 20
"""A file of torch has a member a tensor."""
MAX_CSV_ROOM = 16
"""Bytes of memory that a byte of a table may take, as numbers and while they are sorted."""
GZIP = b"\x1f\x8b"
FOREIGN = {
    b"BZh": "packed by bzip2", b"\xfd7zXZ": "packed by xz", b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"\xff\xfe": "text in UTF-16", b"\xfe\xff": "text in UTF-16", b"PAR1": "Parquet", b"\x89HDF": "HDF5",
    b"SQLite format 3": "a database of SQLite",
}  # fmt: skip
"""How files begin that are not read, and what they are."""
LONG_JSON = 16 << 20
"""From so many bytes on a table in JSON is read piece by piece."""
TABLES = ("logical_count",)
TABLE = re.compile(rb'\s*(?:\{.*"(?:%s)"\s*:\s*)?\[\s*(?:\[\s*)+[-\d]' % "|".join(TABLES).encode(), re.DOTALL)
YAML_KEYS = re.compile(rb"^(num_slots|initial_global_assignments|layer_updates_per_iter)\s*:", re.MULTILINE)
DATED = re.compile(rb"\[\d{4}-\d\d-\d\d")
"""How a log line may begin that is no JSON list."""
UNUSED = frozenset({"misc_objects"})
"""Keys of a torch file that no reader uses; SGLang's is one list in every record."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One file.

    Parameters
    ----------
    path, size : the file, and its bytes.
    container : what kind of file it is.
    value : torch, json, yaml: the object; json-lines: a list of objects; npy: an array; npz: names of its members;
        safetensors: a :class:`~poise.engines.shards.Shard`; csv: a :class:`~poise.engines.dumps.csv_text.CsvText`;
        text: None, readers go through the lines.
    room : bytes of memory that the value takes at most, where they may be more than those of the file.
    """

    path: Path
    size: int
    container: Container
    value: Any
    room: int = 0

    @property
    def name(self) -> str:
        """File name, for messages."""
        return self.path.name


def open_part(path: Path) -> Part:
    """Read a file as far as its container goes.

    Raises
    ------
    TraceError : missing, too large, damaged, or of no kind that is known.
    NoResultError : a torch file, and PyTorch is not installed or does not load.
    """
    try:
        return _open(path)
    except TraceError as error:
        raise TraceError(f"{str(path)[:200]}: {error.message}", hint=error.hint) from None


def _open(path: Path) -> Part:
    size = file_size(path)
    with open_regular(path, TraceError) as stream:
        start = stream.read(CSV_HEAD_BYTES)
    head = start[:HEAD_BYTES]
    if not head.strip():
        raise TraceError("the file is empty")
    if head.startswith(b"PK"):
        names = _members(path)
        if names and not any(name.endswith((".npy", ".pkl")) for name in names):
            raise TraceError(f"a zip archive of {names[0][:60]!r} and {len(names) - 1} more", hint="unpack it first")
        if not any(name.endswith("/data.pkl") for name in names):
            return Part(path, size, "npz", [name.removesuffix(".npy") for name in names])
        value, room = with_torch("poise.engines.dumps.torch_files", f"reading {path}").load(path, skip=UNUSED)
        value = stacked(value)
        return Part(path, size, "torch", value, max(room, value.nbytes) if isinstance(value, np.ndarray) else room)
    if head.startswith(b"\x93NUMPY"):
        return Part(path, size, "npy", npy_file(path))
    if head[:1] == b"\x80":
        raise TraceError("a bare pickle", hint="pickles are not read; torch.save in its zip format is")
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return Part(path, size, "safetensors", _shard(path, int.from_bytes(head[:8], "little")))
    for begin, what in FOREIGN.items():  # behind safetensors, which may begin with any byte
        if head.startswith(begin):
            raise TraceError(f"{what}, which is not read", hint="unpack it: JSON, CSV in UTF-8, .npy, .npz; or gzip")
    if head.startswith(GZIP):
        return _packed(path, size)
    if _is_json(head):
        if size > LONG_JSON and TABLE.match(head):
            return Part(path, size, "json", _table(path))
        return _json(path, size, read_bytes(path, MAX_JSON_BYTES if size <= MAX_JSON_BYTES else MAX_LINES_BYTES))
    if YAML_KEYS.search(head):
        return Part(path, size, "yaml", parse_yaml(read_bytes(path, MAX_YAML_BYTES), TraceError))
    if b"\x00" not in start and sniff(start) is not None:
        return Part(path, size, "csv", csv_text(start, read_bytes(path, MAX_CSV_BYTES)), room=MAX_CSV_ROOM * size)
    if b"\x00" in head:
        raise TraceError("a kind of file that is not known", hint="docs/dumps.md lists what is read")
    return Part(path, size, "text", None)


def _members(path: Path) -> list[str]:
    try:
        with open_regular(path, TraceError) as stream:
            check_directory(stream, file_size(path), MAX_DIRECTORY_BYTES)
            with zipfile.ZipFile(stream) as archive:
                return archive.namelist()
    except BROKEN as error:
        raise TraceError(f"not a readable archive: {error}", hint="it may be truncated") from None


def _shard(path: Path, header: int) -> Shard:
    try:
        if header <= MAX_HEADER_BYTES:  # a longer one is refused unread
            with open_regular(path, TraceError) as stream:
                stream.seek(8)
                json_room(stream.read(header))
        return read_shard(path)
    except ModelError as error:
        raise TraceError(error.message, hint=error.hint) from None


def _is_json(head: bytes) -> bool:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return text[:1] in (b"{", b"[") and not DATED.match(text)


def _packed(path: Path, size: int) -> Part:
    """JSON or CSV that gzip has packed."""
    data = inflate(read_bytes(path, MAX_LINES_BYTES))
    if _is_json(data[:HEAD_BYTES]):
        return _json(path, max(size, len(data)), data)
    start = data[:CSV_HEAD_BYTES]
    table = None if b"\x00" in start else csv_text(start, data)
    if table is None:
        raise TraceError("packed by gzip, and neither JSON nor CSV", hint="unpack it first")
    return Part(path, size, "csv", table, room=(1 + MAX_CSV_ROOM) * len(data))


def inflate(data: bytes) -> bytes:
    """What gzip packed, within FREE_BYTES, or MAX_RATIO times the packed bytes and MAX_LINES_BYTES: as of an ``.npz``.

    Raises
    ------
    TraceError : damaged, or more; no more than the limit is unpacked.
    """
    most = min(MAX_LINES_BYTES, max(FREE_BYTES, MAX_RATIO * len(data)))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            out = read_at_most(cast(BinaryIO, stream), most)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"not readable as gzip packs: {str(error)[:200]}", hint="it may be truncated") from None
    if len(out) > most:
        raise TraceError(
            f"{len(data)} packed bytes would grow to more than {most}", hint="if it is real, unpack it first"
        )
    return out


def _json(path: Path, size: int, data: bytes) -> Part:
    """One document, or one a line."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    room = json_room(data)
    lines = _lines(data)
    first = next(lines, b"")
    if first[-1:] in (b"}", b"]") and next(lines, None) is not None:
        try:
            parse_json(first)
        except TraceError:
            return Part(path, size, "json", parse_json(data), room)
        return Part(path, size, "json-lines", [_line(line) for line in _lines(data)], room)
    return Part(path, size, "json", parse_json(data), room)


def _table(path: Path) -> Any:
    """A long table, or an object with one among its first values, read piece by piece."""
    try:
        with open_regular(path, TraceError) as stream:
            return read_tables(stream, TABLES, strict_decoder())
    except Ragged as error:
        raise TraceError(f"is no full table: {error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"not JSON: {str(error)[:200]}", hint="was it cut short?") from None


def _lines(data: bytes) -> Iterator[bytes]:
    """Lines with something in them, one at a time."""
    return (line for raw in io.BytesIO(data) if (line := raw.strip()))


def _line(line: bytes) -> Any:
    """The object or list of a line; plain values could be more than their bytes tell."""
    if line[:1] not in (b"{", b"["):
        raise TraceError(f"a line is {line[:40]!r}, not an object or a list")
    return parse_json(line)
