"""vLLM: map files of open proposals. No release loads one; each format is named by its pull request.

#34811  ``--expert-placement-file``: ``{"expert_to_ep_rank": [rank of expert 0, 1, ...]}``, one list for all layers,
        without replicas.
#49572  ``eplb_config.initial_expert_map_path``: ``[[expert of slot 0, 1, ...], ...]``, a list a MoE layer.
#53022  ``eplb_config.expert_map_path``, DeepSeek-V4 alone: the same lists, one a decoder layer and one for each layer
        of multi-token prediction that the config has (``num_nextn_predict_layers``), run or not. Its loader
        (``vllm/models/deepseek_v4/expert_map.py``, ``load_static_expert_map``) refuses another number of lists, and,
        without replicas, a list that tears a routing group.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from poise.engines.slots import full_table, rows_for, rows_with_mtp
from poise.planning.placement import Placement
from poise.util.errors import OptionError, PlacementError
from poise.util.files import write_whole


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
        raise PlacementError(
            f"expert {expert} is on rank {rank_LE[0, expert]} in layer {placement.layer_ids_L[0]} and on rank "
            f"{rank_LE[layer, expert]} in layer {placement.layer_ids_L[layer]}: #34811 has one list for all layers",
            hint="export to checkpoint (a permutation a layer) or vllm-49572",
        )
    write_whole(path, json.dumps({"expert_to_ep_rank": rank_LE[0].tolist()}), PlacementError)


def write_49572(placement: Placement, path: str | Path, *, layer_ids: tuple[int, ...] | None = None) -> tuple[int, int]:
    """Write the file of vLLM's pull request #49572; returns slots filled, and layers with a trivial row.

    Raises
    ------
    PlacementError : as :func:`poise.engines.slots.rows_for`.
    """
    rows, filled, unplanned = rows_for(placement, layer_ids, engine="vLLM (#49572)")
    write_whole(path, json.dumps([row.tolist() for _, row in sorted(rows.items())]), PlacementError)
    return filled, unplanned


def write_53022(
    placement: Placement, path: str | Path, *, num_hidden_layers: int | None, num_mtp_layers: int = 0,
    num_groups: int = 1,
) -> int:  # fmt: skip
    """Write the file of vLLM's pull request #53022; returns slots filled. Layers without a plan get a trivial row.

    Raises
    ------
    PlacementError : as :func:`poise.engines.slots.rows_for`, or, without replicas, a block of slots holds experts of
        two routing groups.
    OptionError : the number of decoder layers is not known.
    """
    if num_hidden_layers is None:
        raise OptionError("#53022 needs every decoder layer", hint="give --model or --num-hidden-layers")
    rows, filled, _ = rows_with_mtp(
        placement, tuple(range(num_hidden_layers)), num_mtp_layers, num_hidden_layers, engine="vLLM (#53022)"
    )
    table = np.stack([row for _, row in sorted(rows.items())])
    if placement.num_slots == placement.num_experts and placement.num_experts % num_groups == 0:
        group_LGX = (table // (placement.num_experts // num_groups)).reshape(len(table), num_groups, -1)
        torn = np.argwhere((group_LGX != group_LGX[:, :, :1]).any(axis=2))
        if torn.size:
            layer, block = torn[0].tolist()
            raise PlacementError(
                f"layer {sorted(rows)[layer]}: block {block} of {num_groups} holds experts of routing groups "
                f"{group_LGX[layer, block].min()} and {group_LGX[layer, block].max()}, #53022 asks for one",
                hint="--keep-groups, or plan for --engine checkpoint",
            )
    write_whole(path, json.dumps(table.tolist()), PlacementError)
    return filled
