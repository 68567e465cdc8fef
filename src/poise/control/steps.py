"""Steps of batches, cut out and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.routing.batch import RoutingBatch
from poise.util.errors import OptionError


def steps_of(batch: RoutingBatch, rows: slice | NDArray[Any]) -> RoutingBatch:
    """Some of a batch's steps, weighted alike."""
    return join_steps([one_step(batch, int(b)) for b in np.arange(batch.num_steps)[rows]])


def one_step(batch: RoutingBatch, b: int) -> RoutingBatch:
    """One step as a batch."""
    return replace(batch.part(slice(b, b + 1)), drawn_from=None)


def join_steps(parts: Sequence[RoutingBatch]) -> RoutingBatch:
    """Batches one after another as one, every step weighted alike; request numbers are taken to be common."""
    head = parts[0]
    for part in parts[1:]:
        have = (part.load_BLE.shape[1:], part.top_k, part.has_tokens)
        want = (head.load_BLE.shape[1:], head.top_k, head.has_tokens)
        if have != want:
            raise OptionError(f"steps with [layers, experts], top-k, tokens {have} follow steps with {want}")

    def stack(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else np.concatenate(values)

    load = stack("load_BLE")
    sizes = [np.diff(part.start_B) for part in parts if part.start_B is not None]
    start = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]) if head.has_tokens else None
    return RoutingBatch(load, np.full(len(load), 1 / len(load)), head.top_k, head.layer_ids_L, stack("experts_TLK"),
                        start, stack("request_T"), stack("home_T"), head.order, homes=head.homes,
                        domain_R=_common(parts))  # fmt: skip


def _common(parts: Sequence[RoutingBatch]) -> NDArray[np.int16] | None:
    """Domains of the requests of all parts; None where one has none, or two say different ones of a request."""
    domains = [part.domain_R for part in parts if part.domain_R is not None]
    if len(domains) < len(parts):
        return None
    longest = max(domains, key=len)
    return longest if all(np.array_equal(one, longest[: one.size]) for one in domains) else None
