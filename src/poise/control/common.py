"""Two placements on one set of devices and slots, also where their devices or slots differ.

While moves last, a device has the larger of its two numbers of slots: those it had first, then those it gets. One that
joins starts with empty slots, one that leaves ends with empty slots. What only lost devices held lies on one more
device, the checkpoint, which leaves too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.planning.placement import EMPTY, Placement

STAYS, LEAVES, CHECKPOINT = 0, 1, 2


class Common(NamedTuple):
    """Placements with the same slots on every device; ``kind_D``: int [D], STAYS, LEAVES or (the last) CHECKPOINT."""

    before: Placement
    after: Placement
    kind_D: NDArray[np.int64]

    @property
    def real(self) -> int:
        """Devices without the checkpoint."""
        return int((self.kind_D != CHECKPOINT).sum())


def common(before: Placement, after: Placement, lost: Sequence[int] = ()) -> Common:
    """Both placements on all devices of either; devices keep their numbers, ``lost`` ones are gone with what they held.

    Raises
    ------
    PlacementError : layers or experts differ.
    """
    before.diff(after)
    devices = max(before.num_devices, after.num_devices)
    before, after = before.on_devices(devices), after.on_devices(devices)
    kind_D = np.where(before.leaving_D(after), LEAVES, STAYS)
    slots_D = np.maximum(before.slots_D, after.slots_D)
    slot_device_S = np.repeat(np.arange(devices, dtype=np.int32), slots_D)
    old_LS, new_LS = _table(before, slots_D), _table(after, slots_D)
    old_LS[:, np.isin(slot_device_S, list(lost))] = EMPTY
    orphans = [np.setdiff1d(np.arange(before.num_experts), row) for row in old_LS]
    width = max(row.size for row in orphans)
    if width:
        more_LS = np.full((2, len(old_LS), width), EMPTY, np.int32)
        for row, experts in zip(more_LS[0], orphans, strict=True):
            row[: experts.size] = experts
        old_LS, new_LS = np.hstack([old_LS, more_LS[0]]), np.hstack([new_LS, more_LS[1]])
        slot_device_S = np.append(slot_device_S, np.full(width, devices, np.int32))
        kind_D = np.append(kind_D, CHECKPOINT)
    old, new = (
        replace(each, slot_expert_LS=table, slot_device_S=slot_device_S, num_devices=len(kind_D))
        for each, table in ((before, old_LS), (after, new_LS))
    )
    return Common(old, new, kind_D)


def _table(placement: Placement, slots_D: NDArray[np.int64]) -> NDArray[np.int32]:
    """Experts of slots, int32 [L, S], of which each device has ``slots_D``, as many as it has or more."""
    mine_D, device_S = placement.slots_D, placement.slot_device_S
    shift_D = np.cumsum(slots_D - mine_D) - (slots_D - mine_D)
    out = np.full((placement.num_layers, int(slots_D.sum())), EMPTY, np.int32)
    out[:, np.arange(placement.num_slots) + shift_D[device_S]] = placement.slot_expert_LS
    return out
