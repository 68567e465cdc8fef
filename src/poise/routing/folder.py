"""A folder of shards as one load profile: each shard counted on its own, anywhere, and joined in order of names."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import numpy as np

from poise.routing.files import join, read
from poise.routing.profile import load_LE
from poise.routing.trace import NO_EXPERT, LoadProfile, RoutingTrace, row_blocks
from poise.util.errors import TraceError
from poise.util.executors import Serial, in_order

MAX_SHARDS = 20_000
ENDINGS = (".npz", ".json")


def shards_of(folder: str | Path) -> list[Path]:
    """Files of a folder that may hold traffic, by name.

    Raises
    ------
    TraceError : it cannot be read, has no such file, or more than MAX_SHARDS.
    """
    try:
        inside = sorted(Path(folder).iterdir())
        found = [path for path in inside if path.suffix in ENDINGS and path.name[0] != "." and path.is_file()]
    except OSError as error:
        raise TraceError(f"cannot read {str(folder)[:200]!r}: {error}") from None
    if not found:
        raise TraceError(
            f"{str(folder)[:200]} holds {len(inside)} files, none of {' or '.join(ENDINGS)}",
            hint="'poise convert' reads what engines write",
        )
    if len(found) > MAX_SHARDS:
        raise TraceError(f"{str(folder)[:200]} holds {len(found)} shards, at most {MAX_SHARDS} are read")
    return found


def shard_profile(path: str | Path) -> LoadProfile:
    """Loads of one file: a profile as it is; of a trace, those of all its tokens as one recorded load.

    Raises
    ------
    TraceError : as :func:`poise.routing.files.read`; the message names the file.
    """
    try:
        found = read(path)
        return found if isinstance(found, LoadProfile) else counted(found)
    except TraceError as error:
        where = "" if str(path)[:200] in error.message else f"{path}: "
        raise type(error)(f"{where}{error.message}", hint=error.hint) from None


def counted(trace: RoutingTrace) -> LoadProfile:
    """A trace's loads, whole numbers [1, L, E], and its picks that compute nothing."""
    idle_L = np.zeros(trace.num_layers)
    for rows in row_blocks(trace.experts):
        idle_L += (trace.experts[rows] == NO_EXPERT).sum(axis=(0, 2))
    return LoadProfile(
        load_LE(trace.experts, trace.num_experts)[None], trace.layer_ids, trace.top_k, trace.name,
        idle_BL=idle_L[None],
    )  # fmt: skip


def folder_profile(folder: str | Path, executor: Executor | None = None) -> LoadProfile:
    """Loads of a folder's shards (``.npz``, ``.json``) as the steps of one profile, in order of their names.

    Parameters
    ----------
    folder : its files must be there for the executor's workers too.
    executor : where shards are read and counted; None: here, one after the other.

    Raises
    ------
    TraceError : no shard, a damaged one, or shards that do not belong together, as :func:`poise.routing.files.join`.
    """
    paths = [str(path) for path in shards_of(folder)]
    profiles = list(in_order(executor or Serial(), shard_profile, paths))
    return joined_profiles(profiles, f"{Path(folder).name}/ ({len(paths):,} shards)")


def joined_profiles(profiles: Sequence[LoadProfile], name: str) -> LoadProfile:
    """Profiles as one of that name."""
    together = join(profiles)
    assert isinstance(together, LoadProfile)
    return replace(together, name=name)
