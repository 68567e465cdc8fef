"""One layer between two placements: what comes and leaves, and chains of moves; used by :mod:`poise.control.moves`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.planning.placement import EMPTY


class ChainMove(NamedTuple):
    """One part of a chain: an expert arrives at a device, another one (or EMPTY: none) leaves it."""

    expert: int
    device: int
    leaver: int


def after_chain(have_ED: NDArray[Any], chain: Sequence[ChainMove]) -> NDArray[Any]:
    """Slots of each expert on each device after a chain, int [E, D]."""
    after_ED = have_ED.copy()
    for link in chain:
        after_ED[link.expert, link.device] += 1
        if link.leaver != EMPTY:
            after_ED[link.leaver, link.device] -= 1
    return after_ED


def count_fetched(have_ED: NDArray[Any], then_ED: NDArray[Any]) -> int:
    """Experts that come to a device that did not have them."""
    return int(((then_ED > 0) & (have_ED == 0)).sum())


class LayerMoves:
    """One layer: where experts are (``have_ED``) and shall be (``want_ED``), who comes and leaves on each device."""

    def __init__(self, have_ED: NDArray[Any], want_ED: NDArray[Any]) -> None:
        self.have_ED, self.want_ED = have_ED.astype(np.int64), want_ED.astype(np.int64)
        self.copies_E: list[int] = have_ED.sum(axis=1).tolist()
        self.comers_D = [set(np.flatnonzero(column).tolist()) for column in (want_ED > have_ED).T]
        self.leavers_D = [set(np.flatnonzero(column).tolist()) for column in (want_ED < have_ED).T]

    def change(self, expert: int, device: int, by: int) -> None:
        """One slot more of an expert that comes (1), or less of one that leaves (-1)."""
        self.have_ED[expert, device] += by
        self.copies_E[expert] += by
        if self.have_ED[expert, device] == self.want_ED[expert, device]:
            (self.comers_D if by > 0 else self.leavers_D)[device].discard(expert)

    def apply(self, chain: Sequence[ChainMove]) -> None:
        """Arrivals, then leavers."""
        for link in chain:
            self.change(link.expert, link.device, 1)
        for link in chain:
            if link.leaver != EMPTY:
                self.change(link.leaver, link.device, -1)

    def chain(
        self, expert: int, device: int, room_D: Sequence[int], budget_D: Sequence[int], *, leaver: int | None = None
    ) -> list[ChainMove]:
        """Shortest chain that lets an expert arrive at a device (step 1); empty if there is none.

        ``room_D``, ``budget_D``: empty slots, staging buffers left; ``leaver``: what must leave the first device.
        """
        came: dict[int, tuple[int, int]] = {device: (expert, -1)}
        queue = deque([device])
        while queue:
            d = queue.popleft()
            forced = leaver if d == device else None
            if room_D[d] > 0 and forced is None:
                return _unroll(came, d, EMPTY)
            if budget_D[d] < 1:
                continue
            leavers = sorted(self.leavers_D[d]) if forced is None else [forced]
            for x in leavers:
                if self.copies_E[x] > 1 or x == expert:
                    return _unroll(came, d, x)
            for x in leavers:
                for target in [other for other, comers in enumerate(self.comers_D) if x in comers]:
                    if target not in came:
                        came[target] = (x, d)
                        queue.append(target)
        return []

    def surplus(self, devices: Sequence[int]) -> list[tuple[int, int]]:
        """Let leavers go that nothing will replace and that have another copy; (expert, device) of each."""
        gone = []
        for d in devices:
            leavers = self.leavers_D[d]
            spare = int(self.have_ED[:, d].sum() - self.want_ED[:, d].sum())
            for x in sorted(leavers):
                while spare > 0 and self.copies_E[x] > 1 and self.have_ED[x, d] > self.want_ED[x, d]:
                    self.change(x, d, -1)
                    gone.append((x, d))
                    spare -= 1
        return gone


def _unroll(came: dict[int, tuple[int, int]], device: int, leaver: int) -> list[ChainMove]:
    links = []
    while device >= 0:
        expert, before = came[device]
        links.append(ChainMove(expert, device, leaver))
        leaver, device = expert, before
    return links[::-1]
