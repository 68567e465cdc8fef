"""Placement: which logical expert each physical slot of each layer holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.errors import PlacementError

EMPTY = -1


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Experts on slots, for every MoE layer. Plain frozen data, checked once; arrays are read-only.

    Parameters
    ----------
    slot_expert_LS : int32 [L, S], logical expert of each physical slot; -1 = empty.
    slot_device_S : int32 [S], device of each slot, non-decreasing.
    num_experts : E.
    num_devices : D (a device may have no slot).
    layer_ids_L : int32 [L], index of each MoE layer among the model's decoder layers.
    method : who made it.

    Raises
    ------
    PlacementError : shapes disagree, ids out of range, or an expert of a layer has no slot. One expert twice on a
        device is accepted (published EPLB does it); see :attr:`has_duplicates`.
    """

    slot_expert_LS: NDArray[np.int32]
    slot_device_S: NDArray[np.int32]
    num_experts: int
    num_devices: int
    layer_ids_L: NDArray[np.int32] | None = None
    method: str = field(default="custom")

    def __post_init__(self) -> None:
        slots = np.array(self.slot_expert_LS, dtype=np.int32)
        device = np.array(self.slot_device_S, dtype=np.int32)
        if slots.ndim != 2 or device.shape != slots.shape[1:] or slots.size == 0:
            raise PlacementError(
                f"slot_expert_LS {slots.shape} and slot_device_S {device.shape} must be [L, S] and [S]"
            )
        num_layers = slots.shape[0]
        ids = np.arange(num_layers) if self.layer_ids_L is None else np.array(self.layer_ids_L)
        ids = ids.astype(np.int32)
        if ids.shape != (num_layers,):
            raise PlacementError(f"{ids.size} layer ids for {num_layers} layers")
        if np.any(np.diff(device) < 0) or device[0] < 0 or device[-1] >= self.num_devices:
            raise PlacementError(f"slot devices must be non-decreasing within 0..{self.num_devices - 1}")
        if slots.min() < EMPTY or slots.max() >= self.num_experts:
            raise PlacementError(
                f"expert ids must lie in 0..{self.num_experts - 1} (or -1 for an empty slot), "
                f"got {slots.min()}..{slots.max()}"
            )
        for arr in (slots, device, ids):
            arr.flags.writeable = False
        object.__setattr__(self, "slot_expert_LS", slots)
        object.__setattr__(self, "slot_device_S", device)
        object.__setattr__(self, "layer_ids_L", ids)
        missing = np.argwhere(self.replicas_LE() == 0)
        if missing.size:
            layer, expert = (int(x) for x in missing[0])
            raise PlacementError(f"layer {layer}: expert {expert} has no slot ({len(missing)} such experts in all)")

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.slot_expert_LS.shape[0])

    @property
    def num_slots(self) -> int:
        """S, empty slots included."""
        return int(self.slot_expert_LS.shape[1])

    def count_LED(self) -> NDArray[np.int32]:
        """Slots of expert e on device d, int32 [L, E, D]."""
        out = np.zeros((self.num_layers, self.num_experts, self.num_devices), dtype=np.int32)
        layer, slot = np.nonzero(self.slot_expert_LS != EMPTY)
        np.add.at(out, (layer, self.slot_expert_LS[layer, slot], self.slot_device_S[slot]), 1)
        return out

    def replicas_LE(self) -> NDArray[np.int32]:
        """Slots of each expert, int32 [L, E]."""
        out = np.zeros((self.num_layers, self.num_experts), dtype=np.int32)
        layer, slot = np.nonzero(self.slot_expert_LS != EMPTY)
        np.add.at(out, (layer, self.slot_expert_LS[layer, slot]), 1)
        return out

    @property
    def has_duplicates(self) -> bool:
        """Some expert has two slots on one device of one layer."""
        return bool((self.count_LED() > 1).any())

    @classmethod
    def from_devices(
        cls,
        expert_device_LE: NDArray[Any],
        num_devices: int,
        *,
        layer_ids_L: NDArray[np.int32] | None = None,
        method: str = "custom",
    ) -> Placement:
        """Placement without replicas from the device of each expert, int [L, E].

        Devices may hold different numbers of experts in different layers: a device gets as many slots as its fullest
        layer needs, and the rest stay empty.
        """
        device_LE = np.asarray(expert_device_LE)
        num_layers, num_experts = device_LE.shape
        holds = np.zeros((num_layers, num_experts, num_devices), dtype=np.int32)
        np.put_along_axis(holds, device_LE[:, :, None].astype(np.int64), 1, axis=2)
        return cls.from_counts(holds, layer_ids_L=layer_ids_L, method=method)

    @classmethod
    def from_counts(
        cls,
        count_LED: NDArray[Any],
        *,
        slots_D: NDArray[Any] | None = None,
        layer_ids_L: NDArray[np.int32] | None = None,
        method: str = "custom",
    ) -> Placement:
        """Placement from the number of slots of each expert on each device, int [L, E, D].

        ``slots_D`` are the slots of each device (default: what its fullest layer needs); experts fill them in
        ascending order, empty slots come last.
        """
        count = np.asarray(count_LED)
        num_layers, num_experts, num_devices = count.shape
        used_LD = count.sum(axis=1)
        slots = used_LD.max(axis=0) if slots_D is None else np.asarray(slots_D)
        if (used_LD > slots).any():
            layer, device = (int(x) for x in np.argwhere(used_LD > slots)[0])
            raise PlacementError(
                f"layer {layer}: device {device} holds {used_LD[layer, device]} experts in {slots[device]} slots"
            )
        start = np.concatenate([[0], np.cumsum(slots)])
        slot_expert = np.full((num_layers, int(start[-1])), EMPTY, dtype=np.int32)
        for layer in range(num_layers):
            for device in range(num_devices):
                held = np.repeat(np.arange(num_experts), count[layer, :, device])
                slot_expert[layer, start[device] : start[device] + held.size] = held
        slot_device = np.repeat(np.arange(num_devices, dtype=np.int32), slots)
        return cls(slot_expert, slot_device, num_experts, num_devices, layer_ids_L=layer_ids_L, method=method)
