"""What is made beforehand for the loss of a device, or of a node: the placements on the rest, and their file.

A loss keeps the numbers of slots and devices: slots of what is lost are empty. Two placements follow each other:

``first``  every expert has a holder again: those without one (*orphans*) were read anew from the checkpoint, each once,
           into slots of experts that have another holder. Nothing else has changed, so serving goes on with it at once.
``after``  what copies between the devices that are left make of it: balanced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.planning.placement import EMPTY, MAX_BYTES, MAX_CELLS, MAX_SIZE, Placement
from poise.routing.npz import open_npz
from poise.util.errors import OptionError, PlacementError, TraceError
from poise.util.files import replacing

FORMAT = 1
UNITS = ("device", "node")
MAX_LOSSES = 4096
NUMBERS = ("format", "num_experts", "num_devices", "layer_ids", "slot_device", "slot_expert", "lost", "first", "after")
WORDS = ("unit", "method")


def lost_together(unit: str, node_D: NDArray[np.int32]) -> list[tuple[int, ...]]:
    """Devices that one loss takes, for every loss: each device, or those of each node.

    Raises
    ------
    OptionError : another unit, or nothing would be left.
    """
    if unit not in UNITS:
        raise OptionError(f"unknown unit {unit!r} of a loss", hint=f"one of {', '.join(UNITS)}")
    unit_D = np.arange(len(node_D)) if unit == "device" else np.asarray(node_D)
    out = [tuple(int(d) for d in np.flatnonzero(unit_D == number)) for number in np.unique(unit_D)]
    if len(out) < 2:
        raise OptionError(f"the cluster has 1 {unit}: nothing is left where it is lost")
    return out


def on_rest(placement: Placement, lost: Iterable[int]) -> Placement:
    """A placement without the slots of lost devices; those that are left are numbered anew, in their order.

    Raises
    ------
    PlacementError : an expert lies on lost devices alone.
    """
    gone = sorted(set(lost))
    stays_S = ~np.isin(placement.slot_device_S, gone)
    number_D = np.cumsum(~np.isin(np.arange(placement.num_devices), gone)) - 1
    return replace(placement, slot_expert_LS=placement.slot_expert_LS[:, stays_S],
                   slot_device_S=number_D[placement.slot_device_S[stays_S]].astype(np.int32),
                   num_devices=placement.num_devices - len(gone))  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """One loss, and what follows it; module docstring.

    Parameters
    ----------
    lost : devices that are gone, ascending.
    first, after : in the slots of the placement before; those of lost devices are empty.

    Raises
    ------
    PlacementError : a lost device holds something, or the two placements are not of the same slots.
    """

    lost: tuple[int, ...]
    first: Placement
    after: Placement

    def __post_init__(self) -> None:
        for each in (self.first, self.after):
            held = each.slot_expert_LS[:, np.isin(each.slot_device_S, self.lost)]
            if (held != EMPTY).any():
                raise PlacementError(
                    f"devices {list(self.lost)} are lost and hold {int((held != EMPTY).sum())} experts"
                )
        if self.first.slot_expert_LS.shape != self.after.slot_expert_LS.shape:
            raise PlacementError(
                f"slots {self.first.slot_expert_LS.shape} at first and {self.after.slot_expert_LS.shape} after"
            )

    def reads_R3(self, before: Placement) -> NDArray[np.int64]:
        """Layer, expert and device of all that is read from the checkpoint, int64 [R, 3]."""
        return np.argwhere((self.first.count_LED() > 0) & (before.count_LED() == 0))

    @property
    def copies(self) -> int:
        """Experts that are copied between devices that are left."""
        return int(((self.after.count_LED() > 0) & (self.first.count_LED() == 0)).sum())

    @property
    def first_on_rest(self) -> Placement:
        """``first`` on the devices that are left."""
        return on_rest(self.first, self.lost)

    @property
    def after_on_rest(self) -> Placement:
        """``after`` on the devices that are left."""
        return on_rest(self.after, self.lost)

    @property
    def name(self) -> str:
        """Lost devices in few letters, for names of files: ``3``, ``4-7``, ``1+5``."""
        ranges: list[list[int]] = []
        for rank in self.lost:
            if ranges and ranges[-1][1] == rank - 1:
                ranges[-1][1] = rank
            else:
                ranges.append([rank, rank])
        return "+".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """All losses of one kind that a placement was prepared for.

    Parameters
    ----------
    before : the placement that runs.
    unit : what is lost at a time, ``device`` or ``node``.
    losses : one for each.

    Raises
    ------
    PlacementError : a loss is not of this placement, or does more than module docstring says.
    """

    before: Placement
    unit: str
    losses: tuple[Loss, ...]

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise PlacementError(f"unknown unit {self.unit!r} of a loss", hint=f"one of {', '.join(UNITS)}")
        have_LED = self.before.count_LED() > 0
        for loss in self.losses:
            mine = (loss.first.slot_expert_LS.shape, loss.first.num_devices)
            if mine != (self.before.slot_expert_LS.shape, self.before.num_devices):
                raise PlacementError(f"the loss of {list(loss.lost)} is for slots {mine[0]} on {mine[1]} devices")
            stays_LED = have_LED.copy()
            stays_LED[:, :, list(loss.lost)] = False
            came_LED = (loss.first.count_LED() > 0) & ~stays_LED
            odd_LE = (came_LED.any(axis=2) & stays_LED.any(axis=2)) | (came_LED.sum(axis=2) > 1)
            if odd_LE.any():
                layer, expert = (int(x) for x in np.argwhere(odd_LE)[0])
                held, came = int(stays_LED[layer, expert].sum()), int(came_LED[layer, expert].sum())
                raise PlacementError(
                    f"the loss of {list(loss.lost)} reads expert {expert} of layer row {layer} on {came} devices; "
                    f"{held} that are left hold it"
                )

    def of(self, lost: Sequence[int]) -> Loss:
        """The loss of just these devices.

        Raises
        ------
        OptionError : nothing was prepared for it.
        """
        wanted = tuple(sorted({int(rank) for rank in lost}))
        for loss in self.losses:
            if loss.lost == wanted:
                return loss
        raise OptionError(
            f"devices {list(wanted)} are lost, {len(self.losses)} losses of one {self.unit} were prepared"
        )

    def save(self, path: str | Path) -> None:
        """Write a ``.npz`` without pickles (docs/formats.md); the file appears whole or not at all.

        Raises
        ------
        PlacementError : as :func:`poise.util.files.replacing`.
        """
        old, devices = self.before, np.arange(self.before.num_devices)
        with replacing(path, PlacementError) as stream:
            np.savez_compressed(
                stream, format=np.int32(FORMAT), unit=np.array(self.unit), method=np.array(old.method),
                num_experts=np.int32(old.num_experts), num_devices=np.int32(old.num_devices),
                layer_ids=np.asarray(old.layer_ids_L), slot_device=old.slot_device_S, slot_expert=old.slot_expert_LS,
                lost=np.array([np.isin(devices, loss.lost) for loss in self.losses]).astype(np.int8),
                first=np.array([loss.first.slot_expert_LS for loss in self.losses]),
                after=np.array([loss.after.slot_expert_LS for loss in self.losses]),
            )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Losses:
        """Read what :meth:`save` wrote.

        Raises
        ------
        PlacementError : the file is missing, damaged, pickled, too large, of another format, or no valid losses.
        """
        path = Path(path)
        try:
            with open_npz(path, ["placements after losses"]) as archive:
                headers = [archive.header(name) for name in (*NUMBERS, *WORDS)]
                if sum(header.nbytes for header in headers) > MAX_BYTES:
                    raise PlacementError(f"{path} unpacks to more than {MAX_BYTES} bytes")
                arrays: dict[str, Any] = {header.name: archive.read(header) for header in headers}
        except TraceError as error:
            raise PlacementError(error.message, hint=error.hint or "is it a poise file of losses?") from None
        for name, array in arrays.items():
            if array.dtype.kind not in ("U" if name in WORDS else "iu"):
                raise PlacementError(f"{path}: {name} must be {'text' if name in WORDS else 'whole numbers'}")
            if name in (*WORDS, "format", "num_experts", "num_devices") and array.shape != ():
                raise PlacementError(f"{path}: {name} must be one value, got shape {array.shape}")
        if int(arrays["format"]) != FORMAT:
            raise PlacementError(f"{path} has format {int(arrays['format'])}, this version reads {FORMAT}")
        experts, devices, table = int(arrays["num_experts"]), int(arrays["num_devices"]), arrays["slot_expert"]
        lost, many = arrays["lost"], arrays["lost"].shape[0] if arrays["lost"].ndim == 2 else 0
        layers = table.shape[0] if table.ndim == 2 else 0
        if not (0 < experts <= MAX_SIZE and 0 < devices <= MAX_SIZE and layers * experts * devices <= MAX_CELLS):
            raise PlacementError(f"{path}: {layers} layers, {experts} experts, {devices} devices are out of range")
        want = (many, *table.shape)
        if not 0 < many <= MAX_LOSSES or lost.shape != (many, devices) or any(
            arrays[name].shape != want for name in ("first", "after")
        ):  # fmt: skip
            raise PlacementError(
                f"{path}: lost {lost.shape}, first {arrays['first'].shape} and after {arrays['after'].shape} do not go "
                f"with {devices} devices and slots {table.shape}"
            )
        try:
            before = Placement(
                table, arrays["slot_device"], experts, devices, arrays["layer_ids"], str(arrays["method"])
            )
            tables = [
                [replace(before, slot_expert_LS=arrays[name][x]) for name in ("first", "after")] for x in range(many)
            ]
            losses = tuple(Loss(tuple(np.flatnonzero(lost[x]).tolist()), *tables[x]) for x in range(many))
            return cls(before, str(arrays["unit"]), losses)
        except PlacementError as error:
            raise PlacementError(f"{path}: {error.message}", hint=error.hint) from None
