"""What ``torch.distributed.checkpoint`` has written, read as data: no code of a checkpoint's files is run.

Its table of contents is a pickle, and so is whatever is not a tensor. torch loads both with all that pickles can do;
here the table may name the classes of torch that it is made of, and nothing else, and the rest goes through the
restricted reader of tensors (``weights_only``).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from poise.train.folders import WRITTEN_LAST
from poise.util.errors import InputError, ModelError, told
from poise.util.files import read_bounded

MOST_BYTES = 2**30
"""Of a table of contents; 256 experts in 60 layers with Adam's moments have 0.04 GB."""
FORMAT = "torch.distributed.checkpoint.metadata"
PARTS = ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorProperties",
         "TensorStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")  # fmt: skip
CLASSES = {
    *((FORMAT, name) for name in PARTS), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
}  # fmt: skip
WEIGHTS, OPTIMIZER, STATES = "model.", "optimizer.", "optimizer.state."
SHOWN = 3


class _Contents(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def contents(place: Path) -> Metadata:
    """The table of contents of a checkpoint.

    Raises
    ------
    InputError : there is none, or it is damaged, or holds something else.
    """
    table = place / WRITTEN_LAST
    data = read_bounded(table, MOST_BYTES, InputError)
    try:
        read = _Contents(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises whatever its operations raise
        raise InputError(f"{table} is not the table of contents of a checkpoint: {told(error)}") from None
    if not isinstance(read, Metadata) or not isinstance(read.storage_data, dict):
        raise InputError(f"{table} holds {type(read).__name__}, not the table of contents of a checkpoint")
    return read


def fault(place: Path) -> str:
    """Why a checkpoint is not whole, or "": its table is read, and its files are there with all that it names."""
    if not place.is_dir():
        return "is not there"
    try:
        ends: dict[str, int] = {}
        for part in contents(place).storage_data.values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
        for name, end in ends.items():
            file = place / name
            if "/" in name or not file.is_file():
                return f"lacks its file {name[:80]}"
            if file.stat().st_size < end:
                return f"is cut short: {name} has {file.stat().st_size} bytes of {end}"
    except (InputError, AttributeError, TypeError, OSError) as error:
        return f"cannot be read ({told(error)})"
    return ""


class CheckpointReader(FileSystemReader):
    """Reads files with :func:`contents`."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The table of contents."""
        return contents(Path(self.path))


class Planner(DefaultLoadPlanner):
    """Loads a checkpoint whose weights and optimizer states are those of the model, no fewer and no more."""

    def create_local_plan(self) -> Any:
        """Refuse a checkpoint of another model.

        Raises
        ------
        ModelError : entries of the one that the other lacks.
        """
        held, wanted = set(self.metadata.state_dict_metadata), set(self.state_dict)
        kinds = (WEIGHTS, STATES) if any(key.startswith(OPTIMIZER) for key in wanted) else (WEIGHTS,)
        _nothing_left(wanted - held, f"of {len(wanted)} entries the checkpoint lacks")
        _nothing_left({key for key in held - wanted if key.startswith(kinds)},
                      f"of the checkpoint's {len(held)} entries the model or the optimizer lacks")  # fmt: skip
        return super().create_local_plan()

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Load an entry that is no tensor: numbers, words, lists of them."""
        torch.load(value, weights_only=True)  # torch then loads the same bytes with all that a pickle can do
        value.seek(0)
        super().load_bytes(read_item, value)


def _nothing_left(entries: set[str], what: str) -> None:
    if entries:
        some = ", ".join(sorted(entries)[:SHOWN]) + (", ..." if len(entries) > SHOWN else "")
        raise ModelError(
            f"{what} {len(entries)}: {some}", hint="load it into the model and the kind of optimizer that wrote it"
        )
