"""The experts of one MoE layer on one rank where no layer waits for the host (:mod:`poise.runtime.device.layer`).

Every step's tokens are filled up to a power of two, the same on all ranks, so that few shapes come. Before attention,
replicas for the mean load of the last steps begin to travel; after the gate tokens are split exactly over the holders
there are. What had no room is known to all ranks at the end of the step, where the engine reads what was sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from poise.cost.traffic import DataFlow
from poise.cost.weights import StepPrice
from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.routing.predict import WINDOW
from poise.runtime.device.choose import OnHost, kernels_for
from poise.runtime.device.layer import DeviceLayer
from poise.runtime.device.padded import RowCapacity
from poise.runtime.device.slot_weights import SlotWeights
from poise.runtime.experts import Bank, ExpertKind
from poise.serve.layer import ServedExperts
from poise.serve.split import ServingPolicy
from poise.stepwise.kernels import LayerSlots, StepKernels
from poise.stepwise.registry import parse_policy
from poise.util.errors import OptionError

PRIOR_PAIRS = 1 << 30
"""What loads known before the first step are scaled to: whole numbers of any shares that matter."""


@dataclass(frozen=True, slots=True, eq=False)
class HostlessPolicy:
    """A fast loop that plans where tokens lie: on a GPU without the host, elsewhere as policy ``poise`` in its place.

    Tokens go by flow ``home``, replicas share them evenly where a layer is left alone.

    Parameters
    ----------
    price : machine and model it plans with.
    step_slots : M, slots a device and layer beyond the static placement's; not shared between layers.
    window : steps whose mean load is the prediction.
    every : steps from one look at a layer's replicas to the next. A look sends ``sent`` + M experts a rank, and on the
        demo trace one slot in ten changes from step to step (benchmarks/fetches.py).
    margin : least predicted gain, as a share of the passive time, for which a layer is not left alone.
    sent : O, experts that one owner can send in a look; default: twice ``step_slots``.
    capacity : room for rows of tokens; default: enough for every routing.
    prior_LE : loads known before the first step, float64 [L, E] of any scale; default: none, and no replica before the
        second step.
    where : types of devices on which layers run so. On a GPU whose kernels refuse (speeds that differ, no Triton), an
        engine warns: the host plans there, and every layer waits for it.

    Raises
    ------
    OptionError : a number out of range.
    """

    price: StepPrice
    step_slots: int = 1
    window: int = WINDOW
    every: int = 8
    margin: float = 0.03
    sent: int | None = None
    capacity: RowCapacity | None = None
    prior_LE: NDArray[np.float64] | None = None
    where: tuple[str, ...] = ("cuda",)

    def __post_init__(self) -> None:
        if self.every < 1 or self.window < 1 or self.step_slots < 0:
            raise OptionError(
                f"a look every {self.every} steps at {self.window} of them, with {self.step_slots} step slots",
                hint="at least 1, 1 and 0",
            )
        if not 0 <= self.margin < 1:
            raise OptionError(f"a margin of {self.margin}", hint="a share of the passive time, from 0 to below 1")
        if self.sent is not None and self.sent < 1:
            raise OptionError(f"owners have room to send {self.sent} experts, at least 1")

    def runs_on(self, like: Tensor) -> bool:
        """Whether layers whose weights lie where this one does run without the host."""
        return like.device.type in self.where

    def elsewhere(self) -> ServingPolicy:
        """What runs on other devices."""
        return ServingPolicy(parse_policy("poise"), self.price, self.step_slots, self.window, self.prior_LE)

    def check(self, traffic: DataFlow, split: str, clocked: bool) -> None:
        """OptionError for what no layer does without the host."""
        for given, allowed, what in ((traffic, "home", "flow"), (split, "even", "split"), (clocked, False, "clock")):
            if given != allowed:
                raise OptionError(
                    f"no {what} {given!r} without the host, only {allowed!r}", hint="ServingPolicy takes every one"
                )


class HostlessLayer(ServedExperts):
    """Experts of one layer, planned, sent and computed where they lie.

    Parameters
    ----------
    index : the layer's row in the placement.
    kind : how its experts compute.
    bank : weights of the experts in this rank's slots, in slot order; they are copied.
    placement, cluster : who holds what; no expert twice on a device.
    policy : how it is planned.
    tokens, top_k : most tokens of a rank in a step, and K.
    group, weights_group : of tokens, and the same ranks for weights.

    Attributes
    ----------
    why : why the host plans although weights lie on a GPU; None: it does not.

    Raises
    ------
    OptionError : a price of another number of devices.
    PlacementError : an expert twice on a device, or nodes that do not lie together.
    ModelError : experts of a kind that cannot run grouped.
    """

    def __init__(
        self, index: int, kind: ExpertKind, bank: Bank, placement: Placement, cluster: Cluster, policy: HostlessPolicy,
        *, tokens: int, top_k: int, group: Any, weights_group: Any,
    ) -> None:  # fmt: skip
        self.index, self.kind, self.cluster, self.policy = index, kind, cluster, policy
        self.tokens, self.top_k, self._group, self._weights_group = tokens, top_k, group, weights_group
        self._capacity = policy.capacity
        self._like = next(iter(bank.values())).new_empty(0)
        self._most_pairs = dist.get_world_size(group) * tokens * top_k
        self.switch(bank, placement)

    def check(self, placement: Placement) -> None:
        """PlacementError for one of which no slot table can be made."""
        self._slots(placement)

    def ready_for(self, placement: Placement) -> Callable[[Bank], None]:
        """Another placement: slot table and kernels are made here, what its weights take when they are given."""
        table = self._slots(placement)
        kernels = kernels_for(self._like, table, self.policy.price, self._most_pairs, margin=self.policy.margin)
        return partial(self._serve, placement, table, kernels)

    def _slots(self, placement: Placement) -> LayerSlots:
        held = [placement.experts_of(self.index, device) for device in range(placement.num_devices)]
        return LayerSlots.in_order(held, placement.num_experts, self.policy.step_slots, self.cluster.node_D)

    def _serve(self, placement: Placement, table: LayerSlots, kernels: StepKernels, bank: Bank) -> None:
        weights = SlotWeights(table, bank, self._group, sent=self.policy.sent, weights_group=self._weights_group)
        self.layer = DeviceLayer(
            self.kind, kernels, table, weights, tokens=self.tokens, top_k=self.top_k, group=self._group,
            capacity=self._capacity, fewer=True,  # a step's tokens are the same on all ranks, and so is its fullest one
        )  # fmt: skip
        self.why = kernels.why if isinstance(kernels, OnHost) and kernels.refused else None
        self.bank = {name: weight.detach() for name, weight in weights.owned.items()}
        self.placement = placement
        self._recent_WE = torch.zeros(
            (self.policy.window, placement.num_experts), dtype=torch.int64, device=self._like.device
        )
        self._steps, self._room, self._first_look = 0, self.tokens, 1
        if self.policy.prior_LE is not None:  # stands in where no step is known: the first one takes its place
            self._recent_WE[0].copy_(torch.from_numpy(whole_shares(self.policy.prior_LE[self.index])))
            self._first_look = 0

    def give_room(self, capacity: RowCapacity | None) -> None:
        """Other room from the next step on, on all ranks alike; None: enough for every routing."""
        self._capacity = capacity
        self.layer.capacity = capacity or RowCapacity.enough(self.tokens, self.top_k, self.placement.num_devices)

    def fill_up(self, tokens: int) -> None:
        """Before a step: all ranks fill up to the next power of two."""
        self._room = min(self.tokens, 1 << max(0, tokens - 1).bit_length())

    def prefetch(self, tokens: int) -> None:
        """Before attention: plan from the last steps, and start to fetch. ``tokens``: pairs of this step, all ranks."""
        known = self._steps - self._first_look
        if self.policy.step_slots and known >= 0 and known % self.policy.every == 0:
            mean_E = self._recent_WE.sum(0)
            expected_E = mean_E * tokens // mean_E.sum().clamp(min=1)
            self.layer.prepare(expected_E.clamp(max=self._most_pairs).to(torch.int32))

    def run(self, x_Td: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sums of the chosen experts, [T, d]. Every rank calls it; T may be 0.

        NaN on all ranks where a step had no room; :meth:`poise.runtime.device.layer.DeviceLayer.judge` raises then.
        """
        given, more = len(x_Td), self._room - len(x_Td)
        y_Td = self.layer(
            F.pad(x_Td, (0, 0, 0, more)), F.pad(ids_TK, (0, 0, 0, more), value=-1), F.pad(weights_TK, (0, 0, 0, more))
        )
        self._learn(self.layer.load_E)
        return y_Td[:given]

    def settle(self) -> None:
        """Take in replicas that are on their way from rows that are about to change."""
        self.layer.weights.ready()

    def _learn(self, load_E: Tensor) -> None:
        self._recent_WE[self._steps % self.policy.window].copy_(load_E)
        self._steps += 1


def whole_shares(load_E: NDArray[np.float64]) -> NDArray[np.int64]:
    """Loads of any scale as whole numbers, int64 [E]; all alike where there is none."""
    load_E = load_E if load_E.any() else np.ones_like(load_E)
    return np.rint(load_E / load_E.sum() * PRIOR_PAIRS).astype(np.int64)
