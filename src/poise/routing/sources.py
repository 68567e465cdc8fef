"""Traffic from whatever names it: a file, a folder, an object, several of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from poise.routing.files import join, read
from poise.routing.folder import folder_profile
from poise.routing.trace import LoadProfile, RoutingTrace

TrafficSource = str | Path | RoutingTrace | LoadProfile


def load(
    source: TrafficSource | Sequence[TrafficSource], executor: Executor | None = None
) -> RoutingTrace | LoadProfile:
    """A trace or profile from paths or objects; several are joined. Of a folder, the loads of its shards
    (:func:`poise.routing.folder.folder_profile`), counted on the executor.
    """
    many = [source] if isinstance(source, str | Path | RoutingTrace | LoadProfile) else list(source)
    return join([_read(item, executor) if isinstance(item, str | Path) else item for item in many])


def _read(path: str | Path, executor: Executor | None) -> RoutingTrace | LoadProfile:
    return folder_profile(path, executor) if os.path.isdir(path) else read(path)
