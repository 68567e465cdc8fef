"""The map that a plugin gives whatever the load: read once, when the process starts.

All ranks must give the same map at every rearrangement. A file read again hours later may have been written anew in
between, or its disk be gone on one node: experts of one rank would move while those of others stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from poise.engines import sglang
from poise.engines.slots import rows_for
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.util.errors import PlacementError


@dataclass(frozen=True, slots=True, eq=False)
class StaticMap:
    """Plain frozen data; the table is read-only.

    Parameters
    ----------
    path : where it was read, for messages.
    table_LS : int64 [L, S], expert of each slot, a row a MoE layer.
    num_experts : E.
    num_devices : D; None where the file does not say: slots are then shared evenly by the ranks there are.
    """

    path: Path
    table_LS: NDArray[np.int64] = field(repr=False)
    num_experts: int
    num_devices: int | None

    @classmethod
    def read(cls, path: Path, model: ModelSpec | None) -> StaticMap:
        """A placement (``.npz``), or SGLang's JSON: a row a MoE layer, or, where a model is named, a row a layer.

        Raises
        ------
        PlacementError : the file cannot be read, or has other layers than the model.
        """
        known = path.suffix == ".npz"
        placement = Placement.load(path) if known else _of_moe_layers(sglang.read(path, num_devices=1), path, model)
        wanted = None if model is None else model.moe_layer_ids
        rows, _, _ = rows_for(placement, wanted, engine="the engine")
        table = np.stack([row for _, row in sorted(rows.items())]).astype(np.int64)
        table.flags.writeable = False
        return cls(path, table, placement.num_experts, placement.num_devices if known else None)

    def rows(self, layers: int, experts: int, slots: int, ranks: int) -> NDArray[np.int64]:
        """The map, int64 [L, S], a copy.

        Raises
        ------
        PlacementError : the engine's numbers are others.
        """
        have = (len(self.table_LS), self.num_experts, self.table_LS.shape[1], self.num_devices or ranks)
        if have != (layers, experts, slots, ranks):
            hint = "a .npz of 'poise plan' has the MoE layers only; the engine's redundant experts are slots - experts"
            if self.num_devices is None:
                hint = "SGLang's file may have rows of dense layers: POISE_MODEL tells which"
            raise PlacementError(
                f"{self.path} has [layers, experts, slots, ranks] {have}, the engine {(layers, experts, slots, ranks)}",
                hint=hint,
            )
        return self.table_LS.copy()


def _of_moe_layers(placement: Placement, path: Path, model: ModelSpec | None) -> Placement:
    """SGLang's file numbers its rows from 0, be they those of MoE layers or of all: the rows under the model's ids."""
    if model is None:
        return placement
    ids = np.array(model.moe_layer_ids)
    if placement.num_layers == ids.size:
        return replace(placement, layer_ids_L=ids)
    if placement.num_layers != model.num_hidden_layers:
        raise PlacementError(
            f"{path} has {placement.num_layers} layers, {model.name} {model.num_hidden_layers}, {ids.size} of them MoE "
            "layers",
            hint="check POISE_MODEL",
        )
    return replace(placement, slot_expert_LS=placement.slot_expert_LS[ids], layer_ids_L=ids)
