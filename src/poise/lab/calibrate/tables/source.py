"""Where the tables lie: a folder, or the wheel that holds them; and their columns as numpy arrays.

PyPI ``aisimulate`` (Apache-2.0) keeps them under ``aisimulate_core/systems/data/GPU/KIND/ENGINE/VERSION/*.parquet``.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.util.errors import NoResultError, OptionError

INSIDE = "aisimulate_core/systems/data/"
"""Folder of the tables within the wheel."""
Column = NDArray[Any]


def _parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise NoResultError(
            f"reading kernel tables needs pyarrow: {str(error)[:200]}", hint="pip install 'poise-moe[tables]'"
        ) from None


@dataclass(frozen=True, slots=True)
class TablePlace:
    """Which table a file is: folder names above it. ``key`` is its path under the folder of the tables."""

    gpu: str
    engine: str
    version: str
    key: str


@dataclass(frozen=True)
class TableSource:
    """A folder of tables, or an ``aisimulate`` wheel.

    Raises
    ------
    OptionError : it is neither.
    """

    path: Path

    def __post_init__(self) -> None:
        if not (self.path.is_dir() or (self.path.suffix == ".whl" and zipfile.is_zipfile(self.path))):
            raise OptionError(
                f"{self.path} holds no kernel tables",
                hint="an aisimulate wheel, or its folder aisimulate_core/systems/data",
            )
        if not self._keys:
            raise OptionError(
                f"{self.path} has no table GPU/KIND/ENGINE/VERSION/*.parquet",
                hint=f"the folder {INSIDE} of an unpacked aisimulate wheel",
            )

    @cached_property
    def _keys(self) -> tuple[str, ...]:
        if self.path.is_dir():
            found = [file.relative_to(self.path).as_posix() for file in self.path.glob("*/*/*/*/*.parquet")]
        else:
            with zipfile.ZipFile(self.path) as wheel:
                found = [name.removeprefix(INSIDE) for name in wheel.namelist() if name.startswith(INSIDE)]
        return tuple(sorted(key for key in found if key.endswith(".parquet") and key.count("/") == 4))

    @cached_property
    def version(self) -> str:
        """``aisimulate VERSION (Apache-2.0)``, from the wheel's name or the dist-info beside an unpacked one."""
        names = [self.path.name]
        if self.path.is_dir():
            above = self.path.resolve().parents[:4]
            names = [beside.name for folder in above for beside in sorted(folder.glob("aisimulate-*"))]
        found = [match[1] for name in names if (match := re.match(r"aisimulate-([^-]+?)(?:-|\.dist-info)", name))]
        return f"aisimulate {found[0] if found else 'of an unknown version'} (Apache-2.0)"

    @cached_property
    def sha256(self) -> str:
        """Of the wheel; of a folder, over the names and contents of its tables."""
        digest = hashlib.sha256()
        if self.path.is_dir():
            for key in self._keys:
                digest.update(key.encode())
                digest.update((self.path / key).read_bytes())
        else:
            with self.path.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
        return digest.hexdigest()

    def tables(self, kind: str, name: str) -> Iterator[TablePlace]:
        """The files ``GPU/kind/ENGINE/VERSION/name.parquet`` there are."""
        for key in self._keys:
            gpu, found, engine, version, file = PurePosixPath(key).parts
            if found == kind and file == f"{name}.parquet":
                yield TablePlace(gpu, engine, version, key)

    def columns(self, place: TablePlace, names: Sequence[str]) -> dict[str, Column]:
        """These columns of one table.

        Raises
        ------
        OptionError : the file is no parquet, or lacks a column.
        NoResultError : pyarrow is not installed.
        """
        parquet = _parquet()
        if self.path.is_dir():
            data = (self.path / place.key).read_bytes()
        else:
            with zipfile.ZipFile(self.path) as wheel:
                data = wheel.read(INSIDE + place.key)
        try:
            file = parquet.ParquetFile(io.BytesIO(data))
            missing = [name for name in names if name not in file.schema_arrow.names]
        except Exception as error:  # pyarrow's own types are not known here
            raise OptionError(f"{place.key} is no parquet file: {str(error)[:200]}") from None
        if missing:
            raise OptionError(
                f"{place.key} lacks the column {missing[0]!r}", hint=f"columns needed: {', '.join(names)}"
            )
        try:
            table = file.read(columns=list(names))
            return {name: table.column(name).to_numpy(zero_copy_only=False) for name in names}
        except Exception as error:
            raise OptionError(f"{place.key} cannot be read: {str(error)[:200]}") from None


def numbers(column: Column, name: str, key: str, *, least: float) -> NDArray[np.float64]:
    """A column of finite numbers, none below ``least``; OptionError names the first that is not."""
    try:
        out = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError):
        raise OptionError(f"{key}: {name} holds something that is no number") from None
    wrong = np.flatnonzero(~(np.isfinite(out) & (out >= least)))
    if wrong.size:
        raise OptionError(f"{key}: {name} is {out[wrong[0]]:g} in row {wrong[0]}, below {least:g} or not finite")
    return out
