"""TensorRT-LLM: placements as the YAML of ``moe_config.load_balancer`` (offline expert load balancing).

``num_slots``; ``initial_global_assignments``: decoder layer -> expert of each slot; ``layer_updates_per_iter``: 0 keeps
the map as it is. Slot s lies on rank s // (num_slots / ep_size). A layer without a row ends the start with a KeyError,
layers of multi-token prediction too (NVIDIA/TensorRT-LLM #13974): they follow the decoder layers, numbered on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from poise.engines.slots import rows_with_mtp
from poise.planning.placement import Placement
from poise.util.errors import PlacementError
from poise.util.files import write_whole


@dataclass(frozen=True, slots=True)
class TensorRTFile:
    """What was written: layers with a row, slots filled, layers with a trivial row because nothing was planned."""

    layers: int
    filled: int
    unplanned: int


def write(
    placement: Placement,
    path: str | Path,
    *,
    layer_ids: tuple[int, ...] | None = None,
    num_hidden_layers: int | None = None,
    num_mtp_layers: int = 0,
) -> TensorRTFile:
    """Write the YAML file.

    Parameters
    ----------
    placement : as many slots on every rank.
    path : file to write.
    layer_ids : the model's MoE layers; None: those of the placement.
    num_hidden_layers, num_mtp_layers : as :func:`poise.engines.slots.rows_with_mtp`.

    Raises
    ------
    PlacementError, OptionError : as :func:`poise.engines.slots.rows_with_mtp`.
    """
    rows, filled, unplanned = rows_with_mtp(
        placement, layer_ids, num_mtp_layers, num_hidden_layers, engine="TensorRT-LLM"
    )
    lines = [f"num_slots: {placement.num_slots}", "initial_global_assignments:"]
    lines += [f"  {layer}: [{', '.join(map(str, row.tolist()))}]" for layer, row in sorted(rows.items())]
    lines.append("layer_updates_per_iter: 0")
    write_whole(path, ("\n".join(lines) + "\n"), PlacementError)
    return TensorRTFile(len(rows), filled, unplanned)
