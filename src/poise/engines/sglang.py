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

from poise.engines.slots import full_table, trivial_row
from poise.planning.placement import Placement
from poise.util.errors import PlacementError
from poise.util.files import write_whole
from poise.util.jsonfile import read_json

KEY = "physical_to_logical_map"
MAX_BYTES = 64 * 2**20
MAX_LAYERS = 10_000
MAX_EXPERTS = 65_536


def physical_to_logical(placement: Placement, num_hidden_layers: int) -> tuple[NDArray[np.int32], int]:
    """The map, int32 [num_hidden_layers, P], and how many empty slots had to be filled.

    SGLang has no empty slots: they are filled by :func:`poise.engines.slots.full_table`.

    Raises
    ------
    PlacementError : devices differ in slots, or a layer id is not below num_hidden_layers.
    """
    if not 1 <= num_hidden_layers <= MAX_LAYERS:
        raise PlacementError(f"num_hidden_layers must lie in 1..{MAX_LAYERS}, got {num_hidden_layers}")
    ids = placement.layer_ids_L
    if int(ids.max()) >= num_hidden_layers:
        raise PlacementError(
            f"the placement reaches layer {ids.max()}, the model has {num_hidden_layers}",
            hint="num_hidden_layers counts dense layers too",
        )
    table, filled = full_table(placement, engine="SGLang")
    out = np.tile(trivial_row(placement.num_experts, placement.num_slots), (num_hidden_layers, 1))
    out[ids] = table
    return out, filled


def write(placement: Placement, path: str | Path, *, num_hidden_layers: int) -> int:
    """Write the JSON file; returns how many empty slots were filled. Raises as :func:`physical_to_logical`."""
    table, filled = physical_to_logical(placement, num_hidden_layers)
    write_whole(path, json.dumps({KEY: table.tolist()}), PlacementError)
    return filled


def read(path: str | Path, *, num_devices: int, num_experts: int | None = None) -> Placement:
    """A placement from such a file; dense layers cannot be told apart and are kept.

    Parameters
    ----------
    path : a file of :func:`write`, or one made for ``--init-expert-location`` by others.
    num_devices : ``--ep-size``, which the file does not say.
    num_experts : E; without it the largest id + 1.

    Raises
    ------
    PlacementError : not such a file, or its numbers make no placement.
    """
    path = Path(path)
    if not 1 <= num_devices <= MAX_EXPERTS:
        raise PlacementError(f"num_devices must lie in 1..{MAX_EXPERTS}, got {num_devices}")
    if num_experts is not None and not 1 <= num_experts <= MAX_EXPERTS:
        raise PlacementError(f"num_experts must lie in 1..{MAX_EXPERTS}, got {num_experts}")
    data: Any = read_json(path, MAX_BYTES, PlacementError)
    if not isinstance(data, dict) or list(data) != [KEY]:
        has = ", ".join(map(repr, list(data)[:4])) if isinstance(data, dict) else f"a {type(data).__name__}"
        raise PlacementError(
            f"{path} must hold the one key {KEY!r}, it has {has or 'none'}",
            hint="a load profile is read by 'poise plan'" if "logical_count" in has else "",
        )
    rows = data[KEY]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise PlacementError(f"{path}: {KEY} must be a list of layers, each a list of expert ids")
    if len(rows) > MAX_LAYERS:
        raise PlacementError(f"{path}: {len(rows)} layers, at most {MAX_LAYERS} are read")
    width = len(rows[0])
    experts = MAX_EXPERTS if num_experts is None else num_experts
    for layer, row in enumerate(rows):
        if len(row) != width:
            raise PlacementError(f"{path}: layer {layer} has {len(row)} slots, layer 0 has {width}")
        for slot, expert in enumerate(row):
            if type(expert) is not int or not 0 <= expert < experts:
                raise PlacementError(
                    f"{path}: layer {layer}, slot {slot} holds {str(expert)[:40]!r}, not an expert id below {experts}"
                )
    if width % num_devices:
        raise PlacementError(
            f"{path}: {width} slots cannot be shared evenly by {num_devices} devices", hint="num_devices is --ep-size"
        )
    table = np.array(rows, dtype=np.int32)
    device = np.repeat(np.arange(num_devices, dtype=np.int32), width // num_devices)
    try:
        return Placement(table, device, num_experts or int(table.max()) + 1, num_devices, method="sglang")
    except PlacementError as error:
        raise PlacementError(f"{path}: {error.message}", hint=error.hint) from None
