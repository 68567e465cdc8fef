"""TensorRT-LLM: placements as the YAML of ``moe_config.load_balancer`` (offline expert load balancing).

``num_slots``; ``initial_global_assignments``: decoder layer -> expert of each slot; ``layer_updates_per_iter``: 0 keeps
the map as it is. Slot s lies on rank s // (num_slots / ep_size). A layer without a row ends the start with a KeyError,
layers of multi-token prediction too (NVIDIA/TensorRT-LLM #13974): they follow the decoder layers, numbered on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from poise.engines.slots import rows_for, trivial_row
from poise.errors import OptionError
from poise.planning.placement import Placement, atomic

MAX_MTP_LAYERS = 64


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
    num_hidden_layers : decoder layers of the model; only MTP layers need it.
    num_mtp_layers : layers of multi-token prediction that the engine will run.

    Raises
    ------
    PlacementError : as :func:`poise.engines.slots.rows_for`. OptionError : MTP layers without num_hidden_layers.
    """
    if not 0 <= num_mtp_layers <= MAX_MTP_LAYERS:
        raise OptionError(f"num_mtp_layers must lie in 0..{MAX_MTP_LAYERS}, got {num_mtp_layers}")
    rows, filled, unplanned = rows_for(placement, layer_ids, engine="TensorRT-LLM")
    if num_mtp_layers:
        if num_hidden_layers is None or num_hidden_layers <= max(rows):
            raise OptionError(
                f"{num_mtp_layers} MTP layers follow the decoder layers, of which {num_hidden_layers} were named and "
                f"the placement reaches layer {max(rows)}",
                hint="give --num-hidden-layers or --model",
            )
        trivial = trivial_row(placement.num_experts, placement.num_slots)
        rows.update({num_hidden_layers + i: trivial for i in range(num_mtp_layers)})
    lines = [f"num_slots: {placement.num_slots}", "initial_global_assignments:"]
    lines += [f"  {layer}: [{', '.join(map(str, row.tolist()))}]" for layer, row in sorted(rows.items())]
    lines.append("layer_updates_per_iter: 0")
    with atomic(Path(path)) as stream:
        stream.write(("\n".join(lines) + "\n").encode())
    return TensorRTFile(len(rows), filled, unplanned + num_mtp_layers)
