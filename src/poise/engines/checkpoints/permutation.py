"""Placements as new expert ids: of contiguous blocks of E/D new ids, the d-th is what device d holds.

Engines that know no map put the d-th block of expert ids on rank d. Give the experts new ids, and the router's rows
with them, and such an engine runs the placement; the model computes what it did. A permutation has no replicas, and
where the router first picks groups (blocks of E/G ids, DeepSeek), only permutations of whole groups, and within groups,
keep the function.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.planning.groups import WholeGroups, gathered
from poise.planning.placement import MAX_NAME, MAX_SIZE, Placement
from poise.routing.trace import NO_EXPERT, LoadProfile, RoutingTrace, row_blocks, sealed
from poise.util.errors import OptionError, PlacementError, TraceError
from poise.util.jsonfile import read_json

RELABELLING_FILE = "poise-relabelling.json"
FORMAT, VERSION = "poise-relabelling", 1
MAX_FILE_BYTES = 2**26


def permutation(placement: Placement, *, num_groups: int = 1) -> NDArray[np.int32]:
    """Old expert of each new id, int32 [L, E]: device d gets the new ids d * E/D to (d + 1) * E/D - 1.

    Within a device experts keep their order, so a contiguous placement gives 0, 1, 2, ...

    Parameters
    ----------
    placement : as many experts on every device of every layer, no replicas, no empty slots.
    num_groups : G, groups that the router picks from before it picks experts; 1 if it does not.

    Raises
    ------
    PlacementError : replicas, empty slots, devices that differ in slots, or groups that are torn apart.
    """
    layers, experts, devices = placement.num_layers, placement.num_experts, placement.num_devices
    if placement.num_slots != experts:
        raise PlacementError(
            f"{placement.num_slots} slots for {experts} experts: new expert ids allow neither replicas nor empty slots",
            hint="plan with --redundant 0 and without --pooled",
        )
    per_device = placement.slots_D
    if (per_device != per_device[0]).any():
        raise PlacementError(
            f"{experts} experts on {devices} devices, {per_device.min()} to {per_device.max()} on each: engines cut "
            "expert ids into equal blocks",
            hint=f"plan with --redundant 0 for a number of devices that divides {experts}",
        )
    order_LE = np.sort(placement.slot_expert_LS.reshape(layers, devices, -1), axis=2).reshape(layers, experts)
    if num_groups > 1:
        _check_groups(placement, order_LE, num_groups)
    return order_LE


def _whole(placement: Placement, num_groups: int) -> WholeGroups:
    """The groups, if they and devices line up."""
    try:
        return WholeGroups.in_ids(placement.num_experts, num_groups, placement.num_devices)
    except OptionError as error:
        raise PlacementError(error.message, hint=error.hint) from None


def _check_groups(placement: Placement, order_LE: NDArray[np.int32], num_groups: int) -> None:
    size = _whole(placement, num_groups).size
    group_LGS = order_LE.reshape(len(order_LE), num_groups, size) // size
    torn = np.argwhere(group_LGS != group_LGS[:, :, :1])
    if torn.size:
        layer, block, at = (int(x) for x in torn[0])
        per_device = placement.num_experts // placement.num_devices
        first, last = block * size // per_device, (block * size + size - 1) // per_device
        who = f"device {first} holds" if first == last else f"devices {first} to {last} together hold"
        raise PlacementError(
            f"layer {placement.layer_ids_L[layer]}: {who} a part of routing group {group_LGS[layer, block, 0]} and of "
            f"group {group_LGS[layer, block, at]}; the router picks among {num_groups} groups of {size} ids, so new "
            f"ids must keep each group whole ({len(set(torn[:, 0].tolist()))} of {len(order_LE)} layers break this)",
            hint="'poise plan --engine checkpoint' with --model plans so that they do; of a placement made elsewhere "
            f"'poise export --keep-groups', or keep_groups(placement, {num_groups}), takes the nearest one that does; "
            "or export a map (sglang, tensorrt-llm), which has no such limit",
        )


def keep_groups(placement: Placement, num_groups: int) -> Placement:
    """The nearest placement that keeps routing groups whole: the fewest experts change their device.

    In every layer either each device holds whole groups, or a run of devices holds one
    (:func:`poise.planning.groups.gathered`). It is for placements that were made elsewhere, and knows no loads: a plan
    for an engine that takes new ids keeps groups from its start on, and is faster.

    Raises
    ------
    PlacementError : as :func:`permutation`, but for torn groups; or groups and devices do not line up.
    """
    permutation(placement)
    if num_groups == 1:
        return placement
    slots_D = placement.slots_D
    count_LED = gathered(placement.count_LED(), _whole(placement, num_groups), slots_D, filled=True)
    method = f"{placement.method}, groups kept"[:MAX_NAME]
    return Placement.from_counts(count_LED, slots_D=slots_D, layer_ids_L=placement.layer_ids_L, method=method)


@dataclass(frozen=True, slots=True, eq=False)
class Relabelling:
    """New expert ids of some layers. Plain frozen data, checked once; arrays are read-only.

    Parameters
    ----------
    layer_ids_L : int32 [L], decoder layers, ascending.
    order_LE : int32 [L, E], old expert of each new id.
    source : name of the model with the old ids.
    num_devices : D, devices of the placement: the d-th block of E/D new ids is what device d holds; None: unknown.

    Raises
    ------
    PlacementError : shapes disagree, a row is no permutation, or D does not divide E.
    """

    layer_ids_L: NDArray[np.int32]
    order_LE: NDArray[np.int32]
    source: str = ""
    num_devices: int | None = None

    def __post_init__(self) -> None:
        ids, order = np.array(self.layer_ids_L), np.array(self.order_LE)
        if ids.ndim != 1 or order.ndim != 2 or len(ids) != len(order) or order.size == 0:
            raise PlacementError(f"new ids of shape {order.shape} for {ids.size} layers")
        if ids.min() < 0 or (np.diff(ids) <= 0).any():
            raise PlacementError(f"layer ids must ascend from 0 or more, got {ids.tolist()[:8]}")
        wrong = np.flatnonzero((np.sort(order, axis=1) != np.arange(order.shape[1])).any(axis=1))
        if wrong.size:
            raise PlacementError(
                f"layer {ids[wrong[0]]}: the old ids are no permutation of 0..{order.shape[1] - 1} "
                f"({wrong.size} such layers)"
            )
        if self.num_devices is not None and (self.num_devices < 1 or order.shape[1] % self.num_devices):
            raise PlacementError(f"{order.shape[1]} experts on {self.num_devices} devices are no equal blocks")
        ids, order = ids.astype(np.int32), order.astype(np.int32)
        ids.flags.writeable = order.flags.writeable = False
        object.__setattr__(self, "layer_ids_L", ids)
        object.__setattr__(self, "order_LE", order)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.order_LE.shape[1])

    @property
    def moved(self) -> int:
        """Experts with another id, all layers together."""
        return int((self.order_LE != np.arange(self.num_experts)).sum())

    def rows(self) -> dict[int, NDArray[np.int32]]:
        """The order of each decoder layer, int32 [E]."""
        return dict(zip(self.layer_ids_L.tolist(), self.order_LE, strict=True))

    def inverse(self) -> Relabelling:
        """What undoes it."""
        return replace(self, order_LE=np.argsort(self.order_LE, axis=1).astype(np.int32), num_devices=None)

    def placement(self) -> Placement:
        """One expert a device, E devices: relabelling with it gives these very ids."""
        experts = self.num_experts
        devices = np.arange(experts, dtype=np.int32)
        return Placement(self.order_LE, devices, experts, experts, self.layer_ids_L, method="relabelling")

    def after(self, first: Relabelling) -> Relabelling:
        """Both in one: ``first``, then this one on the ids that it gave. The source is that of ``first``.

        Raises
        ------
        PlacementError : the numbers of experts differ.
        """
        if first.num_experts != self.num_experts:
            raise PlacementError(
                f"{self.num_experts} experts get new ids, the first relabelling has {first.num_experts}"
            )
        same, before, then = np.arange(self.num_experts), first.rows(), self.rows()
        ids = sorted({*before, *then})
        order = [before.get(layer, same)[then.get(layer, same)] for layer in ids]
        return Relabelling(np.array(ids), np.array(order), first.source, self.num_devices)

    def original(self, traffic: RoutingTrace | LoadProfile) -> RoutingTrace | LoadProfile:
        """Traffic of the relabelled model in the ids of its source; layers without new ids are as they were.

        Raises
        ------
        TraceError : the numbers of experts differ.
        """
        if traffic.num_experts != self.num_experts:
            raise TraceError(f"{traffic.name} has {traffic.num_experts} experts, the relabelling {self.num_experts}")
        rows, same = self.rows(), np.arange(self.num_experts)
        old_LE = np.array([rows.get(layer, same) for layer in traffic.layer_ids.tolist()])
        if isinstance(traffic, RoutingTrace):
            experts = np.empty_like(traffic.experts)
            for part in row_blocks(experts, 8):
                ids = traffic.experts[part]
                old = old_LE[np.arange(traffic.num_layers)[:, None], ids]
                experts[part] = np.where(ids == NO_EXPERT, NO_EXPERT, old)
            return replace(traffic, experts=sealed(experts))
        load_BLE = np.take_along_axis(traffic.load_BLE, np.argsort(old_LE, axis=1)[None], axis=2)
        return replace(traffic, load_BLE=sealed(load_BLE))

    def to_json(self) -> str:
        """What :func:`load_relabelling` reads."""
        layers = {str(layer): order.tolist() for layer, order in self.rows().items()}
        devices = {} if self.num_devices is None else {"num_devices": self.num_devices}
        return json.dumps(
            {"format": FORMAT, "version": VERSION, "source": self.source, "num_experts": self.num_experts, **devices,
             "layers": layers}
        )  # fmt: skip


def load_relabelling(path: str | Path) -> Relabelling:
    """Read the ``poise-relabelling.json`` of a relabelled checkpoint, or of the folder it lies in.

    Raises
    ------
    PlacementError : the file is missing, too large, damaged or of another format.
    """
    path = Path(path)
    try:
        path = path / RELABELLING_FILE if path.is_dir() else path
    except OSError:  # a name too long: reading it says so
        pass
    data = read_json(path, MAX_FILE_BYTES, PlacementError, hint="is it a relabelled checkpoint?")
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise PlacementError(f"{path} is not of format {FORMAT} {VERSION}")
    return relabelling_of(data, str(path))


def relabelling_of(data: dict[str, Any], path: str) -> Relabelling:
    """The same of what such a file, or an order of experts, holds.

    Parameters
    ----------
    path : where it was read, for messages.

    Raises
    ------
    PlacementError : a part of it is missing or not what it should be.
    """
    experts, layers, source = data.get("num_experts"), data.get("layers"), data.get("source", "")
    devices = data.get("num_devices")
    if not _count(experts, 1, MAX_SIZE) or not isinstance(layers, dict) or not layers or not isinstance(source, str):
        raise PlacementError(f"{path}: num_experts, layers or source is missing or not what it should be")
    if devices is not None and not _count(devices, 1, MAX_SIZE):
        raise PlacementError(f"{path}: num_devices is {str(devices)[:20]}")
    order: dict[int, list[int]] = {}
    for name, row in layers.items():
        if not (name.isascii() and name.isdigit() and len(name) < 6):
            raise PlacementError(f"{path}: {name!r:.40} is no layer")
        if not isinstance(row, list) or len(row) != experts or not all(_count(old, 0, MAX_SIZE) for old in row):
            raise PlacementError(f"{path}: layer {name} must list {experts} experts")
        order[int(name)] = row
    try:
        table = np.array([order[layer] for layer in sorted(order)])
        return Relabelling(np.array(sorted(order)), table, source, devices)
    except PlacementError as error:
        raise PlacementError(f"{path}: {error.message}") from None


def _count(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
