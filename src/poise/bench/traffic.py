"""Where the traffic of a case comes from: a file that is known by its hash, or a recipe with a seed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from poise.routing.sources import load
from poise.routing.synthetic import kinds_trace, workload_trace, zipf_trace
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import OptionError, TraceError, UnavailableError
from poise.util.files import READ_BYTES, open_regular

RECIPES: Mapping[str, Callable[..., RoutingTrace]] = {
    "kinds": kinds_trace,
    "workload": workload_trace,
    "zipf": zipf_trace,
}


@dataclass(frozen=True, slots=True)
class FileTraffic:
    """Traffic of files.

    Parameters
    ----------
    files : (path below the folder, sha256 of its bytes) each; several are joined.
    selection : as behind ``FILE#`` (:func:`poise.routing.files.read`), of a single file.
    ships : they lie in poise itself, not in the reader's data folder.
    """

    files: tuple[tuple[str, str], ...]
    selection: str = ""
    ships: bool = False

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        """What must be in the data folder."""
        return () if self.ships else self.files

    def load(self, data: Path | None) -> RoutingTrace | LoadProfile:
        """The traffic, from a data folder where it does not ship.

        Raises
        ------
        UnavailableError : no folder, no such file, or another one of that name.
        """
        if self.ships:
            with as_file(files("poise") / "data") as folder:
                return self._from(folder)
        if data is None:
            raise UnavailableError(f"it needs {self.files[0][0]}", hint="--data FOLDER")
        return self._from(data)

    def _from(self, folder: Path) -> RoutingTrace | LoadProfile:
        for name, digest in self.files:
            found = _sha256(folder / name)
            if found != digest:
                raise UnavailableError(f"{name} has sha256 {found[:12]}..., the case was frozen on {digest[:12]}...")
        behind = f"#{self.selection}" if self.selection else ""
        return load([f"{folder / name}{behind}" for name, _ in self.files])


@dataclass(frozen=True, slots=True)
class MadeTraffic:
    """Traffic of a recipe.

    Parameters
    ----------
    recipe : a key of :data:`RECIPES`.
    settings : its arguments, by name.
    sha256 : of what it made when the case was frozen (:func:`content`): a numpy that draws other numbers is noticed.
    selection : ``even`` or ``odd``: every second request, or the others; all where it is empty.
    """

    recipe: str
    settings: tuple[tuple[str, Any], ...]
    sha256: str
    selection: Literal["", "even", "odd"] = ""

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        """Nothing."""
        return ()

    def load(self, data: Path | None = None) -> RoutingTrace:
        """The traffic; no folder takes part.

        Raises
        ------
        UnavailableError : other numbers were drawn than when the case was frozen.
        """
        made = RECIPES[self.recipe](**dict(self.settings))
        found = content(made)
        if found != self.sha256:
            raise UnavailableError(
                f"numpy {np.__version__} draws other numbers here: sha256 {found[:12]}..., the case was frozen on "
                f"{self.sha256[:12]}..."
            )
        return made.every_second_request()[self.selection == "odd"] if self.selection else made


def content(trace: RoutingTrace) -> str:
    """sha256 of what a trace says: experts, requests, and steps and homes where they are known; not of its name."""
    digest = hashlib.sha256(f"{trace.experts.shape} {trace.num_experts}".encode())
    for array in (trace.experts, trace.request, trace.is_decode, trace.step, trace.home):
        kind = "none" if array is None else f"{array.dtype.kind}{array.dtype.itemsize}"
        digest.update(kind.encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes())
    return digest.hexdigest()


def check_folder(data: Path | None) -> None:
    """Raise OptionError where a data folder is named that is none."""
    if data is not None and not os.path.isdir(data):
        raise OptionError(f"--data {str(data)[:200]!r} is no folder")


def _sha256(path: Path) -> str:
    try:
        with open_regular(path, TraceError) as stream:
            digest = hashlib.sha256()
            while piece := stream.read(READ_BYTES):
                digest.update(piece)
    except TraceError as error:
        raise UnavailableError(error.message) from None
    return digest.hexdigest()
