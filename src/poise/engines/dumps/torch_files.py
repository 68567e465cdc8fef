"""What ``torch.save`` wrote, as plain Python and numpy, in memory that the file's own size bounds.

``torch.load(weights_only=True)`` runs no code, but it believes sizes: a zip member may inflate without end, a tensor
may be a view of one number with a shape of a million million. So the archive is checked first, the pickle is taken
apart and refused if it names anything but tensors, and each tensor is compared with its storage.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from poise.engines.dumps.untrusted import file_size
from poise.routing.npz import BROKEN
from poise.util.errors import TraceError
from poise.util.files import open_regular
from poise.util.room import require

MAX_PICKLE_BYTES = 32 << 20
MAX_PICKLE_ROOM = 512 << 20
"""Most bytes of memory that the objects of a pickle may take, tensors' numbers apart."""
ROOM, OTHER_ROOM = {"REDUCE": 1024, "MARK": 128, "BINPUT": 112, "LONG_BINPUT": 112, "PUT": 112, "MEMOIZE": 112,
                    "BININT": 40, "BININT1": 40, "BININT2": 40, "BINFLOAT": 40}, 80  # fmt: skip
"""What each instruction may leave in memory, at most: a tensor, a list, a place in the table of what was made, ..."""
FREE_BYTES = 64 << 20
"""Tensors that repeat themselves may take up so much more than their storages."""
MAX_DEPTH = 8
GLOBALS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "collections OrderedDict",
           "torch.storage UntypedStorage", "torch uint16", "torch uint32", "torch uint64",
           *(f"torch {name}Storage" for name in
             ("Double", "Float", "Half", "Long", "Int", "Short", "Char", "Byte", "Bool", "BFloat16"))}  # fmt: skip
REFUSED = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
PLAIN = {int, float, bool, str, type(None)}


def load(path: Path, *, skip: frozenset[str] = frozenset()) -> tuple[Any, int]:
    """The saved object (dicts, lists, plain values and numpy arrays), and bytes of memory that it takes at most.

    Parameters
    ----------
    path : a file of ``torch.save`` in its zip format.
    skip : keys of dicts that are left out.

    Raises
    ------
    TraceError : not such a file, damaged, or with anything in it but containers, numbers, text and dense tensors.
    """
    size = file_size(path)
    room = _check_archive(path, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # an unpickler raises whatever damaged data makes it raise
        raise TraceError(f"not readable: {str(error)[:200] or type(error).__name__}") from None
    plain = _Plain(size + FREE_BYTES, skip)
    return plain.of(value), room + size + FREE_BYTES - plain.budget


def _check_archive(path: Path, size: int) -> int:
    """Bytes of memory that its objects may take."""
    try:
        with open_regular(path, TraceError) as stream, zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
                raise TraceError("members are compressed, torch.save stores them as they are", hint="save it anew")
            if sum(m.file_size for m in members) > size:
                raise TraceError(f"{size} bytes claim to hold members of {sum(m.file_size for m in members)}")
            pickles = [m for m in members if m.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise TraceError(f"{len(pickles)} pickles in the archive, or one above {MAX_PICKLE_BYTES} bytes")
            damaged = archive.testzip()
            if damaged is not None:
                raise TraceError(f"{damaged!r:.80} is damaged: its checksum is another")
            return _check_pickle(archive.read(pickles[0]))
    except TraceError:
        raise
    except BROKEN as error:
        raise TraceError(f"not readable as torch.save writes: {str(error)[:200]}", hint="it may be truncated") from None


def _check_pickle(data: bytes) -> int:
    """Refuse a pickle that names anything but tensors, or is large. It is taken apart here, not run."""
    room = len(data)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in REFUSED or (opcode.name == "GLOBAL" and argument not in GLOBALS):
                raise TraceError(
                    f"holds {str(argument or opcode.name)[:80]!r}, where only tensors, numbers and text are read",
                    hint="nothing of it was run; save plain dense tensors: tensor.detach().to_dense()",
                )
            room += ROOM.get(opcode.name, OTHER_ROOM)
            if room > MAX_PICKLE_ROOM:
                raise TraceError(f"a pickle of {len(data)} bytes would take more than {MAX_PICKLE_ROOM} in memory")
    except TraceError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        raise TraceError(f"its pickle is damaged: {str(error)[:200]}") from None
    return room


class _Plain:
    """Turns tensors into arrays, each once, while they fit into ``budget`` bytes."""

    def __init__(self, budget: int, skip: frozenset[str]) -> None:
        self.budget = budget
        self.skip = skip
        self._done: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any, depth: int = 0) -> Any:
        """A copy without torch in it."""
        if type(value) in PLAIN:
            return value
        if depth > MAX_DEPTH:
            raise TraceError(f"nested more than {MAX_DEPTH} deep")
        if isinstance(value, torch.Tensor):
            known = self._done.get(id(value))
            if known is None:
                array = self._array(value)
                known = self._done[id(value)] = (value, array if array.ndim else array.item())
            return known[1]
        if isinstance(value, list | tuple):
            if set(map(type, value)) <= PLAIN:
                return value
            self._once(value)
            return [self.of(item, depth + 1) for item in value]
        if isinstance(value, dict):
            self._once(value)
            if not set(map(type, value)) <= {str, int}:
                raise TraceError("a dict has keys that are neither text nor numbers")
            return {key: self.of(item, depth + 1) for key, item in value.items() if key not in self.skip}
        raise TraceError(f"holds a {type(value).__name__}, where only tensors, numbers and text are read")

    def _once(self, value: Any) -> None:
        """Containers that hold each other, or one many times, unfold without end."""
        if id(value) in self._done:
            raise TraceError("a list or dict of it appears in two places")
        self._done[id(value)] = (value, None)

    def _array(self, tensor: torch.Tensor) -> NDArray[Any]:
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise TraceError(
                f"holds a {type(tensor).__name__}, {tensor.layout}, on {tensor.device}: dense tensors are read"
            )
        if tensor.is_quantized or tensor.is_complex():
            raise TraceError(f"holds a tensor of {tensor.dtype}")
        bytes_ = tensor.numel() * tensor.element_size()
        self.budget -= bytes_
        if self.budget < 0:
            raise TraceError(f"a tensor of shape {list(tensor.shape)[:8]} takes {bytes_} bytes, more than the file has")
        tensor = tensor.detach()
        require(bytes_, f"a tensor of shape {list(tensor.shape)[:8]}", TraceError)
        out = np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
        out.flags.writeable = False
        return out
