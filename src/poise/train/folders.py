"""Folders of checkpoints: ``step-N`` each, and ``latest``, which names the newest; one is whole however a write ends.

What is being written, waits or is being removed has a name that begins with a dot, and is cleared by the next write:

    .step-N.partial  is written; it becomes step-N when it is whole
    .step-N.old      was step-N, until the one that takes its place has its name
    .step-N.gone     is being removed
    .poise-*         is ``latest`` before it has its name (:func:`poise.util.files.replacing`)

Such a folder has one writer at a time. A checkpoint was whole when it got a name without a dot; once there is such a
one, there always is.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from poise.util.errors import InputError, OptionError
from poise.util.files import read_bounded, replacing

LATEST = "latest"
MAX_NAME_BYTES = 4096
WRITTEN_LAST = ".metadata"
"""By ``torch.distributed.checkpoint``, when all ranks have written theirs."""
PLAIN = re.compile(r"step-(\d+)", re.ASCII)
HIDDEN = re.compile(r"\.(step-\d+)\.(partial|old|gone)", re.ASCII)
SCRATCH = re.compile(r"\.poise-[0-9a-f]{12}")

Fault = Callable[[Path], str]
"""Why a checkpoint is not whole, or ""."""


def partial_of(root: Path, step: int) -> Path:
    """Where a checkpoint is written."""
    return root / f".step-{step}.partial"


def clear(root: Path, fault: Fault) -> None:
    """Make the folder, and remove what writes that ended early have left in it; one that was put aside comes back.

    Raises
    ------
    OptionError : it cannot be made, or something cannot be removed.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in sorted(root.iterdir()):
            match = HIDDEN.fullmatch(left.name)
            if match and match[2] == "old" and not fault(left) and fault(root / match[1]):  # between its renames
                _remove(root / match[1])
                left.rename(root / match[1])
            elif match or (SCRATCH.fullmatch(left.name) and left.is_file()):
                _delete(left)
    except OSError as problem:
        raise OptionError(f"cannot write to {root}: {problem.strerror or problem}") from None


def commit(root: Path, step: int, keep: int, fault: Fault) -> Path:
    """Give what was written its name, let ``latest`` name it, and remove all but the ``keep`` newest whole ones.

    The newest is this one, the next one what ``latest`` named; of the others what was written last, whatever its
    number: after a return to an earlier step it is not among the highest.

    Raises
    ------
    OptionError : it is not whole, or the system refuses; what was there is there.
    """
    place, partial, aside = root / f"step-{step}", partial_of(root, step), root / f".step-{step}.old"
    if wrong := fault(partial):
        raise OptionError(f"{partial} is not whole: {wrong}", hint="all ranks must write to one folder")
    before = _named(root)
    try:
        if _is_there(place):
            place.rename(aside)
        partial.rename(place)
    except OSError as problem:
        raise OptionError(f"cannot write {place}: {problem.strerror or problem}") from None
    with replacing(root / LATEST, OptionError) as note:
        note.write(place.name.encode())
    whole = 1
    with suppress(OSError):  # the new one has its name; what cannot be removed now is removed by the next write
        if _is_there(aside):
            _delete(aside)
        ours = before is not None and PLAIN.fullmatch(before.name)
        for old in _by_age(root, first=[place, before] if before and ours else [place])[1:]:
            if whole >= keep:
                _remove(old)
            elif not fault(old):
                whole += 1
    return place


def newest(root: Path, fault: Fault) -> Path | None:
    """What ``latest`` names; where that is not whole, the whole one that was written last, with a warning.

    Raises
    ------
    InputError : there are checkpoints, and none is whole; or the folder cannot be read.
    """
    named = _named(root)
    try:
        if not root.exists():
            return None
        found = _by_age(root, first=[named, root / f".{named.name}.old"] if named else [], hidden=True)
    except OSError as problem:
        raise InputError(f"cannot read {root}: {problem.strerror or problem}") from None
    wrong = [] if named else [f"{LATEST} names none"]
    for place in found:
        why = fault(place)
        if why:
            wrong += [f"{place.name} {why}"] if place == named or _is_there(place) else []
            continue
        if wrong:
            warnings.warn(f"{root}: {'; '.join(wrong)}: going on from {place.name}", stacklevel=3)
        return place
    if found or _is_there(root / LATEST):
        raise InputError(f"{root} holds no whole checkpoint: {'; '.join(wrong)}")
    return None


def _named(root: Path) -> Path | None:
    """What ``latest`` names, there or not; None where it names nothing that could be a checkpoint."""
    try:
        name = read_bounded(root / LATEST, MAX_NAME_BYTES, InputError).decode().strip()
    except (InputError, UnicodeDecodeError):
        return None
    return None if not name.isprintable() or "/" in name or name.startswith(".") or not name else root / name


def _by_age(root: Path, *, first: list[Path], hidden: bool = False) -> list[Path]:
    """``first``, then all others, the newest first; with what was put aside where ``hidden``."""

    def age(place: Path) -> tuple[int, int]:
        number = int(re.sub(r"\D", "", place.name))
        try:
            return (place / WRITTEN_LAST).stat().st_mtime_ns, number
        except OSError:
            return 0, number

    def counts(name: str) -> bool:
        return bool(PLAIN.fullmatch(name) or (hidden and name.endswith(".old") and HIDDEN.fullmatch(name)))

    others = [place for place in root.iterdir() if counts(place.name) and place not in first]
    return [*dict.fromkeys(first), *sorted(others, key=age, reverse=True)]


def _is_there(place: Path) -> bool:
    return place.exists() or place.is_symlink()


def _remove(place: Path) -> None:
    """Rename it first, so that what is half removed is never found under its name."""
    if _is_there(place):
        gone = place.with_name(f".{place.name}.gone")
        if _is_there(gone):
            _delete(gone)
        place.rename(gone)
        _delete(gone)


def _delete(place: Path) -> None:
    if place.is_symlink() or not place.is_dir():
        place.unlink()
    else:
        shutil.rmtree(place)
