"""vllm-ascend: placements as the JSON of ``eplb_config.expert_map_path`` (model runner v1).

``{"moe_layer_count", "layer_list": [{"layer_id", "device_count", "device_list": [{"device_id", "device_expert"}]}]}``,
as its recorder writes it: layers by their place among the MoE layers, from 0. The engine counts its MoE layers as it
makes them (``moe_instance_id``) and finds a layer by its place in the list, so none may be missing. Layers of
multi-token prediction follow; of these one may lack a row, a second one ends the start ("Invalid EPLB Table").
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from poise.engines.slots import rows_with_mtp
from poise.planning.placement import Placement
from poise.util.errors import PlacementError
from poise.util.files import write_whole


def write(
    placement: Placement, path: str | Path, *, layer_ids: tuple[int, ...] | None = None,
    num_mtp_layers: int = 0, num_hidden_layers: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Write the JSON file; returns slots filled, and layers with a trivial row because nothing was planned.

    Parameters
    ----------
    placement : as many slots on every rank, no expert twice on one.
    path : file to write.
    layer_ids : the model's MoE layers; None: those of the placement, taken to be all.
    num_mtp_layers, num_hidden_layers : as :func:`poise.engines.slots.rows_with_mtp`.

    Raises
    ------
    PlacementError : as :func:`poise.engines.slots.rows_for`, or an expert is twice on a device.
    OptionError : as :func:`poise.engines.slots.rows_with_mtp`.
    """
    rows, filled, unplanned = rows_with_mtp(
        placement, layer_ids, num_mtp_layers, num_hidden_layers, engine="vllm-ascend"
    )
    per_rank = placement.num_slots // placement.num_devices
    layers = []
    for index, (layer, row) in enumerate(sorted(rows.items())):
        table_DK = row.reshape(-1, per_rank)
        for device, held in enumerate(table_DK):
            experts, copies = np.unique(held, return_counts=True)
            if copies.max() > 1:
                raise PlacementError(
                    f"layer {layer}: device {device} holds expert {experts[copies.argmax()]} {copies.max()} times, "
                    "vllm-ascend knows one place of an expert on a device",
                    hint="plan with --method poise, which never does that",
                )
        devices = [{"device_id": d, "device_expert": held.tolist()} for d, held in enumerate(table_DK)]
        layers.append({"layer_id": index, "device_count": len(devices), "device_list": devices})
    write_whole(path, json.dumps({"moe_layer_count": len(layers), "layer_list": layers}), PlacementError)
    return filled, unplanned
