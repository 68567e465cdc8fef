"""Slot tables that engines can run: as many slots on every rank, and none of them empty."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.planning.engine_rules import fill_table
from poise.planning.placement import Placement
from poise.util.errors import OptionError, PlacementError


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
    per_device = placement.slots_D
    if (per_device != per_device[0]).any():
        raise PlacementError(
            f"{engine} needs as many slots on every rank, got {per_device.min()} to {per_device.max()}: "
            f"{placement.num_slots} slots on {placement.num_devices} ranks",
            hint=f"choose --redundant so that {placement.num_experts} + R is a multiple of {placement.num_devices}"
            if placement.num_slots % placement.num_devices
            else f"plan with {placement.num_slots // placement.num_devices} slots on every rank",
        )
    out, empty = fill_table(placement, price_LE)
    return out, len(empty)


def trivial_row(num_experts: int, num_slots: int) -> NDArray[np.int32]:
    """What engines start with where nothing is planned: slot p holds expert p mod E, int32 [S]."""
    return np.arange(num_slots, dtype=np.int32) % np.int32(num_experts)


def trivial_placement(num_experts: int, num_slots: int, num_devices: int, layer_ids_L: NDArray[np.int32]) -> Placement:
    """What SGLang starts with: slot p holds expert p mod E, slots in even blocks on devices.

    Raises
    ------
    OptionError : devices cannot share the slots evenly.
    """
    if num_slots % num_devices:
        raise OptionError(f"{num_slots} slots cannot be shared evenly by {num_devices} devices")
    table = np.tile(trivial_row(num_experts, num_slots), (len(layer_ids_L), 1))
    device = np.repeat(np.arange(num_devices, dtype=np.int32), num_slots // num_devices)
    return Placement(table, device, num_experts, num_devices, layer_ids_L, method="trivial")


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


def rows_with_mtp(
    placement: Placement,
    layer_ids: tuple[int, ...] | None,
    num_mtp_layers: int,
    num_hidden_layers: int | None,
    *,
    engine: str,
) -> tuple[dict[int, NDArray[np.int32]], int, int]:
    """As :func:`rows_for`, with rows of layers of multi-token prediction, numbered on behind the decoder layers.

    Parameters
    ----------
    num_mtp_layers : how many the engine runs; what the placement lacks of them gets a trivial row. It can have them
        only where ``layer_ids`` says which layers are the model's own.
    num_hidden_layers : decoder layers of the model; needed where there are such layers.

    Raises
    ------
    PlacementError : as :func:`rows_for`.
    OptionError : layers of multi-token prediction, and it is not known behind which layer.
    """
    if not num_mtp_layers:
        return rows_for(placement, layer_ids, engine=engine)
    planned = placement.layer_ids_L.tolist()
    if num_hidden_layers is None or (layer_ids is None and planned[-1] >= num_hidden_layers):
        raise OptionError(
            f"{num_mtp_layers} MTP layers follow the decoder layers, of which {num_hidden_layers} were named and "
            f"the placement reaches layer {planned[-1]}",
            hint="give --num-hidden-layers or --model",
        )
    ahead = range(num_hidden_layers, num_hidden_layers + num_mtp_layers)
    return rows_for(placement, (*(layer_ids or planned), *ahead), engine=engine)
