"""A layer without a host: planned, dispatched, computed and combined, forward and backward, in the same shapes always.

Nothing here waits for a number: no size, no branch and no allocation follows the routing, so a step can be captured in
a CUDA graph. What did not fit into the padding is noted on the device, comes out as NaN on every rank, and is an error
at the next point where the host reads anything at all (:meth:`DeviceLayer.check`). The stages are those of training
(:class:`poise.runtime.layer.LayerStep`), and so is the autograd function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from poise.runtime.collectives import gather
from poise.runtime.device.padded import APART, LOST, PaddedExchange, RowCapacity, make_padded, pairs_of
from poise.runtime.device.products import slot_product
from poise.runtime.device.slot_weights import SlotWeights
from poise.runtime.dispatch import named, routed
from poise.runtime.experts import Bank, ExpertKind, GroupedProduct
from poise.runtime.layer import LayerFunction, LayerStep
from poise.stepwise.kernels import LayerSlots, StepKernels
from poise.util.errors import CapacityError, CommunicationError, ModelError


@dataclass(frozen=True, slots=True, eq=False)
class _DevicePass:
    """One forward pass whose backward is to come: its stages, the leaves of its graph, and the slots it ran on."""

    step: LayerStep
    way: PaddedExchange
    leaves: Bank
    expert_DS: Tensor


class DeviceLayer:
    """One MoE layer on one rank; all ranks make it, and call it, together.

    Parameters
    ----------
    kind : how experts compute; one of those that can run grouped.
    kernels : the layer's calls (:func:`poise.runtime.device.choose.kernels_for`).
    table, weights : its slots, and what lies in this rank's.
    tokens, top_k : tokens of a step, T, the same on all ranks, and K. A rank with fewer fills up with ids of -1.
    group : process group of tokens.
    capacity : room for rows; by default enough for every routing.
    product : what multiplies rows with the matrix of their slot.
    fewer : whether all ranks may give fewer tokens in a step. No collective tells: the caller sees to it that all give
        the same number.

    Attributes
    ----------
    expert_DS : int32 [D, S], slots that are used; :meth:`prepare` changes them.
    leave : int32 [1], whether the next steps are split evenly over static slots.
    load_E : int32 [E], counts of the last step on all ranks: what the next one is prepared for, if nothing else is.
    need : int32 [2], most rows of a pair of ranks and of a device that any step since :meth:`check` needed.

    Raises
    ------
    ModelError : experts of a kind that cannot run grouped, or that draw random numbers.
    CommunicationError : ranks with other sizes.
    """

    def __init__(
        self, kind: ExpertKind, kernels: StepKernels, table: LayerSlots, weights: SlotWeights, *, tokens: int,
        top_k: int, group: Any, capacity: RowCapacity | None = None, product: GroupedProduct = slot_product,
        fewer: bool = False,
    ) -> None:  # fmt: skip
        if not kind.padded or kind.grouped is None:
            raise ModelError(
                f"experts of kind {kind.name} do not run with sizes on the device",
                hint="stacked experts with up, down and one activation do; others run by poise.runtime.dispatch",
            )
        if kind.random:
            raise ModelError("experts that draw random numbers depend on the rank that computes them")
        devices = len(table.expert_DS)
        self.kind, self.kernels, self.weights, self.group = kind, kernels, weights, group
        self.tokens, self.top_k, self.fewer, self.rank = tokens, top_k, fewer, dist.get_rank(group)
        self.capacity, self.product = capacity or RowCapacity.enough(tokens, top_k, devices), product
        where = next(iter(weights.bank.values())).device
        self.expert_DS = torch.from_numpy(table.expert_DS.copy()).to(where)
        self.leave = torch.zeros(1, dtype=torch.int32, device=where)
        self.load_E = torch.zeros(table.num_experts, dtype=torch.int32, device=where)
        self.need = torch.zeros(2, dtype=torch.int32, device=where)
        self._agree(devices, where)

    def prepare(self, load_E: Tensor | None = None) -> None:
        """Step slots for expected counts int32 [E] (default: the last step's), and whether to leave the layer alone.

        Between steps, with the same counts on all ranks (else the next steps are errors of
        :meth:`check`); replicas begin to travel, and the next step waits for them where it needs them.
        """
        expected_E = self.load_E if load_E is None else load_E
        filled_DS, leave = self.kernels.prepare(expected_E, self.expert_DS)
        self.weights.ready()  # an earlier fetch reads the table
        self.expert_DS.copy_(filled_DS)
        self.leave.copy_(leave)
        self.weights.fetch(self.expert_DS, expected_E)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of the experts' outputs, [T, d]; as experts are called (:mod:`poise.runtime.moe`).

        Raises
        ------
        ModelError : another number of tokens (``fewer``: more of them), or another K, than the layer was made for.
        """
        x_Td, ids_TK, weights_TK = routed(x, ids, weights, self.kind.hidden)
        short, (tokens, top_k) = self.fewer and len(ids_TK) < self.tokens, ids_TK.shape
        if top_k != self.top_k or (tokens != self.tokens and not short):
            raise ModelError(
                f"ids of {[tokens, top_k]}, the layer was made for {[self.tokens, self.top_k]}",
                hint="a rank with fewer tokens fills up with ids of -1: in a step all give the same number",
            )
        with torch.no_grad():
            way = self._planned(ids_TK)
        parameters = [weight for weight in self.weights.owned.values() if weight.requires_grad]
        graph = torch.is_grad_enabled() and (x_Td.requires_grad or bool(parameters))
        one = _DevicePass(LayerStep(way, partial(self._experts, way.ends_S)), way, {}, self.expert_DS.clone())
        like = next(iter(self.weights.bank.values()))
        y_Nd = LayerFunction.apply(
            partial(self._forward, one, graph), partial(self._backward, one), x_Td.to(like.dtype), *parameters
        )
        weights_TK = weights_TK.masked_fill(~named(ids_TK, len(self.load_E)), 0)
        y_TKd = y_Nd.view(*ids_TK.shape, y_Nd.shape[1])
        return (y_TKd * weights_TK.unsqueeze(-1).to(y_TKd.dtype)).sum(dim=1).to(x.dtype)

    def _forward(self, one: _DevicePass, graph: bool, x_Td: Tensor) -> Tensor:
        """Outputs of this rank's pairs, [T * K, d]."""
        x_in = one.step.dispatch(x_Td)
        bank = {name: weight.detach() for name, weight in self.weights.ready().items()}
        if graph:
            for name, weight in bank.items():
                if self.weights.owned[name].requires_grad:
                    one.leaves[name] = weight.requires_grad_()
        y_in, failed = one.step.compute(x_in, [bank], graph=graph, recomputed=False)
        y_Nd = one.step.combine(y_in)
        if failed is not None:
            raise failed
        return y_Nd

    def _backward(self, one: _DevicePass, dy_Nd: Tensor, accumulates: Callable[[], bool]) -> Tensor:
        """Gradients of this rank's tokens, [T, d]; those of weights go to ``.grad`` of their owners."""
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        leaves = one.leaves if accumulates() else {}
        one.step.send_gradients(dy_Nd)
        dy_in = one.step.dispatch_gradients()
        dx_in, grads, failed = one.step.compute_gradients(dy_in, list(leaves.values()), keep=keep)
        if leaves:  # also after an error of this rank: the others wait for its part, which is NaN
            got = zip(leaves.items(), grads, strict=True)
            grad_S = {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in got}
            over = {name: grad.masked_fill(one.way.over, torch.nan) for name, grad in grad_S.items()}
            self.weights.add_gradients(over, one.expert_DS)
        dx_Td = one.step.combine_gradients(dx_in)
        if failed is not None:
            raise failed
        return dx_Td

    def check(self) -> None:
        """Read, on the host, whether every step since the last call had room; all ranks see the same.

        Raises
        ------
        CapacityError : one had not, and its outputs and gradients were NaN.
        CommunicationError : so they were, as ranks had different slots.
        """
        pair, computed = self.need.tolist()
        self.need.zero_()
        self.judge(pair, computed)

    def judge(self, pair: int, computed: int) -> None:
        """As :meth:`check`, of rows that were needed: by whoever has read ``need`` beside something else."""
        if pair == LOST:
            raise CapacityError("a step was planned with other counts than its tokens had")
        if pair == APART:
            raise CommunicationError(
                "ranks had different slots, or split a step otherwise: its outputs were NaN",
                hint="prepare() with the same counts on all ranks, and the same flag in leave; once slots differ, make "
                "expert_DS the same on all ranks, as new slots come from those there are",
            )
        for needed, room, what in (
            (pair, self.capacity.pair, "from one rank to another"),
            (computed, self.capacity.computed, "on one device"),
        ):
            if needed > room:
                raise CapacityError(
                    f"a step needed {needed} rows {what}, room is for {room}: its outputs were NaN",
                    hint="run it again with more room (RowCapacity.enough: for every routing), or by "
                    "poise.runtime.dispatch",
                )

    def _planned(self, ids_TK: Tensor) -> PaddedExchange:
        """Counts of all ranks, the split over the slots there are, this rank's rows."""
        load_SE = gather(pairs_of(ids_TK, len(self.load_E)), self.group)
        self.load_E.copy_(load_SE.sum(0, dtype=torch.int32))
        quota_ED = self.kernels.split(load_SE, self.expert_DS, self.leave)
        row_ED = self.kernels.rows(load_SE, quota_ED, self.rank)
        most = RowCapacity.enough(len(ids_TK), self.top_k, len(self.expert_DS))
        room = RowCapacity(min(self.capacity.pair, most.pair), min(self.capacity.computed, most.computed))
        way = make_padded(ids_TK, row_ED, quota_ED, self.expert_DS, room, self.group)
        torch.maximum(self.need, way.need, out=self.need)
        return way

    def _experts(self, ends_S: Tensor, banks: Sequence[Bank], x_nd: Tensor) -> Tensor:
        assert self.kind.grouped is not None
        return self.kind.grouped(banks[0], x_nd, ends_S, self.product).to(x_nd.dtype)

    def _agree(self, devices: int, where: torch.device) -> None:
        room, sent = self.capacity, self.weights.sent
        mine = [self.tokens, self.top_k, room.pair, room.computed, sent, *self.expert_DS.shape]
        told_DX = gather(torch.tensor(mine, device=where), self.group).tolist()
        if len(told_DX) != devices:
            raise CommunicationError(f"slots of {devices} devices, and the process group has {len(told_DX)} ranks")
        for rank, theirs in enumerate(told_DX):
            if theirs != told_DX[0]:
                raise CommunicationError(
                    f"rank {rank} has sizes {theirs}, rank 0 {told_DX[0]} (tokens, experts a token, rows a pair of "
                    "ranks, rows a device, experts an owner sends, devices, slots)"
                )
