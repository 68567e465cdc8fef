"""SGLang: placements as the JSON that ``--init-expert-location`` takes (read in its 0.5.23 wheel).

``{"physical_to_logical_map": int[num_hidden_layers][P]}`` and no other key; dense layers need a row too, any valid one
does; slot p belongs to rank p // (P / ep_size); P = E + ``--ep-num-redundant-experts``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.errors import PlacementError
from poise.planning.placement import EMPTY, Placement, atomic

KEY = "physical_to_logical_map"
MAX_BYTES = 256 * 2**20


def physical_to_logical(placement: Placement, num_hidden_layers: int) -> tuple[NDArray[np.int32], int]:
    """The map, int32 [num_hidden_layers, P], and how many empty slots had to be filled.

    SGLang has no empty slots: each gets the expert with the fewest replicas that is not on its device.

    Raises
    ------
    PlacementError : devices differ in slots, or a layer id is not below num_hidden_layers.
    """
    per_device = np.bincount(placement.slot_device_S, minlength=placement.num_devices)
    if (per_device != per_device[0]).any():
        raise PlacementError(
            f"SGLang needs as many slots on every rank, got {per_device.min()} to {per_device.max()}",
            hint=f"choose --redundant so that {placement.num_experts} + R is a multiple of {placement.num_devices}",
        )
    ids = placement.layer_ids_L
    assert ids is not None
    if int(ids.max()) >= num_hidden_layers:
        raise PlacementError(f"the placement reaches layer {ids.max()}, the model has {num_hidden_layers}")
    trivial = np.arange(placement.num_slots, dtype=np.int32) % placement.num_experts
    out = np.tile(trivial, (num_hidden_layers, 1))
    out[ids] = placement.slot_expert_LS
    replicas = placement.replicas_LE().astype(np.int64)
    held = placement.count_LED() > 0
    filled = 0
    for layer, slot in np.argwhere(placement.slot_expert_LS == EMPTY):
        device = placement.slot_device_S[slot]
        order = np.lexsort((np.arange(placement.num_experts), replicas[layer], held[layer, :, device]))
        expert = int(order[0])
        out[ids[layer], slot] = expert
        replicas[layer, expert] += 1
        held[layer, expert, device] = True
        filled += 1
    return out, filled


def write(placement: Placement, path: str | Path, *, num_hidden_layers: int) -> int:
    """Write the JSON file; returns how many empty slots were filled. Raises as :func:`physical_to_logical`."""
    table, filled = physical_to_logical(placement, num_hidden_layers)
    with atomic(Path(path)) as stream:
        stream.write(json.dumps({KEY: table.tolist()}).encode())
    return filled


def read(path: str | Path, *, num_devices: int, num_experts: int | None = None) -> Placement:
    """A placement from such a file; dense layers cannot be told apart and are kept.

    Raises
    ------
    PlacementError : not such a file, or its numbers make no placement.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise PlacementError(f"{path} is missing or larger than {MAX_BYTES} bytes")
    try:
        data: Any = json.loads(path.read_bytes())
        table = np.array(data[KEY], dtype=np.int64)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise PlacementError(f"{path} is not an SGLang expert location: {error!r}") from None
    if table.ndim != 2 or table.size == 0 or table.shape[1] % num_devices:
        raise PlacementError(f"{path}: a map {table.shape} cannot be shared by {num_devices} devices")
    if table.min() < 0 or table.max() > 65_535:
        raise PlacementError(f"{path}: expert ids reach from {table.min()} to {table.max()}")
    device = np.repeat(np.arange(num_devices, dtype=np.int32), table.shape[1] // num_devices)
    experts = int(table.max()) + 1 if num_experts is None else num_experts
    return Placement(table.astype(np.int32), device, experts, num_devices, method="sglang")
