"""Placement: which logical expert each physical slot of each layer holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.entries import HeldEntries, entries_of
from poise.planning.provenance import ABOUT, LOADS, UNITS, Provenance
from poise.routing.npz import open_npz
from poise.util.errors import PlacementError, TraceError
from poise.util.files import replacing

EMPTY = -1
FORMAT = 1
FIELDS = ("format", "slot_expert", "slot_device", "num_experts", "num_devices", "layer_ids", "method")
MAX_BYTES = 2**30
MAX_SIZE = 65_536
MAX_CELLS = 2**28
"""Most layers * experts * devices of a file: the entries of :meth:`Placement.count_LED`."""
MAX_NAME = 200


def _whole(name: str, value: Any) -> NDArray[np.int32]:
    """A copy as int32; numbers that int32 would cut or wrap are refused."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise PlacementError(f"{name} has rows of different lengths") from None
    if array.size and array.dtype.kind not in "iu":
        raise PlacementError(f"{name} must hold whole numbers, got {array.dtype}")
    if array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        raise PlacementError(f"{name} reaches from {array.min()} to {array.max()}, more than 32 bits hold")
    return array.astype(np.int32)


def _layer(ids: NDArray[Any], row: int) -> str:
    """The decoder layer of a row, for messages; the row too where it has another number."""
    layer = int(ids[row]) if row < len(ids) else row
    return f"layer {layer}" if layer == row else f"layer {layer} (row {row})"


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Experts on slots, for every MoE layer. Plain frozen data, checked once; arrays are read-only.

    Parameters
    ----------
    slot_expert_LS : int32 [L, S], logical expert of each physical slot; -1 = empty.
    slot_device_S : int32 [S], device of each slot, non-decreasing.
    num_experts : E.
    num_devices : D (a device may have no slot).
    layer_ids_L : int32 [L], index of each MoE layer among the model's decoder layers, ascending; default 0, 1, ...
    method : who made it.
    fitted : what it was fitted on; None: not known.

    Raises
    ------
    PlacementError : shapes disagree, ids out of range, or an expert of a layer has no slot. One expert twice on a
        device is accepted (published EPLB does it); see :attr:`has_duplicates`.
    """

    slot_expert_LS: NDArray[np.int32]
    slot_device_S: NDArray[np.int32]
    num_experts: int
    num_devices: int
    layer_ids_L: NDArray[np.int32] = None  # type: ignore[assignment]  # filled in
    method: str = field(default="custom")
    fitted: Provenance | None = None

    def __post_init__(self) -> None:
        slots, device = _whole("slot_expert_LS", self.slot_expert_LS), _whole("slot_device_S", self.slot_device_S)
        if slots.ndim != 2 or device.shape != slots.shape[1:] or slots.size == 0:
            raise PlacementError(
                f"slot_expert_LS {slots.shape} and slot_device_S {device.shape} must be [L, S] and [S]"
            )
        if not (0 < self.num_experts < 2**31 and 0 < self.num_devices < 2**31):
            raise PlacementError(f"{self.num_experts} experts on {self.num_devices} devices: both must be above 0")
        if slots.shape[1] < self.num_experts:
            raise PlacementError(f"{slots.shape[1]} slots cannot hold {self.num_experts} experts")
        num_layers = slots.shape[0]
        ids = _whole("layer_ids_L", np.arange(num_layers) if self.layer_ids_L is None else self.layer_ids_L)
        if ids.shape != (num_layers,):
            raise PlacementError(f"{ids.size} layer ids for {num_layers} layers")
        if ids[0] < 0 or (np.diff(ids) <= 0).any():
            raise PlacementError(f"layer ids must ascend from 0 or more, got {ids.tolist()[:8]}")
        if len(self.method) > MAX_NAME or not self.method.isprintable():
            raise PlacementError(
                f"a method's name has at most {MAX_NAME} printable characters, got {self.method!r:.80}"
            )
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
            raise PlacementError(
                f"{_layer(ids, layer)}: expert {expert} has no slot ({len(missing)} such experts in all)"
            )

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.slot_expert_LS.shape[0])

    @property
    def num_slots(self) -> int:
        """S, empty slots included."""
        return int(self.slot_expert_LS.shape[1])

    @property
    def slots_D(self) -> NDArray[np.int64]:
        """Slots of each device, int64 [D]."""
        return np.bincount(self.slot_device_S, minlength=self.num_devices)

    @property
    def redundant(self) -> int:
        """R, slots of a layer beyond one for each expert."""
        return self.num_slots - self.num_experts

    def experts_of(self, layer: int, device: int) -> list[int]:
        """Experts of a device's slots of one layer (its row), in slot order; empty slots are left out."""
        held = self.slot_expert_LS[layer, self.slot_device_S == device]
        return [int(expert) for expert in held if expert != EMPTY]

    def entries(self) -> HeldEntries:
        """Which device holds which expert, as what is not 0 of :meth:`count_LED`."""
        layer_S, slot = np.nonzero(self.slot_expert_LS != EMPTY)
        shape = (self.num_layers, self.num_experts, self.num_devices)
        return HeldEntries.of_slots(layer_S, self.slot_expert_LS[layer_S, slot], self.slot_device_S[slot], shape)

    def count_LED(self) -> NDArray[np.int32]:
        """Slots of expert e on device d, int32 [L, E, D]."""
        held = self.entries()
        out = np.zeros(held.shape, np.int32)
        out[held.layer_X(), held.expert_X, held.device_X] = held.count_X
        return out

    def replicas_LE(self) -> NDArray[np.int32]:
        """Slots of each expert, int32 [L, E]."""
        shape = (self.num_layers, self.num_experts)
        layer, slot = np.nonzero(self.slot_expert_LS != EMPTY)
        flat = np.ravel_multi_index((layer, self.slot_expert_LS[layer, slot]), shape)
        return np.bincount(flat, minlength=shape[0] * shape[1]).astype(np.int32).reshape(shape)

    def holds_like(self, other: Placement) -> bool:
        """Whether every device holds what it holds under another placement of this shape, in whatever slots."""
        return bool((self.count_LED() == other.count_LED()).all())

    @property
    def has_duplicates(self) -> bool:
        """Some expert has two slots on one device of one layer."""
        return bool((self.entries().count_X > 1).any())

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
        device_LE = _whole("expert_device_LE", expert_device_LE)
        if device_LE.ndim != 2 or device_LE.size == 0 or device_LE.min() < 0 or device_LE.max() >= num_devices:
            raise PlacementError(
                f"expert_device_LE must be [L, E] devices within 0..{num_devices - 1}, got shape {device_LE.shape}"
                + (f" with {device_LE.min()}..{device_LE.max()}" if device_LE.size else "")
            )
        return cls.from_entries(HeldEntries.of_devices(device_LE, num_devices), layer_ids_L=layer_ids_L, method=method)

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
        count = _whole("count_LED", count_LED)
        if count.ndim != 3 or count.size == 0 or count.min() < 0:
            raise PlacementError(f"count_LED must be [L, E, D] and at least 0, got shape {count.shape}")
        return cls.from_entries(entries_of(count), slots_D=slots_D, layer_ids_L=layer_ids_L, method=method)

    @classmethod
    def from_entries(
        cls, held: HeldEntries, *, slots_D: NDArray[Any] | None = None, layer_ids_L: NDArray[np.int32] | None = None,
        method: str = "custom",
    ) -> Placement:  # fmt: skip
        """:meth:`from_counts` of what is not 0 of them."""
        used_LD, (num_layers, num_experts, num_devices) = held.used_LD(), held.shape
        ids = np.arange(num_layers, dtype=np.int32) if layer_ids_L is None else layer_ids_L
        slots = used_LD.max(axis=0) if slots_D is None else _whole("slots_D", slots_D)
        if slots.shape != (num_devices,):
            raise PlacementError(f"slots_D has shape {slots.shape} for {num_devices} devices")
        if (used_LD > slots).any():
            layer, device = (int(x) for x in np.argwhere(used_LD > slots)[0])
            raise PlacementError(
                f"{_layer(ids, layer)}: device {device} holds {used_LD[layer, device]} experts in {slots[device]} slots"
            )
        start = np.concatenate([[0], np.cumsum(slots)])
        slot_expert = np.full((num_layers, int(start[-1])), EMPTY, dtype=np.int32)
        layer_S, device_S, expert_S = (
            np.repeat(each, held.count_X) for each in (held.layer_X(), held.device_X, held.expert_X)
        )
        before_S = np.concatenate([[0], np.cumsum(used_LD)])[layer_S * num_devices + device_S]
        slot_expert[layer_S, start[device_S] + np.arange(len(expert_S)) - before_S] = expert_S
        slot_device = np.repeat(np.arange(num_devices, dtype=np.int32), slots)
        return cls(slot_expert, slot_device, num_experts, num_devices, layer_ids_L=ids, method=method)

    def save(self, path: str | Path) -> None:
        """Write a ``.npz`` without pickles (docs/formats.md); the file appears whole or not at all.

        Raises
        ------
        PlacementError : as :func:`poise.util.files.replacing`.
        """
        more: dict[str, Any] = {} if self.fitted is None else self.fitted.arrays()
        with replacing(path, PlacementError) as stream:
            np.savez_compressed(
                stream, format=np.int32(FORMAT), slot_expert=self.slot_expert_LS, slot_device=self.slot_device_S,
                num_experts=np.int32(self.num_experts), num_devices=np.int32(self.num_devices),
                layer_ids=self.layer_ids_L, method=np.array(self.method), **more,
            )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Read what :meth:`save` wrote.

        Raises
        ------
        PlacementError : the file is missing, damaged, pickled, too large, of another format, or no valid placement.
        """
        path = Path(path)
        try:
            with open_npz(path, ["an expert placement"]) as archive:
                said = [name for name in (UNITS, LOADS, ABOUT) if name in archive]
                if len(said) not in (0, 3):
                    raise PlacementError(f"{path} has {said[0]} without {UNITS}, {LOADS} and {ABOUT} together")
                headers = [archive.header(name) for name in (*FIELDS, *said)]
                if sum(header.nbytes for header in headers) > MAX_BYTES:
                    raise PlacementError(f"{path} unpacks to more than {MAX_BYTES} bytes")
                arrays = {header.name: archive.read(header) for header in headers}
                method = str(arrays["method"].reshape(-1)[0]) if arrays["method"].shape == () else ""
        except TraceError as error:
            raise PlacementError(error.message, hint=error.hint or "is it a poise placement?") from None
        for name in FIELDS:
            array = arrays[name]
            if array.dtype.kind not in ("U" if name == "method" else "iu"):
                raise PlacementError(f"{path}: {name} must be {'text' if name == 'method' else 'whole numbers'}")
            if name in ("format", "num_experts", "num_devices", "method") and array.shape != ():
                raise PlacementError(f"{path}: {name} must be one value, got shape {array.shape}")
        if int(arrays["format"]) != FORMAT:
            raise PlacementError(f"{path} has format {int(arrays['format'])}, this version reads {FORMAT}")
        experts, devices = int(arrays["num_experts"]), int(arrays["num_devices"])
        layers = arrays["slot_expert"].shape[0] if arrays["slot_expert"].ndim == 2 else 0
        if not (0 < experts <= MAX_SIZE and 0 < devices <= MAX_SIZE and layers * experts * devices <= MAX_CELLS):
            raise PlacementError(
                f"{path}: {layers} layers, {experts} experts, {devices} devices are out of range",
                hint=f"at most {MAX_SIZE} experts, {MAX_SIZE} devices, {MAX_CELLS} of layers * experts * devices",
            )
        try:
            fitted = Provenance.from_arrays(arrays) if said else None
            return cls(arrays["slot_expert"], arrays["slot_device"], experts, devices, arrays["layer_ids"], method,
                       fitted)  # fmt: skip
        except PlacementError as error:
            raise PlacementError(f"{path}: {error.message}", hint=error.hint) from None

    def on_devices(self, num_devices: int) -> Placement:
        """The same slots on a cluster of so many devices; those that join have no slot.

        Raises
        ------
        PlacementError : a device beyond them has slots.
        """
        return replace(self, num_devices=num_devices)

    def leaving_D(self, other: Placement) -> NDArray[np.bool_]:
        """Devices with slots here and none in ``other``, bool [D]; both are on D devices."""
        mine, theirs = (each.slots_D for each in (self, other))
        return (mine > 0) & (theirs == 0)

    def diff(self, other: Placement) -> PlacementDiff:
        """What it takes to go from this placement to ``other``; slots may be renumbered inside a device for nothing.

        Device d here is device d there. Where ``other`` has more devices, those beyond join and hold nothing yet; where
        it has fewer, those beyond leave. Other numberings: :class:`poise.planning.elastic.RankMap`.

        Raises
        ------
        PlacementError : the placements have different numbers of layers or experts.
        """
        mine, theirs = (self.num_layers, self.num_experts), (other.num_layers, other.num_experts)
        if mine != theirs:
            raise PlacementError(
                f"placements of [layers, experts] {list(mine)} and {list(theirs)} cannot be compared",
                hint="are both of one model?",
            )
        before, want_LED = self.count_LED() > 0, other.count_LED() > 0
        have_LED = np.zeros_like(want_LED)
        stay = min(self.num_devices, other.num_devices)
        have_LED[:, :, :stay] = before[:, :, :stay]
        fetched = want_LED & ~have_LED
        dropped = int(before.sum() - (have_LED & want_LED).sum())
        return PlacementDiff(fetched.sum(axis=(1, 2)), fetched.sum(axis=(0, 1)), dropped, np.argwhere(fetched),
                             np.argwhere(~have_LED.any(axis=2)))  # fmt: skip

    def __repr__(self) -> str:
        empty = int((self.slot_expert_LS == EMPTY).sum())
        return (
            f"Placement({self.method}: {self.num_layers} layers, {self.num_experts} experts, {self.num_slots} slots on "
            f"{self.num_devices} devices, most replicas {int(self.replicas_LE().max())}, {empty} slots empty)"
        )


@dataclass(frozen=True, slots=True, eq=False)
class PlacementDiff:
    """Weights to move between two placements.

    Parameters
    ----------
    fetched_L : int [L], experts that some device must fetch, per layer.
    fetched_D : int [D], experts that each device of the new placement must fetch, all layers together.
    dropped : (layer, expert, device) triples that go, those of devices that leave included.
    fetches_F3 : int64 [F, 3], layer, expert and device of every fetch.
    leaving_O2 : int64 [O, 2], layer and expert of all that no device holds that stays: they must be fetched before the
        others leave, or read from the checkpoint.
    """

    fetched_L: NDArray[np.int64]
    fetched_D: NDArray[np.int64]
    dropped: int
    fetches_F3: NDArray[np.int64]
    leaving_O2: NDArray[np.int64]

    @property
    def fetched(self) -> int:
        """Experts to fetch in all."""
        return int(self.fetched_D.sum())

    def moved_bytes(self, expert_bytes: float) -> float:
        """Bytes to fetch in all."""
        return self.fetched * expert_bytes

    def __repr__(self) -> str:
        return (
            f"PlacementDiff(fetch {self.fetched}, most on one device {int(self.fetched_D.max())}, drop {self.dropped})"
        )
