"""vLLM: map files of open proposals. No release loads one; each format is named by its pull request.

#34811  ``--expert-placement-file``: ``{"expert_to_ep_rank": [rank of expert 0, 1, ...]}``, one list for all layers,
        without replicas.
#49572  ``eplb_config.initial_expert_map_path``: ``[[expert of slot 0, 1, ...], ...]``, a list a MoE layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from poise.engines.slots import full_table, rows_for
from poise.planning.placement import Placement
from poise.util.errors import PlacementError
from poise.util.files import replacing


def write_34811(placement: Placement, path: str | Path) -> None:
    """Write the file of vLLM's pull request #34811.

    Raises
    ------
    PlacementError : replicas, layers that differ, or ranks with unequal numbers of experts.
    """
    if placement.num_slots > placement.num_experts:
        raise PlacementError(
            f"{placement.num_slots} slots for {placement.num_experts} experts: the file of #34811 knows no replicas",
            hint="plan with --redundant 0, or export to vllm-49572",
        )
    table, _ = full_table(placement, engine="vLLM (#34811)")
    per_rank = placement.num_slots // placement.num_devices
    rank_LE = np.argsort(table, axis=1) // per_rank
    differ = np.argwhere(rank_LE != rank_LE[0])
    if differ.size:
        layer, expert = (int(x) for x in differ[0])
        assert placement.layer_ids_L is not None
        raise PlacementError(
            f"expert {expert} is on rank {rank_LE[0, expert]} in layer {placement.layer_ids_L[0]} and on rank "
            f"{rank_LE[layer, expert]} in layer {placement.layer_ids_L[layer]}: #34811 has one list for all layers",
            hint="export to checkpoint (a permutation a layer) or vllm-49572",
        )
    with replacing(path, PlacementError) as stream:
        stream.write(json.dumps({"expert_to_ep_rank": rank_LE[0].tolist()}).encode())


def write_49572(placement: Placement, path: str | Path, *, layer_ids: tuple[int, ...] | None = None) -> tuple[int, int]:
    """Write the file of vLLM's pull request #49572; returns slots filled, and layers with a trivial row.

    Raises
    ------
    PlacementError : as :func:`poise.engines.slots.rows_for`.
    """
    rows, filled, unplanned = rows_for(placement, layer_ids, engine="vLLM (#49572)")
    with replacing(path, PlacementError) as stream:
        stream.write(json.dumps([row.tolist() for _, row in sorted(rows.items())]).encode())
    return filled, unplanned
