"""HYGON's vLLM plugin (HYGON-AI/vllm-plugin-das): maps of its ``expert_map_path`` inside ``--eplb-config``.

Pull request #69, merged in September 2026, reads two forms, and so does this module's reader
(:mod:`poise.engines.dumps.hygon_maps`):

- ``{"version": 2, "format": "vllm_offline_eplb_physical_to_logical_by_model", "model_maps": {CLASS: MAP}}``, a map for
  each class of model that runs, multi-token prediction one of its own; later versions read this alone;
- ``MAP`` alone, with ``"version": 1`` and ``"format": "vllm_offline_eplb_physical_to_logical"``.

``MAP`` has ``physical_to_logical_map``, a list a MoE layer in their order, and numbers that must agree with the model.
Its loader (``static_eplb.py``, ``load_static_eplb_plan``) refuses another shape, ids that are no expert's, a row that
lacks an expert, and, in later versions, a map whose ``record_kind`` is not ``proposal`` or whose class is another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from poise.engines.slots import rows_for
from poise.planning.placement import Placement
from poise.util.errors import PlacementError
from poise.util.files import write_whole

FORMAT = "vllm_offline_eplb_physical_to_logical"
BY_MODEL = f"{FORMAT}_by_model"


def write(
    placement: Placement, path: str | Path, *, layer_ids: tuple[int, ...] | None = None, model_name: str = "model",
    model_class: str | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Write the file; returns slots filled, and layers with a trivial row because nothing was planned.

    Parameters
    ----------
    placement : as many slots on every rank.
    path : file to write.
    layer_ids : the model's MoE layers; None: those of the placement, taken to be all.
    model_name : what the file says the model is.
    model_class : the class that vLLM runs it as (``architectures`` of its config); None: the form without one.

    Raises
    ------
    PlacementError : as :func:`poise.engines.slots.rows_for`.
    """
    rows, filled, unplanned = rows_for(placement, layer_ids, engine="HYGON's plugin")
    one: dict[str, Any] = {
        "record_kind": "proposal",
        "model_name": model_name,
        "model_class": model_class or "model",
        "num_moe_layers": len(rows),
        "num_logical_experts": placement.num_experts,
        "num_physical_experts": placement.num_slots,
        "num_redundant_experts": placement.redundant,
        "physical_to_logical_map": [row.tolist() for _, row in sorted(rows.items())],
    }
    whole = {"version": 1, "format": FORMAT, **one}
    if model_class is not None:
        whole = {"version": 2, "format": BY_MODEL, "model_maps": {model_class: one}}
    write_whole(path, json.dumps(whole), PlacementError)
    return filled, unplanned
