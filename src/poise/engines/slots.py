"""Slot tables that engines can run: as many slots on every rank, and none of them empty."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.errors import PlacementError
from poise.planning.engine_rules import fill_table
from poise.planning.placement import Placement


def full_table(
    placement: Placement, *, engine: str, price_LE: NDArray[Any] | None = None
) -> tuple[NDArray[np.int32], int]:
    """Expert of each slot, int32 [L, S], and how many empty slots had to be filled.

    Slot s lies on rank s // (S / D). Engines have no empty slots: each gets the cheapest expert that is not on its
    device (where the device holds every expert, of those). Replicas draw traffic, so a filled table is no longer the
    placement planned.

    Parameters
    ----------
    placement : any placement.
    engine : for the message.
    price_LE : [L, E], what one more slot of an expert costs; default: the replicas it has.

    Raises
    ------
    PlacementError : devices differ in slots.
    """
    per_device = np.bincount(placement.slot_device_S, minlength=placement.num_devices)
    if (per_device != per_device[0]).any():
        raise PlacementError(
            f"{engine} needs as many slots on every rank, got {per_device.min()} to {per_device.max()}: "
            f"{placement.num_slots} slots on {placement.num_devices} ranks",
            hint=f"choose --redundant so that {placement.num_experts} + R is a multiple of {placement.num_devices}",
        )
    out, empty = fill_table(placement, price_LE)
    return out, len(empty)


def trivial_row(num_experts: int, num_slots: int) -> NDArray[np.int32]:
    """What engines start with where nothing is planned: slot p holds expert p mod E, int32 [S]."""
    return np.arange(num_slots, dtype=np.int32) % np.int32(num_experts)


def rows_for(
    placement: Placement, layer_ids: tuple[int, ...] | None, *, engine: str
) -> tuple[dict[int, NDArray[np.int32]], int, int]:
    """A full row of every MoE layer, by decoder layer: the rows, slots filled, layers that nothing was planned for.

    Parameters
    ----------
    placement : any placement.
    layer_ids : the model's MoE layers; None: those of the placement. What the placement lacks gets a trivial row.
    engine : for messages.

    Raises
    ------
    PlacementError : devices differ in slots, or the placement has a layer that is no MoE layer of the model.
    """
    table, filled = full_table(placement, engine=engine)
    assert placement.layer_ids_L is not None
    rows = dict(zip(placement.layer_ids_L.tolist(), table, strict=True))
    wanted = tuple(rows) if layer_ids is None else layer_ids
    foreign = sorted(set(rows) - set(wanted))
    if foreign:
        raise PlacementError(
            f"the placement has a row for layer {foreign[0]}, the model's MoE layers are {wanted[0]} to {wanted[-1]} "
            f"({len(wanted)} of them)",
            hint="check --model",
        )
    trivial = trivial_row(placement.num_experts, placement.num_slots)
    return {layer: rows.get(layer, trivial) for layer in wanted}, filled, len(set(wanted) - set(rows))
