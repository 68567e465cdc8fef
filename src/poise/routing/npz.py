"""Reading arrays from an untrusted ``.npz``: headers first, no pickles, nothing allocated before its size is known.

numpy's own reader believes the header of a member and allocates what it claims. Here a member is opened, its header is
parsed by a strict pattern, its shape is compared with the number of bytes that the archive holds, and only then read.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from poise.util.errors import TraceError
from poise.util.files import READ_BYTES, open_regular
from poise.util.room import require

MAX_MEMBERS = 256
MAX_HEADER_BYTES = 4096
MAX_UNPACKED_BYTES = 8 << 30
"""Most bytes of all members together."""
MAX_DIMENSIONS = 8
FREE_BYTES = 64 << 20
"""Below this size an archive may be compressed as much as it likes."""
MAX_RATIO = 100
"""Most unpacked bytes of all members per byte of a larger archive; routing ids stay below 50."""

MAGIC = b"\x93NUMPY"
MAX_DIRECTORY_BYTES = 1 << 20
MEMBER = b"PK"
"""How a zip file begins."""
END, END_64_AT, END_BYTES = b"PK\x05\x06", b"PK\x06\x07", 22
"""How the end of a zip file begins, and the record before it in large ones."""
BROKEN = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError,
          ValueError, IndexError, KeyError, OverflowError, struct.error)  # fmt: skip
"""What zipfile raises on damaged archives, encrypted members and unknown compression."""


OF_POISE = {"lost": "placements after losses", "score": "a home table", "slot_expert": "an expert placement",
            "experts": "a routing trace", "counts": "a load profile", "cross": "a load profile"}  # fmt: skip
"""What poise writes, by an array that it alone or first has, in the order to look for them."""


DAMAGED = "the file is truncated or damaged"


@dataclass(frozen=True, slots=True)
class Header:
    """Shape and dtype of one member, as its header claims and its size confirms."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * self.dtype.itemsize

    def require(self, *shapes: tuple[int | None, ...], kinds: str = "iu") -> None:
        """Raise TraceError unless the shape is one of ``shapes`` (None = any size) and the dtype kind in ``kinds``."""
        if self.dtype.kind not in kinds:
            wanted = " or ".join(KIND_NAMES[k] for k in kinds if k != "u")
            raise TraceError(f"{self.name} must hold {wanted}, got {self.dtype}", hint=f"convert {self.name} first")
        for want in shapes:
            if len(want) == len(self.shape) and all(w is None or w == s for w, s in zip(want, self.shape, strict=True)):
                return
        wanted = " or ".join("[" + ", ".join("any" if w is None else str(w) for w in want) + "]" for want in shapes)
        raise TraceError(f"{self.name} must have shape {wanted}, got {list(self.shape)}")


KIND_NAMES = {"i": "integers", "u": "integers", "b": "booleans", "f": "floats", "U": "text"}


class Archive:
    """Members of one open ``.npz`` of ``size`` bytes; zipfile gives no more of a member than it says it holds."""

    def __init__(self, zf: zipfile.ZipFile, size: int, wanted: Sequence[str] = ()) -> None:
        self._zf, self._wanted = zf, wanted
        self._info: dict[str, zipfile.ZipInfo] = {}
        infos = zf.infolist()
        if len(infos) > MAX_MEMBERS:
            raise TraceError(f"the archive has {len(infos)} members, at most {MAX_MEMBERS} are read")
        _check_budget(sum(info.file_size for info in infos), size)
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name in self._info:
                raise TraceError(f"the archive has two members named {name!r}", hint="write the file anew")
            self._info[name] = info

    def __contains__(self, name: str) -> bool:
        return name in self._info

    @property
    def names(self) -> list[str]:
        """Members in file order."""
        return list(self._info)

    def header(self, name: str) -> Header:
        """Parse a member's header and compare it with the member's size; the data stay unread."""
        if name not in self._info:
            kind = next((text for key, text in OF_POISE.items() if key in self), "")
            other = f"it is {kind}: was another file meant?" if kind else ""
            raise TraceError(
                f"array {name!r} is missing, the file has {', '.join(self.names[:12]) or 'no arrays'}",
                hint=DAMAGED if kind in self._wanted else other,
            )
        info = self._info[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise TraceError(f"{name} uses zip compression {info.compress_type}", hint="use numpy.savez_compressed")
        with self._zf.open(info) as file:
            header = _parse_header(name, cast(BinaryIO, file))
        if header.offset + header.nbytes != info.file_size:
            raise TraceError(
                f"{name} claims shape {list(header.shape)} of {header.dtype}, {header.nbytes} bytes, but holds "
                f"{info.file_size - header.offset}",
                hint=DAMAGED,
            )
        return header

    def read(self, header: Header) -> NDArray[Any]:
        """The whole array, read-only."""
        return self._filled(header, header.dtype)

    def read_integers(self, header: Header, low: int, high: int, dtype: Any) -> NDArray[Any]:
        """The whole array of whole numbers within ``low..high``, read-only and as ``dtype``, in no other's memory.

        Raises
        ------
        TraceError : no whole numbers, or one is out of range.
        """
        if header.dtype.kind not in "iub":
            raise TraceError(
                f"{header.name} must be whole numbers, got {header.dtype}",
                hint=f"store {header.name} as an integer array",
            )
        return self._filled(header, np.dtype(dtype), (low, high))

    def _filled(self, header: Header, dtype: np.dtype[Any], within: tuple[int, int] | None = None) -> NDArray[Any]:
        require(prod(header.shape) * dtype.itemsize, f"{header.name} {list(header.shape)} of {dtype}", TraceError)
        out = np.empty(prod(header.shape), dtype=dtype)
        at = 0
        for block in self._blocks(header, max(1, READ_BYTES // max(1, header.dtype.itemsize))):
            if within is not None and (int(block.min()) < within[0] or int(block.max()) > within[1]):
                raise TraceError(
                    f"{header.name} must lie in {within[0]}..{within[1]}, got {block.min()}..{block.max()}"
                )
            out[at : at + block.size] = block
            at += block.size
        out = out.reshape(header.shape, order="F" if header.fortran else "C")
        out.flags.writeable = False
        return out

    def _blocks(self, header: Header, elements: int) -> Iterator[NDArray[Any]]:
        left = prod(header.shape)
        with self._zf.open(self._info[header.name]) as file:
            file.read(header.offset)
            while left:
                take = min(left, elements)
                data = _read_exactly(cast(BinaryIO, file), take * header.dtype.itemsize, header.name)
                yield np.frombuffer(data, dtype=header.dtype)
                left -= take
            if file.read(1):  # also makes zipfile check the CRC
                raise TraceError(f"{header.name} has bytes after its {list(header.shape)} array")


@contextmanager
def open_npz(path: Path, wanted: Sequence[str] = ()) -> Iterator[Archive]:
    """Open an archive; damage that zipfile finds, here or while members are read, becomes a TraceError.

    Parameters
    ----------
    wanted : the kinds of :data:`OF_POISE` that are read; a file of another is called what it is.

    Raises
    ------
    TraceError : no regular file, no archive, or its members unpack to more than MAX_UNPACKED_BYTES together, or to more
        than MAX_RATIO times its size.
    """
    with open_regular(path, TraceError) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            check_directory(stream, size, MAX_DIRECTORY_BYTES)
            with zipfile.ZipFile(stream) as zf:
                yield Archive(zf, size, wanted)
        except TraceError as err:
            raise TraceError(f"{path}: {err.message}", hint=err.hint) from err
        except BROKEN as err:
            stream.seek(0)
            begun = stream.read(2) == MEMBER
            raise TraceError(
                f"{path} is {'not a readable' if begun else 'no'} .npz: {err}",
                hint="it may be truncated" if begun else "'poise convert' reads what engines write",
            ) from err


def check_directory(stream: BinaryIO, size: int, most: int) -> None:
    """Refuse a zip file whose list of members takes more than ``most`` bytes: zipfile reads it whole, into objects.

    Parameters
    ----------
    stream : the file of ``size`` bytes.

    Raises
    ------
    TraceError : the list is longer.
    """
    stream.seek(max(0, size - END_BYTES - (1 << 16)))
    tail = stream.read()
    last = len(tail) - END_BYTES
    at = last if tail[last:].startswith(END) and tail.endswith(b"\0\0") else tail.rfind(END)  # as zipfile looks for it
    if at < 0 or at > last:
        return  # no archive: zipfile says so
    listed = int.from_bytes(tail[at + 12 : at + 16], "little")
    if at >= 20 and tail[at - 20 : at].startswith(END_64_AT):
        stream.seek(int.from_bytes(tail[at - 12 : at - 4], "little"))
        listed = max(listed if listed < 2**32 - 1 else 0, int.from_bytes(stream.read(56)[40:48], "little"))
    stream.seek(0)
    if listed > most:
        raise TraceError(f"its list of members has {listed} bytes, at most {most} are read")


def _check_budget(unpacked: int, size: int) -> None:
    """One budget for all members: many that are small alone are large together, and may share their packed bytes."""
    if unpacked > MAX_UNPACKED_BYTES:
        raise TraceError(f"its members unpack to {unpacked} bytes, at most {MAX_UNPACKED_BYTES} are read")
    if unpacked > FREE_BYTES and unpacked > MAX_RATIO * size:
        raise TraceError(
            f"its members would grow from {size} to {unpacked} bytes, more than {MAX_RATIO} times",
            hint="no routing compresses so far; if it is real, store it with numpy.savez",
        )


def _read_exactly(file: BinaryIO, size: int, name: str) -> bytearray:
    """Read ``size`` bytes in small pieces: a member that ends early costs no more memory than it has."""
    data = bytearray()
    while len(data) < size:
        piece = file.read(min(READ_BYTES, size - len(data)))
        if not piece:
            raise TraceError(f"{name} ends after {len(data)} of {size} bytes", hint="the file is truncated")
        data += piece
    return data


def _parse_header(name: str, file: BinaryIO) -> Header:
    start = file.read(8)
    if len(start) < 8 or start[:6] != MAGIC or start[6] not in (1, 2, 3):
        raise TraceError(f"{name} is not a numpy array", hint="write the file with numpy.savez_compressed")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(_read_exactly(file, width, name), "little")
    if length > MAX_HEADER_BYTES:
        raise TraceError(f"{name} has a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    text = _read_exactly(file, length, name).decode("latin-1")
    descr = re.search(r"'descr'\s*:\s*'([^']*)'", text)
    order = re.search(r"'fortran_order'\s*:\s*(True|False)", text)
    shape = re.search(r"'shape'\s*:\s*\(([\d,\s]*)\)", text)
    if descr and descr[1].lstrip("<>|=") == "O":
        raise TraceError(f"{name} holds pickled Python objects", hint="save plain integer or float arrays")
    if not (descr and order and shape and re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|U\d{1,4})", descr[1])):
        raise TraceError(f"{name} is not a plain array of numbers or text: header {text.strip()[:80]!r}")
    sizes = [s for s in (part.strip() for part in shape[1].split(",")) if s]
    if len(sizes) > MAX_DIMENSIONS or not all(re.fullmatch(r"\d{1,12}", s) for s in sizes):
        raise TraceError(f"{name} has an unreadable shape ({shape[1][:80]})")
    dtype = np.dtype(descr[1])
    if dtype.itemsize == 0:
        raise TraceError(f"{name} has elements of 0 bytes")
    return Header(name, dtype, tuple(int(s) for s in sizes), order[1] == "True", 8 + width + length)
