"""The experts of one MoE layer on one rank where no layer waits for the host (:mod:`poise.runtime.device.layer`).

Every step's tokens are filled up to a power of two, the same on all ranks, so that few shapes come. Before attention,
replicas for the mean load of the last steps begin to travel; after the gate tokens are split exactly over the holders
there are. What had no room is known to all ranks at the end of the step, where the engine reads what was sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from poise.runtime.device.choose import kernels_for
from poise.runtime.device.layer import DeviceLayer
from poise.runtime.device.padded import RowCapacity
from poise.runtime.device.slot_weights import SlotWeights
from poise.runtime.experts import Bank, ExpertKind
from poise.serve.split import ServingPolicy
from poise.stepwise.kernels import LayerSlots
from poise.stepwise.registry import parse_policy
from poise.util.errors import OptionError


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
    prior_LE : loads known before the first step, float64 [L, E]; default: none, and no replica before the second step.
    where : types of devices on which layers run so.
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


class HostlessLayer:
    """Experts of one layer, served by all ranks together; called as :class:`poise.serve.layer.ServedLayer` is.

    Parameters
    ----------
    index : the layer's row in the placement.
    kind : how its experts compute.
    bank : weights of the experts in this rank's slots, in slot order; they are copied.
    placement, cluster : who holds what; no expert twice on a device.
    policy : how it is planned.
    tokens, top_k : most tokens of a rank in a step, and K.
    group, weights_group : of tokens, and the same ranks for weights.

    Raises
    ------
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
        self.switch(bank, placement)

    def switch(self, bank: Bank, placement: Placement) -> None:
        """Serve with other weights from now on; all ranks between the same two steps. What was learnt is forgotten."""
        rank, devices, experts = dist.get_rank(self._group), placement.num_devices, placement.num_experts
        held = [placement.experts_of(self.index, device) for device in range(devices)]
        table = LayerSlots.in_order(held, experts, self.policy.step_slots, self.cluster.node_D)
        weights = SlotWeights(table, bank, self._group, sent=self.policy.sent, weights_group=self._weights_group)
        like = next(iter(weights.bank.values()))
        self._most_pairs = devices * self.tokens * self.top_k
        kernels = kernels_for(like, table, self.policy.price, self._most_pairs, margin=self.policy.margin)
        self.layer = DeviceLayer(
            self.kind, kernels, table, weights, tokens=self.tokens, top_k=self.top_k, group=self._group,
            capacity=self._capacity,
        )  # fmt: skip
        self.bank: Bank = {name: weight.detach() for name, weight in weights.owned.items()}
        self.placement, self._rank = placement, rank
        self._recent_WE = torch.zeros((self.policy.window, experts), dtype=torch.int64, device=like.device)
        self._steps, self._room = 0, self.tokens
        if self.policy.prior_LE is not None:
            self._learn(torch.from_numpy(np.rint(self.policy.prior_LE[self.index])).to(self._recent_WE))

    def give_room(self, capacity: RowCapacity | None) -> None:
        """Other room from the next step on, on all ranks alike; None: enough for every routing."""
        self._capacity = capacity
        self.layer.capacity = capacity or RowCapacity.enough(self.tokens, self.top_k, self.placement.num_devices)

    def prefetch(self, tokens: int, fullest: int) -> None:
        """Before attention: plan from the last steps, and start to fetch.

        ``tokens``: pairs of this step over all ranks; ``fullest``: tokens of the rank that has most.
        """
        self._room = min(self.tokens, 1 << max(0, fullest - 1).bit_length())
        if self.policy.step_slots and self._steps and (self._steps - 1) % self.policy.every == 0:
            mean_E = self._recent_WE.sum(0)
            expected_E = mean_E * tokens // mean_E.sum().clamp(min=1)
            self.layer.prepare(expected_E.clamp(max=self._most_pairs).to(torch.int32))

    def run(self, x_Td: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sums of the chosen experts, [T, d]. Every rank calls it; T may be 0.

        NaN on all ranks where a step had no room; :meth:`judge` raises then.
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
