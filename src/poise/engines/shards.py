"""The safetensors format by its bytes: tensors of any size and type are copied without being read into memory.

A file is the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets; padded
with spaces) and the data, in which tensors lie without gaps.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.util.errors import ModelError
from poise.util.files import open_regular
from poise.util.jsonfile import parse_json

MAX_HEADER_BYTES = 100_000_000
"""As the format's own library has it."""
MAX_NAME_LENGTH = 1024
BLOCK_BYTES = 2**24
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
Segment = tuple[int, int, int]
"""Bytes to copy: offset in the source, offset in the target, how many."""
CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file; ``begin`` and ``end`` are its bytes within the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Parameters
    ----------
    path : the file.
    header : its first bytes, length included.
    entries : the header, parsed: name -> what it says, ``__metadata__`` included.
    tensors : in order of their data.
    size : bytes of the file.
    stored : bytes it takes on disk; a sparse file takes fewer than its size.
    """

    path: Path
    header: bytes
    entries: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    size: int
    stored: int

    def renamed_header(self, names: dict[str, str]) -> bytes:
        """The header with other names for some tensors; the header itself where none is named."""
        if not names.keys() & self.entries.keys():
            return self.header
        entries = {names.get(name, name): entry for name, entry in self.entries.items()}
        try:
            text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ModelError(f"{self.path}: the header has characters that no file can hold") from None
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def read_shard(path: Path) -> Shard:
    """Header of a file; its data stays unread.

    Raises
    ------
    ModelError : the file cannot be read, or breaks the format: a length beyond the file or 100 MB, an unknown type,
        sizes that disagree, or tensors that overlap or leave gaps.
    """
    with open_regular(path, ModelError) as stream:
        status = os.fstat(stream.fileno())
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER_BYTES, status.st_size - 8):
            raise ModelError(
                f"{path} has {status.st_size} bytes, its header would have {length} (at most {MAX_HEADER_BYTES})",
                hint="is it a safetensors file, and complete?",
            )
        header = start + stream.read(length)
    try:
        entries = parse_json(header[8:].decode(), ModelError)
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: the header is not JSON: {str(error)[:200]}") from None
    except ModelError as error:
        raise ModelError(f"{path}: the header is {error.message}", hint=error.hint) from None
    if not isinstance(entries, dict):
        raise ModelError(f"{path}: the header holds a {type(entries).__name__}")
    said = entries.get("__metadata__", {})
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ModelError(f"{path}: the header's __metadata__ is not of names and texts")
    tensors = [_tensor(path, name, entry) for name, entry in entries.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    at = 0
    for tensor in tensors:
        if tensor.begin != at:
            raise ModelError(f"{path}: {tensor.name!r} begins at {tensor.begin}, the tensor before it ends at {at}")
        at = tensor.end
    if len(header) + at != status.st_size:
        raise ModelError(
            f"{path} has {status.st_size} bytes, header and tensors have {len(header) + at}", hint="is it complete?"
        )
    stored = min(status.st_size, getattr(status, "st_blocks", 2**62) * 512)
    return Shard(path, header, entries, tuple(tensors), status.st_size, stored)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(path: Path, name: str, entry: Any) -> StoredTensor:
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise ModelError(
            f"{path}: a tensor's name has {len(name)} characters, at most {MAX_NAME_LENGTH} printable ones are read"
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{path}: {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ModelError(f"{path}: {name!r} has the unknown type {dtype!r:.40}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(_whole(size) for size in shape):
        raise ModelError(f"{path}: {name!r} has the shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(at) for at in offsets):
        raise ModelError(f"{path}: {name!r} has the data_offsets {offsets!r:.80}")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if 8 * (end - begin) != bits:
        needs = f"{bits / 8:g}" if bits < 2**66 else "too many"
        raise ModelError(
            f"{path}: {name!r} of {dtype} {shape!r:.80} needs {needs} bytes, its offsets give {end - begin}"
        )
    return StoredTensor(name, dtype, tuple(shape), begin, end)


def copy_segments(
    source: Path, target: Path, header: bytes, segments: Iterable[Segment], size: int, tick: Callable[[int], None]
) -> None:
    """Write a new file: ``header``, then ranges of the source, ``size`` bytes in all. Holes of the source stay holes.

    Parameters
    ----------
    segments : as many bytes as lie between the header and ``size``.
    tick : told how many bytes were done.

    Raises
    ------
    ModelError : the source is shorter than a segment says. OSError : the system refuses.
    """
    with source.open("rb", buffering=0) as read, target.open("xb", buffering=0) as write:
        _write_all(write.fileno(), header, 0)
        os.ftruncate(write.fileno(), size)
        for start, to, count in joined(segments):
            _copy(read.fileno(), write.fileno(), start, to, count, source, tick)


def joined(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The same bytes in as few segments as their order allows."""
    start = to = count = 0
    for next_start, next_to, next_count in segments:
        if (next_start, next_to) == (start + count, to + count):
            count += next_count
            continue
        if count:
            yield start, to, count
        start, to, count = next_start, next_to, next_count
    if count:
        yield start, to, count


def _copy(read: int, write: int, start: int, to: int, count: int, path: Path, tick: Callable[[int], None]) -> None:
    end, shift = start + count, to - start
    while start < end:
        data, hole = _next_data(read, start, end)
        tick(data - start)
        start = data
        while start < hole:
            done = _copy_block(read, write, start, start + shift, min(BLOCK_BYTES, hole - start))
            if not done:
                raise ModelError(
                    f"{path} ends at byte {start}, its header needs {end}", hint="did it change meanwhile?"
                )
            tick(done)
            start += done


def _next_data(read: int, start: int, end: int) -> tuple[int, int]:
    """Where data begins and ends, from ``start`` on and up to ``end``; what lies before it is a hole."""
    try:
        data = os.lseek(read, start, os.SEEK_DATA)
        return (end, end) if data >= end else (data, min(end, os.lseek(read, data, os.SEEK_HOLE)))
    except OSError as error:
        if error.errno == errno.ENXIO and os.fstat(read).st_size >= end:  # nothing but a hole up to the end of the file
            return end, end
        return start, end
    except AttributeError:  # the system has no such question
        return start, end


def _copy_block(read: int, write: int, start: int, to: int, count: int) -> int:
    """Copy up to ``count`` bytes, inside the kernel where it can; how many it were, 0 at the end of the file."""
    try:
        done = os.copy_file_range(read, write, count, start, to)
        if done:
            return done
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in CANNOT:
            raise
    block = os.pread(read, count, start)
    _write_all(write, block, to)
    return len(block)


def _write_all(write: int, block: bytes, to: int) -> None:
    view = memoryview(block)
    while view:
        done = os.pwrite(write, view, to)
        view, to = view[done:], to + done
