"""Experts between owners and step slots in two hops: what travels is bounded, and no host needs to know what it is.

Step 1  Every owner cuts the experts that anybody wants of it into D stripes, and deals them to all ranks.
Step 2  Every rank sends on to each step slot, wherever it is, its stripe of the expert that the slot is to hold.

Either hop is one collective of the same shape always. A rank sends, and receives, O + M experts: M are its step slots,
O the experts that one owner has room to send, to however many ranks. One hop would need room for whatever one rank may
want of another: D M. Gradients go back the same way and are summed in the middle, by rank, so that sums are the same in
every run. (Two hops by way of all ranks, to make any traffic even: Valiant and Brebner, STOC 1981.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from poise.stepwise.kernels import STEP, LayerSlots
from poise.util.errors import OptionError


@dataclass(frozen=True, slots=True, eq=False)
class StripeRoute:
    """What travels for one slot table.

    Parameters
    ----------
    row_O : int64 [O], rows of this rank's weights that it sends; the number of its static slots: none.
    middle_DM : int64 [D, M], where the ranks in the middle have what each step slot is to hold; D O: nothing.
    """

    row_O: Tensor
    middle_DM: Tensor


class Stripes:
    """One rank's part of the exchanges of a layer's step replicas.

    Parameters
    ----------
    table : the layer's slots. The owner of an expert is the first rank that has it for good.
    rank, where : this one, and the device of all tensors.
    room : O, experts that one owner can send, the same on every rank.
    exchange : all-to-all of equal parts, [D, ...] -> [D, ...].

    Raises
    ------
    OptionError : no room, or devices with different numbers of step slots.
    """

    def __init__(
        self, table: LayerSlots, rank: int, where: torch.device, room: int, exchange: Callable[[Tensor], Tensor]
    ) -> None:
        if room < 1:
            raise OptionError(f"owners have room to send {room} experts, at least 1")
        self.step_DM = step_slots_of(table)
        (self.devices, self.step_slots), self.room = self.step_DM.shape, room
        self._static, self._exchange, self._experts = int((table.turn_DS[rank] >= 0).sum()), exchange, table.num_experts
        owner_E, row_E = np.zeros((2, table.num_experts), np.int64)
        device, slot = np.nonzero(table.turn_DS == 0)
        owner_E[table.expert_DS[device, slot]], row_E[table.expert_DS[device, slot]] = device, slot
        order_E = np.argsort(owner_E, kind="stable")
        first_E = np.searchsorted(owner_E[order_E], owner_E[order_E])  # of an owner, in that order
        mine_E = np.where(owner_E == rank, row_E, self._static)
        self._owner_E, self._order_E, self._first_E, self._row_E = (
            torch.from_numpy(each).to(where) for each in (owner_E, order_E, first_E, mine_E)
        )

    @staticmethod
    def enough(table: LayerSlots) -> int:
        """Room for every table of these slots: all that an owner has, or all that slots can hold."""
        owned = np.bincount(np.nonzero(table.turn_DS == 0)[0]).max()
        return max(1, min(int(owned), step_slots_of(table).size))

    @classmethod
    def usual(cls, table: LayerSlots) -> int:
        """Room for twice as many as a rank has step slots: 3 M experts travel, and layers of recorded
        traffic were as even as with room for every table (benchmarks/fetches.py).
        """
        return min(cls.enough(table), max(1, 2 * step_slots_of(table).shape[1]))

    def fitting(self, expert_DM: Tensor, load_E: Tensor) -> Tensor:
        """Which of the step slots' experts, int64 [D, M] (E: empty), their owners have room to send: bool [D, M].

        Of an owner those with most load first, then by number; ``load_E`` int32 [E].
        """
        key_E = (self._owner_E << 32) - load_E.to(torch.int64)
        turn_E = self._turns(self._wanted(expert_DM), torch.argsort(key_E, stable=True))
        fits_E = torch.cat([turn_E < self.room, turn_E.new_zeros(1, dtype=torch.bool)])
        return fits_E.index_select(0, expert_DM.view(-1)).view_as(expert_DM)

    def route(self, expert_DM: Tensor) -> StripeRoute:
        """Of a table whose experts all fit; E where a slot is empty."""
        wanted_E = self._wanted(expert_DM)
        turn_E = torch.where(wanted_E > 0, self._turns(wanted_E, self._order_E), self.room)
        row_O = turn_E.new_full((self.room + 1,), self._static)
        row_O.scatter_(0, torch.where(self._row_E < self._static, turn_E, self.room), self._row_E)
        middle_E = torch.where(wanted_E > 0, self._owner_E * self.room + turn_E, self.devices * self.room)
        middle_E = torch.cat([middle_E, middle_E.new_full((1,), self.devices * self.room)])
        return StripeRoute(row_O[:-1], middle_E.index_select(0, expert_DM.view(-1)).view_as(expert_DM))

    def fetched(self, route: StripeRoute, weight: Tensor) -> Tensor:
        """What this rank's step slots are to hold, [M, ...], of weights [S, ...]; anything where one is empty."""
        row_O = route.row_O.clamp(max=max(self._static - 1, 0))
        middle = self._exchange(self._cut(weight.index_select(0, row_O)))  # [D, O, w], of every owner
        from_X = route.middle_DM.view(-1).clamp(max=self.devices * self.room - 1)
        there = middle.flatten(0, 1).index_select(0, from_X).view(self.devices, self.step_slots, -1)
        return self._joined(self._exchange(there), weight.shape[1:])

    def summed(self, route: StripeRoute, replica: Tensor) -> Tensor:
        """Sums over all ranks of gradients [M, ...] of their step slots: of what this rank sends, [O, ...]."""
        came = self._exchange(self._cut(replica))  # [D, M, w], of every rank's slots
        middle = came.new_zeros(self.devices * self.room + 1, came.shape[2])
        for device in range(self.devices):  # no expert twice on one: the order of the sum is that of ranks
            middle.index_add_(0, route.middle_DM[device], came[device])
        back = self._exchange(middle[:-1].view(self.devices, self.room, -1))
        return self._joined(back, replica.shape[1:])

    def _cut(self, rows: Tensor) -> Tensor:
        """Rows [X, ...] in stripes, [D, X, w]; what does not divide is filled up with zeros."""
        flat = rows.flatten(1)
        wide = -(-flat.shape[1] // self.devices)
        whole = F.pad(flat, (0, wide * self.devices - flat.shape[1]))
        return whole.view(len(rows), self.devices, wide).transpose(0, 1).contiguous()

    def _joined(self, stripes: Tensor, shape: torch.Size) -> Tensor:
        """The reverse: stripes [D, X, w] to rows [X, ...]."""
        flat = stripes.transpose(0, 1).flatten(1)
        return flat[:, : shape.numel()].reshape(len(flat), *shape)

    def _wanted(self, expert_DM: Tensor) -> Tensor:
        """1 for experts that any step slot is to hold, int64 [E]."""
        return expert_DM.new_zeros(self._experts + 1).index_fill_(0, expert_DM.view(-1), 1)[:-1]

    def _turns(self, wanted_E: Tensor, order_E: Tensor) -> Tensor:
        """Place of each expert among those wanted of its owner, in an order that begins with rank 0's, int64 [E]."""
        sorted_E = wanted_E.index_select(0, order_E)
        before_E = sorted_E.cumsum(0) - sorted_E
        turn_E = before_E - before_E.index_select(0, self._first_E)
        return torch.empty_like(turn_E).scatter_(0, order_E, turn_E)


def step_slots_of(table: LayerSlots) -> NDArray[np.int64]:
    """Step slots of every device, int64 [D, M].

    Raises
    ------
    OptionError : devices have different numbers of them.
    """
    count_D = (table.turn_DS == STEP).sum(axis=1)
    if (count_D != count_D[0]).any():
        raise OptionError(
            f"{count_D.min()} to {count_D.max()} step slots a device", hint="every device has the same number of them"
        )
    return np.nonzero(table.turn_DS == STEP)[1].reshape(len(count_D), int(count_D[0]))
