"""Dispatch and combine with sizes that stay on the device: every collective has the same shape in every step.

Of each rank C rows go to each, whatever the plan: what they do not fill is padding. The slot of every row travels with
it, so nothing else is told. A plan that needs more than there is room for is not cut in silence: how much it needed is
known to all ranks in the same step (:attr:`PaddedExchange.need`), and the layer gives NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.runtime.collectives import Arriving, SentRows, exchange_equal
from poise.runtime.dispatch import PairExchange, named, summed
from poise.runtime.spans import span
from poise.util.errors import OptionError

LOST = (1 << 31) - 1
"""Rows that a plan of other counts than a rank has is said to need: more than any room."""
APART = LOST - 1
"""Rows that are said to be needed where ranks have different slot tables or quotas: more than any room."""


@dataclass(frozen=True, slots=True)
class RowCapacity:
    """How many rows of tokens a layer has room for, fixed before it runs.

    ``pair`` = T * K is enough for every routing, as a rank has no more pairs to send. Less saves memory and bytes on
    the wire, by what a plan is expected to need. ``computed`` = D * pair likewise; the plan's fullest device, which the
    exact split makes as small as it can be, says what it needs.

    Parameters
    ----------
    pair : rows from one rank to one, C.
    computed : rows that one device computes, R.
    """

    pair: int
    computed: int

    @classmethod
    def enough(cls, tokens: int, top_k: int, devices: int) -> RowCapacity:
        """Room for every routing of so many tokens a rank."""
        return cls(tokens * top_k, devices * tokens * top_k)

    def __post_init__(self) -> None:
        if self.pair < 1 or self.computed < 1:
            raise OptionError(f"room for {self.pair} rows a pair of ranks and {self.computed} a device, at least 1")


@dataclass(frozen=True, slots=True, eq=False)
class _Came(SentRows):
    """Rows that have come."""

    rows: Tensor

    def wait(self) -> Tensor:
        """What came, by rank."""
        return self.rows


@dataclass(frozen=True, slots=True, eq=False)
class PaddedExchange(PairExchange):
    """One rank's part of a dispatch; all sizes are those of the capacity.

    Parameters
    ----------
    place_N : int64 [T * K], row among those sent of every pair; D * C: none, as it names no expert or finds no room.
    order_R : int64 [R], rows that arrived in the order they are computed, sorted by slot, then source.
    ends_S : int32 [S], where the rows of every slot end.
    need : int32 [2], rows that the fullest pair of ranks and the fullest device needed; the same on all ranks.
    over : bool [], whether that is more than there is room for.
    devices, capacity, top_k, group : D, room, K, and the process group of tokens.
    """

    place_N: Tensor
    order_R: Tensor
    ends_S: Tensor
    need: Tensor
    over: Tensor
    devices: int
    capacity: RowCapacity
    top_k: int
    group: Any

    @property
    def whole(self) -> bool:
        """Nobody on the host knows whether every pair names an expert."""
        return False

    def tokens_there(self, x_Td: Tensor) -> Tensor:
        """Tokens of this rank to what is computed here, [R, d]; padding is 0."""
        with span("dispatch"):
            sent = self.send_pairs(x_Td.repeat_interleave(self.top_k, dim=0))
        return self.arrived(sent)

    def send_pairs(self, y_Nd: Tensor) -> SentRows:
        """Rows of this rank's pairs [T * K, d] to where their experts are: one collective, which has ended."""
        sent = y_Nd.new_zeros(self.devices * self.capacity.pair + 1, y_Nd.shape[1])
        sent.index_copy_(0, self.place_N, y_Nd)
        return _Came(exchange_equal(sent[:-1], self.group))

    def arrived(self, sent: SentRows, prefix: str = "") -> Tensor:
        """What comes of it is computed here, [R, d], sorted by slot; padding is 0."""
        with span(f"{prefix}arrange"):
            return sent.wait().index_select(0, self.order_R)

    def ask_back(self, like_nd: Tensor) -> None:
        """Nothing: equal parts go by one collective of all ranks."""

    def back(self, y_nd: Tensor, asked: Arriving | None, prefix: str = "") -> Tensor:
        """The reverse: rows of all this rank's pairs, [T * K, d]; 0 where no expert was named.

        NaN in every row where the plan needed more room than there is.
        """
        sent = y_nd.new_zeros(self.devices * self.capacity.pair, y_nd.shape[1])
        sent.index_copy_(0, self.order_R, y_nd)
        with span(f"{prefix}combine"):
            came = exchange_equal(sent, self.group)
        came = torch.cat([came, came.new_zeros(1, came.shape[1])])
        return came.index_select(0, self.place_N).masked_fill(self.over, torch.nan)

    def by_token(self, rows: Tensor) -> Tensor:
        """What :meth:`back` brought, summed over the pairs of each token, [T, d]."""
        return summed(rows, self.top_k)


def pairs_of(ids_TK: Tensor, experts: int) -> Tensor:
    """Pairs of every expert on this rank, int32 [E]; ids of -1 and E are not counted."""
    ids_N = torch.where(named(ids_TK, experts), ids_TK, experts).reshape(-1)
    one_N = torch.ones_like(ids_N, dtype=torch.int32)
    return one_N.new_zeros(experts + 1).index_add_(0, ids_N, one_N)[:-1]


def make_padded(
    ids_TK: Tensor, row_ED: Tensor, quota_ED: Tensor, expert_DS: Tensor, capacity: RowCapacity, group: Any
) -> PaddedExchange:
    """One rank's exchange, from what it sends where; one small collective, and no word to the host.

    Pairs leave in the order of :func:`poise.runtime.dispatch.make_exchange`: an expert's first tokens to the first
    device. The small collective carries each row's slot, how many rows the sender wanted to send, and a checksum of its
    table and quotas: a slot means another expert where tables differ.

    Parameters
    ----------
    ids_TK : int64 [T, K]; -1 and E name no expert.
    row_ED : int32 [E, D], where this rank's tokens go.
    quota_ED : int32 [E, D], what every device computes.
    expert_DS : int32 [D, S], the slot table.
    """
    (experts, devices), slots, room = row_ED.shape, expert_DS.shape[1], capacity.pair
    ids_N = torch.where(named(ids_TK, experts), ids_TK, experts).reshape(-1)
    order_N = torch.argsort(ids_N, stable=True)
    sorted_N, number_N = ids_N.index_select(0, order_N), torch.arange(len(ids_N), device=ids_N.device)

    # an expert's pairs, in order, to devices: the first ones to the first device that it sends to
    ends_ED = torch.cat([row_ED.to(torch.int64).cumsum(1), ids_N.new_zeros(1, devices)])
    mine_E = torch.cat([ends_ED[:-1, -1], ids_N.new_zeros(1)])
    turn_N = number_N - _before(mine_E).index_select(0, sorted_N)
    device_N = (turn_N[:, None] >= ends_ED.index_select(0, sorted_N)).sum(1)  # D: named no expert
    order_N, sorted_N, device_N = _by(device_N, order_N, sorted_N)
    sent_D = torch.cat([row_ED.sum(0, dtype=torch.int64), ids_N.new_zeros(1)])
    turn_N = number_N - _before(sent_D).index_select(0, device_N)
    fits_N = (device_N < devices) & (turn_N < room)
    there_N = torch.where(fits_N, device_N * room + turn_N, devices * room)

    slot_N = _slots(expert_DS, experts).view(-1).index_select(0, sorted_N * (devices + 1) + device_N)
    header = slot_N.new_full((devices * room + 1,), slots).index_copy_(0, there_N, slot_N)[:-1].view(devices, room)
    lost = (pairs_of(ids_TK, experts) != row_ED.sum(1, dtype=torch.int32)).any()  # a plan of other counts
    wanted = torch.where(lost, LOST, sent_D.max()).to(torch.int32)
    told_D2 = torch.stack([wanted, _checksum(expert_DS, quota_ED)]).expand(devices, 2)
    with span("counts"):
        came = exchange_equal(torch.cat([header, told_D2], dim=1), group)
    slot_n = came[:, :-2].reshape(-1).to(torch.int64)
    count_S = slot_n.new_zeros(slots + 1).index_add_(0, slot_n, torch.ones_like(slot_n))
    pair = torch.where((came[:, -1] != came[0, -1]).any(), came[:, -2].clamp(min=APART), came[:, -2]).max()
    need = torch.stack([pair, quota_ED.sum(0, dtype=torch.int32).max()])
    over = (need[0] > room) | (need[1] > capacity.computed)
    return PaddedExchange(
        torch.empty_like(order_N).scatter_(0, order_N, there_N),
        torch.argsort(slot_n, stable=True)[: capacity.computed],
        count_S.cumsum(0)[:slots].clamp_(max=capacity.computed).to(torch.int32),
        need, over, devices, capacity, ids_TK.shape[1], group,
    )  # fmt: skip


def _before(count_X: Tensor) -> Tensor:
    """Sums of what comes before."""
    return count_X.cumsum(0) - count_X


def _by(key_N: Tensor, *others_N: Tensor) -> tuple[Tensor, ...]:
    """Others, then the key, in the stable order of the key."""
    order = torch.argsort(key_N, stable=True)
    return tuple(each.index_select(0, order) for each in (*others_N, key_N))


def _checksum(*tables: Tensor) -> Tensor:
    """int32 [], at least 0, of all values and their places; sums that pass 2**63 go on from below."""
    value_X = torch.cat([table.reshape(-1) for table in tables]).to(torch.int64)
    mixed_X = value_X * 0x9E3779B1 + torch.arange(len(value_X), device=value_X.device) * 0x85EBCA77
    mixed_X = (mixed_X ^ (mixed_X >> 15)) * 0xC2B2AE3D
    return ((mixed_X ^ (mixed_X >> 32)).sum() & LOST).to(torch.int32)


def _slots(expert_DS: Tensor, experts: int) -> Tensor:
    """The slot of every expert on every device, int32 [E + 1, D + 1]; S: none."""
    devices, slots = expert_DS.shape
    out = expert_DS.new_full((experts + 1, devices + 1), slots)
    expert_SD = torch.where(expert_DS >= 0, expert_DS, experts).t().to(torch.int64)
    number_SD = torch.arange(slots, device=out.device, dtype=out.dtype)[:, None].expand(slots, devices)
    out[:, :-1].scatter_(0, expert_SD, number_SD)
    out[-1].fill_(slots)  # where empty slots were written
    return out
