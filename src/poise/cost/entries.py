"""Which device holds which expert, as the entries of ``count_LED`` that are not 0: a placement has no more than slots.

An array [L, E, D] has a thousand times as many on 2,048 devices, so whatever prices or checks a placement reads these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class LayerEntries:
    """One layer. Entries H are (expert, device) pairs with a slot, sorted by device, then expert.

    Parameters
    ----------
    expert_H, device_H : int64 [H].
    count_H : slots of the expert on the device, int64 [H].
    num_experts, num_devices : E and D.
    """

    expert_H: NDArray[np.int64]
    device_H: NDArray[np.int64]
    count_H: NDArray[np.int64]
    num_experts: int
    num_devices: int

    @classmethod
    def of_counts(cls, count_ED: NDArray[Any]) -> LayerEntries:
        """From slots of each expert on each device, int or bool [E, D]."""
        device_H, expert_H = np.nonzero(np.asarray(count_ED).T)
        count_H = np.asarray(count_ED)[expert_H, device_H].astype(np.int64)
        return cls(expert_H, device_H, count_H, *np.shape(count_ED))

    def replicas_E(self) -> NDArray[np.int64]:
        """Slots of each expert, int64 [E]."""
        return np.bincount(self.expert_H, self.count_H, self.num_experts).astype(np.int64)

    def by_expert(self) -> NDArray[np.int64]:
        """Numbers of the entries sorted by expert, then device, int64 [H]."""
        return np.argsort(self.expert_H, kind="stable")

    def held_ED(self) -> NDArray[np.bool_]:
        """Whether a device holds an expert, bool [E, D]."""
        out = np.zeros((self.num_experts, self.num_devices), np.bool_)
        out[self.expert_H, self.device_H] = True
        return out

    def dense(self, value_XH: NDArray[np.float64]) -> NDArray[np.float64]:
        """A value of each entry as float64 [X, E, D], 0 elsewhere."""
        out = np.zeros((len(value_XH), self.num_experts, self.num_devices))
        out[:, self.expert_H, self.device_H] = value_XH
        return out


@dataclass(frozen=True, slots=True, eq=False)
class HeldEntries:
    """All layers. Entries X are (layer, expert, device) with a slot, sorted by layer, then device, then expert.

    Parameters
    ----------
    ptr_L : int64 [L + 1], first entry of each layer.
    expert_X, device_X : int64 [X].
    count_X : slots of the expert on the device, int64 [X].
    num_experts, num_devices : E and D.
    """

    ptr_L: NDArray[np.int64]
    expert_X: NDArray[np.int64]
    device_X: NDArray[np.int64]
    count_X: NDArray[np.int64]
    num_experts: int
    num_devices: int

    @classmethod
    def of_slots(
        cls, layer_S: NDArray[Any], expert_S: NDArray[Any], device_S: NDArray[Any], shape: tuple[int, int, int]
    ) -> HeldEntries:
        """From layer, expert and device of every slot that holds one, in any order; ``shape`` is [L, E, D]."""
        layers, experts, devices = shape
        flat, count_X = np.unique((layer_S.astype(np.int64) * devices + device_S) * experts + expert_S,
                                  return_counts=True)  # fmt: skip
        row, expert_X = np.divmod(flat, experts)
        layer_X, device_X = np.divmod(row, devices)
        ptr_L = np.searchsorted(layer_X, np.arange(layers + 1)).astype(np.int64)
        return cls(ptr_L, expert_X, device_X, count_X.astype(np.int64), experts, devices)

    @classmethod
    def of_devices(cls, device_LE: NDArray[Any], num_devices: int) -> HeldEntries:
        """From the one device of each expert, int [L, E]."""
        layer_X, expert_X = np.indices(device_LE.shape).reshape(2, -1)
        return cls.of_slots(layer_X, expert_X, device_LE.ravel(), (*device_LE.shape, num_devices))

    @classmethod
    def of_layers(cls, layers: Iterable[LayerEntries]) -> HeldEntries:
        """From one layer after the other, at least one."""
        all_L = list(layers)
        ptr_L = np.cumsum([0, *(len(one.expert_H) for one in all_L)]).astype(np.int64)
        return cls(
            ptr_L,
            np.concatenate([one.expert_H for one in all_L]),
            np.concatenate([one.device_H for one in all_L]),
            np.concatenate([one.count_H for one in all_L]),
            all_L[0].num_experts,
            all_L[0].num_devices,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """[layers, experts, devices]."""
        return len(self.ptr_L) - 1, self.num_experts, self.num_devices

    def layer(self, layer: int) -> LayerEntries:
        """One layer, as views."""
        own = slice(self.ptr_L[layer], self.ptr_L[layer + 1])
        return LayerEntries(
            self.expert_X[own], self.device_X[own], self.count_X[own], self.num_experts, self.num_devices
        )

    def layers(self) -> list[LayerEntries]:
        """All of them."""
        return [self.layer(layer) for layer in range(len(self.ptr_L) - 1)]

    def once(self) -> HeldEntries:
        """Without second slots of an expert on a device."""
        return replace(self, count_X=np.ones_like(self.count_X))

    def layer_X(self) -> NDArray[np.int64]:
        """Layer of each entry, int64 [X]."""
        return np.repeat(np.arange(len(self.ptr_L) - 1), np.diff(self.ptr_L))

    def used_LD(self, *, different: bool = False) -> NDArray[np.int64]:
        """Slots of each device that hold an expert, int64 [L, D]; or its ``different`` experts."""
        layers, _, devices = self.shape
        weight = None if different else self.count_X
        used = np.bincount(self.layer_X() * devices + self.device_X, weight, layers * devices)
        return used.astype(np.int64).reshape(layers, devices)

    def replicas_LE(self) -> NDArray[np.int64]:
        """Slots of each expert, int64 [L, E]."""
        layers, experts, _ = self.shape
        slots = np.bincount(self.layer_X() * experts + self.expert_X, self.count_X, layers * experts)
        return slots.astype(np.int64).reshape(layers, experts)


SlotCounts = HeldEntries | NDArray[Any]
"""A placement to be priced: entries, or int or bool [L, E, D]."""


def entries_of(counts: SlotCounts) -> HeldEntries:
    """The entries of a placement given in either form."""
    if isinstance(counts, HeldEntries):
        return counts
    count_LED = np.asarray(counts)
    layer_X, device_X, expert_X = np.nonzero(count_LED.transpose(0, 2, 1))
    ptr_L = np.searchsorted(layer_X, np.arange(len(count_LED) + 1)).astype(np.int64)
    count_X = count_LED[layer_X, expert_X, device_X].astype(np.int64)
    return HeldEntries(ptr_L, expert_X, device_X, count_X, *count_LED.shape[1:])


def picked_layers(options: Sequence[HeldEntries], best_L: NDArray[np.integer[Any]]) -> HeldEntries:
    """Each layer from the option that is named for it."""
    return HeldEntries.of_layers(options[best].layer(layer) for layer, best in enumerate(best_L.tolist()))
