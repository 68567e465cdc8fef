"""The calls of a fast loop that engines make in every layer, whatever computes them; all whole numbers.

A layer's holders are a *slot table*: ``expert_DS`` int32 [D, S], the expert of every slot, -1 where it is empty. The
same inputs give the same plan on every rank, bit for bit.

=========================================  ===================================================
:class:`poise.stepwise.host_kernels`       numpy arrays, numba
:class:`poise.runtime.device.planner`      tensors of a GPU, Triton
=========================================  ===================================================

:func:`poise.runtime.device.choose.kernels_for` chooses by the device of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import StepPrice, compiled_price
from poise.util.errors import OptionError, PlacementError

EMPTY = -1
"""An expert of no slot."""
STEP, ABSENT = -1, -2
"""Turns of slots that are no static ones: those for step replicas, and those that a device does not have."""
MOST_PAIRS = 1 << 30
"""Most (token, expert) pairs of a layer's step times devices: prices of whole numbers then fit 64 bits."""
MOST_PICOSECONDS = 1 << 52
"""Of all pairs of a step times devices: a thousand times as much fits 64 bits."""
MOST_DEVICES = 1024
"""Of what keys of the device's flow tell apart, a quarter; more have not been tried."""
PICO = 1e12
PRICES = (
    "compute", "read", "activation", "start", "out_intra", "out_inter", "back_intra", "back_inter", "control",
    "wire_start", "margin", "nic_shared",
)  # fmt: skip
"""What :func:`prices` returns, in order: picoseconds, but ``margin`` in thousandths and a flag."""


class StepKernels(Protocol):
    """One layer's calls. ``Any`` is a numpy array or a tensor, int32 unless said otherwise."""

    def prepare(self, load_E: Any, expert_DS: Any) -> tuple[Any, Any]:
        """Between steps, for expected whole loads [E]: the slot table with replicas in step slots, and whether to leave
        the layer alone [1]: the even split over static slots is about as fast as the exact one over these.
        """
        ...

    def split(self, load_SE: Any, expert_DS: Any, leave: Any) -> Any:
        """Quotas [E, D] of exact counts [D, E] over the slot table's holders, the fullest device as low as it can be.

        Where ``leave`` [1] is not 0: the engine's even split over the static slots.
        """
        ...

    def rows(self, load_SE: Any, quota_ED: Any, source: int) -> Any:
        """Where a source's tokens go [E, D]: own device, own node, anywhere (:func:`poise.cost.route.rows_into`)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LayerSlots:
    """One layer's slots on the host, where they are checked once.

    Parameters
    ----------
    expert_DS : int32 [D, S], static experts, :data:`EMPTY` elsewhere.
    turn_DS : int32 [D, S], which of its expert's static slots this is, from 0 by device; :data:`STEP`, :data:`ABSENT`.
    num_experts : E.
    node_D : int32 [D], ascending.

    Raises
    ------
    PlacementError : an expert without a slot, twice on a device or out of range, or nodes that do not lie together or
        are not counted from 0.
    """

    expert_DS: NDArray[np.int32]
    turn_DS: NDArray[np.int32]
    num_experts: int
    node_D: NDArray[np.int32]

    def __post_init__(self) -> None:
        held = self.expert_DS >= 0
        if self.expert_DS.max(initial=EMPTY) >= self.num_experts:
            raise PlacementError(f"slot of expert {self.expert_DS.max()}, and there are {self.num_experts}")
        if len(self.node_D) != len(self.expert_DS):
            raise PlacementError(f"nodes of {len(self.node_D)} devices, slots of {len(self.expert_DS)}")
        if not np.array_equal(np.unique(self.node_D), np.arange(self.node_D.max() + 1)):
            raise PlacementError(f"nodes {np.unique(self.node_D).tolist()}, they are counted from 0 without gaps")
        device, _ = np.nonzero(held)
        count_ED = np.zeros((self.num_experts, len(self.expert_DS)), np.int64)
        np.add.at(count_ED, (self.expert_DS[held], device), 1)
        if not count_ED.any(axis=1).all():
            raise PlacementError(f"expert {int(np.argmin(count_ED.any(axis=1)))} has no slot")
        if count_ED.max() > 1:
            expert, where = np.unravel_index(np.argmax(count_ED), count_ED.shape)
            raise PlacementError(f"expert {expert} lies {count_ED.max()} times on device {where}, slot tables need 1")
        if (np.diff(self.node_D) < 0).any():
            raise PlacementError("devices of a node must lie together")

    @classmethod
    def of(cls, static_ED: NDArray[np.bool_], step_slots: int, node_D: NDArray[Any]) -> LayerSlots:
        """The table of a static placement, bool [E, D], with so many step slots a device."""
        held = [np.flatnonzero(static_D).tolist() for static_D in static_ED.T]
        return cls.in_order(held, len(static_ED), step_slots, node_D)

    @classmethod
    def in_order(
        cls, expert_D: Sequence[Sequence[int]], num_experts: int, step_slots: int, node_D: NDArray[Any]
    ) -> LayerSlots:
        """The table whose devices have these experts for good, in this order, and then so many step slots."""
        shape = (len(expert_D), max(map(len, expert_D)) + step_slots)
        expert_DS, turn_DS = np.full(shape, EMPTY, np.int32), np.full(shape, ABSENT, np.int32)
        turn_E = np.zeros(num_experts, np.int32)
        for device, held in enumerate(expert_D):
            expert_DS[device, : len(held)] = held
            turn_DS[device, : len(held)] = turn_E[list(held)]
            turn_DS[device, len(held) : len(held) + step_slots] = STEP
            np.add.at(turn_E, list(held), 1)
        return cls(expert_DS, turn_DS, num_experts, np.asarray(node_D, np.int32))

    @property
    def size_N(self) -> NDArray[np.int64]:
        """Devices of each node, int64 [N]."""
        return np.bincount(self.node_D)

    def holders(self, expert_DS: NDArray[Any]) -> NDArray[np.bool_]:
        """Bool [E, D] of a slot table."""
        device, slot = np.nonzero(expert_DS >= 0)
        out = np.zeros((self.num_experts, len(expert_DS)), np.bool_)
        out[expert_DS[device, slot], device] = True
        return out

    def with_holders(self, expert_DS: NDArray[Any], holders_ED: NDArray[np.bool_]) -> NDArray[np.int32]:
        """The table whose step slots hold what ``holders_ED`` bool [E, D] has; what is there already stays.

        Raises
        ------
        PlacementError : a device holds more than it has slots.
        """
        out = np.where(self.turn_DS >= 0, self.expert_DS, EMPTY).astype(np.int32)
        for device in range(len(out)):
            room = np.flatnonzero(self.turn_DS[device] == STEP)
            kept = {int(expert_DS[device, s]): s for s in room if expert_DS[device, s] >= 0}
            wanted = set(np.flatnonzero(holders_ED[:, device]).tolist()) - set(out[device].tolist())
            free = [s for s in room if int(expert_DS[device, s]) not in wanted]
            new = sorted(wanted - set(kept))
            if len(new) > len(free):
                raise PlacementError(f"device {device} is to hold {len(wanted)} step replicas in {len(room)} slots")
            for expert, slot in [*((e, s) for e, s in kept.items() if e in wanted), *zip(new, free, strict=False)]:
                out[device, slot] = expert
        return out


def prices(price: StepPrice, margin: float) -> NDArray[np.int64]:
    """A price in whole numbers, int64: see :data:`PRICES`. ``margin``: least gain, as a share of the passive time.

    Raises
    ------
    OptionError : the price is of a kind that whole numbers here cannot say (:func:`unsaid`).
    """
    if (why := unsaid(price)) is not None:
        raise OptionError(f"no device kernels: {why}", hint="the host's kernels take every price")
    machine = compiled_price(price).machine
    times = (
        machine.compute_s, machine.read_s, machine.activation_s, machine.start_s, machine.out_intra_s,
        machine.out_inter_s, machine.back_intra_s, machine.back_inter_s, price.control_s,
        price.cluster.dispatch_wire.start_s,
    )  # fmt: skip
    return np.array([*(round(each * PICO) for each in times), round(margin * 1000), int(machine.nic_shared)], np.int64)


def check_source(source: int, devices: int) -> None:
    """OptionError for a source rank that is none."""
    if not 0 <= source < devices:
        raise OptionError(f"source {source} of {devices} devices", hint="0 to one less than there are devices")


def unsaid(price: StepPrice) -> str | None:
    """What of a price the device's kernels do not know; None: nothing."""
    machine = compiled_price(price).machine
    if (machine.speed_D != machine.speed_D[0]).any() or machine.speed_D[0] != 1.0:
        return f"devices have speeds of {machine.speed_D.min():g} to {machine.speed_D.max():g}, and only 1 is known"
    if machine.curve_tokens_X.size:
        return f"experts are priced by a curve of {machine.curve_tokens_X.size} knots"
    return None


def refusal(table: LayerSlots, price: StepPrice, most_pairs: int, margin: float = 0.03) -> str | None:
    """Why the device's kernels cannot plan a layer, whose steps have at most so many pairs; None: they can."""
    if (why := unsaid(price)) is not None:
        return why
    devices, width = table.expert_DS.shape
    if most_pairs * devices > MOST_PAIRS:
        return f"{most_pairs} pairs of a step on {devices} devices are more than {MOST_PAIRS} in all"
    compute, read, activation, start, *ports = (int(each) for each in prices(price, margin)[:8])
    longest = most_pairs * devices * max(compute, activation, *ports) + devices * (start + width * read)
    if longest > MOST_PICOSECONDS:
        return (
            f"{most_pairs} pairs of a step on {devices} devices could take {longest / PICO:.0f} s in all, and whole "
            f"numbers end at {MOST_PICOSECONDS / PICO:.0f}"
        )
    if devices > MOST_DEVICES:
        return f"{devices} devices, and the kernels tell {MOST_DEVICES} apart"
    return None
