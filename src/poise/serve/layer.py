"""The routed experts of one MoE layer on one rank: weights, split of the tokens, and data flow."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from poise.cost.near import near_count
from poise.cost.split import Split, check_split
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.planning.placement import EMPTY, Placement
from poise.runtime.experts import Bank, ExpertKind
from poise.runtime.flows import Flow, MovedTokens
from poise.serve.replicas import StepReplicas, empty_bank
from poise.serve.split import EvenSplit, PlannedSplit, ServingPolicy, TokenSplit
from poise.util.errors import OptionError, PlacementError


class Clock(Protocol):
    """What makes computing last as long as a device would need (:class:`poise.lab.emulate.clock.DeviceClock`)."""

    def compute(self, tokens_per_expert: ArrayLike, *, since: float | None = None) -> object:
        """Return when the computation begun at ``since`` is over."""
        ...


class ServedExperts(ABC):
    """Experts of one layer on one rank, served by all ranks together: what an engine asks of them.

    Attributes
    ----------
    bank : weights of the experts in this rank's slots, in slot order.
    placement : who holds what.
    """

    bank: Bank
    placement: Placement

    @abstractmethod
    def check(self, placement: Placement) -> None:
        """Raise PlacementError or OptionError for a placement that the layer cannot serve by."""

    @abstractmethod
    def ready_for(self, placement: Placement) -> Callable[[Bank], None]:
        """Another placement, checked and prepared while the one before serves on; called with its weights, between the
        same two steps on all ranks, it serves from then on.
        """

    def switch(self, bank: Bank, placement: Placement) -> None:
        """Serve with other weights from now on; all ranks between the same two steps. What was learnt is forgotten."""
        self.ready_for(placement)(bank)

    @abstractmethod
    def fill_up(self, tokens: int) -> None:
        """Before a step: the rank that has most has so many tokens."""

    @abstractmethod
    def prefetch(self, tokens: int) -> None:
        """Before attention: plan, and start to fetch. ``tokens``: pairs of this step over all ranks."""

    @abstractmethod
    def run(self, x_Td: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sums of the chosen experts, [T, d], under a ``home`` flow. Every rank calls it; T may be 0."""

    def move(self, h_Td: Tensor, ids_TK: Tensor, weights_TK: Tensor, tag_T: Tensor, prepare: Any) -> MovedTokens:
        """``stay``: tokens go to where their heaviest expert runs (:meth:`ServedLayer.move`)."""
        raise OptionError(f"no flow 'stay' by a {type(self).__name__}", hint="an engine of flow 'home'")

    @abstractmethod
    def settle(self) -> None:
        """Take in replicas that are on their way from rows that are about to change."""


class ServedLayer(ServedExperts):
    """Experts of one layer, split and sent by the host, in any flow.

    Parameters
    ----------
    index : the layer's row in the placement.
    kind : how its experts compute.
    bank : weights of the experts in this rank's slots, in slot order.
    placement, cluster : who holds what.
    traffic : data flow.
    split : how replicas share tokens, ``even`` or ``near``.
    group : process group whose ranks are the placement's devices.
    weights_group : the same ranks, for a fast loop's weights (:func:`poise.runtime.collectives.twin`); default: group.
    fast : a fast loop, which splits tokens itself where it has a plan.
    step_bank : room for the fast loop's replicas, shared with other layers; a policy that keeps replicas gets its own.
    clock : of an emulated device.

    Raises
    ------
    PlacementError : the bank has another number of experts than this rank's slots.
    OptionError : cluster, placement and group disagree in size, or there is no such split of this data flow.
    """

    def __init__(
        self,
        index: int,
        kind: ExpertKind,
        bank: Bank,
        placement: Placement,
        cluster: Cluster,
        *,
        traffic: DataFlow = "home",
        split: Split = "even",
        group: Any = None,
        weights_group: Any = None,
        fast: ServingPolicy | None = None,
        step_bank: Bank | None = None,
        clock: Clock | None = None,
    ) -> None:
        check_split(split, traffic)
        if split == "exact":
            raise OptionError("no split 'exact' without counts of all ranks", hint="a fast loop with the policy split")
        self.index, self.kind, self.cluster = index, kind, cluster
        self.flow = Flow(traffic, cluster, placement.num_experts, group)
        self._fast, self._step_bank, self._clock, self._near = fast, step_bank, clock, split == "near"
        self._weights_group = weights_group if weights_group is not None else self.flow.group
        self.switch(bank, placement)

    def check(self, placement: Placement) -> None:
        """OptionError for one of other sizes."""
        flow = self.flow
        if placement.num_devices != flow.world or placement.num_experts != flow.num_experts:
            raise OptionError(
                f"the placement has {placement.num_experts} experts on {placement.num_devices} devices, this run"
                f" {flow.num_experts} on {flow.world}"
            )

    def ready_for(self, placement: Placement) -> Callable[[Bank], None]:
        """Another placement; a fast loop starts anew with it."""
        self.check(placement)
        return partial(self._serve, placement)

    def _serve(self, placement: Placement, bank: Bank) -> None:
        flow, mine = self.flow, placement.experts_of(self.index, self.flow.rank)
        for name, weight in bank.items():
            if len(weight) != len(mine):
                raise PlacementError(
                    f"layer {self.index}: rank {flow.rank} has {len(mine)} experts in its slots, {name} {len(weight)}"
                )
        self.bank, self.placement, self._mine = bank, placement, mine
        count_ED = placement.count_LED()[self.index]
        self._row_of = {expert: row for row, expert in reversed(list(enumerate(mine)))}
        self._replicas: StepReplicas | None = None
        mine_ED = near_count(count_ED, self.cluster.node_D, flow.rank) if self._near else count_ED
        own = EvenSplit(mine_ED, flow.rank)
        if self._fast is None:
            self.split: TokenSplit = own
            self._set_order([])
            return
        room = self._step_bank
        if room is None or self._fast.policy.keeps:
            room = empty_bank(self.kind, self._fast.step_slots, next(iter(bank.values())))
        self._replicas = StepReplicas(
            room, bank, self._row_of, count_ED > 0, self.cluster, self._weights_group, flow.rank
        )
        self.split = PlannedSplit(self._fast, self.index, count_ED, own, flow, self._replicas)

    def fill_up(self, tokens: int) -> None:
        """Nothing: sizes follow the routing here."""

    def prefetch(self, tokens: int) -> None:
        """Before attention: a fast loop plans and starts to fetch. ``tokens``: pairs of this step over all ranks."""
        self.split.prefetch(tokens)

    def run(self, x_Td: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sums of the chosen experts, [T, d], under a ``home`` flow. Every rank calls it; T may be 0."""
        device_TK = self.devices(ids_TK)
        out = self.flow.run(x_Td, ids_TK, weights_TK, device_TK, self._compute)
        self.split.finish()
        return out

    def move(self, h_Td: Tensor, ids_TK: Tensor, weights_TK: Tensor, tag_T: Tensor, prepare: Any) -> MovedTokens:
        """``stay``: tokens go to where their heaviest expert runs.

        Parameters
        ----------
        h_Td : rows that go along (the residual stream).
        ids_TK, weights_TK : experts and router weights.
        tag_T : int64 [T], names each token among those of all ranks.
        prepare : rows [n, d] -> what experts take, [n, d]; applied where they run.
        """
        order = weights_TK.argsort(dim=-1, descending=True, stable=True)
        ids_TK, weights_TK = ids_TK.gather(1, order), weights_TK.gather(1, order)
        device_TK = self.devices(ids_TK)
        out = self.flow.move(
            h_Td, ids_TK, weights_TK, device_TK, tag_T, lambda x, count: self._compute(prepare(x), count)
        )
        self.split.finish()
        return out

    def settle(self) -> None:
        """Take in replicas that are on their way from rows that are about to change."""
        if self._replicas is not None:
            self._replicas.land()

    def devices(self, ids_TK: Tensor) -> Tensor:
        """Device of each pair, int64 [T, K]; what a fast loop brings for them is here then. All ranks call it."""
        device_TK = self.split.devices(ids_TK)
        if self._replicas is not None:
            self._replicas.ready()
            self._set_order(self._replicas.experts())
        return device_TK

    def _set_order(self, step_experts: list[int]) -> None:
        """Rows come by slot: the static ones, then the fast loop's."""
        self._order = [*self._mine, *step_experts]
        place_E = torch.arange(self.flow.num_experts)
        for place, expert in reversed(list(enumerate(self._order))):
            if expert != EMPTY:
                place_E[expert] = place - len(self._order)  # ahead of what is not held here
        self.flow.place_E = place_E

    def _compute(self, x_nd: Tensor, count_E: NDArray[np.int64]) -> Tensor:
        began = time.monotonic()
        counts, seen = [], set()
        for expert in self._order:
            counts.append(int(count_E[expert]) if expert != EMPTY and expert not in seen else 0)
            seen.add(expert)
        held = len(self._mine)
        banks = [(self.bank, counts[:held])]
        if self._replicas is not None:
            banks.append((self._replicas.bank, counts[held:]))
        out = self.kind.run(banks, x_nd)
        if self._clock is not None:
            self._clock.compute(count_E, since=began)
        return out
